// The list of conversations: open, search, rename, delete, export, import.

import * as store from "./store.js";
import { add, iconButton } from "./turn.js";

const element = (id) => document.getElementById(id);
const list = element("conversations"), query = element("search"), curtain = element("curtain");
const phone = matchMedia("(max-width: 760px)");
let actions = null;
let current = null;
let shown = ""; // what the list says

// `given`: {open(id), begin(), removed(id), renamed(id, title)}; the page's part in what happens here.
export function start(given) {
  actions = given;
  query.addEventListener("input", show);
  element("new-chat").addEventListener("click", () => { hide(); actions.begin(); });
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

// Closes the drawer of a narrow window; whether it was open.
export function hide() {
  const was = document.body.classList.contains("drawer");
  document.body.classList.remove("drawer");
  return was;
}

function toggle() {
  if (phone.matches) document.body.classList.toggle("drawer");
  else document.body.classList.toggle("narrow");
}

// The list is left alone where nothing would change: a reply is kept every second, by any tab, and a name that is
// being typed here must survive that.
export function show() {
  const found = store.search(query.value);
  const wanted = JSON.stringify([query.value, current, found.map(({ id, title }) => [id, title])]);
  if (wanted === shown) return;
  shown = wanted;
  list.replaceChildren();
  for (const conversation of found) list.append(item(conversation));
  if (!found.length) add(list, "li", "nothing", query.value ? "Nothing found" : "Conversations are kept in this browser");
}

function item({ id, title }) {
  const row = document.createElement("li");
  const name = add(row, "button", "name", title || "New chat");
  name.type = "button";
  name.title = title;
  if (id === current) name.setAttribute("aria-current", "page");
  name.addEventListener("click", () => { hide(); actions.open(id); });
  iconButton(row, "edit", `Rename ${title}`, () => rename(row, id, title));
  iconButton(row, "delete", `Delete ${title}`, () => {
    if (!confirm(`Delete “${title}”?`)) return;
    store.forget(id);
    actions.removed(id);
    show();
  });
  return row;
}

function rename(row, id, title) {
  row.replaceChildren();
  const input = add(row, "input");
  input.value = title;
  input.setAttribute("aria-label", "Name of the conversation");
  let done = false;
  const end = (keep) => {
    if (done) return; // Enter also takes the focus away
    done = true;
    const name = input.value.trim();
    if (keep && name) {
      store.rename(id, name);
      actions.renamed(id, name);
    }
    shown = ""; // the row is a field still
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
    alert(`${file.name} cannot be imported: ${error.message}`);
  }
  show();
}
