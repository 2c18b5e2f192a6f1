// The page: its sections in order, from the report.

const started = performance.now();
const REPORT = JSON.parse(document.getElementById("report").textContent);
const SAMPLERS = [...new Set(Object.values(REPORT.arms).map((arm) => arm.sampler))];
const TASKS = [...new Set(Object.values(REPORT.arms).map((arm) => arm.task))];
const NAMES = { pusht: "PushT", lift: "Lift", can: "Can", square: "Square", transport: "Transport", tool_hang: "Tool hang" };

const taskTitle = (task) => (Object.hasOwn(NAMES, task) ? NAMES[task] : task);
const shortName = (name, task) => (name.startsWith(`${task}/`) ? name.slice(task.length + 1) : name);

const ARMS = Object.entries(REPORT.arms).map(([name, arm]) => ({
  ...arm, name, short: shortName(name, arm.task), full: `${taskTitle(arm.task)} \u00b7 ${shortName(name, arm.task)}`,
  kind: SAMPLERS.indexOf(arm.sampler), latency: arm.plan_latency_ms,
}));

const QUESTIONS = REPORT.questions.map((q) => {
  const task = REPORT.arms[q.arm].task;
  return { ...q, task, short: shortName(q.arm, task), shortReference: shortName(q.reference, task) };
});

function section(id, title, ...intro) {
  const place = document.getElementById(id);
  place.append(h("h2", { id: `${id}-title` }, title), ...intro);
  return place;
}

function link(id, words) {
  return h("a", { href: `#${id}` }, words);
}

// ---------------------------------------------------------------------------------------------- the head

function drawHead() {
  const decided = QUESTIONS.filter((q) => q.decided).length;
  const episodes = ARMS.reduce((sum, arm) => sum + arm.episodes.seed.length, 0);
  const facts = [`${decided} of ${plural(QUESTIONS.length, "question")} decided`, plural(ARMS.length, "arm"), plural(TASKS.length, "task"),
    plural(episodes, "episode"), REPORT.date].filter(Boolean);
  const sections = [["verdicts", "Verdicts"], ["differences", "Differences"], ["latency", "Reward and latency"], ["episodes", "Episodes"],
    ["cost", "Cost of a plan"], ["run", "What was run"], ["reading", "How to read this"]];
  document.querySelector("header > div").append(
    h("h1", {}, REPORT.title || REPORT.name),
    h("p", { class: "facts" }, facts.join(" \u00b7 ")),
    h("nav", { "aria-label": "Sections" }, h("ul", {}, sections.map(([id, words]) => h("li", {}, link(id, words))))));
}

// ---------------------------------------------------------------------------------------------- verdicts

function verdictKind(q) {
  if (!q.decided || !q.claim) return "open";
  return q.claim === "worse" ? "bad" : "good";
}

/** A margin or a difference in the unit of its measure. */
function amount(q, value) {
  return q.measure === "success" ? `${short(100 * value)} percentage points` : short(value);
}

/** The claim as a clause: "rti scores as well as ddpm on PushT (within 0.03)". */
function claimWords(q) {
  const [does, well, less, more] = q.measure === "success" ? ["succeeds", "as often as", "less often than", "more often than"]
    : ["scores", "as well as", "lower than", "higher than"];
  const within = amount(q, q.margin), where = `on ${taskTitle(q.task)}`;
  switch (q.claim) {
    case "better": return `${q.short} ${does} ${more} ${q.shortReference} ${where}`;
    case "worse": return `${q.short} ${does} ${less} ${q.shortReference} ${where} by more than ${within}`;
    case "non_inferior": return `${q.short} ${does} at least ${well} ${q.shortReference} ${where}, to within ${within}`;
    default: return `${q.short} ${does} ${well} ${q.shortReference} ${where} (within ${within})`;
  }
}

function verdictSentence(q) {
  if (q.decided && q.claim) return [h("strong", {}, `${claimWords(q)}: `), `shown after ${plural(q.n, "seed")}.`];
  return [h("strong", {}, `Not decided: whether ${claimWords({ ...q, claim: null })}. `), `${plural(q.n, "seed")} so far.`];
}

/** What was saved, or what is missing. */
function verdictReason(q) {
  if (q.decided) {
    if (!q.fixed_n) return "";
    const saved = q.fixed_n - q.n;
    if (saved > 0) return `${plural(saved, "seed")} saved: a test of a size fixed in advance would have needed ${whole(q.fixed_n)}.`;
    return `A test of a size fixed in advance would have needed ${plural(q.fixed_n, "seed")}, had the difference and its spread been known.`;
  }
  const end = { budget: `The budget of ${plural(REPORT.budget ?? q.n, "seed")} is used up. `, unfinished: "The study isn't finished. " }[q.stopped] ?? "";
  if (q.seeds_needed) return `${end}About ${plural(q.seeds_needed, "more seed")} would decide, if the difference and its spread stay as they are.`;
  return `${end}How many seeds would decide can't be said: the difference lies too near to where verdicts change.`;
}

function verdictItem(q) {
  const kind = verdictKind(q);
  const [sign, words] = { good: ["\u2713", "Shown"], bad: ["\u2715", "Shown to be worse"], open: ["?", "Open"] }[kind];
  const [low, high] = q.interval;
  const reason = verdictReason(q);
  return h("li", { class: `verdict ${kind}` },
    h("span", { class: "badge", role: "img", "aria-label": words }, sign),
    h("div", { class: "claim" }, h("p", { class: "sentence" }, verdictSentence(q)), reason ? h("p", { class: "reason" }, reason) : null),
    h("dl", { class: "figures" },
      h("div", {}, h("dt", {}, `Difference, ${short(100 * q.confidence)} % interval`),
        h("dd", {}, h("b", {}, signed(q.mean)), ` [${signed(low)}, ${signed(high)}]`)),
      h("div", {}, h("dt", {}, "Seeds"), h("dd", {}, whole(q.n)))));
}

function drawVerdicts() {
  const place = section("verdicts", "Verdicts",
    h("p", { class: "lead" }, "Every sampler of a question ran the same seeds as its reference. The interval holds the true mean difference with the confidence that is named, however often the study looked; the margin is the largest difference that doesn\u2019t matter. ", link("reading", "More on how to read this"), "."));
  if (REPORT.unfinished?.length) {
    place.append(h("p", { class: "notice" }, `This study isn\u2019t finished: ${REPORT.unfinished.join(", ")} would go on. The same command continues it.`));
  }
  for (const [task, questions] of groupBy(QUESTIONS, (q) => q.task)) {
    if (TASKS.length > 1) place.append(h("h3", { class: "task" }, taskTitle(task)));
    place.append(h("ul", { class: "verdicts" }, questions.map(verdictItem)));
  }
  if (!QUESTIONS.length) place.append(h("p", {}, "No question was asked."));
}

// ---------------------------------------------------------------------------------------------- sections

function drawDifferences() {
  const place = section("differences", "Differences");
  const ranges = groupBy(QUESTIONS, (q) => (q.measure === "success" ? "[0,1]" : JSON.stringify(REPORT.arms[q.arm].reward_range ?? [0, 1])));
  let count = 0;
  for (const questions of ranges.values()) {
    figure(place, {
      name: count ? `differences_${count}` : "differences", title: "Paired differences to the reference", draw: differencesPlot(questions),
      about: "A dot is the mean difference over the seeds, its line the interval, the shaded band the margin on both sides of zero. An arrow marks an interval that goes on beyond the axis.",
    });
    count += 1;
  }
}

const MEASURES = {
  score: (arm) => arm.score.mean === null ? null : { mean: arm.score.mean, low: arm.score.mean - NORMAL_95 * (arm.score.standard_error ?? 0), high: arm.score.mean + NORMAL_95 * (arm.score.standard_error ?? 0) },
  success: (arm) => arm.success && { mean: arm.success.mean, low: arm.success.interval_95[0], high: arm.success.interval_95[1] },
};

function drawLatency() {
  const place = section("latency", "Reward and latency");
  let chosen = "score";
  const made = {};
  const choice = (name, words) => h("label", { class: "check" }, h("input", {
    type: "radio", name: "measure", value: name, checked: name === chosen, onchange: () => { chosen = name; made.figure.redraw(); },
  }), words);
  made.figure = figure(place, {
    name: "latency", title: "Reward against latency of a plan",
    about: "Upright bars are 95 % intervals of the arm\u2019s own mean (the differences above are more precise, since they are paired). The thin line to the right ends at the 99th percentile of the latency.",
    controls: ARMS.some((arm) => arm.success) ? [h("span", { class: "legendWord" }, "Show"), choice("score", "score"), choice("success", "success")] : [],
    draw: (width) => latencyPlot(ARMS, MEASURES[chosen], chosen)(width),
  });
  const untimed = ARMS.filter((arm) => !arm.latency).map((arm) => arm.name);
  if (untimed.length) place.append(h("p", { class: "note" }, `Not timed: ${untimed.join(", ")}.`));
}

function drawEpisodes() {
  const place = section("episodes", "Episodes",
    h("p", { class: "lead" }, h("span", { class: "key succeeded" }, "\u2713 success"), " ", h("span", { class: "key failed" }, "\u2715 failure"), " with the episode\u2019s score; \u25b6 has a video. A sampler disagrees with another where one succeeds and the other fails (where success isn\u2019t known: where scores lie a tenth of their range apart). Arrow keys move, Enter opens."));
  const panel = (task) => {
    const element = h("div", { class: "panel" });
    return { element, show: once(() => new EpisodeGrid(element, gridModel(task, ARMS), openEpisode, videoOf)) };
  };
  tabs(place, TASKS.map((task) => ({ id: task, title: taskTitle(task), ...panel(task) })));
}

function once(run) {
  let made;
  return () => (made ??= run());
}

/** Panels of which one is shown; one panel needs no tabs. */
function tabs(place, panels) {
  const buttons = panels.map((panel, k) => h("button", { type: "button", role: "tab", id: `tab-${k}`, "aria-controls": `panel-${k}`, onclick: () => show(k) }, panel.title));
  panels.forEach((panel, k) => fill(panel.element, panels.length > 1 ? { role: "tabpanel", id: `panel-${k}`, "aria-labelledby": `tab-${k}` } : {}, []));
  function show(chosen) {
    buttons.forEach((button, k) => { button.setAttribute("aria-selected", k === chosen); button.tabIndex = k === chosen ? 0 : -1; });
    panels.forEach((panel, k) => { panel.element.hidden = k !== chosen; });
    panels[chosen].show();
  }
  const list = h("div", { role: "tablist", "aria-label": "Tasks", class: "tabs", onkeydown: (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (buttons.indexOf(event.target) + step + buttons.length) % buttons.length;
    show(next);
    buttons[next].focus();
  } }, buttons);
  if (panels.length > 1) place.append(list);
  place.append(...panels.map((panel) => panel.element));
  show(0);
}

// ------------------------------------------------------------------------------------------ the dialog

function videoOf(arm, seed) {
  const name = REPORT.videos.files?.[arm.name]?.[seed];
  return REPORT.videos.embedded?.[arm.name]?.[seed] ?? (name ? name.split("/").map(encodeURIComponent).join("/") : null);
}

function openEpisode(model, row, column) {
  const dialog = document.getElementById("episode");
  fillDialog(dialog, model, row, column);
  if (!dialog.open) dialog.showModal();
}

function fillDialog(dialog, model, row, column) {
  const arm = model.columns[column], cell = row.cells[column], address = videoOf(arm, row.seed);
  const stage = h("div", { class: "stage" });
  if (address) stage.append(player(address, arm, row.seed, stage));
  else stage.append(...withoutVideo());
  const others = h("tbody", {}, model.columns.map((other, k) => row.cells[k] && h("tr", { class: k === column ? "chosen" : null },
    h("th", { scope: "row" }, h("button", { type: "button", class: "plain", "aria-current": k === column ? "true" : null,
      onclick: () => { fillDialog(dialog, model, row, k); dialog.querySelector("[aria-current]").focus(); } }, other.short)),
    h("td", {}, `${outcomeSign(row.cells[k])} ${scoreText(row.cells[k].score)}`), h("td", {}, whole(row.cells[k].steps)), h("td", {}, videoOf(other, row.seed) ? "\u25b6" : ""))));
  dialog.replaceChildren(
    h("div", { class: "dialogHead" }, h("h2", { id: "episode-title" }, `${arm.full}, seed ${row.seed}`),
      h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close")),
    h("p", { class: "reason" }, `${outcomeSign(cell)} ${outcomeWords(cell)}`), stage,
    h("h3", {}, "The same seed under the other samplers"),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Sampler", "Score", "Steps", "Video"].map((words) => h("th", { scope: "col" }, words)))), others)));
}

function player(address, arm, seed, stage) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const video = h("video", { src: address, controls: true, loop: true, playsinline: true, preload: "auto", "aria-label": `Video of ${arm.short}, seed ${seed}` });
  video.muted = true;
  video.autoplay = !calm;
  video.addEventListener("error", () => stage.replaceChildren(h("p", {}, `The video ${decodeURIComponent(address.slice(0, 200))} isn\u2019t beside this page, or can\u2019t be played here.`), ...withoutVideo()));
  return video;
}

function withoutVideo() {
  if (!REPORT.videos.command) return [h("p", {}, "There is no video of this episode.")];
  return [h("p", {}, "There is no video of this episode. This command makes videos, first of the seeds on which samplers disagree, then of failures; a larger number makes more:"), copyable(REPORT.videos.command)];
}

function copyable(words) {
  const code = h("code", {}, words);
  const button = h("button", { type: "button", class: "quiet", onclick: async () => {
    await copy(words, code);
    button.textContent = "Copied";
    say("Copied");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  } }, "Copy");
  return h("div", { class: "command" }, h("pre", { tabindex: 0, "aria-label": "Command" }, code), button);
}

/** Files opened without a server may have no clipboard: then the text is selected and copied as by hand. */
async function copy(words, element) {
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    getSelection().selectAllChildren(element);
    document.execCommand("copy");
  }
}

// --------------------------------------------------------------------------------------- cost of a plan

function drawCost() {
  const place = section("cost", "Cost of a plan");
  place.append(h("h3", {}, "The numbers of every arm"), numbersTable());
  const counted = (key) => ARMS.filter((arm) => arm[key]?.values.length).map((arm) => ({
    task: arm.task, label: arm.short, kind: arm.kind, bins: countedBins(arm[key]), median: countedMedian(arm[key]),
    words: `mean ${short(countedMean(arm[key]))}`,
  }));
  const add = (name, title, rows, label, log, about) => rows.length && figure(place, { name, title, about, draw: distributionsPlot(rows, { label, log }) });
  add("iterations", "Iterations per plan", counted("iterations"), "iterations per plan", spans("iterations"), "An iteration is a network call that waits for the one before. The bars say how often a plan took so many; every row has its own height. The triangle is the median.");
  add("nfe", "Network function evaluations per plan", counted("nfe"), "NFE per plan", spans("nfe"), "NFE counts the nodes that went through the network. Parallel samplers trade more evaluations for fewer iterations.");
  add("plan_latency", "Latency of a plan", latencyRows(), "latency of a plan for one robot, ms", true, "Every plan that was timed. The triangle is the median.");
  const timelines = ARMS.filter((arm) => arm.timeline?.lateness_ms.length);
  if (timelines.length) {
    figure(place, { name: "deadlines", title: "Deadlines of the control loop", draw: deadlinesPlot(timelines),
      about: "When each tick\u2019s action was ready, in milliseconds after the next tick\u2019s deadline: below zero is in time; \u2715 marks ticks that were late, in the shaded zone." });
  }
}

/** Whether counts span so much that only a log axis shows the small ones. */
function spans(key) {
  const [low, high] = extent(ARMS.flatMap((arm) => arm[key]?.values ?? []));
  return low >= 1 && high > 20 * low;
}

function latencyRows() {
  const timed = ARMS.filter((arm) => arm.latency?.values.length);
  if (!timed.length) return [];
  const [low, high] = extent(timed.flatMap((arm) => arm.latency.values));
  return timed.map((arm) => ({
    task: arm.task, label: arm.short, kind: arm.kind, bins: logBins(arm.latency.values, Math.max(low * 0.9, 1e-3), high * 1.1), median: arm.latency.p50,
    words: `p50 ${short(arm.latency.p50)}${arm.latency.p99 ? `, p99 ${short(arm.latency.p99)}` : `, max ${short(arm.latency.max)}`}`,
  }));
}

function numbersTable() {
  const columns = [
    ["Arm", (arm) => arm.name], ["Seeds", (arm) => whole(arm.score.n)],
    ["Score \u00b1 s.e.", (arm) => `${fixed(arm.score.mean, 3)} \u00b1 ${fixed(arm.score.standard_error, 3)}`],
    ["Success [95 %]", (arm) => (arm.success ? `${percent(arm.success.mean)} [${percent(arm.success.interval_95[0])}, ${percent(arm.success.interval_95[1])}]` : "unknown")],
    ["Iterations", (arm) => short(arm.iterations && countedMean(arm.iterations))], ["NFE", (arm) => short(arm.nfe && countedMean(arm.nfe))],
    ["Latency p50, ms", (arm) => short(arm.latency?.p50)], ["p99, ms", (arm) => short(arm.latency?.p99)],
    ["Missed ticks", (arm) => (arm.timeline ? whole(arm.timeline.missed) : "\u2013")],
  ];
  const smooth = [["Jump at joins", "jump"], ["LDLJ", "ldlj"], ["SPARC", "sparc"]];
  if (ARMS.some((arm) => arm.smoothness)) columns.push(...smooth.map(([words, key]) => [words, (arm) => short(arm.smoothness?.[key].median)]));
  return table("The numbers of every arm", columns, ARMS);
}

/** A table that scrolls by itself where it is too wide. */
function table(label, columns, rows) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", {},
    h("thead", {}, h("tr", {}, columns.map(([words, , kind]) => h("th", { scope: "col", class: kind }, words)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([, cell, kind], k) => h(k ? "td" : "th", k ? { class: kind } : { scope: "row" }, cell(row))))))));
}

// ---------------------------------------------------------------------------------- what was run, reading

function drawRun() {
  const place = section("run", "What was run");
  if (REPORT.command) place.append(copyable(REPORT.command));
  const seeds = REPORT.validation_seeds;
  const facts = {
    Date: REPORT.date, Error: REPORT.error && `${percent(REPORT.error)} chance of any false claim of a kind in the whole study`,
    Seeds: REPORT.first_seed !== undefined && `from ${REPORT.first_seed}, in blocks of ${REPORT.block}, at most ${whole(REPORT.budget ?? 0)} per arm${seeds ? `; ${seeds[0]} to ${seeds[1]} are for choosing settings and are not used here` : ""}`,
    Code: REPORT.code_sha256, ...named("Machine", REPORT.machine), Versions: Object.entries(REPORT.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", "),
  };
  place.append(h("dl", { class: "run" }, Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", { class: name === "Code" ? "hash" : null }, String(value))])));
  const said = (value) => (value === null || value === undefined ? "\u2013" : Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value));
  const optional = [["Plans, Hz", "rate_hz"], ["Latency, ms", "latency_ms"], ["Blending", "blending"], ["Disturbance", "disturbance"]];
  const hash = (value) => (value ? h("code", { title: value }, value.slice(0, 12)) : "\u2013");
  place.append(h("h3", {}, "Arms"), table("Arms", [
    ["Arm", (arm) => arm.name], ["Sampler", (arm) => arm.sampler, "words"], ["Checkpoint", (arm) => said(arm.checkpoint), "words"],
    ["Weights", (arm) => hash(arm.weights_sha256), "words"], ["Data", (arm) => hash(arm.data_sha256), "words"], ["Control, Hz", (arm) => said(arm.control_hz)],
    ...optional.filter(([, key]) => ARMS.some((arm) => (arm[key] ?? null) !== null)).map(([words, key]) => [words, (arm) => said(arm[key])]),
  ], ARMS));
  place.append(h("details", {}, h("summary", {}, "Settings of the samplers, and whole hashes"), h("pre", { tabindex: 0, "aria-label": "Settings" }, JSON.stringify(Object.fromEntries(ARMS.map((arm) => [arm.name, { weights_sha256: arm.weights_sha256, data_sha256: arm.data_sha256, sampler: arm.sampler_config }])), null, 2))));
}

function named(name, values) {
  const words = Object.entries(values ?? {}).filter(([, value]) => value !== null).map(([key, value]) => `${key} ${value}`).join(", ");
  return words ? { [name]: words } : {};
}

const READING = [
  ["Arm and question", "An arm is a task, a checkpoint, a sampler and how time passes. A question compares an arm with its reference, in score or in success."],
  ["Paired seeds", "A seed sets the start of an episode and its noise. Both arms run the same seeds, and what counts is the difference on each: what makes a seed hard for both cancels out."],
  ["Margin", "The largest difference that doesn\u2019t matter, chosen before the study. \u201cAs well as, within 0.03\u201d says that the whole interval lies between \u22120.03 and +0.03. It doesn\u2019t say that the two are the same."],
  ["Interval", "It holds the true mean difference at the named confidence, at every look at once. So a study may stop as soon as a verdict is reached, without more false verdicts. The price is a wider interval than that of a single look at a number of seeds that was fixed in advance."],
  ["Open questions", "\u201cNot decided\u201d is no evidence for either side: neither that the samplers differ, nor that they don\u2019t."],
  ["Several questions", "All are tested together (Holm\u2019s procedure), so the chance of any false claim of a kind in the whole study stays below the error that is named above."],
  ["Iterations, NFE", "An iteration is a network call that waits for the one before; NFE counts all nodes that went through the network. Iterations set the latency, NFE the work."],
  ["What isn\u2019t shown", "The seeds stand for starts of this task with this checkpoint. Another checkpoint, task or robot may answer otherwise."],
];

function drawReading() {
  section("reading", "How to read this page").append(h("dl", { class: "reading" }, READING.map(([term, words]) => h("div", {}, h("dt", {}, term), h("dd", {}, words)))));
}

document.getElementById("episode").addEventListener("close", (event) => event.target.replaceChildren());
document.getElementById("episode").addEventListener("click", (event) => event.target === event.currentTarget && event.target.close());
[drawHead, drawVerdicts, drawDifferences, drawLatency, drawEpisodes, drawCost, drawRun, drawReading].forEach((draw) => draw());
watchWidths();
document.documentElement.dataset.builtMs = Math.round(performance.now() - started);
