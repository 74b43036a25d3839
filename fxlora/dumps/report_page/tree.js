// The tree of modules, repeats folded; made as it is opened.

function treeItem(entry, depth) {
  const visits = entry.fold || [entry],
    name = foldNames(visits.map((v) => v.name)),
    likes = likeWords(visits);
  const inner = entry.fold ? visits : now.entries(entry).filter((e) => typeof e !== "number");
  const served = visits.reduce((n, v) => n + now.served(v), 0);
  const item = el(
    "li",
    {
      role: "treeitem",
      "aria-level": depth,
      tabindex: -1,
      "aria-expanded": inner.length ? false : null,
      "data-path": entry.fold ? null : entry.path,
    },
    el(
      "div",
      { class: "row", title: entry.fold ? name : [entry.path, T[D.modules[entry.path]]].filter(Boolean).join(": ") },
      el("span", { class: "twist", "aria-hidden": true }, inner.length ? "▶" : ""),
      el("span", { class: "mono" }, name),
      likes ? el("span", { class: "like" }, likes) : "",
      served ? el("span", { class: "count", title: plural(served, "site") }, String(served)) : "",
    ),
  );
  item.inner = inner;
  item.depth = depth;
  item.firstElementChild.addEventListener("click", (e) => {
    focusTree(item);
    if (entry.fold || e.target.classList.contains("twist")) toggle(item);
    else {
      openModule(entry.path);
      if (item.getAttribute("aria-expanded") === "false") toggle(item, true);
    }
  });
  return item;
}
function toggle(item, open = item.getAttribute("aria-expanded") !== "true") {
  if (!item.inner.length) return;
  item.setAttribute("aria-expanded", open);
  if (open && !item.list) {
    item.list = el(
      "ul",
      { role: "group" },
      item.inner.map((e) => treeItem(e, item.depth + 1)),
    );
    item.append(item.list);
  }
  if (item.list) item.list.hidden = !open;
}
function focusTree(item) {
  $("tree")
    .querySelectorAll("[tabindex='0']")
    .forEach((i) => {
      i.tabIndex = -1;
    });
  item.tabIndex = 0;
  item.focus();
}
function markTree() {
  $("tree")
    .querySelectorAll("[role=treeitem]")
    .forEach((i) => i.setAttribute("aria-selected", i.dataset.path === state.module));
}
function treeKey(e) {
  const item = e.target.closest("[role=treeitem]"),
    all = [...$("tree").querySelectorAll("[role=treeitem]")].filter((i) => i.offsetParent !== null),
    at = all.indexOf(item);
  const open = item && item.getAttribute("aria-expanded");
  if (!item) return;
  if (e.key === "ArrowDown" && all[at + 1]) focusTree(all[at + 1]);
  else if (e.key === "ArrowUp" && all[at - 1]) focusTree(all[at - 1]);
  else if (e.key === "Home") focusTree(all[0]);
  else if (e.key === "End") focusTree(all[all.length - 1]);
  else if (e.key === "ArrowRight") {
    if (open === "false") toggle(item, true);
    else if (open === "true" && all[at + 1]) focusTree(all[at + 1]);
  } else if (e.key === "ArrowLeft") {
    if (open === "true") toggle(item, false);
    else if (item.parentNode.closest("[role=treeitem]")) focusTree(item.parentNode.closest("[role=treeitem]"));
  } else if (e.key === "Enter" || e.key === " ") {
    if (item.dataset.path !== undefined) openModule(item.dataset.path);
    else toggle(item);
  } else return;
  e.preventDefault();
}
