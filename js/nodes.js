// What the editor itself does not do for the pack's nodes: advanced settings are folded away in the classic editor, too,
// sentences of a node stand on it, and sockets of one type have one color.
import { app } from "../../scripts/app.js";
import { t } from "./texts.mjs";

const COLORS = { CONCEPT: "#e8a33d", RECIPE: "#5fb3a1", RESULT: "#7fc25a", STOPPER: "#d9697a", REPORT: "#8f8fe0",
  METRIC_MODELS: "#4fa8c9" };
const STYLE = `
.personalize-text { display: flex; gap: 6px; align-items: flex-start; box-sizing: border-box; height: 100%;
  padding: 6px 10px; border-radius: 8px; overflow: auto; font: 12px/1.4 Inter, system-ui, sans-serif;
  color: var(--input-text, #ddd); background: var(--component-node-widget-background, var(--comfy-input-bg, #222));
  div { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; }
  button { padding: 1px 8px; border: 1px solid color-mix(in srgb, currentColor 35%, transparent); border-radius: 6px;
    font: inherit; color: inherit; background: none; cursor: pointer; }
}`;
const COPIED = /embedding:[\w-]+|<[\w-]+>/; // what a prompt needs of a sentence
const isOurs = (node) => node.comfyClass?.startsWith("Personalize");
const EVERYTHING = "Comfy.Node.AlwaysShowAdvancedWidgets";

function fold(node) { // LiteGraph reads `advanced` of a widget, the server's definition arrives in its options
  const open = window.LiteGraph.vueNodesMode || node.showAdvanced || app.extensionManager?.setting?.get(EVERYTHING);
  for (const widget of node.widgets ?? []) {
    if (!widget.options?.advanced) continue;
    for (const each of [widget, ...(widget.linkedWidgets ?? [])]) { // a seed's control after generate
      each.advanced = true;
      each.hidden = !open;
    }
  }
}

function fit(node) {
  node.setSize([node.size[0], node.computeSize()[1]]);
  node.setDirtyCanvas(true, true);
}

function foldable(node) {
  let open = false;
  const change = (value) => { // the node's menu, and a saved workflow
    if (open === Boolean(value)) return;
    open = Boolean(value);
    fold(node);
    fit(node);
  };
  Object.defineProperty(node, "showAdvanced", { get: () => open, set: change });
  fold(node);
  fit(node);
  const preset = node.widgets?.find(({ name }) => name === "preset"), chosen = preset?.callback;
  if (preset) preset.callback = function (...values) { // another preset brings other widgets
    const returned = chosen?.apply(this, values);
    fold(node);
    fit(node);
    return returned;
  };
  const configured = node.onConfigure;
  node.onConfigure = function (saved) {
    const returned = configured?.apply(this, arguments);
    fold(node);
    if (saved.size) node.setSize([saved.size[0], Math.max(saved.size[1], node.computeSize()[1])]);
    return returned;
  };
}

function paint() { // a color palette that is loaded, or changed, forgets the colors of types that it does not know
  for (const [name, color] of Object.entries(COLORS)) {
    const type = `PERSONALIZE_${name}`;
    window.LGraphCanvas.link_type_colors[type] = color;
    if (app.canvas) app.canvas.default_connection_color_byType[type] = color;
  }
}

function say(node, sentences) {
  let widget = node.widgets?.find(({ name }) => name === "said");
  if (!widget) {
    const box = Object.assign(document.createElement("div"), { className: "personalize-text" });
    const button = Object.assign(document.createElement("button"), { textContent: t("Copy") });
    box.append(document.createElement("div"), button);
    button.onclick = () => navigator.clipboard.writeText(button.value);
    const options = { serialize: false, hideOnZoom: false, margin: 6, getMinHeight: () => 76 };
    widget = node.addDOMWidget("said", "PERSONALIZE_TEXT", box, options);
    widget.serialize = false;
  }
  const [text, button] = widget.element.children;
  text.textContent = sentences.join("\n");
  button.value = text.textContent.match(COPIED)?.[0] ?? "";
  button.title = button.value;
  button.hidden = !button.value;
  node.setSize([Math.max(node.size[0], 280), Math.max(node.size[1], node.computeSize()[1])]);
}

app.registerExtension({
  name: "personalize.nodes",
  setup() {
    const vue = Object.entries(COLORS).map(([type, color]) => `--color-datatype-PERSONALIZE_${type}: ${color};`);
    const style = `${STYLE}\n:root { ${vue.join(" ")} }`;
    document.head.append(Object.assign(document.createElement("style"), { textContent: style }));
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    paint();
    foldable(node);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      if (output?.text?.length) say(node, output.text);
    };
  },
});
