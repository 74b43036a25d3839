// Graph: one module on both sides. Layers by longest path, order by barycentre, long edges through points.

const MAX_BOXES = 220;
function moduleDrawing(stage, path) {
  const visit = stage.find(path),
    all = stage.entries(visit);
  const page = Math.min(state.page[path] || 0, Math.floor(Math.max(all.length - 1, 0) / MAX_BOXES)),
    entries = all.slice(page * MAX_BOXES, (page + 1) * MAX_BOXES);
  const boxes = [],
    home = new Map();
  for (const entry of entries) {
    const box = {
      entry,
      nodes: typeof entry === "number" ? [entry] : (entry.fold || [entry]).flatMap((v) => stage.calls(v)),
      kind: "call",
      order: boxes.length,
    };
    Object.assign(box, describe(stage, entry, box.nodes));
    box.nodes.forEach((i) => home.set(i, box));
    boxes.push(box);
  }
  const edges = new Map(),
    inner = boxes.length;
  let maps = null;
  const outside = new Map();
  for (const box of boxes.slice(0, inner))
    for (const i of box.nodes)
      for (const ref of stage.refs(i)) {
        let from = home.get(ref);
        if (from === box || stage.kind(ref) === WEIGHT) continue;
        if (!from && stage.kind(ref) === ROW_MAP)
          from = maps = maps || { nodes: [], kind: "map", lines: ["row maps"], order: -2 };
        if (!from && stage.isSize(ref)) continue; // sizes from elsewhere
        if (!from) {
          if (!outside.has(ref))
            outside.set(ref, {
              nodes: [ref],
              kind: "outside",
              lines: [stage.short(ref), stage.module(ref) || stage.type(ref)],
              order: -1,
            });
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
  return {
    stage,
    visit,
    boxes,
    edges: [...edges.values()],
    pages: Math.ceil(all.length / MAX_BOXES),
    page,
    total: all.length,
  };
}
moduleDrawing.ids = 0;
function describe(stage, entry, nodes) {
  if (typeof entry !== "number") {
    const visits = entry.fold || [entry],
      served = visits.reduce((n, v) => n + stage.served(v), 0),
      like = visits[0].like;
    const likes = likeWords(visits);
    return {
      kind: "module",
      site: served > 0,
      path: visits[0].path,
      lines: [
        foldNames(visits.map((v) => v.name)),
        [
          entry.fold ? `×${visits.length}` : "",
          like ? likes : plural(nodes.length, "call"),
          served ? plural(served, "site") : "",
        ]
          .filter(Boolean)
          .join(" · "),
      ],
    };
  }
  const sites = stage.sitesOf.get(entry) || [],
    kind = stage.kind(entry);
  const weights = stage
    .refs(entry)
    .filter((r) => stage.kind(r) === WEIGHT)
    .map((r) => stage.label(r).split(".").slice(-2).join("."));
  const label = stage.label(entry).replace("fxlora::", "");
  return {
    kind: sites.length ? "site" : kind === ROW_MAP ? "map" : "call",
    mixed: stage.mixed(entry),
    lines: [label, ...(weights.length ? [weights.join(" + ")] : []), stage.type(entry)]
      .filter(Boolean)
      .map((t) => (t.length > 46 ? t.slice(0, 45) + "…" : t)),
  };
}
function layout({ boxes, edges }) {
  for (const box of boxes) {
    box.w = Math.max(64, 18 + 7.3 * Math.max(...box.lines.map((t) => t.length)));
    box.h = 12 + 16 * box.lines.length;
    box.layer = 0;
    box.ins = [];
    box.outs = [];
  }
  const sorted = [...boxes].sort((a, b) => a.order - b.order);
  edges.forEach((e) => {
    e.from.outs.push(e);
    e.to.ins.push(e);
  });
  for (const box of sorted) for (const e of box.ins) box.layer = Math.max(box.layer, e.from.layer + 1);
  for (const box of [...sorted].reverse())
    if (box.order < 0 && box.outs.length) box.layer = Math.max(0, Math.min(...box.outs.map((e) => e.to.layer)) - 1);
  const layers = [];
  const put = (item) => (layers[item.layer] = layers[item.layer] || []).push(item);
  sorted.forEach(put);
  const segments = [];
  for (const e of edges) {
    // long edges bend around boxes through points of their own
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
  const up = new Map(),
    down = new Map();
  for (const [a, b] of segments) {
    down.set(a, [...(down.get(a) || []), b]);
    up.set(b, [...(up.get(b) || []), a]);
  }
  const packed = Array.from(layers, (l) => l || []);
  const place = (layer) => {
    let x = 0;
    layer.forEach((n) => {
      n.x = x + n.w / 2;
      x += n.w + 22;
    });
    layer.forEach((n) => {
      n.x -= x / 2;
    });
  };
  packed.forEach(place);
  const mean = (n, side) => {
    const near = side.get(n);
    return near ? near.reduce((s, m) => s + m.x, 0) / near.length : n.x;
  };
  for (let sweep = 0; sweep < 10; sweep++) {
    const forward = sweep % 2 === 0,
      side = forward ? up : down;
    for (const layer of forward ? packed : [...packed].reverse()) {
      layer.forEach((n) => {
        n.want = mean(n, side);
      });
      layer.sort((a, b) => a.want - b.want);
      let x = -Infinity;
      layer.forEach((n) => {
        n.x = Math.max(n.want, x + n.w / 2);
        x = n.x + n.w / 2 + 22;
      });
      x = Infinity;
      const drift = layer.reduce((s, n) => s + n.x - n.want, 0) / (layer.length || 1);
      layer.forEach((n) => {
        n.x -= drift;
      });
    }
  }
  let y = 16;
  packed.forEach((layer) => {
    const h = Math.max(0, ...layer.map((n) => n.h));
    layer.forEach((n) => {
      n.y = y + h / 2;
    });
    y += h + 30;
  });
  const left = Math.min(...packed.flat().map((n) => n.x - n.w / 2)) - 16,
    right = Math.max(...packed.flat().map((n) => n.x + n.w / 2)) + 16;
  packed.flat().forEach((n) => {
    n.x -= left;
  });
  return { width: right - left, height: y };
}
function drawInto(canvas, drawing) {
  const { width, height } = layout(drawing);
  drawing.size = { width, height };
  const image = svg("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": `${drawing.stage.name}: ${drawing.visit.path || "the whole graph"}`,
  });
  for (const e of drawing.edges) {
    const points = [
      [e.from.x, e.from.y + e.from.h / 2],
      ...e.points.map((p) => [p.x, p.y]),
      [e.to.x, e.to.y - e.to.h / 2 - 3],
    ];
    let d = `M${points[0]}`;
    for (let i = 1; i < points.length; i++) {
      const [x0, y0] = points[i - 1],
        [x1, y1] = points[i],
        m = (y0 + y1) / 2;
      d += `C${x0},${m} ${x1},${m} ${x1},${y1}`;
    }
    e.path = svg("path", { d, class: e.size ? "size" : "" });
    const [x, yEnd] = points[points.length - 1];
    image.append(
      e.path,
      svg("path", {
        d: `M${x - 3.5},${yEnd - 4}L${x},${yEnd + 3}L${x + 3.5},${yEnd - 4}`,
        class: e.size ? "size" : "",
      }),
    );
  }
  for (const box of drawing.boxes) {
    const g = svg("g", {
      class: `box ${box.kind} ${box.site ? "site" : ""} ${box.mixed ? "mixed" : ""}`,
      tabindex: 0,
      role: "button",
      transform: `translate(${box.x - box.w / 2},${box.y - box.h / 2})`,
      "aria-label": box.lines.join(", "),
    });
    g.append(svg("rect", { width: box.w, height: box.h, rx: box.kind === "module" ? 10 : 6 }));
    box.lines.forEach((line, i) => {
      const t = svg("text", { x: box.w / 2, y: 18 + 16 * i, "text-anchor": "middle", class: i ? "sub" : "" });
      t.textContent = line;
      g.append(t);
    });
    const title = svg("title", {});
    title.textContent =
      box.path || (box.nodes.length === 1 ? drawing.stage.text(box.nodes[0]) : box.lines.join("\n"));
    g.append(title);
    const pick = () =>
      box.path !== undefined
        ? select({ stage: drawing.stage, module: box.path, nodes: box.nodes })
        : selectNode(drawing.stage, box.nodes[0]);
    g.addEventListener("click", pick);
    g.addEventListener("dblclick", () => box.path !== undefined && openModule(box.path));
    g.addEventListener("keydown", (e) => {
      if (e.key === "Enter" && e.shiftKey && box.path !== undefined) openModule(box.path);
      else if (e.key === "Enter" || e.key === " ") {
        e.preventDefault();
        pick();
      }
    });
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
  trail.forEach((v) =>
    crumbs.append(el("span", { class: "dim" }, "/"), el("button", { onclick: () => openModule(v.path) }, v.name)),
  );
  let zoom = 1;
  const setZoom = (z) => {
    zoom = Math.min(2, Math.max(0.2, z));
    drawings.forEach((d) => {
      d.image.setAttribute("width", d.size.width * zoom);
      d.image.setAttribute("height", d.size.height * zoom);
    });
  };
  const panes = el("div", { class: `panes ${both ? "" : "one"}` });
  drawings = stages.map((stage) => moduleDrawing(stage, state.module));
  drawings.forEach((drawing) => {
    const canvas = el("div", { class: "canvas" });
    const pager =
      drawing.pages > 1
        ? el(
            "span",
            { class: "tools" },
            el("button", { onclick: () => turn(-1), "aria-label": "Earlier nodes" }, "‹"),
            ` ${drawing.page + 1} of ${drawing.pages} `,
            el("button", { onclick: () => turn(1), "aria-label": "Later nodes" }, "›"),
          )
        : "";
    panes.append(
      el(
        "div",
        { class: "pane", "data-stage": drawing.stage.name },
        el(
          "h3",
          {},
          both ? (drawing.stage.name === "before" ? "Before" : "After") : "Graph",
          el("span", { class: "dim" }, plural(drawing.stage.calls(drawing.visit).length, "call")),
          pager,
        ),
        canvas,
      ),
    );
    drawInto(canvas, drawing);
  });
  function turn(by) {
    const path = state.module;
    state.page[path] = Math.min(
      Math.max((state.page[path] || 0) + by, 0),
      Math.max(...drawings.map((d) => d.pages)) - 1,
    );
    show("graph");
  }
  const up = trail.length ? (trail.length > 1 ? trail[trail.length - 2].path : "") : null;
  main.append(
    el(
      "div",
      { class: "bar" },
      crumbs,
      el(
        "span",
        { class: "tools end" },
        up !== null ? el("button", { onclick: () => openModule(up) }, "Up") : "",
        " ",
        el("button", { "aria-label": "Zoom out", onclick: () => setZoom(zoom / 1.2) }, "−"),
        " ",
        el("button", { "aria-label": "Zoom in", onclick: () => setZoom(zoom * 1.2) }, "+"),
        " ",
        el(
          "button",
          {
            onclick: () =>
              setZoom(Math.min(...drawings.map((d) => (d.image.parentNode.clientWidth - 4) / d.size.width))),
          },
          "Fit",
        ),
      ),
    ),
    panes,
    el(
      "div",
      { class: "legend" },
      [
        ["--accent", "holds sites"],
        ["--maps", "row map"],
        ["--bad", "rows mix requests"],
        ["--a1", "the same on the other side"],
      ].map(([c, t]) => el("span", {}, el("i", { style: `border-color:var(${c})` }), t)),
      el("span", {}, "click: details · double click or Shift+Enter on a module: open it"),
    ),
  );
  const fit = Math.min(...drawings.map((d) => (d.image.parentNode.clientWidth - 4) / d.size.width));
  if (fit < 1 && fit > 0) setZoom(Math.max(fit, 0.6));
  highlight(true);
};
function chosenNodes(stage) {
  const s = state.selection;
  if (!s) return [];
  if (s.site !== undefined) return D.sites[s.site].calls[stage.name] || [];
  if (s.skip !== undefined)
    return stage === before
      ? D.skipped[s.skip].calls
      : D.skipped[s.skip].calls.flatMap((i) => counterparts(before, i));
  if (s.stage === stage) return s.nodes || [s.node];
  return (s.nodes || [s.node]).flatMap((i) => counterparts(s.stage, i));
}
function highlight(reveal) {
  if (state.tab !== "graph") return;
  for (const drawing of drawings) {
    const chosen = new Set(chosenNodes(drawing.stage)),
      own = state.selection && (state.selection.stage === drawing.stage || state.selection.stage === undefined);
    for (const box of drawing.boxes) {
      const hit =
        chosen.size &&
        box.nodes.some((i) => chosen.has(i)) &&
        (state.selection.module === undefined || box.path !== undefined || !state.selection.nodes.includes(-1));
      box.g.classList.toggle("selected", !!hit && !!own);
      box.g.classList.toggle("linked", !!hit && !own);
      box.hit = hit;
    }
    drawing.edges.forEach((e) =>
      e.path.classList.toggle("hot", !!(e.from.hit || e.to.hit) && drawing.boxes.filter((b) => b.hit).length < 4),
    );
    const first = drawing.boxes.find((b) => b.hit);
    if (first && (reveal || !own)) {
      const canvas = drawing.image.parentNode,
        scale = drawing.image.getAttribute("width") / drawing.size.width;
      canvas.scrollTo({
        left: first.x * scale - canvas.clientWidth / 2,
        top: first.y * scale - canvas.clientHeight / 2,
      });
    }
  }
}
