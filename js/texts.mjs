// The words of the pack's views in the editor's language: `personalize` of locales/<language>/main.json, by the English.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let texts = {}; // language -> English words -> their translation

export async function loadTexts() {
  texts = await api.getCustomNodesI18n().catch(() => ({}));
}

export function t(words, values = {}) { // `values` stand for {name} in them
  const translated = texts[app.extensionManager.setting.get("Comfy.Locale")]?.personalize?.[words] ?? words;
  return translated.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
