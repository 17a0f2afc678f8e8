// The live view on Train: the curves of a run during training, its last previews, and a button that ends a stage.
// It shows what the server sends, asks for it by the run's digest, and stores nothing else; see nodes/host/live.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { monitors, plot } from "./curves.mjs";
import { loadTexts, t, time } from "./texts.mjs";

const NODE = "PersonalizeTrain";
const MOST = 4000; // points; beyond that a thinned history is loaded
const PREVIEWS = 4;
const FINISH = "Ends the current stage after this step and keeps its result: later stages and the graph continue. "
  + "Cancel stops everything instead; queue again to resume the training.";
const TRAIN_ON = "Queues the graph again; the training goes on from here, up to the recipe's steps.";
const SHOWN = "personalize_run"; // property of a node: its id and the run's digest, so that a copy of it shows none
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
  .strip:empty, footer:empty, .warnings:empty { display: none; }
  .warnings { margin: 0; padding-left: 8px; border-left: 3px solid #e8a33d; white-space: pre-wrap; overflow: auto; }
  a { flex: 0 1 auto; min-width: 0; color: inherit; text-decoration: none; font-size: 10px; text-align: center; }
  img { display: block; max-height: 150px; max-width: 100%; border-radius: 4px; }
}
/* Nodes 2.0 put the newest preview below the widgets, too; an app has only that one. */
[data-node-id]:has(.personalize-live) img.contain-size, [data-node-id]:has(.personalize-live) img.contain-size + div {
  display: none; }`;

const runs = new Map(); // run digest -> its history from the server
const missed = new Map(); // "workflow node" -> digest, for an editor that comes back to a workflow
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

function path(node) { // its execution id, by the same rule
  const inner = (graph, ids) => [...(graph?.nodes ?? [])].flatMap((each) =>
    each === node ? [[...ids, each.id]] : inner(each.subgraph, [...ids, each.id]));
  return inner(root(), [])[0]?.join(":") ?? "";
}

function show(workflow, id, digest) {
  const view = workflow === root().id && views.get(find(id));
  if (view) view.show(digest);
  else missed.set(`${workflow} ${id}`, digest);
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
  else if (answer?.status === 404 && !run.entries.length && !queue.length) runs.delete(digest); // of a loaded workflow
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

function onWarnings({ detail: { workflow, node, sentences } }) {
  if ((workflow ?? root().id) === root().id) views.get(find(node))?.warn(sentences);
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
      <div class="strip"></div><footer></footer><p class="warnings"></p>`;
    [this.text, this.button, this.canvas] = ["span", "button", "canvas"].map((name) => this.box.querySelector(name));
    [this.strip, this.footer, this.warnings] = [".strip", "footer", ".warnings"].map((name) => this.box.querySelector(name));
    this.parts = [".plot", "header"].map((name) => this.box.querySelector(name));
    this.button.onclick = () => (this.run.running ? this.finish() : this.trainOn());
    const options = { serialize: false, hideOnZoom: false, margin: 6 };
    options.getMinHeight = () => this.height() + 12;
    options.getMaxHeight = () => (this.run ? undefined : this.height());
    this.widget = node.addDOMWidget("live", "PERSONALIZE_LIVE", this.box, options);
    this.widget.serialize = false; // nor is it a value of a saved workflow
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.update();
  }

  get run() { return runs.get(this.digest); }

  show(digest) {
    this.digest = digest;
    const value = `${this.node.id} ${digest}`;
    if (this.node.properties[SHOWN] === value) return;
    this.node.properties[SHOWN] = value;
    app.extensionManager.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.(); // a reloaded page has it, too
  }

  restore() { // what a workflow that was loaded again, or a page, had shown
    const [id, digest] = String(this.node.properties[SHOWN]).split(" ");
    if (id !== String(this.node.id)) return;
    this.digest = digest;
    if (runs.has(digest)) this.update();
    else load(digest);
  }

  warn(sentences) {
    this.warnings.textContent = sentences.join("\n");
    this.update();
  }

  height() {
    const { run } = this, words = this.warnings.textContent, perLine = Math.max(20, this.node.size[0] / 6.5);
    const lines = words ? words.split("\n").reduce((sum, { length }) => sum + Math.ceil(length / perLine), 0) : 0;
    const said = lines && 17 * lines + 16;
    if (!run) return said;
    return said + 220 + 80 * monitors(run).length + (run.previews.length ? 172 : 0) + (run.running ? 0 : 24);
  }

  async finish() {
    const { run, digest } = this, body = JSON.stringify({ run: digest, client: api.clientId });
    run.finishing = run.stage;
    this.update();
    const answer = await api.fetchApi("/personalize/finish", { method: "POST", body });
    if (!answer.ok) this.footer.textContent = (await answer.json()).error;
  }

  async trainOn() { // its graph is queued again, with this node in it
    const body = JSON.stringify({ run: this.digest, node: path(this.node) });
    const options = { method: "POST", body, headers: { "Content-Type": "application/json" } };
    const answer = await api.fetchApi("/personalize/runs/reopen", options);
    if (!answer.ok) return void (this.footer.textContent = (await answer.json()).error);
    this.run.can_go_on = false;
    this.update();
    await app.queuePrompt(0, 1);
  }

  update() {
    const { run, node } = this, height = this.height(), finishing = run?.finishing && run.finishing === run.stage;
    const ended = run && !run.running, onward = ended && run.can_go_on;
    this.widget.hidden = !height;
    this.box.style.display = height ? "" : "none";
    this.box.style.minHeight = `${height}px`; // read by nodes that Vue renders
    for (const part of this.parts) part.style.display = run ? "" : "none";
    if (run) {
      this.text.textContent = title(run);
      this.button.textContent = finishing ? t("Finishing") : onward ? t("Train on") : t("Finish now");
      this.button.title = onward ? t(TRAIN_ON) : t(FINISH);
      this.button.disabled = finishing || (ended && !onward);
      this.footer.textContent = ended ? ending(run) : "";
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
      link.append(Object.assign(new Image(), { src: href, alt: "" }), t("step {step}", { step: parseInt(filename.slice(5), 10) }));
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
  const { method, stage, stage_step, stage_steps, step } = run, last = run.entries.at(-1)?.step ?? 0;
  if (!run.running) return t("{method}: {last} steps in {time}", { method, last, time: time(run.seconds) });
  const all = run.steps > stage_steps ? t(", {step} of {steps} in total", { step, steps: run.steps }) : "";
  const left = run.seconds_left >= 1 ? t(", about {time} left", { time: time(run.seconds_left) }) : "";
  return t("{stage}: step {stage_step} of {stage_steps}", { stage, stage_step, stage_steps }) + all + left;
}

function ending(run) {
  const reason = run.stop_reason;
  if (!reason) return t("Stopped at step {step}. Press Run to continue.", { step: run.entries.at(-1)?.step ?? 0 });
  return run.reused ? t("Learned before, used again: {reason}", { reason }) : reason;
}

app.registerExtension({
  name: "personalize.live",
  async setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    api.addEventListener("personalize.step", onStep);
    api.addEventListener("personalize.warnings", onWarnings);
    api.addEventListener("execution_start", () => views.forEach((view) => view.warn([])));
    api.addEventListener("executed", onExecuted);
    api.addEventListener("reconnected", () => runs.forEach((run, digest) => load(digest))); // the server was restarted
    const theme = new MutationObserver(() => views.forEach((view) => view.draw())), watched = ["class", "style"];
    theme.observe(document.documentElement, { attributeFilter: watched });
    theme.observe(document.body, { attributeFilter: watched });
    await loadTexts();
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
    views.forEach((view) => view.restore());
    for (const [place, digest] of missed) {
      const [workflow, id] = place.split(" ");
      if (workflow !== root().id) continue;
      missed.delete(place);
      show(workflow, id, digest);
    }
  },
});
