// System prompt and sampling parameters, saved in the browser. Empty fields take the server's defaults.

import { load, save } from "./store.js";

const KEY = "nanochat:settings";
const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const fields = [...form.elements].filter((field) => field.name);

export function start() {
  const saved = load(KEY, {});
  for (const field of fields) field.value = saved[field.name] ?? "";
  document.getElementById("settings-button").addEventListener("click", () => dialog.showModal());
  document.getElementById("defaults").addEventListener("click", () => form.reset());
  dialog.addEventListener("close", saveFields);
}

// Shows the server's defaults as placeholders.
export function showDefaults(defaults) {
  for (const field of fields) if (field.name in defaults) field.placeholder = defaults[field.name] ?? 0;
}

export function system() {
  return form.elements.system.value.trim();
}

// Returns the sampling fields of a request.
export function sampling() {
  const numbers = fields.filter((field) => field.type === "number" && field.value !== "" && field.validity.valid);
  return Object.fromEntries(numbers.map((field) => [field.name, Number(field.value)]));
}

function saveFields() {
  try {
    save(KEY, Object.fromEntries(fields.filter((field) => field.value !== "").map((field) => [field.name, field.value])));
  } catch {
    // Storage is full or disabled: the settings last until the page is closed.
  }
}
