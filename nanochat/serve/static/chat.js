// The chat page: shows one conversation, streams replies from the server, and saves both with store.js.

import * as api from "./api.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import { add, following, renderAll, ReplyTurn, UserTurn } from "./turn.js";

const element = (id) => document.getElementById(id);
const composer = element("composer"), input = element("input"), send = element("send");
const scroll = element("scroll"), messages = element("messages"), model = element("model");
const OPEN = "nanochat:open", MODEL = "nanochat:model";
const SAVE_INTERVAL = 1000; // milliseconds between saves of a reply while it streams

let chat = store.newConversation();
let activeReply = null; // {controller, store()} of the reply that is streaming

// The request's messages: without the statistics stored with them.
function prompt() {
  const history = chat.messages.map(({ role, content }) => ({ role, content }));
  return settings.system() ? [{ role: "system", content: settings.system() }, ...history] : history;
}

function save() {
  try {
    store.saveConversation(chat);
    store.save(OPEN, chat.id);
    element("trouble").textContent = "";
  } catch {
    element("trouble").textContent = "The browser's storage is full: export and delete some conversations.";
  }
  sidebar.showCurrent(chat.id);
}

function ask(text) {
  stop();
  if (chat.messages.at(-1)?.role === "user") truncate(chat.messages.length - 1); // unanswered
  chat.messages.push({ role: "user", content: text });
  showUser(chat.messages.length - 1);
  scroll.scrollTop = scroll.scrollHeight;
  answer();
}

function showUser(index) {
  const edit = (text) => {
    truncate(index);
    ask(text);
  };
  return new UserTurn(messages, chat.messages[index].content, { edit });
}

function showReply(index) {
  const regenerate = () => answer(removeFrom(index));
  return new ReplyTurn(messages, { regenerate }, chat.messages[index]?.content);
}

// Removes all messages from `index` on from the page and the conversation. Each message is one node.
function removeFrom(index) {
  stop();
  activeReply = null;
  while (messages.children.length > index) messages.lastChild.remove();
  return chat.messages.splice(index);
}

function truncate(index) {
  removeFrom(index);
  save();
}

// Streams a reply to the last message. `before`: the messages it replaces, restored if there is no reply.
async function answer(before = []) {
  const conversation = chat;
  const index = chat.messages.length;
  const view = showReply(index);
  view.node.classList.add("waiting");
  const controller = new AbortController();
  const reply = (activeReply = {
    controller,
    store() {
      if (view.parts.length) conversation.messages[index] = { role: "assistant", content: view.parts, stopped: true };
      else conversation.messages.push(...before);
    },
  });
  // Save regularly: a crash of the browser triggers no event.
  const autosave = setInterval(() => {
    if (activeReply !== reply || !view.parts.length) return;
    reply.store();
    save();
  }, SAVE_INTERVAL);
  if (!before.length) save();
  updateControls();
  const stats = { model: model.value && model.selectedOptions[0].textContent };
  let error = null;
  try {
    await stream(view, controller.signal, stats);
  } catch (caught) {
    error = caught;
  } finally {
    clearInterval(autosave);
  }
  if (activeReply !== reply) return; // another conversation was opened, or this reply was removed
  activeReply = null;
  reply.store();
  if (view.parts.length) Object.assign(conversation.messages[index], { stats, stopped: Boolean(error) });
  save(); // immediately: the user may leave the page while the text is rendered
  if (!error && !model.value) showModels().catch(() => {}); // the server was unreachable when the page loaded
  let node = view.node;
  if (before.length && !view.parts.length) {
    open(conversation);
    node = messages.lastChild;
  } else {
    await view.end(stats);
  }
  if (chat !== conversation) return;
  following(() => {
    if (error?.name === "AbortError") add(node, "div", "note", "Stopped.");
    else if (error instanceof TypeError) add(node, "div", "note failed", "Cannot reach the server.");
    else if (error) add(node, "div", "note failed", error.message);
  });
  updateControls();
}

async function stream(view, signal, stats) {
  const asked = performance.now();
  let first = 0;
  const body = { ...settings.sampling(), messages: prompt(), model: model.value || undefined };
  for await (const piece of api.reply(body, signal)) {
    if (piece.type) {
      first ||= performance.now();
      following(() => view.add(piece.type, piece.text));
    }
    if (piece.dropped) {
      view.note(`The ${piece.dropped} oldest messages were dropped to fit the model's context.`);
    }
    if (piece.reason === "length") view.note("Maximum length reached.");
    if (piece.usage) {
      stats.tokens = piece.usage.completion_tokens;
      stats.wait = (first - asked) / 1000;
      const seconds = (performance.now() - first) / 1000;
      if (stats.tokens > 1 && seconds > 0.001) stats.speed = (stats.tokens - 1) / seconds;
    }
  }
}

function stop() {
  activeReply?.controller.abort();
}

function updateControls() {
  send.setAttribute("aria-label", activeReply ? "Stop" : "Send");
  send.title = activeReply ? "Stop (Esc)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", activeReply ? "#i-stop" : "#i-send");
  send.disabled = !activeReply && !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function submit() {
  const text = input.value.trim();
  if (activeReply || !text) return;
  input.value = "";
  ask(text);
}

// Shows a conversation, a new one by default.
function open(next = store.newConversation()) {
  suspend();
  chat = next;
  messages.replaceChildren();
  const replies = [];
  chat.messages.forEach(({ role, stats, stopped }, index) => {
    if (role === "user") {
      showUser(index);
    } else {
      const reply = showReply(index);
      replies.push(reply);
      reply.end(stats).then(() => stopped && reply.note("Stopped."));
    }
  });
  renderAll(replies).then(() => (scroll.scrollTop = scroll.scrollHeight));
  sidebar.showCurrent(chat.id);
  try {
    store.save(OPEN, chat.messages.length ? chat.id : null);
  } catch {
    // Only the next visit is affected: it starts with another conversation.
  }
  updateControls();
  if (!matchMedia("(hover: none)").matches) input.focus();
}

// Stops and saves a streaming reply when the user opens another conversation or leaves the page.
function suspend() {
  if (!activeReply) return;
  stop();
  activeReply.store();
  save();
  activeReply = null;
}

async function showModels() {
  const found = await api.models();
  model.replaceChildren();
  for (const { id, nanochat: about } of found) {
    const option = add(model, "option", "", about.description);
    option.value = id;
  }
  const wanted = store.load(MODEL, null);
  model.value = found.some(({ id }) => id === wanted) ? wanted : found.find(({ nanochat }) => nanochat.default).id;
  settings.showDefaults(found[0].nanochat.defaults);
}

api.onKeyNeeded((wrong) => new Promise((resolve) => {
  const dialog = element("key");
  element("key-wrong").textContent = wrong ? "Incorrect key." : "";
  dialog.addEventListener("close", () => resolve(element("key-input").value.trim()), { once: true });
  dialog.showModal();
}));

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (activeReply) stop();
  else submit();
});

input.addEventListener("input", updateControls);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter in an input method
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!sidebar.hide()) stop();
});

model.addEventListener("change", () => {
  try {
    store.save(MODEL, model.value);
  } catch {
    // Storage is full: the choice lasts until the page is closed.
  }
});
addEventListener("pagehide", suspend);
addEventListener("pageshow", (event) => { if (event.persisted) open(chat); }); // back navigation: the reply was stopped
for (const button of document.querySelectorAll(".suggestions button")) {
  button.addEventListener("click", () => ask(button.textContent));
}

settings.start();
sidebar.start({
  open: (id) => open(store.conversation(id) ?? undefined),
  create: () => open(),
  removed(id) {
    if (id !== chat.id) return;
    stop();
    activeReply = null; // otherwise saving the reply would restore the conversation
    open();
  },
  renamed: (id, title) => { if (id === chat.id) chat.title = title; },
});
open(store.conversation(store.load(OPEN, "")) ?? undefined);
showModels().catch(() => (add(model, "option", "", "server unreachable").value = ""));
