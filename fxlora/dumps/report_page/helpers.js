// Data of the page and small helpers. Every name goes into the page as text, never as markup.

const D = JSON.parse(document.getElementById("data").textContent);
const T = D.texts,
  [CALL, WEIGHT, INPUT, OUTPUT, ROW_MAP] = [0, 1, 2, 3, 4];
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

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
const bytes = (n) => {
  for (const u of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || u === "GiB") return `${n < 10 && u !== "B" ? n.toFixed(1) : Math.round(n)} ${u}`;
    n /= 1024;
  }
};
const percent = (x) =>
  x === null || x === undefined
    ? ""
    : x >= 0.1
      ? `${(100 * x).toFixed(0)} %`
      : x > 0
        ? `${(100 * x).toPrecision(2)} %`
        : "0 %";
function likeWords(visits) {
  const alike = visits.filter((v) => v.like);
  if (!alike.length) return "";
  return alike.every((v) => v.like.path === v.path)
    ? `again${alike.length > 1 ? ` ×${alike.length}` : ""}`
    : `as ${[...new Set(alike.map((v) => v.like.name))].join(", ")}`;
}
const colour = (i) => `--c:var(--a${i % 8})`;
const last = (path) => path.slice(path.lastIndexOf(".") + 1);
function foldNames(names) {
  const split = names.map((name) => name.split(/(\d+)/));
  if (names.length < 2 || split.some((p) => p.length !== split[0].length)) return names.join(", ");
  return split[0]
    .map((part, i) => {
      const values = [...new Set(split.map((p) => p[i]))];
      if (values.length === 1) return part;
      if (!values.every((v) => /^\d+$/.test(v))) return `{${values.join(",")}}`;
      const spans = [];
      for (const n of values.map(Number).sort((a, b) => a - b)) {
        const s = spans[spans.length - 1];
        if (s && s[1] + 1 === n) s[1] = n;
        else spans.push([n, n]);
      }
      return spans.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
    })
    .join("");
}
