// SVG by hand: elements, scales, ticks, numbers in words, figures with their downloads.

const SVG = "http://www.w3.org/2000/svg";
const NORMAL_95 = 1.96; // standard errors on both sides of a mean

/** An HTML element; strings among the children become text, never markup. */
function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// ---------------------------------------------------------------------------------------------- numbers

const minus = (text) => text.replace("-", "\u2212");

function fixed(value, digits = 2) {
  return value === null || value === undefined ? "\u2013" : minus(value.toFixed(digits));
}

/** An episode's score, rounded down: what falls short of 1 doesn't read as 1. */
function scoreText(score) {
  return fixed(score === null || score === undefined ? score : Math.floor(100 * score + 1e-6) / 100);
}

function signed(value, digits = 3) {
  if (value === null || value === undefined) return "\u2013";
  return (value > 0 ? "+" : "") + minus(value.toFixed(digits));
}

/** Three significant digits, as many as a latency has. */
function short(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  return minus(value.toLocaleString("en", { maximumFractionDigits: size < 1 ? 2 : size < 100 ? 1 : 0 }));
}

const whole = (value) => value.toLocaleString("en");
const percent = (value) => (value === null || value === undefined ? "\u2013" : `${Math.round(100 * value)} %`);
const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;

// ----------------------------------------------------------------------------------------------- scales

function linear(low, high, from, to) {
  const span = high - low || 1;
  const at = (value) => from + ((value - low) / span) * (to - from);
  return Object.assign(at, { ticks: (n) => niceTicks(low, high, n), low, high });
}

function logarithmic(low, high, from, to) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const at = (value) => inner(Math.log10(Math.max(value, low / 10)));
  return Object.assign(at, { ticks: (n) => logTicks(low, high, n), low, high });
}

function niceTicks(low, high, n = 5) {
  const raw = (high - low || 1) / n;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((each) => each * unit >= raw * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step);
  return ticks.map((tick) => Number(tick.toPrecision(10)));
}

function logTicks(low, high, n = 6) {
  for (const steps of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
      ticks.push(...steps.map((step) => step * 10 ** k).filter((tick) => tick >= low * 0.999 && tick <= high * 1.001));
    }
    if (ticks.length <= n || steps.length === 1) return ticks.map((tick) => Number(tick.toPrecision(6)));
  }
  return [];
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function quantile(sorted, q) {
  const at = (sorted.length - 1) * q, below = Math.floor(at);
  return sorted[below] + (at - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

// ----------------------------------------------------------------------------------------------- drawing

function text(x, y, words, style = "label", anchor = "start") {
  return s("text", { x: round(x), y: round(y), class: style, "text-anchor": anchor }, String(words));
}

function line(x1, y1, x2, y2, style) {
  return s("line", { x1: round(x1), y1: round(y1), x2: round(x2), y2: round(y2), class: style });
}

function rect(x, y, width, height, style, extra = {}) {
  return s("rect", { x: round(x), y: round(y), width: round(Math.max(width, 0)), height: round(height), class: style, ...extra });
}

const round = (value) => Math.round(value * 10) / 10;

const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-r},${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0,${-1.25 * r}L${1.2 * r},${0.9 * r}H${-1.2 * r}Z`,
  (r) => `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0Z`,
  (r) => `M0,${1.25 * r}L${1.2 * r},${-0.9 * r}H${-1.2 * r}Z`,
];

/** A mark whose shape and colour say which sampler it is of. */
function mark(x, y, kind, r = 5) {
  const shape = SHAPES[kind % SHAPES.length](r);
  return s("path", { d: shape, transform: `translate(${round(x)},${round(y)})`, class: `mark colour${kind % 8}` });
}

/** The width that words take in a figure, about. */
const widthOf = (words, size = 12.5) => String(words).length * size * 0.56;

function canvasOf(width, height, label) {
  return s("svg", {
    width, height: Math.round(height), viewBox: `0 0 ${width} ${Math.round(height)}`, role: "img", "aria-label": label,
  });
}

// ----------------------------------------------------------------------------------------------- figures

const FIGURES = [];

/**
 * A figure: title, what it shows, the drawing, and buttons that download it.
 * `draw(width)` returns the SVG; it is called again when the figure's width changes.
 */
function figure(parent, { name, title, about, draw, controls = [] }) {
  const plot = h("div", { class: "plot" });
  const save = (kind) => h("button", { type: "button", class: "quiet", "data-save": kind, onclick: () => download(plot.firstChild, name, kind) },
    h("span", { class: "unseen" }, `${title}: `), `Download ${kind.toUpperCase()}`);
  const heading = h("h3", {}, title);
  parent.append(h("figure", { id: `figure-${name}` },
    h("figcaption", {}, heading, about ? h("p", {}, about) : null),
    controls.length ? h("div", { class: "controls" }, controls) : null,
    plot, h("div", { class: "saving" }, save("svg"), save("png"))));
  const made = { plot, draw, width: 0, redraw: () => plot.replaceChildren(draw(made.width)) };
  FIGURES.push(made);
  return made;
}

/** Draws the figures whose width changed; all widths are asked for first, since each drawing changes the layout. */
function fitFigures() {
  const widths = FIGURES.map((made) => Math.max(260, Math.floor(made.plot.clientWidth)));
  FIGURES.forEach((made, k) => {
    if (made.width === widths[k]) return;
    made.width = widths[k];
    made.redraw();
  });
}

function watchWidths() {
  let asked = 0;
  fitFigures();
  new ResizeObserver(() => {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(fitFigures);
  }).observe(document.querySelector("main"));
}

const INLINED = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin",
  "font-family", "font-size", "font-weight", "text-anchor", "paint-order"];

const PADDING = 16;

function paddedSize(drawing) {
  return [drawing.width, drawing.height].map((side) => side.baseVal.value + 2 * PADDING);
}

/** The drawing with its styles written into it, so that it looks the same elsewhere. */
function standalone(drawing) {
  const copy = drawing.cloneNode(true);
  const originals = [drawing, ...drawing.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, index) => {
    const style = getComputedStyle(originals[index]);
    for (const name of INLINED) element.style.setProperty(name, style.getPropertyValue(name));
    element.removeAttribute("class");
  });
  const background = getComputedStyle(document.body).backgroundColor;
  const [width, height] = paddedSize(drawing);
  fill(copy, { width, height, viewBox: `${-PADDING} ${-PADDING} ${width} ${height}` }, []);
  copy.prepend(s("rect", { x: -PADDING, y: -PADDING, width, height, fill: background }));
  copy.setAttribute("xmlns", SVG);
  return new XMLSerializer().serializeToString(copy);
}

async function download(drawing, name, kind) {
  const written = standalone(drawing);
  let blob = new Blob([written], { type: "image/svg+xml" });
  if (kind === "png") blob = await rastered(written, ...paddedSize(drawing));
  const address = URL.createObjectURL(blob);
  const study = REPORT.name.replace(/[^\w.-]+/g, "_");
  h("a", { href: address, download: `${study}_${name}.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  say(`${name}.${kind} saved`);
}

async function rastered(written, width, height, times = 2) {
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(written)}`;
  await picture.decode();
  const canvas = h("canvas", { width: width * times, height: height * times });
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

/** Tells readers of screens what happened. */
function say(words) {
  document.getElementById("said").textContent = words;
}
