// The panel of what is chosen: a site, a node, a module, or a weight that is no site.

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
    if (k === 0 || k === chain.length - 1 || stage.rows(n) !== stage.rows(chain[k - 1]))
      kept.push({ node: n, passed: 0 });
    else kept[kept.length - 1].passed += 1;
  });
  return kept;
}
function chainList(stage, start, maps = []) {
  const chain = chainTo(stage, start);
  if (!chain.length) return null;
  const steps = chain.map(({ node: i, passed }, k) =>
    el(
      "li",
      { class: stage.mixed(i) ? "mixed" : "" },
      nodeLink(
        stage,
        i,
        stage.kind(i) === INPUT
          ? `input ${stage.label(i)}`
          : stage.label(i) === stage.nodes[i][0]
            ? stage.label(i)
            : `${stage.label(i)}  ${stage.nodes[i][0]}`,
      ),
      el("span", { class: stage.mixed(i) ? "bad dim" : "dim" }, stage.rows(i)),
      stage.source(i) && stage.kind(i) !== INPUT && k < chain.length - 1
        ? el("span", { class: "dim mono" }, stage.source(i))
        : "",
      passed
        ? el("span", { class: "dim" }, `… ${plural(passed, "call")} that ${passed === 1 ? "keeps" : "keep"} it`)
        : "",
    ),
  );
  maps.forEach((m) =>
    steps.push(
      el(
        "li",
        { class: "end" },
        el("b", {}, `rows ${m}`),
        el("span", { class: "dim mono" }, D.maps[m - 1].steps.join(" → ")),
      ),
    ),
  );
  return el("ol", { class: "chain" }, steps);
}
function nodeLink(stage, i, text) {
  return el("button", { class: "link", onclick: () => reveal(stage, i) }, text || stage.nodes[i][0]);
}
function reveal(stage, i, site) {
  const path = stage.around(i);
  if (state.tab !== "graph" || now.find(state.module).path !== path) openModule(path);
  if (site === undefined) selectNode(stage, i, { reveal: true });
  else selectSite(site, { reveal: true });
}
function facts(rows) {
  return el(
    "dl",
    {},
    rows
      .filter(([, v]) => v !== "" && v !== null && v !== undefined && !(Array.isArray(v) && !v.length))
      .map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]),
  );
}
function source(text) {
  const cut = text.match(/^(.*?:\d+): ?(.*)$/s);
  return text
    ? [el("h3", {}, "In the model"), el("pre", {}, cut ? [el("span", { class: "dim" }, cut[1]), "\n", cut[2]] : text)]
    : [];
}
function details() {
  const box = $("details"),
    s = state.selection;
  box.hidden = !s;
  box.replaceChildren();
  if (!s) return;
  box.append(el("button", { class: "close", "aria-label": "Close details", onclick: () => select(null) }, "×"));
  if (s.site !== undefined) siteDetails(box, s.site);
  else if (s.skip !== undefined) skipDetails(box, D.skipped[s.skip]);
  else if (s.module !== undefined) {
    box.append(
      el("h2", { class: "mono" }, s.module || D.title),
      facts([
        ["class", T[D.modules[s.module]] || ""],
        ["calls", String(s.nodes.length)],
        ["sites", String(s.nodes.reduce((n, i) => n + (s.stage.sitesOf.get(i) || []).length, 0))],
      ]),
      el("p", {}, el("button", { class: "link", onclick: () => openModule(s.module) }, "open this module →")),
    );
  } else nodeDetails(box, s.stage, s.node);
}
function siteDetails(box, s) {
  const site = D.sites[s],
    group = (groupOf.get(s) || [])[0],
    others = siblings(s);
  box.append(
    el("h2", { class: "mono" }, site.name),
    facts([
      ["role", el("span", { class: `role ${site.role}` }, site.role)],
      ["weight", `${site.shape.join(" × ")} ${site.dtype}`],
      ["also called", site.aliases.join(", ")],
      ["read", plural(site.uses, "time")],
      [
        "one op with",
        others.map((o, k) => [
          k ? ", " : "",
          el("button", { class: "link", onclick: () => selectSite(o) }, last(D.sites[o].name)),
        ]),
      ],
      ["why", group ? group.why : ""],
      ["in the graph", (site.calls[now.name] || []).map((i, k) => [k ? ", " : "", nodeLink(now, i)])],
    ]),
    ...source(site.source),
  );
  const call = (site.calls.before || [])[0];
  const chain = call === undefined ? null : chainList(before, call, site.maps);
  if (chain) box.append(el("h3", {}, "From the input to its rows"), chain);
  const here = D.adapters.map((a, i) => i).filter((i) => placeOf[i].has(s));
  if (D.adapters.length) box.append(el("h3", {}, "Adapters here"));
  if (D.adapters.length && !here.length) box.append(el("p", { class: "dim" }, "None adds to this weight."));
  here.forEach((i) => {
    const p = placeOf[i].get(s);
    box.append(
      el(
        "div",
        { style: "margin-bottom:10px" },
        chip(i),
        facts([
          ["rank", String(p.rank)],
          ["scaling", String(+p.scaling.toPrecision(6))],
          [
            "‖ΔW‖ / ‖W‖",
            p.ratio === null ? "" : `${percent(p.ratio)}  (${p.delta.toPrecision(3)} / ${p.weight.toPrecision(3)})`,
          ],
          ["pool rows", p.start === null ? "" : `${p.start} to ${p.start + p.rows - 1}`],
        ]),
      ),
    );
  });
  const held = here.map((i) => [i, placeOf[i].get(s)]).filter(([, p]) => p.start !== null && p.pool);
  if (held.length)
    box.append(
      el("h3", {}, `Adapter memory: ${plural(held[0][1].pool, "rank row")}`),
      el(
        "div",
        { class: "pool", role: "img", "aria-label": "Extents" },
        held.map(([i, p]) =>
          el("i", {
            style: `${colour(i)};left:${(100 * p.start) / p.pool}%;width:${(100 * p.rows) / p.pool}%`,
            title: D.adapters[i].name,
          }),
        ),
      ),
    );
}
function skipDetails(box, skip) {
  box.append(
    el("h2", { class: "mono" }, skip.name),
    el("div", { class: "refusal" }, el("b", {}, "No site. "), skip.reason),
    facts([["also called", skip.aliases.join(", ")]]),
  );
  skip.calls.slice(0, 1).forEach((i) => {
    const chain = chainList(before, i);
    if (chain) box.append(el("h3", {}, "Where requests meet"), chain);
    box.append(...source(before.source(i)));
  });
}
function nodeDetails(box, stage, i) {
  const sites = stage.sitesOf.get(i) || [],
    kind = stage.kind(i),
    names = kind === WEIGHT ? stage.nodes[i][8] : null;
  box.append(
    el("h2", { class: "mono" }, kind === WEIGHT ? stage.label(i) : stage.nodes[i][0]),
    facts([
      ["op", kind === WEIGHT ? "weight" : stage.label(i)],
      ["graph", both ? stage.name : ""],
      [
        "module",
        stage.module(i)
          ? el("button", { class: "link", onclick: () => openModule(stage.module(i)) }, stage.module(i))
          : "",
      ],
      ["result", stage.type(i)],
      ["also called", names ? names.slice(1).join(", ") : ""],
      ["rows", stage.mixed(i) ? el("span", { class: "bad" }, stage.rows(i)) : stage.rows(i)],
      [
        "serves",
        sites.map((s, k) => [
          k ? ", " : "",
          el("button", { class: "link", onclick: () => selectSite(s) }, D.sites[s].name),
        ]),
      ],
      [
        stage === before ? "became" : "stands for",
        (stage === before ? became : cameFrom).has(i)
          ? counterparts(stage, i).map((j, k) => [k ? ", " : "", nodeLink(otherOf(stage), j)])
          : "",
      ],
    ]),
  );
  if (kind !== WEIGHT && kind !== INPUT) box.append(el("h3", {}, "Call"), el("pre", {}, stage.text(i)));
  box.append(...source(stage.source(i)));
  const reads = [...new Set(stage.refs(i))],
    users = stage.users(i);
  if (reads.length)
    box.append(
      el("h3", {}, "Reads"),
      el(
        "div",
        {},
        reads.map((r, k) => [k ? ", " : "", nodeLink(stage, r, stage.short(r))]),
      ),
    );
  if (users.length)
    box.append(
      el("h3", {}, "Read by"),
      el(
        "div",
        {},
        users.slice(0, 40).map((r, k) => [k ? ", " : "", nodeLink(stage, r)]),
        users.length > 40 ? ` and ${users.length - 40} more` : "",
      ),
    );
}
