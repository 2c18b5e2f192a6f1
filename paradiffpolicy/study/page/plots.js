// The figures: differences, reward against latency, distributions, deadlines.

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ------------------------------------------------------------------------------------------- differences

/** Paired differences with their intervals, grouped by task; the band is the margin. */
function differencesPlot(questions) {
  return (width) => {
    const wide = width >= 640;
    const groups = groupBy(questions, (q) => q.task);
    const names = questions.map((q) => `${q.short} \u2212 ${q.shortReference}, ${q.measure}`);
    const left = wide ? Math.min(Math.max(...names.map((name) => widthOf(name))) + 24, width * 0.4) : 12;
    const right = wide ? width - 190 : width - 12;
    const limit = differenceLimit(questions);
    const x = linear(-limit, limit, left, right);
    const rowHeight = wide ? 34 : 52, headHeight = 40;
    const height = 12 + groups.size * headHeight + questions.length * rowHeight + 50;
    const svg = canvasOf(width, height, `Paired differences of ${questions.length} questions with their intervals`);
    const bottom = height - 44;
    x.ticks(wide ? 8 : 4).forEach((tick) => svg.append(line(x(tick), 12, x(tick), bottom, tick === 0 ? "zero" : "grid"),
      text(x(tick), bottom + 16, signed(tick, limit < 0.02 ? 3 : limit < 1 ? 2 : 1), "tick", "middle")));
    drawGroups(svg, groups, 12, headHeight, rowHeight, (q, y) => drawDifference(svg, q, x, y, rowHeight, { wide, left, right, width }));
    svg.append(text((left + right) / 2, height - 8, "lower than the reference  \u2190  difference  \u2192  higher", "tick", "middle"));
    return svg;
  };
}

function drawDifference(svg, q, x, y, rowHeight, { wide, left, right, width }) {
  const middle = y + (wide ? rowHeight / 2 : rowHeight - 15);
  const name = `${q.short} \u2212 ${q.shortReference}, ${q.measure}`;
  const [from, to] = [x(clamp(-q.margin, x.low, x.high)), x(clamp(q.margin, x.low, x.high))];
  svg.append(rect(from, middle - 12, to - from, 24, "band"));
  svg.append(wide ? text(left - 16, middle + 4, name, "label", "end") : text(12, y + 16, name, "label"));
  const numbers = `${signed(q.mean)} [${signed(q.interval[0])}, ${signed(q.interval[1])}]`;
  if (wide) svg.append(text(width, middle + 4, numbers, "number", "end"));
  if (q.mean === null || q.interval[0] === null) return;
  const [low, high] = q.interval.map((value) => x(clamp(value, x.low, x.high)));
  const style = `interval ${verdictKind(q)}`;
  svg.append(line(low, middle, high, middle, style));
  const end = (at, value, side) => (value >= x.low && value <= x.high)
    ? line(at, middle - 5, at, middle + 5, style)
    : s("path", { d: `M${round(at + 6 * side)},${middle}l${-7 * side},-5v10Z`, class: `arrowhead ${verdictKind(q)}` });
  svg.append(end(low, q.interval[0], -1), end(high, q.interval[1], 1));
  if (q.mean >= x.low && q.mean <= x.high) {
    svg.append(s("circle", { cx: round(x(q.mean)), cy: middle, r: 4.5, class: `estimate ${verdictKind(q)}` },
      s("title", {}, `${name}: ${numbers}, ${q.n} seeds`)));
  }
}

/** Wide enough for most intervals; those of few seeds end in an arrow. */
function differenceLimit(questions) {
  const margin = Math.max(...questions.map((q) => q.margin));
  const ends = questions.flatMap((q) => q.interval).filter((value) => value !== null).map(Math.abs);
  const means = questions.map((q) => Math.abs(q.mean ?? 0));
  return Math.min(Math.max(...ends, margin) * 1.08, Math.max(5 * margin, 1.6 * Math.max(...means))) || 1;
}

/** The rows of each task under its heading; `draw` takes a row and where it begins. */
function drawGroups(svg, groups, top, headHeight, rowHeight, draw) {
  let y = top;
  for (const [task, members] of groups) {
    svg.append(text(0, y + 26, taskTitle(task), "group"));
    y += headHeight;
    for (const row of members) {
      draw(row, y);
      y += rowHeight;
    }
  }
}

function groupBy(values, key) {
  const groups = new Map();
  values.forEach((value) => groups.set(key(value), [...(groups.get(key(value)) ?? []), value]));
  return groups;
}

// --------------------------------------------------------------------------------- reward against latency

/** One panel per task: reward against the median latency of a plan. */
function latencyPlot(arms, measure, word) {
  return (width) => {
    const timed = arms.filter((arm) => arm.latency && (measure(arm)?.mean ?? null) !== null);
    const groups = [...groupBy(timed, (arm) => arm.task)];
    const columns = Math.min(width >= 760 ? 2 : 1, groups.length || 1);
    const gap = 28, panel = (width - gap * (columns - 1)) / columns, panelHeight = columns === 1 && width > 700 ? 380 : 320;
    const rows = Math.ceil(groups.length / columns) || 1;
    const svg = canvasOf(width, rows * panelHeight, "Reward against the median latency of a plan, by task");
    const [low, high] = extent(timed.map((arm) => arm.latency.p50));
    groups.forEach(([task, members], index) => {
      const group = s("g", { transform: `translate(${(index % columns) * (panel + gap)},${Math.floor(index / columns) * panelHeight})` });
      drawLatencyPanel(group, `${taskTitle(task)}, ${word}`, members, measure, { width: panel, height: panelHeight, low: low / 1.6, high: high * 1.6 });
      svg.append(group);
    });
    if (!groups.length) svg.append(text(0, 30, "No plan was timed.", "label"));
    return svg;
  };
}

function drawLatencyPanel(svg, title, arms, measure, { width, height, low, high }) {
  const points = arms.map((arm) => ({ arm, value: measure(arm) }));
  const [bottomValue, topValue] = extent(points.flatMap(({ value }) => [value.low, value.high]));
  const pad = Math.max((topValue - bottomValue) * 0.12, 0.02);
  const x = logarithmic(low, high, 40, width - 12), y = linear(bottomValue - pad, topValue + pad, height - 52, 40);
  svg.append(text(0, 18, title, "group"));
  y.ticks(5).forEach((tick) => svg.append(line(40, y(tick), width - 12, y(tick), "grid"), text(34, y(tick) + 4, fixed(tick, y.high - y.low < 0.2 ? 2 : 1 + (y.high - y.low < 0.5)), "tick", "end")));
  x.ticks(width > 420 ? 9 : 5).forEach((tick) => svg.append(line(x(tick), height - 52, x(tick), height - 47, "axis"), text(x(tick), height - 32, whole(tick), "tick", "middle")));
  svg.append(line(40, height - 52, width - 12, height - 52, "axis"), text(width / 2, height - 10, "median latency of a plan, ms (log scale)", "tick", "middle"));
  const tick = 1000 / arms[0].control_hz;
  if (tick > low && tick < high) {
    svg.append(line(x(tick), 40, x(tick), height - 52, "deadline"), text(x(tick) - 4, height - 58, "one tick", "tick", "end"));
  }
  const taken = points.map(({ arm, value }) => ({ x0: x(arm.latency.p50) - 7, x1: x(arm.latency.p50) + 7, y0: y(value.mean) - 7, y1: y(value.mean) + 7 }));
  for (const { arm, value } of points) {
    const [px, py] = [x(arm.latency.p50), y(value.mean)];
    svg.append(line(px, y(value.low), px, y(value.high), `bar colour${arm.kind % 8}`));
    if (arm.latency.p99) svg.append(line(px, py, Math.min(x(arm.latency.p99), width - 12), py, `bar thin colour${arm.kind % 8}`));
  }
  for (const { arm, value } of points) {
    const [px, py] = [x(arm.latency.p50), y(value.mean)];
    svg.append(mark(px, py, arm.kind));
    svg.append(placedLabel(arm.short, px, py, width, height, taken));
  }
}

/** A label beside its mark, in the first of several places that overlaps nothing. */
function placedLabel(words, px, py, width, height, taken) {
  const long = widthOf(words, 12), places = [];
  for (const dy of [-10, 18, -24, 32, -38, 46]) places.push([px + 8, py + dy, "start"], [px - 8, py + dy, "end"]);
  const box = ([x, y, anchor]) => ({ x0: anchor === "start" ? x : x - long, x1: anchor === "start" ? x + long : x, y0: y - 11, y1: y + 3 });
  const free = (b) => b.x0 >= 42 && b.x1 <= width && b.y0 >= 26 && b.y1 <= height - 54
    && taken.every((other) => b.x1 < other.x0 || b.x0 > other.x1 || b.y1 < other.y0 || b.y0 > other.y1);
  const place = places.find((each) => free(box(each))) ?? [Math.min(px + 8, width - long), py - 10, "start"];
  taken.push(box(place));
  return text(place[0], place[1], words, "label halo", place[2]);
}

// ---------------------------------------------------------------------------------------- distributions

/**
 * Histograms of several arms on one axis, a row each.
 * `rows`: [{task, label, kind, bins: [[from, to, share]], median, high, words}]
 */
function distributionsPlot(rows, { label, log }) {
  return (width) => {
    const wide = width >= 640;
    const groups = groupBy(rows, (row) => row.task);
    const left = wide ? Math.min(Math.max(...rows.map((row) => widthOf(row.label))) + 20, width * 0.34) : 8;
    const right = wide ? width - 170 : width - 12;
    const [low, high] = extent(rows.flatMap((row) => row.bins.flatMap((bin) => [bin[0], bin[1]])));
    const x = (log ? logarithmic : linear)(low, high === low ? low + 1 : high, left, right);
    const rowHeight = wide ? 36 : 56, headHeight = 38;
    const height = groups.size * headHeight + rows.length * rowHeight + 54;
    const svg = canvasOf(width, height, label);
    const bottom = height - 44;
    x.ticks(wide ? 8 : 5).filter((tick) => tick >= low && tick <= high).forEach((tick) => svg.append(line(x(tick), 8, x(tick), bottom, "grid"), text(x(tick), bottom + 16, whole(tick), "tick", "middle")));
    drawGroups(svg, groups, 0, headHeight, rowHeight, (row, y) => drawDistribution(svg, row, x, y, rowHeight, { wide, left, right, width }));
    svg.append(text((left + right) / 2, height - 8, label + (log ? " (log scale)" : ""), "tick", "middle"));
    return svg;
  };
}

function drawDistribution(svg, row, x, y, rowHeight, { wide: beside, left, right, width }) {
  const base = y + rowHeight - 6, tall = 24;
  const most = Math.max(...row.bins.map((bin) => bin[2]));
  svg.append(beside ? text(left - 14, base - 4, row.label, "label", "end") : text(8, y + 16, row.label, "label"));
  svg.append(beside ? text(width, base - 4, row.words, "number", "end") : text(width - 8, y + 16, row.words, "number", "end"));
  svg.append(line(left, base, right, base, "axis faint"));
  for (const [from, to, share] of row.bins) {
    const size = Math.max(1, (share / most) * tall), wide = clamp(x(to) - x(from) - 0.5, 3, 14);
    svg.append(rect((x(from) + x(to) - wide) / 2, base - size, wide, size, `bin colour${row.kind % 8}`));
  }
  if (row.median !== null) svg.append(s("path", { d: `M${round(x(row.median))},${base + 1}l-4,6h8Z`, class: "median" }));
}

/** Bins of counted whole numbers: one per value, or as many as are seen. */
function countedBins({ values, counts }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const [low, high] = extent(values), every = Math.max(1, Math.ceil((high - low + 1) / 60));
  const bins = new Map();
  values.forEach((value, index) => {
    const start = low + Math.floor((value - low) / every) * every;
    bins.set(start, (bins.get(start) ?? 0) + counts[index] / total);
  });
  return [...bins].map(([start, share]) => [start - 0.4, start + every - 0.6, share]);
}

/** Bins of equal ratio, for a log axis. */
function logBins(values, low, high, n = 72) {
  const ratio = Math.log(high / low) / n, counts = new Array(n).fill(0);
  values.forEach((value) => { counts[clamp(Math.floor(Math.log(value / low) / ratio), 0, n - 1)] += 1 / values.length; });
  return counts.map((share, k) => [low * Math.exp(k * ratio), low * Math.exp((k + 1) * ratio), share]).filter((bin) => bin[2] > 0);
}

function countedMean({ values, counts }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return total ? values.reduce((sum, value, index) => sum + value * counts[index], 0) / total : null;
}

function countedMedian({ values, counts }) {
  const half = counts.reduce((sum, count) => sum + count, 0) / 2;
  let seen = 0;
  return values.find((_, index) => (seen += counts[index]) >= half) ?? null;
}

// --------------------------------------------------------------------------------------------- deadlines

const LATE_LEFT = 44;

/** How late every tick's action was, of each arm that ran on a real clock. */
function deadlinesPlot(arms) {
  return (width) => {
    const rowHeight = 104, height = arms.length * rowHeight + 40;
    const svg = canvasOf(width, height, "Lateness of every tick of the control loop");
    const most = Math.max(...arms.map((arm) => arm.timeline.lateness_ms.length * (arm.timeline.every ?? 1)));
    const x = linear(0, most, LATE_LEFT, width - 8);
    arms.forEach((arm, index) => drawDeadlines(svg, arm, x, index * rowHeight, rowHeight, width));
    x.ticks(width > 640 ? 8 : 4).forEach((tick) => svg.append(text(x(tick), height - 24, whole(tick), "tick", "middle")));
    svg.append(text((LATE_LEFT + width) / 2, height - 6, "tick", "tick", "middle"));
    return svg;
  };
}

function drawDeadlines(svg, arm, x, top, rowHeight, width) {
  const { lateness_ms: late, missed, every = 1 } = arm.timeline;
  const [low, high] = extent(late), spread = Math.max(high - low, 1);
  const y = linear(Math.min(low, 0) - spread * 0.06, Math.max(high, 0) + spread * 0.12, top + rowHeight - 10, top + 30);
  svg.append(text(0, top + 18, arm.full, "label strong"));
  svg.append(text(width, top + 18, `${missed ? `\u2715 ${plural(missed, "missed tick")}` : "none missed"} of ${whole(late.length * every)}`, missed ? "number late" : "number", "end"));
  svg.append(rect(LATE_LEFT, top + 30, width - 8 - LATE_LEFT, Math.max(y(0) - top - 30, 0), "lateZone"));
  svg.append(line(LATE_LEFT, y(0), width - 8, y(0), "deadline"), text(LATE_LEFT - 6, y(0) + 4, "0", "tick", "end"));
  const lowest = Math.round(low);
  if (y(lowest) - y(0) > 14) svg.append(text(LATE_LEFT - 6, y(lowest) + 4, minus(String(lowest)), "tick", "end"));
  if (high > 0 && y(0) - y(high) > 14) svg.append(text(LATE_LEFT - 6, y(high) + 4, `+${Math.round(high)}`, "tick", "end"));
  const points = late.map((value, index) => `${round(x(index * every))},${round(y(value))}`);
  svg.append(s("polyline", { points: points.join(" "), class: `trace colour${arm.kind % 8}` }));
  const r = round(clamp((x(every) - x(0)) * 0.4, 1.2, 3.2));
  late.forEach((value, index) => {
    if (value > 0) svg.append(s("path", { d: `M${round(x(index * every))},${round(y(value))}m${-r},${-r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}`, class: "missed" }));
  });
}
