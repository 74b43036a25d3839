// Overview: the summary, adapters, row maps, weights that are no site, and passes.

const VIEWS = {};
function tile(big, text, extra, cls) {
  return el(
    "div",
    { class: `tile ${cls || ""}` },
    el("div", { class: "big" }, big),
    el("div", { class: "dim" }, text),
    extra,
  );
}
VIEWS.overview = (main) => {
  const S = D.summary,
    roles = {};
  D.sites.forEach((s) => {
    roles[s.role] = (roles[s.role] || 0) + 1;
  });
  const tints = { linear: "--a0", embedding: "--a2", logits: "--a4", experts: "--a3" };
  const bad = D.adapters.filter((a) => a.unbound.length || a.error),
    loaded = D.adapters.filter((a) => a.slot !== null);
  main.append(
    el("h1", {}, D.title),
    el(
      "div",
      { class: "dim" },
      both
        ? "The graph before and after fxlora's rewrite, and what every adapter landed on."
        : "A graph as it is; nothing was rewritten.",
    ),
  );
  if (D.refusal) main.append(el("div", { class: "refusal", role: "alert" }, el("b", {}, "Refused. "), D.refusal));
  D.notes.forEach((note) => main.append(el("div", { class: "note" }, note)));
  const tiles = el("div", { class: "tiles" });
  if (D.sites.length) {
    tiles.append(
      tile(
        D.sites.length.toLocaleString("en"),
        `${D.sites.length === 1 ? "site" : "sites"} in ${plural(S.ops, "op")}`,
        [
          el(
            "div",
            { class: "split", "aria-hidden": true },
            Object.entries(roles).map(([r, n]) =>
              el("i", { style: `flex:${n};background:var(${tints[r] || "--a7"})` }),
            ),
          ),
          el(
            "div",
            { class: "dim" },
            Object.entries(roles)
              .map(([r, n]) => `${n} ${r}`)
              .join(" · "),
          ),
        ],
      ),
    );
    tiles.append(
      tile(
        S.memory.slots ? `${loaded.length} of ${S.memory.slots}` : String(D.adapters.length),
        S.memory.slots ? "adapter slots in use" : "adapters",
        el("div", { class: "dim" }, S.memory.slots ? `ranks up to ${S.memory.max_rank}` : ""),
      ),
    );
  }
  if (S.memory.bytes)
    tiles.append(
      tile(
        bytes(S.memory.bytes),
        "adapter memory",
        el("div", { class: "dim" }, `${S.memory.pool_rows} rank rows a site`),
      ),
    );
  const a = S.nodes.before,
    b = S.nodes.after;
  tiles.append(
    tile(
      b === undefined ? a.toLocaleString("en") : `${a.toLocaleString("en")} → ${b.toLocaleString("en")}`,
      "nodes",
      el(
        "div",
        { class: "dim" },
        b === undefined ? "" : `${plural(D.maps.length, "row map")}, each computed once a call`,
      ),
    ),
  );
  if (D.skipped.length)
    tiles.append(
      tile(
        D.skipped.length.toLocaleString("en"),
        D.skipped.length === 1 ? "weight is no site" : "weights are no site",
        el("div", { class: "dim" }, "each with its reason, below"),
      ),
    );
  if (bad.length)
    tiles.append(
      tile(String(bad.length), bad.length === 1 ? "adapter does not bind" : "adapters do not bind", null, "bad"),
    );
  main.append(tiles);
  if (D.adapters.length) main.append(adaptersSection());
  if (D.maps.length)
    main.append(
      el(
        "section",
        {},
        el("h2", {}, "Which request does a row belong to?"),
        D.maps.map((m, i) => mapRow(m, i)),
      ),
    );
  if (D.skipped.length) main.append(skippedSection());
  if (D.passes.length)
    main.append(
      el(
        "section",
        {},
        el("h2", {}, "Passes"),
        el(
          "table",
          {},
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              el("th", {}, "pass"),
              el("th", { class: "num" }, "ms"),
              el("th", { class: "num" }, "nodes before"),
              el("th", { class: "num" }, "after"),
            ),
          ),
          el(
            "tbody",
            {},
            D.passes.map(([name, ms, x, y]) =>
              el(
                "tr",
                {},
                el("td", { class: "mono" }, name),
                el("td", { class: "num" }, ms.toFixed(1)),
                el("td", { class: "num" }, x.toLocaleString("en")),
                el("td", { class: "num" }, x === y ? "same" : y.toLocaleString("en")),
              ),
            ),
          ),
        ),
      ),
    );
};
function chip(i) {
  return el("span", { class: "chip", style: colour(i) }, D.adapters[i].name);
}
function adaptersSection() {
  const body = el("tbody");
  D.adapters.forEach((a, i) => {
    const ranks = [...new Set(a.places.map((p) => p[1]))].sort((x, y) => x - y),
      ratios = [...placeOf[i].values()].map((p) => p.ratio).filter((r) => r !== null);
    const top = Math.max(...ratios);
    body.append(
      el(
        "tr",
        {},
        el("td", {}, chip(i)),
        el("td", { class: "num" }, a.slot === null ? "not loaded" : String(a.slot)),
        el("td", { class: "num" }, a.places.length ? String(a.places.length) : el("span", { class: "bad" }, "0")),
        el("td", { class: "num" }, ranks.join(", ")),
        el(
          "td",
          {},
          a.unbound.length
            ? el("span", { class: "bad" }, `✕ does not bind: ${plural(a.unbound.length, "tensor")} without a site`)
            : a.error
              ? el("span", { class: "bad" }, `✕ ${a.error}`)
              : ratios.length
                ? [
                    `largest ${percent(top)}`,
                    el(
                      "span",
                      { class: "spark", style: colour(i), "aria-hidden": true },
                      sample(ratios, 90).map((r) =>
                        el("i", { style: `height:${Math.max(1, Math.round((20 * r) / (top || 1)))}px` }),
                      ),
                    ),
                  ]
                : "",
        ),
      ),
    );
    a.unbound
      .slice(0, 200)
      .forEach(([key, reason, nearest]) =>
        body.append(
          el(
            "tr",
            {},
            el("td", { class: "mono unbound", colspan: 4 }, `✕ ${key}`),
            el(
              "td",
              { class: "unbound" },
              reason,
              nearest ? [el("br"), "nearest: ", el("span", { class: "mono" }, nearest)] : "",
            ),
          ),
        ),
      );
    if (a.unbound.length > 200)
      body.append(el("tr", {}, el("td", { colspan: 5, class: "bad" }, `and ${a.unbound.length - 200} more`)));
  });
  return el(
    "section",
    { id: "adapters" },
    el("h2", {}, "Adapters"),
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("th", {}, "adapter"),
          el("th", { class: "num" }, "slot"),
          el("th", { class: "num" }, "sites"),
          el("th", { class: "num" }, "ranks"),
          el("th", {}, "‖ΔW‖ / ‖W‖, site by site"),
        ),
      ),
      body,
    ),
  );
}
const sample = (values, n) =>
  values.length <= n ? values : Array.from({ length: n }, (_, i) => values[Math.floor((i * values.length) / n)]);
function mapRow(map, i) {
  const used = D.sites.filter((s) => s.maps.includes(i + 1)).length;
  return el(
    "div",
    { class: "maprow" },
    el("b", {}, `rows ${i + 1}`),
    map.steps.map((step, k) => [
      k ? el("span", { class: "arrow" }, "→") : "",
      el("span", { class: `step ${k ? "" : "first"}` }, step),
    ]),
    el("span", { class: "dim" }, plural(used, "site")),
  );
}
function skippedSection() {
  const groups = new Map();
  D.skipped.forEach((s, i) => {
    const key = s.name.replace(/\d+/g, "#") + "\0" + s.reason.replace(/\d+/g, "#");
    groups.set(key, [...(groups.get(key) || []), i]);
  });
  const body = el(
    "tbody",
    {},
    [...groups.values()].map((all) => {
      const first = D.skipped[all[0]];
      const name = foldNames(all.map((i) => D.skipped[i].name));
      return el(
        "tr",
        {},
        el(
          "td",
          {},
          first.calls.length
            ? el("button", { class: "link", onclick: () => select({ skip: all[0] }) }, name)
            : el("span", { class: "mono" }, name),
          all.length > 1 ? el("span", { class: "times" }, `×${all.length}`) : "",
        ),
        el("td", {}, first.reason),
      );
    }),
  );
  return el(
    "section",
    {},
    el("h2", {}, "Weights that are no site"),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "weight"), el("th", {}, "why"))), body),
  );
}
