// Rows: which slot the rows of each request get at every site.

const batch = Array.from({ length: 4 }, (_, i) => (shown.length && i < shown.length ? shown[i] : -1));
VIEWS.rows = (main) => {
  main.append(
    el("h1", {}, "Rows"),
    el(
      "p",
      { class: "dim" },
      "A call names one adapter for each request. Every site works on rows; the chain of ops below each number proves which request a row belongs to, so each row gets the slot of its own request.",
    ),
  );
  D.maps.forEach((m, i) => main.append(mapRow(m, i)));
  main.append(el("h2", { style: "margin:22px 0 10px" }, "Try a batch"));
  const out = el("div"),
    loaded = D.adapters.map((a, i) => i).filter((i) => D.adapters[i].slot !== null || D.adapters[i].places.length);
  main.append(
    el(
      "div",
      { class: "requests" },
      batch.map((choice, r) =>
        el(
          "label",
          {},
          `request ${r}`,
          el(
            "select",
            {
              onchange: (e) => {
                batch[r] = +e.target.value;
                fill();
              },
            },
            el("option", { value: -1 }, "no adapter"),
            loaded.map((i) => el("option", { value: i, selected: i === choice }, D.adapters[i].name)),
          ),
        ),
      ),
    ),
    out,
  );
  function fill() {
    const groups = new Map();
    D.sites.forEach((site, s) => {
      const key = [
        site.name.replace(/\d+/g, "#"),
        site.role,
        site.maps,
        ...batch.map((i) => (i < 0 || !placeOf[i].has(s) ? "-" : placeOf[i].get(s).rank)),
      ].join("\0");
      groups.set(key, [...(groups.get(key) || []), s]);
    });
    out.replaceChildren(
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", {}, "site"),
            el("th", { class: "num" }, "rows"),
            batch.map((i, r) => el("th", {}, `rows of request ${r}`)),
          ),
        ),
        el(
          "tbody",
          {},
          [...groups.values()].map((all) =>
            el(
              "tr",
              {},
              el(
                "td",
                {},
                el(
                  "button",
                  { class: "link", onclick: () => selectSite(all[0]) },
                  foldNames(all.map((s) => D.sites[s].name)),
                ),
                all.length > 1 ? el("span", { class: "times" }, `×${all.length}`) : "",
              ),
              el("td", { class: "num" }, D.sites[all[0]].maps.join(", ")),
              batch.map((i) => {
                const p = i < 0 ? null : placeOf[i].get(all[0]);
                return el(
                  "td",
                  {},
                  i < 0
                    ? el("span", { class: "dim" }, "slot −1: the bare model")
                    : p
                      ? [
                          el(
                            "span",
                            { class: "chip", style: colour(i) },
                            D.adapters[i].slot === null ? D.adapters[i].name : `slot ${D.adapters[i].slot}`,
                          ),
                          ` rank ${p.rank}`,
                        ]
                      : el(
                          "span",
                          { class: "dim" },
                          `${D.adapters[i].slot === null ? "" : `slot ${D.adapters[i].slot}: `}adds nothing here`,
                        ),
                );
              }),
            ),
          ),
        ),
      ),
    );
  }
  fill();
};
