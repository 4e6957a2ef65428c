// System prompt and sampling, kept in this browser. A field left empty takes the server's default.

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
  dialog.addEventListener("close", keep);
}

// What the server does where nothing is set stands in the empty fields.
export function showDefaults(defaults) {
  for (const field of fields) if (field.name in defaults) field.placeholder = defaults[field.name] ?? 0;
}

export function system() {
  return form.elements.system.value.trim();
}

// The fields of a request.
export function sampling() {
  const numbers = fields.filter((field) => field.type === "number" && field.value !== "" && field.validity.valid);
  return Object.fromEntries(numbers.map((field) => [field.name, Number(field.value)]));
}

function keep() {
  try {
    save(KEY, Object.fromEntries(fields.filter((field) => field.value !== "").map((field) => [field.name, field.value])));
  } catch {
    // A browser that keeps nothing: they hold until the page is left.
  }
}
