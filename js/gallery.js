// The gallery of runs on Load Personalized, Runs and Plot History: what each has learned, to choose, rename and delete.
// It shows what the server lists, again after each training; see nodes/host/routes.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { t } from "./texts.mjs";

const PLOT = "PersonalizePlotHistory";
const NODES = ["PersonalizeLoad", "PersonalizeRuns", PLOT];
const UNFINISHED = ["interrupted", "not finished"];
const HEIGHT = 260;
const STYLE = `
.personalize-gallery { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; height: 100%;
  padding: 8px; overflow: hidden; border-radius: 8px; font: 12px/1.35 Inter, system-ui, sans-serif;
  color: var(--input-text, #ddd); background: var(--component-node-widget-background, var(--comfy-input-bg, #222));
  .cards { flex: 1 1 0; min-height: 0; overflow-y: auto; display: grid; gap: 6px; align-content: start;
    grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
  .card { display: flex; gap: 8px; padding: 5px; border: 1px solid transparent; border-radius: 6px; cursor: pointer;
    background: color-mix(in srgb, currentColor 6%, transparent); }
  .card.chosen { border-color: #7fc25a; }
  .card > div { flex: 1; min-width: 0; overflow-wrap: anywhere; font-size: 11px; }
  b { display: block; font-size: 12px; }
  img { width: 76px; height: 76px; border-radius: 4px; object-fit: cover; object-position: top; }
  footer { display: flex; gap: 8px; align-items: center; }
  footer span { flex: 1; }
  button { padding: 0 7px; border: 1px solid color-mix(in srgb, currentColor 35%, transparent); border-radius: 5px;
    font: inherit; color: inherit; background: none; cursor: pointer; }
  .card button { margin: 3px 4px 0 0; font-size: 10.5px; }
}`;
const galleries = new Map(); // node -> its gallery
let listed; // the server's last answer

async function refresh() {
  const answer = await api.fetchApi("/personalize/runs").catch(() => null);
  if (answer?.ok) take(await answer.json());
}

function take(list) {
  listed = list;
  galleries.forEach((gallery) => gallery.update());
}

async function change(what, values) { // the server says what is wrong, in one sentence
  const options = { method: "POST", body: JSON.stringify(values), headers: { "Content-Type": "application/json" } };
  const answer = await api.fetchApi(`/personalize/${what}`, options), said = await answer.json();
  if (answer.ok) return take(said);
  app.extensionManager.toast.add({ severity: "error", summary: "Personalize", detail: said.error, life: 8000 });
}

const sure = (title, message) => app.extensionManager.dialog.confirm({ title, message, type: "delete" });
const size = (bytes) => (bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GB` : `${(bytes / 2 ** 20).toFixed(1)} MB`);

function element(kind, values = {}, ...children) {
  const made = Object.assign(document.createElement(kind), values);
  made.append(...children);
  return made;
}

function button(text, act) {
  return element("button", { textContent: text, onclick: (event) => { event.stopPropagation(); act(); } });
}

class Gallery {
  constructor(node) {
    this.combo = node.widgets.find(({ name }) => name === "run");
    this.others = node.comfyClass === PLOT ? this.combo.options.values.slice(0, 1) : []; // the run that is connected
    this.cards = element("div", { className: "cards" });
    this.footer = element("footer");
    this.box = element("div", { className: "personalize-gallery" }, this.cards, this.footer);
    this.box.style.minHeight = `${HEIGHT}px`; // read by nodes that Vue renders
    const options = { serialize: false, hideOnZoom: false, margin: 6 };
    options.getMinHeight = () => (this.widget.hidden ? 0 : HEIGHT + 12);
    options.getMaxHeight = () => (this.widget.hidden ? 0 : undefined);
    this.widget = node.addDOMWidget("gallery", "PERSONALIZE_GALLERY", this.box, options);
    this.widget.serialize = false;
    this.node = node;
    for (const event of ["onConnectionsChange", "onConfigure"]) this.follow(event);
    const chosen = this.combo.callback, gallery = this;
    this.combo.callback = function (...values) {
      const returned = chosen?.apply(this, values);
      gallery.mark();
      return returned;
    };
    node.setSize([Math.max(node.size[0], 440), node.computeSize()[1]]);
    this.update();
  }

  follow(event) { // with a result, Plot History needs no run from here
    const before = this.node[event], gallery = this;
    this.node[event] = function () {
      const returned = before?.apply(this, arguments);
      gallery.fold();
      return returned;
    };
  }

  fold() {
    const { node, widget, box } = this, result = node.inputs.find(({ name }) => name === "result");
    if (node.comfyClass !== PLOT || widget.hidden === (result.link !== null)) return;
    widget.hidden = this.combo.hidden = result.link !== null;
    box.style.display = widget.hidden ? "none" : "";
    node.setSize([node.size[0], node.computeSize()[1]]);
  }

  update() {
    if (!listed) return;
    const { runs, cache } = listed, labels = runs.map(({ label }) => label);
    this.combo.value = this.current(labels);
    this.combo.options.values = [...this.others, ...labels];
    this.node.setDirtyCanvas(true, true);
    this.cards.replaceChildren(...runs.map((run) => this.card(run)));
    const bytes = runs.reduce((sum, run) => sum + run.size, 0);
    const words = t("{count} runs, {size}; cache {cache}", { count: runs.length, size: size(bytes), cache: size(cache) });
    const clear = button(t("Delete cache"), async () => {
      const message = t("What trainings share will be computed again by the next ones.");
      if (await sure(t("Delete cache"), message)) change("cache/delete", {});
    });
    this.footer.replaceChildren(element("span", { textContent: words }), ...(cache ? [clear] : []));
    this.mark();
  }

  current(labels) { // the chosen run under the name that it has now; nothing in place of one that was deleted
    const { value, options } = this.combo, digest = String(value).split(" ").at(-1);
    const now = labels.find((label) => digest && label.endsWith(digest));
    return now ?? (options.values.includes(value) ? this.others[0] ?? "" : value);
  }

  card(run) {
    const title = run.name || run.placeholder_token || t("damaged"), about = [
      [run.name && run.placeholder_token, run.class_word].filter(Boolean).join(", "),
      [run.method, run.method && t("{steps} steps", { steps: run.steps })].filter(Boolean).join(", "),
      UNFINISHED.includes(run.state) && t(run.state), run.checkpoint,
      `${new Date(1000 * run.seconds).toLocaleString([], { dateStyle: "short", timeStyle: "short" })}, ${size(run.size)}`,
    ].filter(Boolean);
    const lines = about.map((words) => element("div", { textContent: words }));
    const text = element("div", {}, element("b", { textContent: title }), ...lines, this.buttons(run, title));
    const card = element("div", { className: "card", onclick: () => this.choose(run) }, text);
    card.dataset.run = run.run;
    if (run.image) card.prepend(element("img", { src: thumbnail(run), alt: "", loading: "lazy" }));
    return card;
  }

  buttons(run, title) {
    const rename = async () => {
      const asked = { title: t("Rename"), message: t("Name of this run"), defaultValue: run.name };
      const name = await app.extensionManager.dialog.prompt(asked);
      if (typeof name === "string") change("runs/rename", { run: run.run, name });
    };
    const remove = async () => {
      const message = t("{title} will be deleted with its previews and checkpoints.", { title });
      if (await sure(t("Delete"), message)) change("runs/delete", { run: run.run });
    };
    const offered = run.method ? [button(t("Rename"), rename)] : [];
    return element("div", {}, ...offered, button(t("Delete"), remove));
  }

  choose(run) {
    this.combo.value = run.label;
    this.combo.callback?.(run.label);
    app.graph.setDirtyCanvas(true, true);
  }

  mark() {
    for (const card of this.cards.children) {
      card.classList.toggle("chosen", String(this.combo.value).endsWith(card.dataset.run));
    }
  }
}

function thumbnail({ run, image }) {
  const [folder, filename] = image.split("/");
  const place = { filename, type: "output", subfolder: `personalize/runs/${run}/${folder}`, preview: "webp;80" };
  return api.apiURL(`/view?${new URLSearchParams(place)}`);
}

app.registerExtension({
  name: "personalize.gallery",
  setup() {
    document.head.append(element("style", { textContent: STYLE }));
    api.addEventListener("executed", ({ detail }) => detail.output?.personalize_run && refresh());
    api.addEventListener("personalize.step", ({ detail }) => detail.running || refresh());
  },
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass) || !node.widgets?.some(({ name }) => name === "run")) return;
    galleries.set(node, new Gallery(node));
    refresh();
    const removed = node.onRemoved;
    node.onRemoved = function () {
      galleries.delete(node);
      return removed?.apply(this, arguments);
    };
  },
});
