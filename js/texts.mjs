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

export function time(seconds) {
  if (seconds < 90) return t("{seconds} s", { seconds: Math.round(seconds) });
  const all = Math.round(seconds / 60), hours = Math.floor(all / 60), minutes = all < 90 ? all : all % 60;
  return all < 90 ? t("{minutes} min", { minutes }) : t("{hours} h {minutes} min", { hours, minutes });
}
