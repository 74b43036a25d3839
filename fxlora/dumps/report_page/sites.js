// Sites: the table that filters, sorts and folds, and draws the lines in sight alone.

const filter = { text: "", role: "", fold: true, sort: null, down: false };
function siteLines() {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean),
    lines = [],
    known = new Map();
  D.sites.forEach((site, s) => {
    if (filter.role && site.role !== filter.role) return;
    const text = [
      site.name,
      ...site.aliases,
      site.role,
      ...shown.filter((i) => placeOf[i].has(s)).map((i) => D.adapters[i].name),
    ]
      .join(" ")
      .toLowerCase();
    if (!words.every((w) => text.includes(w))) return;
    const key = [
      site.name.replace(/\d+/g, "#"),
      site.role,
      site.shape,
      site.maps,
      site.uses,
      ...shown.map((i) => {
        const p = placeOf[i].get(s);
        return p ? `${p.rank}/${p.scaling}` : "-";
      }),
    ].join("\0");
    if (filter.fold && known.has(key)) {
      known.get(key).push(s);
      return;
    }
    const line = [s];
    known.set(key, line);
    lines.push(line);
  });
  if (filter.sort) {
    const of = filter.sort,
      sign = filter.down ? -1 : 1;
    lines.sort((x, y) => {
      const a = of(x),
        b = of(y);
      return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    });
  }
  return lines;
}
function siteColumns() {
  const mean = (line, i) => {
    const r = line
      .map((s) => placeOf[i].get(s))
      .filter(Boolean)
      .map((p) => p.ratio || 0);
    return r.length ? r.reduce((a, b) => a + b, 0) / r.length : -1;
  };
  return [
    {
      name: "site",
      width: "minmax(310px,2.2fr)",
      key: (l) => D.sites[l[0]].name,
      cell: (l) => [
        el("span", { class: "mono" }, foldNames(l.map((s) => D.sites[s].name))),
        l.length > 1 ? el("span", { class: "times" }, `×${l.length}`) : "",
        D.sites[l[0]].aliases.length
          ? el("span", { class: "dim" }, `  also ${D.sites[l[0]].aliases.join(", ")}`)
          : "",
      ],
    },
    {
      name: "role",
      width: "108px",
      key: (l) => D.sites[l[0]].role,
      cell: (l) => el("span", { class: `role ${D.sites[l[0]].role}` }, D.sites[l[0]].role),
    },
    {
      name: "shape",
      width: "126px",
      num: true,
      key: (l) => D.sites[l[0]].shape.reduce((a, b) => a * b, 1),
      cell: (l) => D.sites[l[0]].shape.join(" × "),
    },
    ...shown.map((i) => ({
      name: D.adapters[i].name,
      width: "206px",
      adapter: i,
      key: (l) => mean(l, i),
      cell: (l) => adapterCell(l, i),
    })),
    {
      name: "one op with",
      width: "minmax(130px,1fr)",
      key: (l) => siblings(l[0]).length,
      cell: (l) =>
        el(
          "span",
          { class: "dim" },
          siblings(l[0])
            .map((s) => last(D.sites[s].name))
            .join(", "),
        ),
    },
    {
      name: "uses",
      width: "62px",
      num: true,
      key: (l) => D.sites[l[0]].uses,
      cell: (l) => String(D.sites[l[0]].uses),
    },
    {
      name: "rows",
      width: "62px",
      num: true,
      key: (l) => D.sites[l[0]].maps.join(),
      cell: (l) => D.sites[l[0]].maps.join(", "),
    },
  ];
}
const siblings = (s) => [...new Set((groupOf.get(s) || []).flatMap((g) => g.sites))].filter((o) => o !== s);
function adapterCell(line, i) {
  const places = line.map((s) => placeOf[i].get(s)).filter(Boolean);
  if (!places.length) return el("span", { class: "dim" }, "–");
  const ratios = places.map((p) => p.ratio || 0),
    top = Math.max(...ratios);
  return [
    `r ${places[0].rank} · ${percent(ratios.reduce((a, b) => a + b, 0) / ratios.length)}`,
    places.length > 1
      ? el(
          "span",
          { class: "spark", style: colour(i), "aria-hidden": true, title: "each layer" },
          sample(ratios, 30).map((r) =>
            el("i", { style: `height:${Math.max(1, Math.round((18 * r) / (top || 1)))}px` }),
          ),
        )
      : "",
  ];
}
const LINE = 32,
  PAPER = 1000; // pixels of a line of the table, and of a page across
VIEWS.sites = (main) => {
  const columns = siteColumns(),
    roles = [...new Set(D.sites.map((s) => s.role))];
  const count = el("span", { class: "dim end", "aria-live": "polite" });
  const bar = el(
    "div",
    { class: "bar" },
    el("h1", {}, "Sites"),
    el("input", {
      type: "search",
      id: "site-filter",
      placeholder: "Filter",
      "aria-label": "Filter sites",
      value: filter.text,
      oninput: (e) => {
        filter.text = e.target.value;
        fill();
      },
    }),
    el(
      "select",
      {
        "aria-label": "Role",
        onchange: (e) => {
          filter.role = e.target.value;
          fill();
        },
      },
      el("option", { value: "" }, "every role"),
      roles.map((r) => el("option", { value: r, selected: r === filter.role }, r)),
    ),
    el(
      "label",
      {},
      el("input", {
        type: "checkbox",
        id: "site-fold",
        checked: filter.fold,
        onchange: (e) => {
          filter.fold = e.target.checked;
          fill();
        },
      }),
      "fold repeats",
    ),
    count,
  );
  const widths = columns.map((c) => c.width).join(" ");
  const least = columns.reduce((sum, c) => sum + Number(c.width.match(/\d+/)[0]), 0);
  const grid = el("div", {
    class: "grid",
    role: "grid",
    "aria-label": "Sites",
    style: `--columns:${widths};--least:${least}px;max-height:calc(100vh - 150px)`,
  });
  const head = el(
    "div",
    { class: "head", role: "row" },
    columns.map((c) =>
      el(
        "button",
        {
          role: "columnheader",
          class: c.num ? "num" : "",
          title: c.adapter !== undefined ? `${c.name}: rank, and mean of ‖ΔW‖ / ‖W‖` : null,
          onclick: (e) => {
            if (filter.sort === c.key && filter.down) {
              filter.sort = null;
              filter.down = false;
            } else if (filter.sort === c.key) filter.down = true;
            else {
              filter.sort = c.key;
              filter.down = c.adapter !== undefined;
            }
            fill();
          },
        },
        c.adapter !== undefined ? chip(c.adapter) : c.name,
      ),
    ),
  );
  const body = el("div", { style: "position:relative" });
  grid.append(head, body);
  let lines = [],
    from = -1,
    to = -1;
  function fill() {
    columns.forEach((c, i) => {
      if (filter.sort === c.key) head.children[i].setAttribute("aria-sort", filter.down ? "descending" : "ascending");
      else head.children[i].removeAttribute("aria-sort");
    });
    lines = siteLines();
    count.textContent = `${plural(
      lines.reduce((n, l) => n + l.length, 0),
      "site",
    )} in ${plural(lines.length, "line")}`;
    body.style.height = `${lines.length * LINE}px`;
    from = to = -1;
    draw();
  }
  function draw(all = false) {
    const a = all ? 0 : Math.max(0, Math.floor(grid.scrollTop / LINE) - 8),
      b = all ? lines.length : Math.min(lines.length, a + Math.ceil((grid.clientHeight || 900) / LINE) + 16);
    if (a === from && b === to) return;
    [from, to] = [a, b];
    body.replaceChildren(
      ...lines.slice(a, b).map((line, k) =>
        el(
          "div",
          {
            class: "line",
            role: "row",
            tabindex: 0,
            "data-site": line[0],
            "aria-selected": !!state.selection && state.selection.site === line[0],
            style: `position:absolute;left:0;right:0;top:${(a + k) * LINE}px`,
            onclick: () => selectSite(line[0]),
            onkeydown: (e) => lineKey(e, line, a + k),
          },
          columns.map((c) => el("div", { class: `cell ${c.num ? "num" : ""}`, role: "gridcell" }, c.cell(line))),
        ),
      ),
    );
  }
  function lineKey(e, line, k) {
    if (e.key === "Enter" || e.key === " ") {
      e.preventDefault();
      selectSite(line[0]);
    }
    const next = e.key === "ArrowDown" ? k + 1 : e.key === "ArrowUp" ? k - 1 : null;
    if (next === null || next < 0 || next >= lines.length) return;
    e.preventDefault();
    if (next * LINE < grid.scrollTop) grid.scrollTop = next * LINE;
    if ((next + 2) * LINE > grid.scrollTop + grid.clientHeight)
      grid.scrollTop = (next + 2) * LINE - grid.clientHeight;
    draw();
    body.children[next - from].focus();
  }
  grid.addEventListener("scroll", () => draw());
  main.append(bar, grid);
  VIEWS.sites.print = () => {
    grid.style.zoom = Math.min(1, PAPER / least);
    draw(true);
  };
  fill();
};
