// The grid of episodes: a row per seed, a column per arm. Only the rows in sight are elements of the page.

const ROW = 30;
const SEED_WIDTH = 92;
const CELL_WIDTH = 96;

/** What the grid shows of a task: `columns` are its arms, `rows` its seeds with an episode or null per arm. */
function gridModel(task, arms) {
  const columns = arms.filter((arm) => arm.task === task);
  const places = columns.map((arm) => new Map(arm.episodes.seed.map((seed, index) => [seed, index])));
  const seeds = [...new Set(columns.flatMap((arm) => arm.episodes.seed))].sort((a, b) => a - b);
  const range = Math.max(...columns.map((arm) => (arm.reward_range?.[1] ?? 1) - (arm.reward_range?.[0] ?? 0)));
  const rows = seeds.map((seed) => gridRow(seed, columns, places, range));
  return { task, columns, rows, range, low: Math.min(...columns.map((arm) => arm.reward_range?.[0] ?? 0)) };
}

function gridRow(seed, columns, places, range) {
  const cells = columns.map((arm, column) => {
    const index = places[column].get(seed);
    if (index === undefined) return null;
    const { score, success, n_steps } = arm.episodes;
    return { score: score[index], success: success[index], steps: n_steps[index] };
  });
  const there = cells.filter((cell) => cell && cell.score !== null);
  const [low, high] = there.length ? extent(there.map((cell) => cell.score)) : [0, 0];
  const known = there.filter((cell) => cell.success !== null);
  const mixed = known.some((cell) => cell.success) && known.some((cell) => !cell.success);
  return { seed, cells, spread: high - low, disagree: known.length ? mixed : high - low > 0.1 * range };
}

const ORDERS = {
  seed: () => (a, b) => a.seed - b.seed,
  disagreement: () => (a, b) => b.disagree - a.disagree || b.spread - a.spread || a.seed - b.seed,
  arm: (column) => (a, b) => (b.cells[column]?.score ?? -Infinity) - (a.cells[column]?.score ?? -Infinity) || a.seed - b.seed,
};

/** A grid in `parent` whose cells call `open(model, row, column)`. */
class EpisodeGrid {
  constructor(parent, model, open, videoOf) {
    Object.assign(this, { model, open, videoOf, order: "seed", reversed: false, only: false, focus: [0, 0], drawn: new Map() });
    this.count = h("p", { class: "count", role: "status" });
    this.head = h("div", { class: "gridHead", role: "row", "aria-rowindex": 1 });
    this.body = h("div", { class: "gridBody", role: "rowgroup" });
    this.inner = h("div", { class: "gridInner", role: "presentation" }, h("div", { role: "rowgroup", class: "gridTop" }, this.head), this.body);
    this.inner.style.setProperty("--columns", `${SEED_WIDTH}px repeat(${model.columns.length}, minmax(${CELL_WIDTH}px, 1fr))`);
    this.inner.style.minWidth = `${SEED_WIDTH + CELL_WIDTH * model.columns.length}px`;
    this.box = h("div", { class: "grid", role: "grid", "aria-label": `Episodes of ${model.task}: a row per seed, a column per sampler`,
      "aria-colcount": model.columns.length + 1 }, this.inner);
    this.box.addEventListener("scroll", () => this.later(), { passive: true });
    this.body.addEventListener("click", (event) => this.clicked(event));
    this.body.addEventListener("keydown", (event) => this.pressed(event));
    parent.append(this.controls(), this.count, this.box);
    this.arrange();
  }

  controls() {
    const choices = [["seed", "seed"], ["disagreement", "disagreement"], ...this.model.columns.map((arm, k) => [`arm:${k}`, `score of ${arm.short}`])];
    this.select = h("select", { onchange: () => this.sort(this.select.value, false) }, choices.map(([value, words]) => h("option", { value }, words)));
    const reverse = h("button", { type: "button", class: "quiet", onclick: () => this.sort(this.order, !this.reversed) }, "Reverse");
    const only = h("input", { type: "checkbox", onchange: (event) => { this.only = event.target.checked; this.arrange(); } });
    return h("div", { class: "controls" }, h("label", {}, "Sort by ", this.select), reverse,
      h("label", { class: "check" }, only, "Only where samplers disagree"));
  }

  sort(order, reversed) {
    Object.assign(this, { order, reversed });
    this.select.value = order;
    this.arrange();
  }

  /** Sorts and filters, then draws from the top. */
  arrange() {
    const [kind, column] = this.order.split(":");
    this.rows = this.model.rows.filter((row) => !this.only || row.disagree).sort(ORDERS[kind](Number(column)));
    if (this.reversed) this.rows.reverse();
    const disagree = this.model.rows.filter((row) => row.disagree).length;
    this.count.textContent = `${plural(this.rows.length, "seed")} shown; samplers disagree on ${whole(disagree)} of ${whole(this.model.rows.length)}.`;
    this.box.setAttribute("aria-rowcount", this.rows.length + 1);
    this.body.style.height = `${this.rows.length * ROW}px`;
    this.focus = [0, this.focus[1]];
    this.drawHead();
    this.drawn.forEach((element) => element.remove());
    this.drawn.clear();
    this.box.scrollTop = 0;
    this.draw();
  }

  drawHead() {
    const heading = (words, order, detail) => {
      const sorted = this.order === order;
      const descends = (order === "seed") === this.reversed;
      const button = h("button", { type: "button", onclick: () => this.sort(order, sorted && !this.reversed) },
        h("span", { class: "columnName" }, words), detail ? h("span", { class: "columnDetail" }, detail) : null,
        h("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (descends ? "\u25be" : "\u25b4") : ""));
      return h("div", { role: "columnheader", "aria-sort": sorted ? (descends ? "descending" : "ascending") : "none" }, button);
    };
    const rate = (arm) => (arm.success ? percent(arm.success.mean) : fixed(arm.score.mean));
    this.head.replaceChildren(heading("seed", "seed", ""), ...this.model.columns.map((arm, k) => heading(arm.short, `arm:${k}`, rate(arm))));
  }

  later() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => { this.asked = 0; this.draw(); });
  }

  /** Elements of the rows in sight, and of the focused one, which would lose the focus without. */
  draw() {
    const height = this.box.clientHeight || 480;
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - 6);
    const last = Math.min(this.rows.length - 1, first + Math.ceil(height / ROW) + 12);
    for (const [index, element] of this.drawn) {
      if ((index < first || index > last) && index !== this.focus[0]) {
        element.remove();
        this.drawn.delete(index);
      }
    }
    const added = document.createDocumentFragment();
    const add = (index) => {
      if (this.drawn.has(index) || !this.rows[index]) return;
      const element = this.row(index);
      this.drawn.set(index, element);
      added.append(element);
    };
    for (let index = first; index <= last; index++) add(index);
    add(this.focus[0]);
    this.body.append(added);
  }

  row(index) {
    const row = this.rows[index];
    const element = h("div", { class: "gridRow", role: "row", "aria-rowindex": index + 2, "data-row": index });
    element.style.top = `${index * ROW}px`;
    element.append(h("div", { class: "seed", role: "rowheader" }, String(row.seed)), ...row.cells.map((cell, column) => this.cell(row, cell, index, column)));
    return element;
  }

  cell(row, cell, index, column) {
    const arm = this.model.columns[column];
    const here = this.focus[0] === index && this.focus[1] === column;
    const base = { role: "gridcell", tabindex: here ? 0 : -1, "data-row": index, "data-column": column };
    if (!cell) return h("div", { ...base, class: "cell none", "aria-label": `seed ${row.seed}, ${arm.short}: not run` }, "\u2013");
    const video = this.videoOf(arm, row.seed);
    const element = h("div", { ...base, class: `cell ${outcomeClass(cell)}`, "aria-label": `seed ${row.seed}, ${arm.short}: ${outcomeWords(cell)}${video ? ", video" : ""}` },
      h("span", { class: "sign" }, outcomeSign(cell)), h("span", {}, scoreText(cell.score)), h("span", { class: "play" }, video ? "\u25b6" : ""));
    if (cell.success === null && cell.score !== null) {
      element.style.setProperty("--share", `${Math.round(100 * clamp((cell.score - this.model.low) / (this.model.range || 1), 0, 1))}%`);
    }
    return element;
  }

  clicked(event) {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    const [row, column] = [Number(cell.dataset.row), Number(cell.dataset.column)];
    this.moveTo(row, column);
    if (this.rows[row].cells[column]) this.open(this.model, this.rows[row], column);
  }

  pressed(event) {
    const [row, column] = this.focus;
    const lastRow = this.rows.length - 1, lastColumn = this.model.columns.length - 1, page = Math.floor(this.box.clientHeight / ROW) - 2;
    const far = event.ctrlKey || event.metaKey;
    const moves = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      PageUp: [row - page, column], PageDown: [row + page, column], Home: [far ? 0 : row, 0], End: [far ? lastRow : row, lastColumn],
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.rows[row]?.cells[column]) this.open(this.model, this.rows[row], column);
    } else if (moves[event.key]) {
      event.preventDefault();
      this.moveTo(clamp(moves[event.key][0], 0, lastRow), clamp(moves[event.key][1], 0, lastColumn));
    }
  }

  find([row, column]) {
    return this.drawn.get(row)?.children[column + 1];
  }

  moveTo(row, column) {
    this.find(this.focus)?.setAttribute("tabindex", -1);
    this.focus = [row, column];
    const seen = this.box.clientHeight - this.head.offsetHeight - 4;
    const top = row * ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW > this.box.scrollTop + seen) this.box.scrollTop = top + ROW - seen;
    this.draw();
    const cell = this.find(this.focus);
    const left = cell.offsetLeft - SEED_WIDTH, right = cell.offsetLeft + cell.offsetWidth;
    if (left < this.box.scrollLeft) this.box.scrollLeft = left;
    else if (right > this.box.scrollLeft + this.box.clientWidth) this.box.scrollLeft = right - this.box.clientWidth;
    cell.setAttribute("tabindex", 0);
    cell.focus({ preventScroll: true });
  }
}

const outcomeClass = ({ success, score }) => (success === null ? (score === null ? "none" : "scored") : success ? "succeeded" : "failed");
const outcomeSign = ({ success }) => (success === null ? "" : success ? "\u2713" : "\u2715");

function outcomeWords({ success, score, steps }) {
  const outcome = success === null ? "" : success ? "success, " : "failure, ";
  return `${outcome}score ${scoreText(score)}, ${plural(steps, "step")}`;
}
