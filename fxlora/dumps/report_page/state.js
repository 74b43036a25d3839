// What is shown and chosen now, and the ways to change it.

const state = { tab: "overview", module: D.focus || "", selection: null, page: {} };
const TABS = { overview: "Overview", sites: "Sites", graph: "Graph", rows: "Rows" };
if (!D.sites.length) {
  delete TABS.sites;
  delete TABS.rows;
}

function show(tab) {
  state.tab = tab;
  for (const button of $("tabs").children) {
    const on = button.dataset.tab === tab;
    button.setAttribute("aria-selected", on);
    button.tabIndex = on ? 0 : -1;
  }
  const main = $("main");
  main.replaceChildren();
  main.scrollTop = 0;
  VIEWS[tab](main);
}
function openModule(path) {
  state.module = path;
  show("graph");
  markTree();
}
function select(selection, { reveal = false } = {}) {
  state.selection = selection;
  details();
  highlight(reveal);
  document
    .querySelectorAll(".grid .line")
    .forEach((line) =>
      line.setAttribute(
        "aria-selected",
        selection && selection.site !== undefined && line.dataset.site === String(selection.site),
      ),
    );
}
const selectNode = (stage, i, options) => select({ stage, node: i }, options);
const selectSite = (s, options) => select({ site: s }, options);
