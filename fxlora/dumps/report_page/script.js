"use strict";
(() => {
const D = JSON.parse(document.getElementById("data").textContent);
const T = D.texts, [CALL, WEIGHT, INPUT, OUTPUT, ROW_MAP] = [0, 1, 2, 3, 4];
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// ---- small helpers: every name goes into the page as text, never as markup
function el(tag, attrs, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attrs || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") node.style.cssText = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}
function svg(tag, attrs, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attrs || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const bytes = (n) => { for (const u of ["B", "KiB", "MiB", "GiB"]) { if (n < 1024 || u === "GiB") return `${n < 10 && u !== "B" ? n.toFixed(1) : Math.round(n)} ${u}`; n /= 1024; } };
const percent = (x) => x === null || x === undefined ? "" : x >= 0.1 ? `${(100 * x).toFixed(0)} %` : x > 0 ? `${(100 * x).toPrecision(2)} %` : "0 %";
function likeWords(visits) {
  const alike = visits.filter((v) => v.like);
  if (!alike.length) return "";
  return alike.every((v) => v.like.path === v.path) ? `again${alike.length > 1 ? ` ×${alike.length}` : ""}` : `as ${[...new Set(alike.map((v) => v.like.name))].join(", ")}`;
}
const colour = (i) => `--c:var(--a${i % 8})`;
const last = (path) => path.slice(path.lastIndexOf(".") + 1);
function foldNames(names) {
  const split = names.map((name) => name.split(/(\d+)/));
  if (names.length < 2 || split.some((p) => p.length !== split[0].length)) return names.join(", ");
  return split[0].map((part, i) => {
    const values = [...new Set(split.map((p) => p[i]))];
    if (values.length === 1) return part;
    if (!values.every((v) => /^\d+$/.test(v))) return `{${values.join(",")}}`;
    const spans = [];
    for (const n of values.map(Number).sort((a, b) => a - b)) {
      const s = spans[spans.length - 1];
      if (s && s[1] + 1 === n) s[1] = n; else spans.push([n, n]);
    }
    return spans.map(([a, b]) => a === b ? `${a}` : `${a}-${b}`).join(",");
  }).join("");
}

// ---- the graph of one stage
class Stage {
  constructor({ name, nodes, tree }) {
    this.name = name;
    this.nodes = nodes;
    this.index = new Map(nodes.map((n, i) => [n[0], i]));
    this.root = this.visit(tree, null);
    this.typed = nodes.some((n) => n[1] === CALL && n[4]);
    this.sitesOf = new Map();
    D.sites.forEach((site, s) => (site.calls[name] || []).forEach((i) => this.sitesOf.set(i, [...(this.sitesOf.get(i) || []), s])));
  }
  visit([name, path, like, items], parent) {
    const made = { name, path, like: null, parent, first: Infinity };
    made.items = items.map((item) => typeof item === "number" ? item : this.visit(item, made));
    const visits = made.items.filter((item) => typeof item !== "number");
    items.filter((item) => typeof item !== "number").forEach((item, i) => { if (item[2] >= 0) visits[i].like = visits[item[2]]; });
    return made;
  }
  label(i) { return T[this.nodes[i][2]]; }
  module(i) { return T[this.nodes[i][3]]; }
  type(i) { return T[this.nodes[i][4]]; }
  source(i) { return T[this.nodes[i][5]]; }
  rows(i) { return T[this.nodes[i][6]]; }
  kind(i) { return this.nodes[i][1]; }
  mixed(i) { return this.nodes[i][7] === 1; }
  refs(i) { return this.kind(i) === WEIGHT ? [] : [...this.nodes[i][8].matchAll(/%(\d+);/g)].map((m) => +m[1]); }
  text(i) {
    if (this.kind(i) === WEIGHT) return this.nodes[i][8].join("\nalso ");
    return this.nodes[i][8].replace(/%(\d+);|%%/g, (m, ref) => ref === undefined ? "%" : this.short(+ref));
  }
  isSize(i) { return this.typed && !this.type(i) && !this.sitesOf.has(i); }
  short(i) { return this.kind(i) === WEIGHT || this.kind(i) === INPUT ? this.label(i) : this.nodes[i][0]; }
  // the module to draw a call in: its own, or the one around it where its own holds next to nothing
  around(i) {
    const visit = this.find(this.module(i));
    return visit.items.length <= 3 && visit.parent ? visit.parent.path : visit.path;
  }
  users(i) {
    if (!this.readers) {
      this.readers = this.nodes.map(() => []);
      this.nodes.forEach((_, j) => { for (const r of new Set(this.refs(j))) this.readers[r].push(j); });
    }
    return this.readers[i];
  }
  calls(visit) {
    if (!visit.all) visit.all = visit.items.flatMap((item) => typeof item === "number" ? [item] : this.calls(item));
    return visit.all;
  }
  served(visit) {
    if (visit.served === undefined) visit.served = this.calls(visit).reduce((n, i) => n + (this.sitesOf.get(i) || []).length, 0);
    return visit.served;
  }
  // items of a visit, with runs of repeats as one entry
  entries(visit) {
    const made = [];
    for (const item of visit.items) {
      const tail = made[made.length - 1];
      if (typeof item === "number" || !item.like) made.push(item);
      else if (tail && tail.fold) tail.fold.push(item);
      else made.push({ fold: [item] });
    }
    return made.map((e) => e.fold && e.fold.length === 1 ? e.fold[0] : e);
  }
  find(path, from = this.root) {
    let best = from;
    for (const item of from.items) {
      if (typeof item === "number" || !(path === item.path || path.startsWith(item.path + "."))) continue;
      const found = this.find(path, item);
      if (found.path.length > best.path.length) best = found;
      if (best.path === path) break;
    }
    return best;
  }
}
const stages = D.stages.map((s) => new Stage(s));
const before = stages[0], now = stages[stages.length - 1], both = stages.length > 1;
const became = new Map(D.became), cameFrom = new Map();
for (const [a, made] of D.became) for (const b of made) cameFrom.set(b, [...(cameFrom.get(b) || []), a]);
function counterparts(stage, i) {
  if (!both) return [];
  const other = stage === before ? now : before, linked = (stage === before ? became : cameFrom).get(i);
  if (linked) return linked;
  const same = other.index.get(stage.nodes[i][0]);
  return same === undefined ? [] : [same];
}
const otherOf = (stage) => stage === before ? now : before;
const groupOf = new Map();
D.groups.forEach((g) => g.sites.forEach((s) => groupOf.set(s, [...(groupOf.get(s) || []), g])));
const placeOf = D.adapters.map((a) => new Map(a.places.map(([s, rank, scaling, delta, weight, start, rows, pool]) =>
  [s, { rank, scaling, ratio: delta !== null && weight ? delta / weight : null, delta, weight, start, rows, pool }])));
const shown = D.adapters.map((a, i) => i).filter((i) => D.adapters[i].places.length);

// ---- state
const state = { tab: "overview", module: D.focus || "", selection: null, page: {} };
const TABS = { overview: "Overview", sites: "Sites", graph: "Graph", rows: "Rows" };
if (!D.sites.length) { delete TABS.sites; delete TABS.rows; }

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
function openModule(path) { state.module = path; show("graph"); markTree(); }
function select(selection, { reveal = false } = {}) {
  state.selection = selection;
  details();
  highlight(reveal);
  document.querySelectorAll(".grid .line").forEach((line) => line.setAttribute("aria-selected", selection && selection.site !== undefined && line.dataset.site === String(selection.site)));
}
const selectNode = (stage, i, options) => select({ stage, node: i }, options);
const selectSite = (s, options) => select({ site: s }, options);

// ---- overview
const VIEWS = {};
function tile(big, text, extra, cls) { return el("div", { class: `tile ${cls || ""}` }, el("div", { class: "big" }, big), el("div", { class: "dim" }, text), extra); }
VIEWS.overview = (main) => {
  const S = D.summary, roles = {};
  D.sites.forEach((s) => { roles[s.role] = (roles[s.role] || 0) + 1; });
  const tints = { linear: "--a0", embedding: "--a2", logits: "--a4", experts: "--a3" };
  const bad = D.adapters.filter((a) => a.unbound.length || a.error), loaded = D.adapters.filter((a) => a.slot !== null);
  main.append(el("h1", {}, D.title), el("div", { class: "dim" }, both ? "The graph before and after fxlora's rewrite, and what every adapter landed on." : "A graph as it is; nothing was rewritten."));
  if (D.refusal) main.append(el("div", { class: "refusal", role: "alert" }, el("b", {}, "Refused. "), D.refusal));
  D.notes.forEach((note) => main.append(el("div", { class: "note" }, note)));
  const tiles = el("div", { class: "tiles" });
  if (D.sites.length) {
    tiles.append(tile(D.sites.length.toLocaleString("en"), `${D.sites.length === 1 ? "site" : "sites"} in ${plural(S.ops, "op")}`,
      [el("div", { class: "split", "aria-hidden": true }, Object.entries(roles).map(([r, n]) => el("i", { style: `flex:${n};background:var(${tints[r] || "--a7"})` }))),
        el("div", { class: "dim" }, Object.entries(roles).map(([r, n]) => `${n} ${r}`).join(" · "))]));
    tiles.append(tile(S.memory.slots ? `${loaded.length} of ${S.memory.slots}` : String(D.adapters.length), S.memory.slots ? "adapter slots in use" : "adapters",
      el("div", { class: "dim" }, S.memory.slots ? `ranks up to ${S.memory.max_rank}` : "")));
  }
  if (S.memory.bytes) tiles.append(tile(bytes(S.memory.bytes), "adapter memory", el("div", { class: "dim" }, `${S.memory.pool_rows} rank rows a site`)));
  const a = S.nodes.before, b = S.nodes.after;
  tiles.append(tile(b === undefined ? a.toLocaleString("en") : `${a.toLocaleString("en")} → ${b.toLocaleString("en")}`, "nodes", el("div", { class: "dim" }, b === undefined ? "" : `${plural(D.maps.length, "row map")}, each computed once a call`)));
  if (D.skipped.length) tiles.append(tile(D.skipped.length.toLocaleString("en"), D.skipped.length === 1 ? "weight is no site" : "weights are no site", el("div", { class: "dim" }, "each with its reason, below")));
  if (bad.length) tiles.append(tile(String(bad.length), bad.length === 1 ? "adapter does not bind" : "adapters do not bind", null, "bad"));
  main.append(tiles);
  if (D.adapters.length) main.append(adaptersSection());
  if (D.maps.length) main.append(el("section", {}, el("h2", {}, "Which request does a row belong to?"), D.maps.map((m, i) => mapRow(m, i))));
  if (D.skipped.length) main.append(skippedSection());
  if (D.passes.length) main.append(el("section", {}, el("h2", {}, "Passes"), el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "pass"), el("th", { class: "num" }, "ms"), el("th", { class: "num" }, "nodes before"), el("th", { class: "num" }, "after"))),
    el("tbody", {}, D.passes.map(([name, ms, x, y]) => el("tr", {}, el("td", { class: "mono" }, name), el("td", { class: "num" }, ms.toFixed(1)), el("td", { class: "num" }, x.toLocaleString("en")), el("td", { class: "num" }, x === y ? "same" : y.toLocaleString("en"))))))));
};
function chip(i) { return el("span", { class: "chip", style: colour(i) }, D.adapters[i].name); }
function adaptersSection() {
  const body = el("tbody");
  D.adapters.forEach((a, i) => {
    const ranks = [...new Set(a.places.map((p) => p[1]))].sort((x, y) => x - y), ratios = [...placeOf[i].values()].map((p) => p.ratio).filter((r) => r !== null);
    const top = Math.max(...ratios);
    body.append(el("tr", {}, el("td", {}, chip(i)), el("td", { class: "num" }, a.slot === null ? "not loaded" : String(a.slot)),
      el("td", { class: "num" }, a.places.length ? String(a.places.length) : el("span", { class: "bad" }, "0")), el("td", { class: "num" }, ranks.join(", ")),
      el("td", {}, a.unbound.length ? el("span", { class: "bad" }, `✕ does not bind: ${plural(a.unbound.length, "tensor")} without a site`) : a.error ? el("span", { class: "bad" }, `✕ ${a.error}`) :
        ratios.length ? [`largest ${percent(top)}`, el("span", { class: "spark", style: colour(i), "aria-hidden": true }, sample(ratios, 90).map((r) => el("i", { style: `height:${Math.max(1, Math.round(20 * r / (top || 1)))}px` })))] : "")));
    a.unbound.slice(0, 200).forEach(([key, reason, nearest]) => body.append(el("tr", {}, el("td", { class: "mono unbound", colspan: 4 }, `✕ ${key}`), el("td", { class: "unbound" }, reason, nearest ? [el("br"), "nearest: ", el("span", { class: "mono" }, nearest)] : ""))));
    if (a.unbound.length > 200) body.append(el("tr", {}, el("td", { colspan: 5, class: "bad" }, `and ${a.unbound.length - 200} more`)));
  });
  return el("section", { id: "adapters" }, el("h2", {}, "Adapters"), el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "adapter"), el("th", { class: "num" }, "slot"), el("th", { class: "num" }, "sites"), el("th", { class: "num" }, "ranks"), el("th", {}, "‖ΔW‖ / ‖W‖, site by site"))), body));
}
const sample = (values, n) => values.length <= n ? values : Array.from({ length: n }, (_, i) => values[Math.floor(i * values.length / n)]);
function mapRow(map, i) {
  const used = D.sites.filter((s) => s.maps.includes(i + 1)).length;
  return el("div", { class: "maprow" }, el("b", {}, `rows ${i + 1}`), map.steps.map((step, k) => [k ? el("span", { class: "arrow" }, "→") : "", el("span", { class: `step ${k ? "" : "first"}` }, step)]), el("span", { class: "dim" }, plural(used, "site")));
}
function skippedSection() {
  const groups = new Map();
  D.skipped.forEach((s, i) => {
    const key = s.name.replace(/\d+/g, "#") + "\0" + s.reason.replace(/\d+/g, "#");
    groups.set(key, [...(groups.get(key) || []), i]);
  });
  const body = el("tbody", {}, [...groups.values()].map((all) => {
    const first = D.skipped[all[0]];
    const name = foldNames(all.map((i) => D.skipped[i].name));
    return el("tr", {}, el("td", {}, first.calls.length ? el("button", { class: "link", onclick: () => select({ skip: all[0] }) }, name) : el("span", { class: "mono" }, name), all.length > 1 ? el("span", { class: "times" }, `×${all.length}`) : ""), el("td", {}, first.reason));
  }));
  return el("section", {}, el("h2", {}, "Weights that are no site"), el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "weight"), el("th", {}, "why"))), body));
}

// ---- sites
const filter = { text: "", role: "", fold: true, sort: null, down: false };
function siteLines() {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean), lines = [], known = new Map();
  D.sites.forEach((site, s) => {
    if (filter.role && site.role !== filter.role) return;
    const text = [site.name, ...site.aliases, site.role, ...shown.filter((i) => placeOf[i].has(s)).map((i) => D.adapters[i].name)].join(" ").toLowerCase();
    if (!words.every((w) => text.includes(w))) return;
    const key = [site.name.replace(/\d+/g, "#"), site.role, site.shape, site.maps, site.uses, ...shown.map((i) => { const p = placeOf[i].get(s); return p ? `${p.rank}/${p.scaling}` : "-"; })].join("\0");
    if (filter.fold && known.has(key)) { known.get(key).push(s); return; }
    const line = [s];
    known.set(key, line);
    lines.push(line);
  });
  if (filter.sort) {
    const of = filter.sort, sign = filter.down ? -1 : 1;
    lines.sort((x, y) => { const a = of(x), b = of(y); return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true })); });
  }
  return lines;
}
function siteColumns() {
  const mean = (line, i) => { const r = line.map((s) => placeOf[i].get(s)).filter(Boolean).map((p) => p.ratio || 0); return r.length ? r.reduce((a, b) => a + b, 0) / r.length : -1; };
  return [
    { name: "site", width: "minmax(310px,2.2fr)", key: (l) => D.sites[l[0]].name, cell: (l) => [el("span", { class: "mono" }, foldNames(l.map((s) => D.sites[s].name))), l.length > 1 ? el("span", { class: "times" }, `×${l.length}`) : "", D.sites[l[0]].aliases.length ? el("span", { class: "dim" }, `  also ${D.sites[l[0]].aliases.join(", ")}`) : ""] },
    { name: "role", width: "108px", key: (l) => D.sites[l[0]].role, cell: (l) => el("span", { class: `role ${D.sites[l[0]].role}` }, D.sites[l[0]].role) },
    { name: "shape", width: "126px", num: true, key: (l) => D.sites[l[0]].shape.reduce((a, b) => a * b, 1), cell: (l) => D.sites[l[0]].shape.join(" × ") },
    ...shown.map((i) => ({ name: D.adapters[i].name, width: "206px", adapter: i, key: (l) => mean(l, i), cell: (l) => adapterCell(l, i) })),
    { name: "one op with", width: "minmax(130px,1fr)", key: (l) => siblings(l[0]).length, cell: (l) => el("span", { class: "dim" }, siblings(l[0]).map((s) => last(D.sites[s].name)).join(", ")) },
    { name: "uses", width: "62px", num: true, key: (l) => D.sites[l[0]].uses, cell: (l) => String(D.sites[l[0]].uses) },
    { name: "rows", width: "62px", num: true, key: (l) => D.sites[l[0]].maps.join(), cell: (l) => D.sites[l[0]].maps.join(", ") },
  ];
}
const siblings = (s) => [...new Set((groupOf.get(s) || []).flatMap((g) => g.sites))].filter((o) => o !== s);
function adapterCell(line, i) {
  const places = line.map((s) => placeOf[i].get(s)).filter(Boolean);
  if (!places.length) return el("span", { class: "dim" }, "–");
  const ratios = places.map((p) => p.ratio || 0), top = Math.max(...ratios);
  return [`r ${places[0].rank} · ${percent(ratios.reduce((a, b) => a + b, 0) / ratios.length)}`, places.length > 1 ? el("span", { class: "spark", style: colour(i), "aria-hidden": true, title: "each layer" }, sample(ratios, 30).map((r) => el("i", { style: `height:${Math.max(1, Math.round(18 * r / (top || 1)))}px` }))) : ""];
}
const LINE = 32;
VIEWS.sites = (main) => {
  const columns = siteColumns(), roles = [...new Set(D.sites.map((s) => s.role))];
  const count = el("span", { class: "dim end", "aria-live": "polite" });
  const bar = el("div", { class: "bar" }, el("h1", {}, "Sites"),
    el("input", { type: "search", id: "site-filter", placeholder: "Filter", "aria-label": "Filter sites", value: filter.text, oninput: (e) => { filter.text = e.target.value; fill(); } }),
    el("select", { "aria-label": "Role", onchange: (e) => { filter.role = e.target.value; fill(); } }, el("option", { value: "" }, "every role"), roles.map((r) => el("option", { value: r, selected: r === filter.role }, r))),
    el("label", {}, el("input", { type: "checkbox", id: "site-fold", checked: filter.fold, onchange: (e) => { filter.fold = e.target.checked; fill(); } }), "fold repeats"), count);
  const grid = el("div", { class: "grid", role: "grid", "aria-label": "Sites", style: `--columns:${columns.map((c) => c.width).join(" ")};--least:${columns.reduce((n, c) => n + +c.width.match(/\d+/)[0], 0)}px;max-height:calc(100vh - 150px)` });
  const head = el("div", { class: "head", role: "row" }, columns.map((c) => el("button", { role: "columnheader", class: c.num ? "num" : "", title: c.adapter !== undefined ? `${c.name}: rank, and mean of ‖ΔW‖ / ‖W‖` : null, onclick: (e) => {
    if (filter.sort === c.key && filter.down) { filter.sort = null; filter.down = false; } else if (filter.sort === c.key) filter.down = true; else { filter.sort = c.key; filter.down = c.adapter !== undefined; }
    fill();
  } }, c.adapter !== undefined ? chip(c.adapter) : c.name)));
  const body = el("div", { style: "position:relative" });
  grid.append(head, body);
  let lines = [], from = -1, to = -1;
  function fill() {
    columns.forEach((c, i) => { if (filter.sort === c.key) head.children[i].setAttribute("aria-sort", filter.down ? "descending" : "ascending"); else head.children[i].removeAttribute("aria-sort"); });
    lines = siteLines();
    count.textContent = `${plural(lines.reduce((n, l) => n + l.length, 0), "site")} in ${plural(lines.length, "line")}`;
    body.style.height = `${lines.length * LINE}px`;
    from = to = -1;
    draw();
  }
  function draw(all = false) {
    const a = all ? 0 : Math.max(0, Math.floor(grid.scrollTop / LINE) - 8), b = all ? lines.length : Math.min(lines.length, a + Math.ceil((grid.clientHeight || 900) / LINE) + 16);
    if (a === from && b === to) return;
    [from, to] = [a, b];
    body.replaceChildren(...lines.slice(a, b).map((line, k) => el("div", { class: "line", role: "row", tabindex: 0, "data-site": line[0], "aria-selected": !!state.selection && state.selection.site === line[0], style: `position:absolute;left:0;right:0;top:${(a + k) * LINE}px`, onclick: () => selectSite(line[0]), onkeydown: (e) => lineKey(e, line, a + k) }, columns.map((c) => el("div", { class: `cell ${c.num ? "num" : ""}`, role: "gridcell" }, c.cell(line))))));
  }
  function lineKey(e, line, k) {
    if (e.key === "Enter" || e.key === " ") { e.preventDefault(); selectSite(line[0]); }
    const next = e.key === "ArrowDown" ? k + 1 : e.key === "ArrowUp" ? k - 1 : null;
    if (next === null || next < 0 || next >= lines.length) return;
    e.preventDefault();
    if (next * LINE < grid.scrollTop) grid.scrollTop = next * LINE;
    if ((next + 2) * LINE > grid.scrollTop + grid.clientHeight) grid.scrollTop = (next + 2) * LINE - grid.clientHeight;
    draw();
    body.children[next - from].focus();
  }
  grid.addEventListener("scroll", () => draw());
  main.append(bar, grid);
  VIEWS.sites.all = () => draw(true);
  fill();
};

// ---- drawing one module: layers by longest path, order by barycentre
const MAX_BOXES = 220;
function moduleDrawing(stage, path) {
  const visit = stage.find(path), all = stage.entries(visit);
  const page = Math.min(state.page[path] || 0, Math.floor(Math.max(all.length - 1, 0) / MAX_BOXES)), entries = all.slice(page * MAX_BOXES, (page + 1) * MAX_BOXES);
  const boxes = [], home = new Map();
  for (const entry of entries) {
    const box = { entry, nodes: typeof entry === "number" ? [entry] : (entry.fold || [entry]).flatMap((v) => stage.calls(v)), kind: "call", order: boxes.length };
    Object.assign(box, describe(stage, entry, box.nodes));
    box.nodes.forEach((i) => home.set(i, box));
    boxes.push(box);
  }
  const edges = new Map(), inner = boxes.length;
  let maps = null;
  const outside = new Map();
  for (const box of boxes.slice(0, inner)) for (const i of box.nodes) for (const ref of stage.refs(i)) {
    let from = home.get(ref);
    if (from === box || stage.kind(ref) === WEIGHT) continue;
    if (!from && stage.kind(ref) === ROW_MAP) from = maps = maps || { nodes: [], kind: "map", lines: ["row maps"], order: -2 };
    if (!from && stage.isSize(ref)) continue;  // sizes from elsewhere
    if (!from) {
      if (!outside.has(ref)) outside.set(ref, { nodes: [ref], kind: "outside", lines: [stage.short(ref), stage.module(ref) || stage.type(ref)], order: -1 });
      from = outside.get(ref);
    }
    if (from.kind === "map" && from === maps && !maps.nodes.includes(ref)) maps.nodes.push(ref);
    if (from.order > box.order) continue;
    const key = `${from.id ?? (from.id = ++moduleDrawing.ids)}>${box.id ?? (box.id = ++moduleDrawing.ids)}`;
    const edge = edges.get(key) || { from, to: box, count: 0, size: true };
    edge.count += 1;
    edge.size = edge.size && stage.isSize(ref);
    edges.set(key, edge);
  }
  boxes.unshift(...(maps ? [maps] : []), ...outside.values());
  return { stage, visit, boxes, edges: [...edges.values()], pages: Math.ceil(all.length / MAX_BOXES), page, total: all.length };
}
moduleDrawing.ids = 0;
function describe(stage, entry, nodes) {
  if (typeof entry !== "number") {
    const visits = entry.fold || [entry], served = visits.reduce((n, v) => n + stage.served(v), 0), like = visits[0].like;
    const likes = likeWords(visits);
    return { kind: "module", site: served > 0, path: visits[0].path, lines: [foldNames(visits.map((v) => v.name)), [entry.fold ? `×${visits.length}` : "", like ? likes : plural(nodes.length, "call"), served ? plural(served, "site") : ""].filter(Boolean).join(" · ")] };
  }
  const sites = stage.sitesOf.get(entry) || [], kind = stage.kind(entry);
  const weights = stage.refs(entry).filter((r) => stage.kind(r) === WEIGHT).map((r) => stage.label(r).split(".").slice(-2).join("."));
  const label = stage.label(entry).replace("fxlora::", "");
  return { kind: sites.length ? "site" : kind === ROW_MAP ? "map" : "call", mixed: stage.mixed(entry), lines: [label, ...(weights.length ? [weights.join(" + ")] : []), stage.type(entry)].filter(Boolean).map((t) => t.length > 46 ? t.slice(0, 45) + "…" : t) };
}
function layout({ boxes, edges }) {
  for (const box of boxes) {
    box.w = Math.max(64, 18 + 7.3 * Math.max(...box.lines.map((t) => t.length)));
    box.h = 12 + 16 * box.lines.length;
    box.layer = 0; box.ins = []; box.outs = [];
  }
  const sorted = [...boxes].sort((a, b) => a.order - b.order);
  edges.forEach((e) => { e.from.outs.push(e); e.to.ins.push(e); });
  for (const box of sorted) for (const e of box.ins) box.layer = Math.max(box.layer, e.from.layer + 1);
  for (const box of [...sorted].reverse()) if (box.order < 0 && box.outs.length) box.layer = Math.max(0, Math.min(...box.outs.map((e) => e.to.layer)) - 1);
  const layers = [];
  const put = (item) => (layers[item.layer] = layers[item.layer] || []).push(item);
  sorted.forEach(put);
  const segments = [];
  for (const e of edges) {  // long edges bend around boxes through points of their own
    let prior = e.from;
    e.points = [];
    for (let layer = e.from.layer + 1; layer < e.to.layer; layer++) {
      const point = { layer, w: 10, h: 0, dummy: true };
      e.points.push(point);
      put(point);
      segments.push([prior, point]);
      prior = point;
    }
    segments.push([prior, e.to]);
  }
  const up = new Map(), down = new Map();
  for (const [a, b] of segments) { down.set(a, [...(down.get(a) || []), b]); up.set(b, [...(up.get(b) || []), a]); }
  const packed = Array.from(layers, (l) => l || []);
  const place = (layer) => { let x = 0; layer.forEach((n) => { n.x = x + n.w / 2; x += n.w + 22; }); layer.forEach((n) => { n.x -= x / 2; }); };
  packed.forEach(place);
  const mean = (n, side) => { const near = side.get(n); return near ? near.reduce((s, m) => s + m.x, 0) / near.length : n.x; };
  for (let sweep = 0; sweep < 10; sweep++) {
    const forward = sweep % 2 === 0, side = forward ? up : down;
    for (const layer of forward ? packed : [...packed].reverse()) {
      layer.forEach((n) => { n.want = mean(n, side); });
      layer.sort((a, b) => a.want - b.want);
      let x = -Infinity;
      layer.forEach((n) => { n.x = Math.max(n.want, x + n.w / 2); x = n.x + n.w / 2 + 22; });
      x = Infinity;
      const drift = layer.reduce((s, n) => s + n.x - n.want, 0) / (layer.length || 1);
      layer.forEach((n) => { n.x -= drift; });
    }
  }
  let y = 16;
  packed.forEach((layer) => { const h = Math.max(0, ...layer.map((n) => n.h)); layer.forEach((n) => { n.y = y + h / 2; }); y += h + 30; });
  const left = Math.min(...packed.flat().map((n) => n.x - n.w / 2)) - 16, right = Math.max(...packed.flat().map((n) => n.x + n.w / 2)) + 16;
  packed.flat().forEach((n) => { n.x -= left; });
  return { width: right - left, height: y };
}
function drawInto(canvas, drawing) {
  const { width, height } = layout(drawing);
  drawing.size = { width, height };
  const image = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${drawing.stage.name}: ${drawing.visit.path || "the whole graph"}` });
  for (const e of drawing.edges) {
    const points = [[e.from.x, e.from.y + e.from.h / 2], ...e.points.map((p) => [p.x, p.y]), [e.to.x, e.to.y - e.to.h / 2 - 3]];
    let d = `M${points[0]}`;
    for (let i = 1; i < points.length; i++) { const [x0, y0] = points[i - 1], [x1, y1] = points[i], m = (y0 + y1) / 2; d += `C${x0},${m} ${x1},${m} ${x1},${y1}`; }
    e.path = svg("path", { d, class: e.size ? "size" : "" });
    const [x, yEnd] = points[points.length - 1];
    image.append(e.path, svg("path", { d: `M${x - 3.5},${yEnd - 4}L${x},${yEnd + 3}L${x + 3.5},${yEnd - 4}`, class: e.size ? "size" : "" }));
  }
  for (const box of drawing.boxes) {
    const g = svg("g", { class: `box ${box.kind} ${box.site ? "site" : ""} ${box.mixed ? "mixed" : ""}`, tabindex: 0, role: "button", transform: `translate(${box.x - box.w / 2},${box.y - box.h / 2})`, "aria-label": box.lines.join(", ") });
    g.append(svg("rect", { width: box.w, height: box.h, rx: box.kind === "module" ? 10 : 6 }));
    box.lines.forEach((line, i) => { const t = svg("text", { x: box.w / 2, y: 18 + 16 * i, "text-anchor": "middle", class: i ? "sub" : "" }); t.textContent = line; g.append(t); });
    const title = svg("title", {}); title.textContent = box.path || (box.nodes.length === 1 ? drawing.stage.text(box.nodes[0]) : box.lines.join("\n")); g.append(title);
    const pick = () => box.path !== undefined ? select({ stage: drawing.stage, module: box.path, nodes: box.nodes }) : selectNode(drawing.stage, box.nodes[0]);
    g.addEventListener("click", pick);
    g.addEventListener("dblclick", () => box.path !== undefined && openModule(box.path));
    g.addEventListener("keydown", (e) => { if (e.key === "Enter" && e.shiftKey && box.path !== undefined) openModule(box.path); else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); pick(); } });
    box.g = g;
    image.append(g);
  }
  canvas.replaceChildren(image);
  drawing.image = image;
}
let drawings = [];
VIEWS.graph = (main) => {
  const visit = now.find(state.module);
  state.module = visit.path;
  const crumbs = el("div", { class: "crumbs" }, el("button", { onclick: () => openModule("") }, D.title));
  const trail = [];
  for (let v = visit; v && v.path; v = v.parent) trail.unshift(v);
  trail.forEach((v) => crumbs.append(el("span", { class: "dim" }, "/"), el("button", { onclick: () => openModule(v.path) }, v.name)));
  let zoom = 1;
  const setZoom = (z) => { zoom = Math.min(2, Math.max(0.2, z)); drawings.forEach((d) => { d.image.setAttribute("width", d.size.width * zoom); d.image.setAttribute("height", d.size.height * zoom); }); };
  const panes = el("div", { class: `panes ${both ? "" : "one"}` });
  drawings = stages.map((stage) => moduleDrawing(stage, state.module));
  drawings.forEach((drawing) => {
    const canvas = el("div", { class: "canvas" });
    const pager = drawing.pages > 1 ? el("span", { class: "tools" }, el("button", { onclick: () => turn(-1), "aria-label": "Earlier nodes" }, "‹"), ` ${drawing.page + 1} of ${drawing.pages} `, el("button", { onclick: () => turn(1), "aria-label": "Later nodes" }, "›")) : "";
    panes.append(el("div", { class: "pane", "data-stage": drawing.stage.name }, el("h3", {}, both ? drawing.stage.name === "before" ? "Before" : "After" : "Graph", el("span", { class: "dim" }, plural(drawing.stage.calls(drawing.visit).length, "call")), pager), canvas));
    drawInto(canvas, drawing);
  });
  function turn(by) { const path = state.module; state.page[path] = Math.min(Math.max((state.page[path] || 0) + by, 0), Math.max(...drawings.map((d) => d.pages)) - 1); show("graph"); }
  const up = trail.length ? (trail.length > 1 ? trail[trail.length - 2].path : "") : null;
  main.append(el("div", { class: "bar" }, crumbs, el("span", { class: "tools end" }, up !== null ? el("button", { onclick: () => openModule(up) }, "Up") : "", " ", el("button", { "aria-label": "Zoom out", onclick: () => setZoom(zoom / 1.2) }, "−"), " ", el("button", { "aria-label": "Zoom in", onclick: () => setZoom(zoom * 1.2) }, "+"), " ", el("button", { onclick: () => setZoom(Math.min(...drawings.map((d) => (d.image.parentNode.clientWidth - 4) / d.size.width))) }, "Fit"))),
    panes, el("div", { class: "legend" }, [["--accent", "holds sites"], ["--maps", "row map"], ["--bad", "rows mix requests"], ["--a1", "the same on the other side"]].map(([c, t]) => el("span", {}, el("i", { style: `border-color:var(${c})` }), t)), el("span", {}, "click: details · double click or Shift+Enter on a module: open it")));
  const fit = Math.min(...drawings.map((d) => (d.image.parentNode.clientWidth - 4) / d.size.width));
  if (fit < 1 && fit > 0) setZoom(Math.max(fit, 0.6));
  highlight(true);
};
function chosenNodes(stage) {
  const s = state.selection;
  if (!s) return [];
  if (s.site !== undefined) return D.sites[s.site].calls[stage.name] || [];
  if (s.skip !== undefined) return stage === before ? D.skipped[s.skip].calls : D.skipped[s.skip].calls.flatMap((i) => counterparts(before, i));
  if (s.stage === stage) return s.nodes || [s.node];
  return (s.nodes || [s.node]).flatMap((i) => counterparts(s.stage, i));
}
function highlight(reveal) {
  if (state.tab !== "graph") return;
  for (const drawing of drawings) {
    const chosen = new Set(chosenNodes(drawing.stage)), own = state.selection && (state.selection.stage === drawing.stage || state.selection.stage === undefined);
    for (const box of drawing.boxes) {
      const hit = chosen.size && box.nodes.some((i) => chosen.has(i)) && (state.selection.module === undefined || box.path !== undefined || !state.selection.nodes.includes(-1));
      box.g.classList.toggle("selected", !!hit && !!own);
      box.g.classList.toggle("linked", !!hit && !own);
      box.hit = hit;
    }
    drawing.edges.forEach((e) => e.path.classList.toggle("hot", !!(e.from.hit || e.to.hit) && drawing.boxes.filter((b) => b.hit).length < 4));
    const first = drawing.boxes.find((b) => b.hit);
    if (first && (reveal || !own)) {
      const canvas = drawing.image.parentNode, scale = drawing.image.getAttribute("width") / drawing.size.width;
      canvas.scrollTo({ left: first.x * scale - canvas.clientWidth / 2, top: first.y * scale - canvas.clientHeight / 2 });
    }
  }
}

// ---- rows
const batch = Array.from({ length: 4 }, (_, i) => shown.length && i < shown.length ? shown[i] : -1);
VIEWS.rows = (main) => {
  main.append(el("h1", {}, "Rows"), el("p", { class: "dim" }, "A call names one adapter for each request. Every site works on rows; the chain of ops below each number proves which request a row belongs to, so each row gets the slot of its own request."));
  D.maps.forEach((m, i) => main.append(mapRow(m, i)));
  main.append(el("h2", { style: "margin:22px 0 10px" }, "Try a batch"));
  const out = el("div"), loaded = D.adapters.map((a, i) => i).filter((i) => D.adapters[i].slot !== null || D.adapters[i].places.length);
  main.append(el("div", { class: "requests" }, batch.map((choice, r) => el("label", {}, `request ${r}`, el("select", { onchange: (e) => { batch[r] = +e.target.value; fill(); } }, el("option", { value: -1 }, "no adapter"), loaded.map((i) => el("option", { value: i, selected: i === choice }, D.adapters[i].name)))))), out);
  function fill() {
    const groups = new Map();
    D.sites.forEach((site, s) => { const key = [site.name.replace(/\d+/g, "#"), site.role, site.maps, ...batch.map((i) => i < 0 || !placeOf[i].has(s) ? "-" : placeOf[i].get(s).rank)].join("\0"); groups.set(key, [...(groups.get(key) || []), s]); });
    out.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "site"), el("th", { class: "num" }, "rows"), batch.map((i, r) => el("th", {}, `rows of request ${r}`)))),
      el("tbody", {}, [...groups.values()].map((all) => el("tr", {}, el("td", {}, el("button", { class: "link", onclick: () => selectSite(all[0]) }, foldNames(all.map((s) => D.sites[s].name))), all.length > 1 ? el("span", { class: "times" }, `×${all.length}`) : ""), el("td", { class: "num" }, D.sites[all[0]].maps.join(", ")),
        batch.map((i) => { const p = i < 0 ? null : placeOf[i].get(all[0]); return el("td", {}, i < 0 ? el("span", { class: "dim" }, "slot −1: the bare model") : p ? [el("span", { class: "chip", style: colour(i) }, D.adapters[i].slot === null ? D.adapters[i].name : `slot ${D.adapters[i].slot}`), ` rank ${p.rank}`] : el("span", { class: "dim" }, `${D.adapters[i].slot === null ? "" : `slot ${D.adapters[i].slot}: `}adds nothing here`)); }))))));
  }
  fill();
};

// ---- details
function chainTo(stage, start) {
  const chain = [];
  let i = start;
  const seen = new Set();
  while (i !== undefined && !seen.has(i)) {
    seen.add(i);
    chain.unshift(i);
    if (stage.kind(i) === INPUT) break;
    const refs = stage.refs(i);
    i = refs.find((r) => stage.mixed(r) && !seen.has(r)) ?? refs.find((r) => stage.rows(r) && !seen.has(r));
  }
  if (!chain.length || !stage.rows(chain[0])) return [];
  const kept = [];
  chain.forEach((n, k) => {
    if (k === 0 || k === chain.length - 1 || stage.rows(n) !== stage.rows(chain[k - 1])) kept.push({ node: n, passed: 0 });
    else kept[kept.length - 1].passed += 1;
  });
  return kept;
}
function chainList(stage, start, maps = []) {
  const chain = chainTo(stage, start);
  if (!chain.length) return null;
  const steps = chain.map(({ node: i, passed }, k) => el("li", { class: stage.mixed(i) ? "mixed" : "" },
    nodeLink(stage, i, stage.kind(i) === INPUT ? `input ${stage.label(i)}` : stage.label(i) === stage.nodes[i][0] ? stage.label(i) : `${stage.label(i)}  ${stage.nodes[i][0]}`),
    el("span", { class: stage.mixed(i) ? "bad dim" : "dim" }, stage.rows(i)), stage.source(i) && stage.kind(i) !== INPUT && k < chain.length - 1 ? el("span", { class: "dim mono" }, stage.source(i)) : "",
    passed ? el("span", { class: "dim" }, `… ${plural(passed, "call")} that ${passed === 1 ? "keeps" : "keep"} it`) : ""));
  maps.forEach((m) => steps.push(el("li", { class: "end" }, el("b", {}, `rows ${m}`), el("span", { class: "dim mono" }, D.maps[m - 1].steps.join(" → ")))));
  return el("ol", { class: "chain" }, steps);
}
function nodeLink(stage, i, text) { return el("button", { class: "link", onclick: () => reveal(stage, i) }, text || stage.nodes[i][0]); }
function reveal(stage, i, site) {
  const path = stage.around(i);
  if (state.tab !== "graph" || now.find(state.module).path !== path) openModule(path);
  if (site === undefined) selectNode(stage, i, { reveal: true }); else selectSite(site, { reveal: true });
}
function facts(rows) { return el("dl", {}, rows.filter(([, v]) => v !== "" && v !== null && v !== undefined && !(Array.isArray(v) && !v.length)).map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])); }
function source(text) {
  const cut = text.match(/^(.*?:\d+): ?(.*)$/s);
  return text ? [el("h3", {}, "In the model"), el("pre", {}, cut ? [el("span", { class: "dim" }, cut[1]), "\n", cut[2]] : text)] : [];
}
function details() {
  const box = $("details"), s = state.selection;
  box.hidden = !s;
  box.replaceChildren();
  if (!s) return;
  box.append(el("button", { class: "close", "aria-label": "Close details", onclick: () => select(null) }, "×"));
  if (s.site !== undefined) siteDetails(box, s.site);
  else if (s.skip !== undefined) skipDetails(box, D.skipped[s.skip]);
  else if (s.module !== undefined) {
    box.append(el("h2", { class: "mono" }, s.module || D.title), facts([["class", T[D.modules[s.module]] || ""], ["calls", String(s.nodes.length)], ["sites", String(s.nodes.reduce((n, i) => n + (s.stage.sitesOf.get(i) || []).length, 0))]]), el("p", {}, el("button", { class: "link", onclick: () => openModule(s.module) }, "open this module →")));
  } else nodeDetails(box, s.stage, s.node);
}
function siteDetails(box, s) {
  const site = D.sites[s], group = (groupOf.get(s) || [])[0], others = siblings(s);
  box.append(el("h2", { class: "mono" }, site.name), facts([["role", el("span", { class: `role ${site.role}` }, site.role)], ["weight", `${site.shape.join(" × ")} ${site.dtype}`], ["also called", site.aliases.join(", ")], ["read", plural(site.uses, "time")],
    ["one op with", others.map((o, k) => [k ? ", " : "", el("button", { class: "link", onclick: () => selectSite(o) }, last(D.sites[o].name))])], ["why", group ? group.why : ""],
    ["in the graph", (site.calls[now.name] || []).map((i, k) => [k ? ", " : "", nodeLink(now, i)])]]), ...source(site.source));
  const call = (site.calls.before || [])[0];
  const chain = call === undefined ? null : chainList(before, call, site.maps);
  if (chain) box.append(el("h3", {}, "From the input to its rows"), chain);
  const here = D.adapters.map((a, i) => i).filter((i) => placeOf[i].has(s));
  if (D.adapters.length) box.append(el("h3", {}, "Adapters here"));
  if (D.adapters.length && !here.length) box.append(el("p", { class: "dim" }, "None adds to this weight."));
  here.forEach((i) => { const p = placeOf[i].get(s); box.append(el("div", { style: "margin-bottom:10px" }, chip(i), facts([["rank", String(p.rank)], ["scaling", String(+p.scaling.toPrecision(6))], ["‖ΔW‖ / ‖W‖", p.ratio === null ? "" : `${percent(p.ratio)}  (${p.delta.toPrecision(3)} / ${p.weight.toPrecision(3)})`], ["pool rows", p.start === null ? "" : `${p.start} to ${p.start + p.rows - 1}`]]))); });
  const held = here.map((i) => [i, placeOf[i].get(s)]).filter(([, p]) => p.start !== null && p.pool);
  if (held.length) box.append(el("h3", {}, `Adapter memory: ${plural(held[0][1].pool, "rank row")}`), el("div", { class: "pool", role: "img", "aria-label": "Extents" }, held.map(([i, p]) => el("i", { style: `${colour(i)};left:${100 * p.start / p.pool}%;width:${100 * p.rows / p.pool}%`, title: D.adapters[i].name }))));
}
function skipDetails(box, skip) {
  box.append(el("h2", { class: "mono" }, skip.name), el("div", { class: "refusal" }, el("b", {}, "No site. "), skip.reason), facts([["also called", skip.aliases.join(", ")]]));
  skip.calls.slice(0, 1).forEach((i) => { const chain = chainList(before, i); if (chain) box.append(el("h3", {}, "Where requests meet"), chain); box.append(...source(before.source(i))); });
}
function nodeDetails(box, stage, i) {
  const sites = stage.sitesOf.get(i) || [], kind = stage.kind(i), names = kind === WEIGHT ? stage.nodes[i][8] : null;
  box.append(el("h2", { class: "mono" }, kind === WEIGHT ? stage.label(i) : stage.nodes[i][0]), facts([["op", kind === WEIGHT ? "weight" : stage.label(i)], ["graph", both ? stage.name : ""], ["module", stage.module(i) ? el("button", { class: "link", onclick: () => openModule(stage.module(i)) }, stage.module(i)) : ""], ["result", stage.type(i)], ["also called", names ? names.slice(1).join(", ") : ""],
    ["rows", stage.mixed(i) ? el("span", { class: "bad" }, stage.rows(i)) : stage.rows(i)], ["serves", sites.map((s, k) => [k ? ", " : "", el("button", { class: "link", onclick: () => selectSite(s) }, D.sites[s].name)])],
    [stage === before ? "became" : "stands for", (stage === before ? became : cameFrom).has(i) ? counterparts(stage, i).map((j, k) => [k ? ", " : "", nodeLink(otherOf(stage), j)]) : ""]]));
  if (kind !== WEIGHT && kind !== INPUT) box.append(el("h3", {}, "Call"), el("pre", {}, stage.text(i)));
  box.append(...source(stage.source(i)));
  const reads = [...new Set(stage.refs(i))], users = stage.users(i);
  if (reads.length) box.append(el("h3", {}, "Reads"), el("div", {}, reads.map((r, k) => [k ? ", " : "", nodeLink(stage, r, stage.short(r))])));
  if (users.length) box.append(el("h3", {}, "Read by"), el("div", {}, users.slice(0, 40).map((r, k) => [k ? ", " : "", nodeLink(stage, r)]), users.length > 40 ? ` and ${users.length - 40} more` : ""));
}

// ---- module tree
function treeItem(entry, depth) {
  const visits = entry.fold || [entry], name = foldNames(visits.map((v) => v.name)), likes = likeWords(visits);
  const inner = entry.fold ? visits : now.entries(entry).filter((e) => typeof e !== "number");
  const served = visits.reduce((n, v) => n + now.served(v), 0);
  const item = el("li", { role: "treeitem", "aria-level": depth, tabindex: -1, "aria-expanded": inner.length ? false : null, "data-path": entry.fold ? null : entry.path },
    el("div", { class: "row", title: entry.fold ? name : [entry.path, T[D.modules[entry.path]]].filter(Boolean).join(": ") }, el("span", { class: "twist", "aria-hidden": true }, inner.length ? "▶" : ""), el("span", { class: "mono" }, name), likes ? el("span", { class: "like" }, likes) : "", served ? el("span", { class: "count", title: plural(served, "site") }, String(served)) : ""));
  item.inner = inner;
  item.depth = depth;
  item.firstElementChild.addEventListener("click", (e) => { focusTree(item); if (entry.fold || e.target.classList.contains("twist")) toggle(item); else { openModule(entry.path); if (item.getAttribute("aria-expanded") === "false") toggle(item, true); } });
  return item;
}
function toggle(item, open = item.getAttribute("aria-expanded") !== "true") {
  if (!item.inner.length) return;
  item.setAttribute("aria-expanded", open);
  if (open && !item.list) { item.list = el("ul", { role: "group" }, item.inner.map((e) => treeItem(e, item.depth + 1))); item.append(item.list); }
  if (item.list) item.list.hidden = !open;
}
function focusTree(item) { $("tree").querySelectorAll("[tabindex='0']").forEach((i) => { i.tabIndex = -1; }); item.tabIndex = 0; item.focus(); }
function markTree() { $("tree").querySelectorAll("[role=treeitem]").forEach((i) => i.setAttribute("aria-selected", i.dataset.path === state.module)); }
function treeKey(e) {
  const item = e.target.closest("[role=treeitem]"), all = [...$("tree").querySelectorAll("[role=treeitem]")].filter((i) => i.offsetParent !== null), at = all.indexOf(item);
  const open = item && item.getAttribute("aria-expanded");
  if (!item) return;
  if (e.key === "ArrowDown" && all[at + 1]) focusTree(all[at + 1]);
  else if (e.key === "ArrowUp" && all[at - 1]) focusTree(all[at - 1]);
  else if (e.key === "Home") focusTree(all[0]);
  else if (e.key === "End") focusTree(all[all.length - 1]);
  else if (e.key === "ArrowRight") { if (open === "false") toggle(item, true); else if (open === "true" && all[at + 1]) focusTree(all[at + 1]); }
  else if (e.key === "ArrowLeft") { if (open === "true") toggle(item, false); else if (item.parentNode.closest("[role=treeitem]")) focusTree(item.parentNode.closest("[role=treeitem]")); }
  else if (e.key === "Enter" || e.key === " ") { if (item.dataset.path !== undefined) openModule(item.dataset.path); else toggle(item); }
  else return;
  e.preventDefault();
}

// ---- search
let searchable = null, hits = [], at = -1;
function searchIndex() {
  if (searchable) return searchable;
  searchable = D.sites.map((s, i) => ({ text: [s.name, ...s.aliases].join(" "), name: s.name, about: `site · ${s.role}`, go: () => { if (state.tab === "graph" && s.calls[now.name]) reveal(now, s.calls[now.name][0], i); else { show("sites"); selectSite(i); } } }));
  const paths = new Set();
  (function walk(v) { if (v.path) paths.add(v.path); v.items.forEach((i) => typeof i !== "number" && walk(i)); })(now.root);
  paths.forEach((p) => searchable.push({ text: p, name: p, about: "module", go: () => openModule(p) }));
  D.skipped.forEach((s, i) => searchable.push({ text: [s.name, ...s.aliases].join(" "), name: s.name, about: "no site", go: () => select({ skip: i }) }));
  for (const stage of [...stages].reverse()) stage.nodes.forEach((n, i) => {
    if (stage !== now && now.index.has(n[0])) return;
    searchable.push({ text: `${n[0]} ${stage.label(i)} ${stage.kind(i) === WEIGHT ? n[8].join(" ") : ""}`, name: stage.kind(i) === WEIGHT ? stage.label(i) : n[0], about: stage.kind(i) === WEIGHT ? "weight" : `${stage.label(i).replace("fxlora::", "")}${both && stage === before ? ", before" : ""}`, go: () => reveal(stage, i) });
  });
  searchable.forEach((s) => { s.text = s.text.toLowerCase(); });
  return searchable;
}
function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean), list = $("hits"), index = searchIndex();
  hits = [];
  if (words.length) for (const item of index) { if (words.every((w) => item.text.includes(w))) hits.push(item); if (hits.length >= 60) break; }
  at = hits.length ? 0 : -1;
  list.hidden = !words.length;
  $("search").setAttribute("aria-expanded", words.length > 0);
  list.replaceChildren(...hits.map((h, i) => el("li", { role: "option", id: `hit-${i}`, "aria-selected": i === at, onmousedown: (e) => { e.preventDefault(); take(i); } }, el("span", { class: "mono" }, el("bdi", {}, h.name)), el("span", { class: "dim" }, h.about))), ...(hits.length ? [] : [el("li", { class: "dim" }, "nothing by this name")]));
}
function take(i) { if (!hits[i]) return; hits[i].go(); closeSearch(); }
function closeSearch() { $("hits").hidden = true; $("search").setAttribute("aria-expanded", false); }
$("search").addEventListener("input", (e) => search(e.target.value));
$("search").addEventListener("focus", (e) => e.target.value && search(e.target.value));
$("search").addEventListener("blur", closeSearch);
$("search").addEventListener("keydown", (e) => {
  if (e.key === "Enter") take(at);
  else if (e.key === "Escape") { closeSearch(); e.target.blur(); }
  else if (e.key === "ArrowDown" || e.key === "ArrowUp") {
    e.preventDefault();
    at = Math.min(Math.max(at + (e.key === "ArrowDown" ? 1 : -1), 0), hits.length - 1);
    [...$("hits").children].forEach((li, i) => li.setAttribute("aria-selected", i === at));
    if ($("hits").children[at]) { $("hits").children[at].scrollIntoView({ block: "nearest" }); e.target.setAttribute("aria-activedescendant", `hit-${at}`); }
  }
});
document.addEventListener("keydown", (e) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (e.key === "/" && !typing) { e.preventDefault(); $("search").focus(); $("search").select(); }
  if (e.key === "Escape" && !typing && state.selection) select(null);
});

// ---- start
$("title").textContent = D.title;
$("tabs").append(...Object.entries(TABS).map(([tab, name]) => el("button", { role: "tab", "data-tab": tab, "aria-controls": "main", onclick: () => show(tab) }, name)));
$("tabs").addEventListener("keydown", (e) => {
  const buttons = [...$("tabs").children], step = e.key === "ArrowRight" ? 1 : e.key === "ArrowLeft" ? -1 : 0;
  if (step) { const next = buttons[(buttons.findIndex((b) => b.dataset.tab === state.tab) + step + buttons.length) % buttons.length]; next.click(); next.focus(); }
});
const top = now.entries(now.root).filter((e) => typeof e !== "number").map((e) => treeItem(e, 1));
$("tree").append(...top);
$("tree").addEventListener("keydown", treeKey);
if (top.length) { top[0].tabIndex = 0; if (top[0].inner.length <= 60) toggle(top[0], true); }
let printed = null;
window.addEventListener("beforeprint", () => { printed = state.tab; const main = $("main"); main.replaceChildren(); VIEWS.overview(main); if (D.sites.length) { const part = el("section", { style: "margin-top:20px" }); main.append(part); VIEWS.sites(part); VIEWS.sites.all(); } });
window.addEventListener("afterprint", () => { if (printed) show(printed); });
show(D.focus ? "graph" : "overview");
})();
