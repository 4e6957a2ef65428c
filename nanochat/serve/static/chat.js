// The chat page: one conversation at a time, answered by the server and kept by store.js.

import * as api from "./api.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import { add, following, renderAll, ReplyTurn, UserTurn } from "./turn.js";

const element = (id) => document.getElementById(id);
const composer = element("composer"), input = element("input"), send = element("send");
const scroll = element("scroll"), messages = element("messages"), model = element("model");
const OPEN = "nanochat:open", MODEL = "nanochat:model";
const PAUSE = 1000; // milliseconds between two times that a reply is kept while it is written

let chat = store.newConversation();
let underWay = null; // {controller, store()} of the reply being written

// What the model reads: the messages without the figures that are shown with them.
function prompt() {
  const said = chat.messages.map(({ role, content }) => ({ role, content }));
  return settings.system() ? [{ role: "system", content: settings.system() }, ...said] : said;
}

function keep() {
  try {
    store.keep(chat);
    store.save(OPEN, chat.id);
    element("trouble").textContent = "";
  } catch {
    element("trouble").textContent = "This browser has no room left to keep conversations: export and delete some.";
  }
  sidebar.showCurrent(chat.id);
}

function ask(text) {
  stop();
  if (chat.messages.at(-1)?.role === "user") rewind(chat.messages.length - 1); // it was never answered
  chat.messages.push({ role: "user", content: text });
  showUser(chat.messages.length - 1);
  scroll.scrollTop = scroll.scrollHeight;
  answer();
}

function showUser(index) {
  const edit = (text) => {
    rewind(index);
    ask(text);
  };
  return new UserTurn(messages, chat.messages[index].content, { edit });
}

function showReply(index) {
  const again = () => answer(cut(index));
  return new ReplyTurn(messages, { again }, chat.messages[index]?.content);
}

// Takes everything from message `index` on off the page and out of the conversation. Each message is one node.
function cut(index) {
  stop();
  underWay = null;
  while (messages.children.length > index) messages.lastChild.remove();
  return chat.messages.splice(index);
}

function rewind(index) {
  cut(index);
  keep();
}

// Writes the reply to the conversation, which ends with the user's message. The messages `before` are what it replaces:
// they are back if nothing comes.
async function answer(before = []) {
  const mine = chat;
  const index = chat.messages.length;
  const view = showReply(index);
  view.node.classList.add("waiting");
  const controller = new AbortController();
  const reply = (underWay = {
    controller,
    store() {
      if (view.parts.length) mine.messages[index] = { role: "assistant", content: view.parts, stopped: true };
      else mine.messages.push(...before);
    },
  });
  // A browser that crashes says no farewell.
  const keeping = setInterval(() => {
    if (underWay !== reply || !view.parts.length) return;
    reply.store();
    keep();
  }, PAUSE);
  if (!before.length) keep();
  showState();
  const stats = { model: model.value && model.selectedOptions[0].textContent };
  let problem = null;
  try {
    await stream(view, controller.signal, stats);
  } catch (error) {
    problem = error;
  } finally {
    clearInterval(keeping);
  }
  if (underWay !== reply) return; // another conversation was opened meanwhile, or this was taken back
  underWay = null;
  reply.store();
  if (view.parts.length) Object.assign(mine.messages[index], { stats, stopped: Boolean(problem) });
  keep(); // at once: the reader may leave while the text is still being drawn
  if (!problem && !model.value) showModels().catch(() => {}); // the server could not be reached before
  let node = view.node;
  if (before.length && !view.parts.length) {
    open(mine);
    node = messages.lastChild;
  } else {
    await view.end(stats);
  }
  if (chat !== mine) return;
  following(() => {
    if (problem?.name === "AbortError") add(node, "div", "note", "Stopped.");
    else if (problem instanceof TypeError) add(node, "div", "note failed", "The server cannot be reached.");
    else if (problem) add(node, "div", "note failed", problem.message);
  });
  showState();
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
      view.note(`The ${piece.dropped} oldest messages no longer fit what the model can read.`);
    }
    if (piece.reason === "length") view.note("The reply ends here: it reached its longest length.");
    if (piece.usage) {
      stats.tokens = piece.usage.completion_tokens;
      stats.wait = (first - asked) / 1000;
      const seconds = (performance.now() - first) / 1000;
      if (stats.tokens > 1 && seconds > 0.001) stats.speed = (stats.tokens - 1) / seconds;
    }
  }
}

function stop() {
  underWay?.controller.abort();
}

function showState() {
  send.setAttribute("aria-label", underWay ? "Stop" : "Send");
  send.title = underWay ? "Stop (Esc)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", underWay ? "#i-stop" : "#i-send");
  send.disabled = !underWay && !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function submit() {
  const text = input.value.trim();
  if (underWay || !text) return;
  input.value = "";
  ask(text);
}

// Shows a conversation, by default a new one.
function open(next = store.newConversation()) {
  leave();
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
    // It is only the next visit that begins elsewhere.
  }
  showState();
  if (!matchMedia("(hover: none)").matches) input.focus();
}

// What has been written so far is kept when the reader goes elsewhere.
function leave() {
  if (!underWay) return;
  stop();
  underWay.store();
  keep();
  underWay = null;
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
  element("key-wrong").textContent = wrong ? "That was not the key." : "";
  dialog.addEventListener("close", () => resolve(element("key-input").value.trim()), { once: true });
  dialog.showModal();
}));

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (underWay) stop();
  else submit();
});

input.addEventListener("input", showState);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: an input method's Enter
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
    // It holds until the page is left.
  }
});
addEventListener("pagehide", leave);
addEventListener("pageshow", (event) => { if (event.persisted) open(chat); }); // back, and the reply was stopped
for (const button of document.querySelectorAll(".suggestions button")) {
  button.addEventListener("click", () => ask(button.textContent));
}

settings.start();
sidebar.start({
  open: (id) => open(store.conversation(id) ?? undefined),
  begin: () => open(),
  removed(id) {
    if (id !== chat.id) return;
    stop();
    underWay = null; // what is being written would be kept, and the conversation be back
    open();
  },
  renamed: (id, title) => { if (id === chat.id) chat.title = title; },
});
open(store.conversation(store.load(OPEN, "")) ?? undefined);
showModels().catch(() => (add(model, "option", "", "not reachable").value = ""));
