// The graph of one side: its nodes, its tree of modules, and what became of a node on the other side.

class Stage {
  constructor({ name, nodes, tree }) {
    this.name = name;
    this.nodes = nodes;
    this.index = new Map(nodes.map((n, i) => [n[0], i]));
    this.root = this.visit(tree, null);
    this.sitesOf = new Map();
    D.sites.forEach((site, s) =>
      (site.calls[name] || []).forEach((i) => this.sitesOf.set(i, [...(this.sitesOf.get(i) || []), s])),
    );
  }
  visit([name, path, like, items], parent) {
    const made = { name, path, like: null, parent, first: Infinity };
    made.items = items.map((item) => (typeof item === "number" ? item : this.visit(item, made)));
    const visits = made.items.filter((item) => typeof item !== "number");
    items
      .filter((item) => typeof item !== "number")
      .forEach((item, i) => {
        if (item[2] >= 0) visits[i].like = visits[item[2]];
      });
    return made;
  }
  label(i) {
    return T[this.nodes[i][2]];
  }
  module(i) {
    return T[this.nodes[i][3]];
  }
  type(i) {
    return T[this.nodes[i][4]];
  }
  source(i) {
    return T[this.nodes[i][5]];
  }
  rows(i) {
    return T[this.nodes[i][6]];
  }
  kind(i) {
    return this.nodes[i][1];
  }
  mixed(i) {
    return this.nodes[i][7] === 1;
  }
  refs(i) {
    return this.kind(i) === WEIGHT ? [] : [...this.nodes[i][8].matchAll(/%(\d+);/g)].map((m) => +m[1]);
  }
  text(i) {
    if (this.kind(i) === WEIGHT) return this.nodes[i][8].join("\nalso ");
    return this.nodes[i][8].replace(/%(\d+);|%%/g, (m, ref) => (ref === undefined ? "%" : this.short(+ref)));
  }
  isSize(i) {
    return this.type(i) !== "" && !this.type(i).includes("[");
  }
  short(i) {
    return this.kind(i) === WEIGHT || this.kind(i) === INPUT ? this.label(i) : this.nodes[i][0];
  }
  // the module to draw a call in: its own, or the one around it where its own holds next to nothing
  around(i) {
    const visit = this.find(this.module(i));
    return visit.items.length <= 3 && visit.parent ? visit.parent.path : visit.path;
  }
  users(i) {
    if (!this.readers) {
      this.readers = this.nodes.map(() => []);
      this.nodes.forEach((_, j) => {
        for (const r of new Set(this.refs(j))) this.readers[r].push(j);
      });
    }
    return this.readers[i];
  }
  calls(visit) {
    if (!visit.all) visit.all = visit.items.flatMap((item) => (typeof item === "number" ? [item] : this.calls(item)));
    return visit.all;
  }
  served(visit) {
    if (visit.served === undefined)
      visit.served = this.calls(visit).reduce((n, i) => n + (this.sitesOf.get(i) || []).length, 0);
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
    return made.map((e) => (e.fold && e.fold.length === 1 ? e.fold[0] : e));
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
const before = stages[0],
  now = stages[stages.length - 1],
  both = stages.length > 1;
const became = new Map(D.became),
  cameFrom = new Map();
for (const [a, made] of D.became) for (const b of made) cameFrom.set(b, [...(cameFrom.get(b) || []), a]);
function counterparts(stage, i) {
  if (!both) return [];
  const other = stage === before ? now : before,
    linked = (stage === before ? became : cameFrom).get(i);
  if (linked) return linked;
  const same = other.index.get(stage.nodes[i][0]);
  return same === undefined ? [] : [same];
}
const otherOf = (stage) => (stage === before ? now : before);
const groupOf = new Map();
D.groups.forEach((g) => g.sites.forEach((s) => groupOf.set(s, [...(groupOf.get(s) || []), g])));
const placeOf = D.adapters.map(
  (a) =>
    new Map(
      a.places.map(([s, rank, scaling, delta, weight, start, rows, pool]) => [
        s,
        { rank, scaling, ratio: delta !== null && weight ? delta / weight : null, delta, weight, start, rows, pool },
      ]),
    ),
);
const shown = D.adapters.map((a, i) => i).filter((i) => D.adapters[i].places.length);
