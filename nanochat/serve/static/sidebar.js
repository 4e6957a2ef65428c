// The list of conversations: open, search, rename, delete, export, import.

import * as store from "./store.js";
import { add, iconButton } from "./turn.js";

const element = (id) => document.getElementById(id);
const list = element("conversations"), query = element("search"), curtain = element("curtain");
const phone = matchMedia("(max-width: 760px)");
let actions = null;
let current = null;
let rendered = ""; // state of the list, as JSON

// `callbacks`: {open(id), create(), removed(id), renamed(id, title)}.
export function start(callbacks) {
  actions = callbacks;
  query.addEventListener("input", show);
  element("new-chat").addEventListener("click", () => { hide(); actions.create(); });
  element("menu").addEventListener("click", toggle);
  curtain.addEventListener("click", hide);
  element("export").addEventListener("click", download);
  element("import").addEventListener("click", () => element("import-file").click());
  element("import-file").addEventListener("change", upload);
  addEventListener("storage", show); // another tab's changes
  show();
}

export function showCurrent(id) {
  current = id;
  show();
}

// Closes the drawer of a narrow window and returns true if it was open.
export function hide() {
  const was = document.body.classList.contains("drawer");
  document.body.classList.remove("drawer");
  return was;
}

function toggle() {
  if (phone.matches) document.body.classList.toggle("drawer");
  else document.body.classList.toggle("narrow");
}

// Rebuilds the list only if it has changed: replies are saved every second, by any tab, and that must not close the
// field in which a conversation is being renamed.
export function show() {
  const found = store.search(query.value);
  const state = JSON.stringify([query.value, current, found.map(({ id, title }) => [id, title])]);
  if (state === rendered) return;
  rendered = state;
  list.replaceChildren();
  for (const conversation of found) list.append(item(conversation));
  if (!found.length) add(list, "li", "nothing", query.value ? "No results" : "Conversations are stored in this browser");
}

function item({ id, title }) {
  const row = document.createElement("li");
  const name = add(row, "button", "name", title || "New chat");
  name.dir = "auto";
  name.type = "button";
  name.title = title;
  if (id === current) name.setAttribute("aria-current", "page");
  name.addEventListener("click", () => { hide(); actions.open(id); });
  iconButton(row, "edit", `Rename ${title}`, () => rename(row, id, title));
  iconButton(row, "delete", `Delete ${title}`, () => {
    if (!confirm(`Delete “${title}”?`)) return;
    store.remove(id);
    actions.removed(id);
    show();
  });
  return row;
}

function rename(row, id, title) {
  row.replaceChildren();
  const input = add(row, "input");
  input.value = title;
  input.setAttribute("aria-label", "Conversation title");
  let done = false;
  const end = (keep) => {
    if (done) return; // Enter is followed by a blur event
    done = true;
    const name = input.value.trim();
    if (keep && name) {
      store.rename(id, name);
      actions.renamed(id, name);
    }
    rendered = ""; // force a rebuild
    show();
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      end(false);
    }
  });
  input.addEventListener("blur", () => end(true));
  input.focus();
  input.select();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  link.download = "nanochat-conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function upload() {
  const [file] = element("import-file").files;
  element("import-file").value = "";
  if (!file) return;
  try {
    store.imported(await file.text());
  } catch (error) {
    alert(`Cannot import ${file.name}: ${error.message}`);
  }
  show();
}
