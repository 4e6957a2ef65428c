// Conversations and settings, kept in this browser and nowhere else.
// A conversation: {id, title, updated, messages: [{role, content, stats?, stopped?}]}, content of a reply as parts {type, text}.

const CHAT = "nanochat:chat:";
const ROLES = new Set(["user", "assistant"]);
const TYPES = new Set(["text", "python", "python_output"]);

export function load(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise; // not ours, or damaged
  }
}

// Throws where the browser keeps nothing or its space is used up.
export function save(key, value) {
  localStorage.setItem(key, JSON.stringify(value));
}

// All conversations, the latest first.
export function conversations() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(CHAT))
    .map((key) => load(key, null))
    .filter(valid)
    .sort((a, b) => b.updated - a.updated);
}

export function conversation(id) {
  const found = load(CHAT + id, null);
  return valid(found) ? found : null;
}

export function newConversation() {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", updated: Date.now(), messages: [] };
}

export function keep(conversation) {
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

export function forget(id) {
  localStorage.removeItem(CHAT + id);
}

export function textOf(content) {
  if (typeof content === "string") return content;
  return content.filter((part) => part.type === "text").map((part) => part.text).join("");
}

// Those in whose title or text every word of the query is found.
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

// Adds what `exported` wrote; gives how many conversations came in. Throws on a file that is something else.
export function imported(text) {
  const { nanochat, conversations: found } = JSON.parse(text);
  if (nanochat !== 1 || !Array.isArray(found) || !found.every(valid)) throw new Error("not an export of nanochat");
  for (const one of found) {
    const id = localStorage.getItem(CHAT + one.id) === null ? one.id : newConversation().id;
    save(CHAT + id, { ...one, id });
  }
  return found.length;
}

function firstWords({ messages }) {
  const text = textOf(messages[0]?.content ?? "").trim().replace(/\s+/g, " ");
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}

function valid(value) {
  return typeof value?.id === "string" && typeof value.title === "string" && Number.isFinite(value.updated) &&
    Array.isArray(value.messages) && value.messages.every(validMessage);
}

function validMessage(message) {
  const { role, content } = message ?? {};
  const parts = Array.isArray(content) && content.every((part) => TYPES.has(part?.type) && typeof part.text === "string");
  return ROLES.has(role) && (typeof content === "string" || (role === "assistant" && parts));
}
