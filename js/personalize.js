// The live view on Train: the curves of a run during training, its last previews, and a button that ends a stage.
// It shows what the server sends, asks for it by the run's digest, and stores nothing else; see nodes/host/live.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "PersonalizeTrain";
const MOST = 4000; // points; beyond that a thinned history is loaded
const PREVIEWS = 4;
const COLORS = { mean: "#3d8fe8", fixed: "#e8842c", ratio: "#2fa37c", score: "#b069d6", stop: "#e0524d",
  identity: "#3d8fe8", text: "#2fa37c" };
const KEYS = ["ratio", "score", "identity", "text"]; // measurements of monitors: each has a panel
const LIMITS = { ratio: "stops below", score: "improves above", identity: "floor", text: "floor" };
const FINISH = "Ends the current stage after this step and keeps its result: later stages and the graph continue. "
  + "Cancel stops everything instead; queue again to resume the training.";
const STYLE = `
.personalize-live { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; height: 100%;
  padding: 8px 10px; overflow: hidden; border-radius: 8px; font: 12px/1.35 Inter, system-ui, sans-serif;
  color: var(--input-text, #ddd); background: var(--component-node-widget-background, var(--comfy-input-bg, #222));
  header { display: flex; gap: 8px; align-items: center; }
  span { flex: 1; min-width: 0; font-variant-numeric: tabular-nums; }
  button { padding: 2px 10px; border: 1px solid color-mix(in srgb, currentColor 35%, transparent); border-radius: 6px;
    font: inherit; color: inherit; background: none; white-space: nowrap; cursor: pointer; }
  button:hover:enabled { background: color-mix(in srgb, currentColor 12%, transparent); }
  button:disabled { opacity: .4; cursor: default; }
  .plot { position: relative; flex: 1 1 0; min-height: 0; }
  canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
  .strip { display: flex; gap: 6px; height: 166px; }
  .strip:empty, footer:empty { display: none; }
  a { flex: 0 1 auto; min-width: 0; color: inherit; text-decoration: none; font-size: 10px; text-align: center; }
  img { display: block; max-height: 150px; max-width: 100%; border-radius: 4px; }
}
/* Nodes 2.0 put the newest preview below the widgets, too; an app has only that one. */
[data-node-id]:has(.personalize-live) img.contain-size, [data-node-id]:has(.personalize-live) img.contain-size + div {
  display: none; }`;

const runs = new Map(); // run digest -> its history from the server
const shown = new Map(); // "workflow node" -> digest, for an editor that comes back to a workflow
const views = new Map(); // node -> its view
const root = () => app.rootGraph ?? app.graph;

function find(id) { // an execution id: "12:3" is node 3 in the subgraph of node 12
  let graph = root(), node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function show(workflow, id, digest) {
  shown.set(`${workflow} ${id}`, digest);
  const view = workflow === root().id && views.get(find(id));
  if (view) view.digest = digest;
  redraw(digest);
}

function redraw(digest) {
  for (const view of views.values()) if (view.digest === digest) view.update();
}

// ---- messages of the server

async function load(digest, ...queue) {
  const run = runs.get(digest) ?? { entries: [], previews: [], stops: [] };
  runs.set(digest, Object.assign(run, { queue })); // with the events that arrive meanwhile
  const answer = await api.fetchApi(`/personalize/runs/${digest}`).catch(() => null);
  if (answer?.ok) Object.assign(run, await answer.json());
  run.queue = null;
  queue.forEach((event) => add(run, event));
  redraw(digest);
}

function add(run, { entries, ...now }) {
  Object.assign(run, now, { seen: true, reused: false });
  if (!run.running) run.finishing = null;
  for (const entry of entries) {
    while (run.entries.at(-1)?.step >= entry.step) run.entries.pop(); // out of memory, a training goes back some steps
    run.entries.push(entry);
  }
}

function onStep({ detail: event }) {
  const run = runs.get(event.run), last = run?.entries.at(-1)?.step ?? 0;
  show(event.workflow ?? root().id, event.node, event.run);
  if (run?.queue) return run.queue.push(event);
  const missed = event.entries[0]?.step > last + 1;
  if (!run || missed || !event.running || run.entries.length > MOST) return load(event.run, event);
  add(run, event);
  redraw(event.run);
}

function onExecuted({ detail }) { // also for a training that was finished before
  const digest = detail.output?.personalize_run?.[0];
  if (!digest) return;
  show(root().id, detail.display_node ?? detail.node, digest);
  const run = runs.get(digest) ?? { entries: [], previews: [], stops: [] };
  runs.set(digest, Object.assign(run, { reused: !run.seen, seen: false }));
  if (!run.queue) load(digest);
}

// ---- the widget

class View {
  constructor(node) {
    this.node = node;
    node.hideOutputImages = true; // the strip shows the previews; the editor's own picture would cover what is below
    Object.defineProperty(node, "imgs", { get: () => undefined, set() {} });
    this.box = Object.assign(document.createElement("div"), { className: "personalize-live" });
    this.box.innerHTML = `<header><span></span><button disabled></button></header><div class="plot"><canvas></canvas></div>
      <div class="strip"></div><footer></footer>`;
    [this.text, this.button, this.canvas] = ["span", "button", "canvas"].map((name) => this.box.querySelector(name));
    [this.strip, this.footer] = [".strip", "footer"].map((name) => this.box.querySelector(name));
    this.button.title = FINISH;
    this.button.onclick = () => this.finish();
    const options = { serialize: false, hideOnZoom: false, margin: 6 };
    options.getMinHeight = () => this.height() + 12;
    options.getMaxHeight = () => (this.run ? undefined : 0);
    this.widget = node.addDOMWidget("live", "PERSONALIZE_LIVE", this.box, options);
    this.widget.serialize = false; // nor is it a value of a saved workflow
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.update();
  }

  get run() { return runs.get(this.digest); }

  height() {
    const { run } = this;
    return run ? 220 + 80 * monitors(run).length + (run.previews.length ? 172 : 0) + (run.running ? 0 : 24) : 0;
  }

  async finish() {
    const { run, digest } = this, body = JSON.stringify({ run: digest, client: api.clientId });
    run.finishing = run.stage;
    this.update();
    const answer = await api.fetchApi("/personalize/finish", { method: "POST", body });
    if (!answer.ok) this.footer.textContent = (await answer.json()).error;
  }

  update() {
    const { run, node } = this, height = this.height(), finishing = run?.finishing && run.finishing === run.stage;
    this.widget.hidden = !run;
    this.box.style.display = run ? "" : "none";
    this.box.style.minHeight = `${height}px`; // read by nodes that Vue renders
    if (run) {
      this.text.textContent = title(run);
      this.button.textContent = finishing ? "Finishing" : "Finish now";
      this.button.disabled = !run.running || finishing;
      this.footer.textContent = run.running ? "" : ended(run);
      this.pictures(run.previews.slice(-PREVIEWS));
    }
    if (height !== this.before) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    this.before = height;
    this.draw();
    node.setDirtyCanvas(true, true);
  }

  pictures(names) {
    const key = `${this.digest} ${names}`;
    if (this.strip.dataset.key === key) return;
    this.strip.dataset.key = key;
    this.strip.replaceChildren(...names.map((filename) => {
      const place = { filename, type: "output", subfolder: `personalize/runs/${this.digest}/previews` };
      const href = api.apiURL(`/view?${new URLSearchParams(place)}`);
      const link = Object.assign(document.createElement("a"), { href, target: "_blank" });
      link.append(Object.assign(new Image(), { src: href, alt: "" }), `step ${parseInt(filename.slice(5), 10)}`);
      return link;
    }));
  }

  draw() {
    const { offsetWidth: width, offsetHeight: height } = this.canvas;
    if (!this.run?.entries.length || !width || !height) return;
    const zoom = this.canvas.getBoundingClientRect().width / width; // of the editor
    const scale = window.devicePixelRatio * Math.min(3, Math.max(1, zoom));
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = "10.5px Inter, system-ui, sans-serif";
    plot(context, width, height, this.run, getComputedStyle(this.box).color);
  }
}

function title(run) {
  if (!run.running) return `${run.method}: ${run.entries.at(-1)?.step ?? 0} steps in ${time(run.seconds)}`;
  const all = run.steps > run.stage_steps ? `, ${run.step} of ${run.steps} in total` : "";
  const left = run.seconds_left >= 1 ? `, about ${time(run.seconds_left)} left` : "";
  return `${run.stage}: step ${run.stage_step} of ${run.stage_steps}${all}${left}`;
}

function ended(run) {
  if (!run.stop_reason) return `Stopped at step ${run.entries.at(-1)?.step ?? 0}. Press Run to continue.`;
  return run.reused ? `Learned before, used again: ${run.stop_reason}` : run.stop_reason;
}

function time(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---- the curves

function measured({ entries }, monitor, key) { // [step, value], including measurements before a stage's first step
  const found = entries.flatMap(({ step, start, measures }) => [[step - 1, start], [step, measures]]);
  return found.map(([step, all]) => [step, all?.[monitor]?.[key]]).filter(([, value]) => value !== undefined);
}

function monitors({ entries }) { // those with curves: [name, the key that has a threshold or a floor]
  const found = new Map();
  for (const [name, values] of entries.flatMap((entry) => Object.entries(entry.measures ?? {}))) {
    for (const key of KEYS) if (key in values) found.set(`${name} ${key}`, [name, key]);
  }
  return [...found.values()];
}

function mean(entries) { // running mean over a twentieth of the steps, never across stages
  const length = Math.max(8, Math.round(entries.length / 20));
  let sum = 0, from = 0;
  return entries.map(({ step, stage, loss }, i) => {
    if (stage !== entries[from].stage) [sum, from] = [0, i];
    sum += loss;
    if (i - from >= length) sum -= entries[from++].loss;
    return [step, sum / (i - from + 1)];
  });
}

function panels(run) {
  const raw = run.entries.map(({ step, loss }) => [step, loss]);
  const lines = [
    { name: "loss", alpha: 0.35, width: 0.9, points: raw, rough: true },
    { name: "mean", color: COLORS.mean, width: 1.7, points: mean(run.entries) },
  ];
  const others = monitors(run).map(([monitor, key]) => {
    const fixed = measured(run, monitor, "fixed_loss");
    const name = `${monitor.replace(/ Early Stopping|Pick by Score/, "")} ${key}`.trim();
    if (fixed.length) lines.push({ name: "fixed batch", color: COLORS.fixed, width: 1.7, points: fixed });
    const value = { name, color: COLORS[key], width: 1.7, points: measured(run, monitor, key) };
    const limit = { name: LIMITS[key], color: COLORS.stop, dash: [5, 4] };
    limit.points = measured(run, monitor, LIMITS[key] === "floor" ? `${key}_floor` : "threshold");
    if (limit.points.length === 1) limit.points.push([run.entries.at(-1).step, limit.points[0][1]]); // a floor is constant
    return { share: 1, lines: [value, limit].filter(({ points }) => points.length) };
  });
  return [{ share: 2, lines }, ...others];
}

function range(lines) { // of all values, without the rare peaks of a rough line
  const values = lines.flatMap(({ points, rough }) => {
    const sorted = points.map(([, y]) => y).sort((a, b) => a - b);
    const rare = rough ? Math.floor(points.length / 50) : 0;
    return [sorted[rare], sorted[sorted.length - 1 - rare]];
  });
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - pad, high + pad];
}

function ticks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough), found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(6)));
  return found;
}

function plot(context, width, height, run, color) {
  const write = (words, x, y, { align = "left", alpha = 0.75, fill = color } = {}) => {
    Object.assign(context, { textAlign: align, globalAlpha: alpha, fillStyle: fill });
    context.fillText(words, x, y);
  };
  const stroke = (points, line = {}) => {
    context.strokeStyle = line.color ?? color;
    context.globalAlpha = line.alpha ?? 1;
    context.lineWidth = line.width ?? 1;
    context.setLineDash(line.dash ?? []);
    context.beginPath();
    points.forEach(([x, y]) => context.lineTo(x, y));
    context.stroke();
  };
  const legend = (lines, x, y) => { // each with its last value, as far as they fit
    for (const { name, color: fill, points } of lines) {
      const words = `${name} ${Number(points.at(-1)[1].toPrecision(3))}`;
      const next = x + context.measureText(words).width + 26;
      if (next - 12 > width) return;
      write("●", x, y, { fill, alpha: fill ? 1 : 0.4 });
      write(words, x + 12, y, { alpha: 0.9 });
      x = next;
    }
  };
  const left = 38, right = width - 6, end = Math.max(run.steps ?? 0, run.entries.at(-1).step, 2);
  const x = (step) => left + (step / end) * (right - left), all = panels(run);
  const unit = (height - 16) / all.reduce((sum, { share }) => sum + share, 0);
  const begins = run.entries.filter(({ stage }, i, entries) => i && stage !== entries[i - 1].stage);
  let top = 0;
  for (const { share, lines } of all) {
    const high = top + 18, low = top + unit * share - 4, [least, most] = range(lines);
    const y = (value) => low - ((value - least) / (most - least)) * (low - high);
    const upright = (step) => [[x(step), high], [x(step), low]];
    for (const value of ticks(least, most, Math.max(2, (low - high) / 34))) {
      stroke([[left, y(value)], [right, y(value)]], { alpha: 0.12 });
      write(String(value), left - 5, y(value) + 3.5, { align: "right" });
    }
    for (const { step } of begins) stroke(upright(step - 1), { alpha: 0.45, dash: [2, 3] });
    context.save();
    context.beginPath();
    context.rect(left, high - 1, right - left + 1, low - high + 2);
    context.clip();
    for (const line of lines) stroke(line.points.map(([step, value]) => [x(step), y(value)]), line);
    context.restore();
    for (const { step, acted } of run.stops) stroke(upright(step), { color: COLORS.stop, dash: acted ? [] : [1, 3] });
    legend(lines, left, top + 11);
    top += unit * share;
  }
  for (const step of ticks(0, end, Math.max(2, width / 90)).filter(Number.isInteger)) {
    write(String(step), x(step), height - 3, { align: x(step) > right - 12 ? "right" : "center" });
  }
}

app.registerExtension({
  name: "personalize.live",
  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    api.addEventListener("personalize.step", onStep);
    api.addEventListener("executed", onExecuted);
    api.addEventListener("reconnected", () => runs.forEach((run, digest) => load(digest))); // the server was restarted
    const theme = new MutationObserver(() => views.forEach((view) => view.draw())), watched = ["class", "style"];
    theme.observe(document.documentElement, { attributeFilter: watched });
    theme.observe(document.body, { attributeFilter: watched });
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    views.set(node, new View(node));
    const removed = node.onRemoved;
    node.onRemoved = function () {
      views.delete(node);
      return removed?.apply(this, arguments);
    };
  },
  afterConfigureGraph() {
    for (const [place, digest] of shown) show(...place.split(" "), digest);
  },
});
