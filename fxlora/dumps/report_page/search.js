// Search over sites, modules, weights and nodes.

let searchable = null,
  hits = [],
  at = -1;
function searchIndex() {
  if (searchable) return searchable;
  searchable = D.sites.map((s, i) => ({
    text: [s.name, ...s.aliases].join(" "),
    name: s.name,
    about: `site · ${s.role}`,
    go: () => {
      if (state.tab === "graph" && s.calls[now.name]) reveal(now, s.calls[now.name][0], i);
      else {
        show("sites");
        selectSite(i);
      }
    },
  }));
  const paths = new Set();
  (function walk(v) {
    if (v.path) paths.add(v.path);
    v.items.forEach((i) => typeof i !== "number" && walk(i));
  })(now.root);
  paths.forEach((p) => searchable.push({ text: p, name: p, about: "module", go: () => openModule(p) }));
  D.skipped.forEach((s, i) =>
    searchable.push({
      text: [s.name, ...s.aliases].join(" "),
      name: s.name,
      about: "no site",
      go: () => select({ skip: i }),
    }),
  );
  for (const stage of [...stages].reverse())
    stage.nodes.forEach((n, i) => {
      if (stage !== now && now.index.has(n[0])) return;
      searchable.push({
        text: `${n[0]} ${stage.label(i)} ${stage.kind(i) === WEIGHT ? n[8].join(" ") : ""}`,
        name: stage.kind(i) === WEIGHT ? stage.label(i) : n[0],
        about:
          stage.kind(i) === WEIGHT
            ? "weight"
            : `${stage.label(i).replace("fxlora::", "")}${both && stage === before ? ", before" : ""}`,
        go: () => reveal(stage, i),
      });
    });
  searchable.forEach((s) => {
    s.text = s.text.toLowerCase();
  });
  return searchable;
}
function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean),
    list = $("hits"),
    index = searchIndex();
  hits = [];
  if (words.length)
    for (const item of index) {
      if (words.every((w) => item.text.includes(w))) hits.push(item);
      if (hits.length >= 60) break;
    }
  at = hits.length ? 0 : -1;
  list.hidden = !words.length;
  $("search").setAttribute("aria-expanded", words.length > 0);
  list.replaceChildren(
    ...hits.map((h, i) =>
      el(
        "li",
        {
          role: "option",
          id: `hit-${i}`,
          "aria-selected": i === at,
          onmousedown: (e) => {
            e.preventDefault();
            take(i);
          },
        },
        el("span", { class: "mono" }, el("bdi", {}, h.name)),
        el("span", { class: "dim" }, h.about),
      ),
    ),
    ...(hits.length ? [] : [el("li", { class: "dim" }, "nothing by this name")]),
  );
}
function take(i) {
  if (!hits[i]) return;
  hits[i].go();
  closeSearch();
}
function closeSearch() {
  $("hits").hidden = true;
  $("search").setAttribute("aria-expanded", false);
}
$("search").addEventListener("input", (e) => search(e.target.value));
$("search").addEventListener("focus", (e) => e.target.value && search(e.target.value));
$("search").addEventListener("blur", closeSearch);
$("search").addEventListener("keydown", (e) => {
  if (e.key === "Enter") take(at);
  else if (e.key === "Escape") {
    closeSearch();
    e.target.blur();
  } else if (e.key === "ArrowDown" || e.key === "ArrowUp") {
    e.preventDefault();
    at = Math.min(Math.max(at + (e.key === "ArrowDown" ? 1 : -1), 0), hits.length - 1);
    [...$("hits").children].forEach((li, i) => li.setAttribute("aria-selected", i === at));
    if ($("hits").children[at]) {
      $("hits").children[at].scrollIntoView({ block: "nearest" });
      e.target.setAttribute("aria-activedescendant", `hit-${at}`);
    }
  }
});
document.addEventListener("keydown", (e) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (e.key === "/" && !typing) {
    e.preventDefault();
    $("search").focus();
    $("search").select();
  }
  if (e.key === "Escape" && !typing && state.selection) select(null);
});
