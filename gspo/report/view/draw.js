// Elements, numbers, texts that are not to be trusted, colours, figures. Text goes in as text and never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child); // a string becomes a text node
  }
  return element;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// ------------------------------------------------------------------------------------------------ numbers and texts

function number(x, digits = 3) {
  if (x === undefined || x === null || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  const text = Number.isInteger(x) && size < 1e6 ? String(x)
    : size !== 0 && (size < 1e-3 || size >= 1e6) ? x.toExponential(digits - 1).replace(/\.?0+e/, "e")
    : String(Number(x.toPrecision(digits)));
  return text.replace(/-/g, "−");
}
const percent = (part, whole) => (whole ? `${number((100 * part) / whole)} %` : "–");

// A text of a model with what cannot be seen, or would move other text about, written out. Halves of characters too.
const UNSEEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]|" +
  "[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]", "g");
const seen = (text) => text.replace(UNSEEN, (c) => `\\u{${c.charCodeAt(0).toString(16)}}`);
// One token: blanks can be seen as well.
const piece = (record, t) => {
  const text = seen(record.pieces[record.token[t]] ?? `⟨${record.token[t]}⟩`);
  return text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/^ +$/, (blanks) => "␣".repeat(blanks.length)) || "∅";
};
const short = (text, size = 60) => {
  const line = seen(text).replace(/\s*\n\s*/g, " ↵ ");
  const characters = Array.from(line);
  return characters.length > size ? characters.slice(0, size - 1).join("") + "…" : line;
};

// ------------------------------------------------------------------------------------------------ colours

// share in [-1, 1] -> a background: orange above zero, blue below.
const shade = (share) =>
  `rgba(var(--${share < 0 ? "minus" : "plus"}), ${(0.8 * Math.min(Math.abs(share), 1)).toFixed(3)})`;

// The largest |x| but for one in a hundred: what full colour stands for.
function extent(values) {
  const sizes = Array.from(values, Math.abs).filter(Number.isFinite).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] : 0;
}

// ------------------------------------------------------------------------------------------------ parts of a page

const labelled = (text, control) => h("label", {}, text, control);
const facts = (pairs) => h("dl", {}, pairs.filter(([, value]) => value !== undefined).map(([name, value]) =>
  [h("dt", {}, name), h("dd", {}, value)]));

// choices: [value, text]; change(value).
function choice(key, choices, chosen, change) {
  const options = choices.map(([value, text]) =>
    h("option", { value: String(value), selected: String(value) === String(chosen) }, text));
  return h("select", { "data-key": key, onchange: (event) => change(event.target.value) }, options);
}

// columns: {name, value(row), show(row), text: left-aligned}. order: {column, down}; without it nothing is sorted.
function table(caption, columns, rows, { order, sort, current, key = "" } = {}) {
  const head = columns.map((column, i) => {
    const chosen = order && order.column === i;
    return h("th", {
      scope: "col", class: column.text && "text",
      "aria-sort": order && column.value && (chosen ? (order.down ? "descending" : "ascending") : "none"),
    }, sort && column.value
      ? h("button", { "data-key": `${key}-sort-${i}`, onclick: () => sort({ column: i, down: chosen ? !order.down : true }) }, column.name)
      : column.name);
  });
  const body = rows.map((row) => h("tr", { "aria-current": current && current(row) ? "true" : null },
    columns.map((column) => h("td", { class: column.text && "text" }, column.show(row)))));
  return h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": caption },
    h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

function sorted(rows, columns, order) {
  const value = columns[order.column].value, sign = order.down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const x = value(a), y = value(b);
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  });
}

// ------------------------------------------------------------------------------------------------ axes

const FRAME = { width: 420, height: 210, left: 60, right: 8, top: 10, bottom: 24 };

// Round numbers between two, about as many as asked for.
function ticks(low, high, count = 4) {
  const raw = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((each) => each >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

// {x, y: data -> place; parts: axes with their numbers}
function axes(xs, ys, names) {
  const span = (values) => {
    let low = Infinity, high = -Infinity;
    for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
    if (low > high) return [0, 1];
    return low === high ? [low - 0.5 * (Math.abs(low) || 1), high + 0.5 * (Math.abs(high) || 1)] : [low, high];
  };
  const [x0, x1] = span(xs), [y0, y1] = span(ys), f = FRAME;
  const x = (v) => f.left + ((v - x0) / (x1 - x0)) * (f.width - f.left - f.right);
  const y = (v) => f.height - f.bottom - ((v - y0) / (y1 - y0)) * (f.height - f.top - f.bottom);
  const at = ticks(y0, y1), apart = Math.abs(at[1] - at[0]) || 1; // as many digits as tell them apart
  const digits = Math.max(3, Math.ceil(Math.log10(Math.max(Math.abs(y0), Math.abs(y1)) / apart)) + 1);
  const parts = [
    at.map((v) => [
      s("line", { class: "axis", x1: f.left, x2: f.width - f.right, y1: y(v), y2: y(v) }),
      s("text", { x: f.left - 6, y: y(v) + 4, "text-anchor": "end" }, number(v, Math.min(digits, 9))),
    ]),
    ticks(x0, x1).map((v) => s("text", { x: x(v), y: f.height - 8, "text-anchor": "middle" }, number(v))),
    names && s("text", { x: f.width - f.right, y: f.height - f.bottom - 4, "text-anchor": "end" }, names),
  ];
  return { x, y, parts };
}
const drawing = (label, ...parts) =>
  s("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", "aria-label": label }, ...parts);
