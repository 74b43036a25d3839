// Puts the page together; on paper it shows the overview and every site.

$("title").textContent = D.title;
$("tabs").append(
  ...Object.entries(TABS).map(([tab, name]) =>
    el("button", { role: "tab", "data-tab": tab, "aria-controls": "main", onclick: () => show(tab) }, name),
  ),
);
$("tabs").addEventListener("keydown", (e) => {
  const buttons = [...$("tabs").children],
    step = e.key === "ArrowRight" ? 1 : e.key === "ArrowLeft" ? -1 : 0;
  if (step) {
    const next =
      buttons[(buttons.findIndex((b) => b.dataset.tab === state.tab) + step + buttons.length) % buttons.length];
    next.click();
    next.focus();
  }
});
const top = now
  .entries(now.root)
  .filter((e) => typeof e !== "number")
  .map((e) => treeItem(e, 1));
$("tree").append(...top);
$("tree").addEventListener("keydown", treeKey);
if (top.length) {
  top[0].tabIndex = 0;
  if (top[0].inner.length <= 60) toggle(top[0], true);
}
let printed = null;
window.addEventListener("beforeprint", () => {
  printed = state.tab;
  const main = $("main");
  main.replaceChildren();
  VIEWS.overview(main);
  if (D.sites.length) {
    const part = el("section", { style: "margin-top:20px" });
    main.append(part);
    VIEWS.sites(part);
    VIEWS.sites.print();
  }
});
window.addEventListener("afterprint", () => {
  if (printed) show(printed);
});
show(D.focus ? "graph" : "overview");
