// Conversations and settings in the browser's localStorage.
// Conversation: {id, title, updated, messages: [{role, content, stats?, stopped?}]}; a reply's content is [{type, text}].

const CHAT = "nanochat:chat:";
const ROLES = new Set(["user", "assistant"]);
const STATS = { model: "string", tokens: "number", speed: "number", wait: "number" };
const TYPES = new Set(["text", "python", "python_output"]);

export function load(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise; // invalid JSON
  }
}

// Throws if storage is disabled or full.
export function save(key, value) {
  localStorage.setItem(key, JSON.stringify(value));
}

// All conversations, newest first.
export function conversations() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(CHAT))
    .map((key) => checked(load(key, null)))
    .filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}

export function conversation(id) {
  return checked(load(CHAT + id, null));
}

export function newConversation() {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", updated: Date.now(), messages: [] };
}

export function saveConversation(conversation) {
  conversation.updated = Date.now();
  conversation.title ||= firstWords(conversation);
  save(CHAT + conversation.id, conversation);
}

export function rename(id, title) {
  const found = conversation(id);
  if (!found) return;
  found.title = title;
  save(CHAT + id, found);
}

export function remove(id) {
  localStorage.removeItem(CHAT + id);
}

export function textOf(content) {
  if (typeof content === "string") return content;
  return content.filter((part) => part.type === "text").map((part) => part.text).join("");
}

// Conversations whose title or text contains every word of the query.
export function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return conversations().filter(({ title, messages }) => {
    const text = [title, ...messages.map((message) => textOf(message.content))].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

export function exported() {
  return JSON.stringify({ nanochat: 1, conversations: conversations() }, null, 2);
}

// Adds conversations from the format of `exported`. Throws if the file has another format.
export function imported(text) {
  const file = JSON.parse(text);
  const found = file?.nanochat === 1 && Array.isArray(file.conversations) ? file.conversations.map(checked) : [null];
  if (!found.every(Boolean)) throw new Error("not a nanochat export");
  for (const one of found) {
    const id = localStorage.getItem(CHAT + one.id) === null ? one.id : newConversation().id;
    save(CHAT + id, { ...one, id });
  }
}

function firstWords({ messages }) {
  const text = textOf(messages[0]?.content ?? "").trim().replace(/\s+/g, " ");
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}

// Returns a copy with the known fields only, or null if the value is not a conversation: it can be from any program.
function checked(value) {
  const { id, title, updated, messages } = value ?? {};
  if (typeof id !== "string" || typeof title !== "string" || !Number.isFinite(updated)) return null;
  if (!Array.isArray(messages) || !messages.every(isMessage)) return null;
  return { id, title, updated, messages: messages.map(checkedMessage) };
}

function isMessage(message) {
  const { role, content } = message ?? {};
  const parts = Array.isArray(content) && content.every((part) => TYPES.has(part?.type) && typeof part.text === "string");
  return ROLES.has(role) && (typeof content === "string" || (role === "assistant" && parts));
}

function checkedMessage({ role, content, stats, stopped }) {
  if (role === "user") return { role, content };
  const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
  return { role, content: parts.map(({ type, text }) => ({ type, text })), stats: checkedStats(stats), stopped: stopped === true };
}

function checkedStats(stats) {
  const known = Object.entries(stats ?? {}).filter(([name, value]) => typeof value === STATS[name]);
  return Object.fromEntries(known);
}
