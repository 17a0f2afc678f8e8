// What stands on the templates' nodes, in the editor's language; a title that a user wrote is in no list and stays.
import { app } from "../../scripts/app.js";
import { loadTexts, t } from "./texts.mjs";

const TITLES = new Set(["Model", "One clear picture", "What is it?", "How it learns", "Learns while you watch",
  "Keeps what it learned", "What to generate", "New images", "What to avoid", "Size and number", "Compare",
  "Untrained", "Trained", "Untrained: prompt", "Trained: prompt"]);

app.registerExtension({
  name: "personalize.titles",
  setup: loadTexts,
  loadedGraphNode(node) {
    const [, number, words] = /^(\d*\s*)(.*)$/s.exec(node.title ?? "");
    if (TITLES.has(words)) node.title = number + t(words);
    for (const each of [...(node.inputs ?? []), ...(node.widgets ?? [])]) { // names of an app's fields
      if (TITLES.has(each.label)) each.label = t(each.label);
    }
  },
});
