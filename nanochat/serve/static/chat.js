// The chat page. What the model writes only ever enters the page as textContent.

const element = (id) => document.getElementById(id);
const composer = element("composer"), input = element("input"), send = element("send");
const scroll = element("scroll"), messages = element("messages");
const temperature = element("temperature"), topK = element("top-k");

let conversation = []; // {role, content}, content of the assistant as parts {type, text}
let underWay = null; // AbortController of the reply being written

function add(parent, tag, className, text = "") {
  const node = parent.appendChild(document.createElement(tag));
  node.className = className;
  node.textContent = text;
  return node;
}

// Runs `change` and keeps the end in view, unless the reader has scrolled up to read.
function following(change) {
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (atEnd) scroll.scrollTop = scroll.scrollHeight;
}

// Shows one assistant turn as it grows.
class ReplyView {
  constructor() {
    this.parts = [];
    this.node = add(messages, "article", "turn assistant waiting");
    this.node.setAttribute("aria-label", "Reply");
    this.current = null; // the node that the last part is written into
    this.step = null;
  }

  add(type, text) {
    const last = this.parts.at(-1);
    if (last?.type === type) {
      last.text += text;
    } else {
      this.parts.push({ type, text });
      this.open(type);
    }
    this.current.append(text);
    if (type === "python_output") {
      this.current.classList.toggle("failed", this.parts.at(-1).text.startsWith("error:"));
    }
  }

  open(type) {
    if (type === "text") {
      this.current = add(this.node, "div", "text");
    } else if (type === "python") {
      this.step = add(this.node, "div", "step");
      add(this.step, "span", "step-name", "Ran Python");
      this.current = add(this.step, "pre", "code");
    } else {
      this.current = add(this.step ?? this.node, "pre", "result");
    }
  }

  note(text, className = "") {
    add(this.node, "div", `note ${className}`, text);
  }

  end() {
    this.node.classList.remove("waiting");
  }
}

// The JSON objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function complaint(response) {
  const body = await response.json().catch(() => null);
  if (body?.error?.code === "context_length_exceeded") {
    return "This conversation has become longer than the model can read. Start a new chat.";
  }
  return body?.error?.message ?? `The server answered with status ${response.status}.`;
}

async function stream(view, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      messages: conversation,
      stream: true,
      temperature: Number(temperature.value),
      top_k: Math.max(0, Math.round(Number(topK.value)) || 0),
    }),
    signal,
  });
  if (!response.ok) throw new Error(await complaint(response));
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const { delta, finish_reason: reason } = chunk.choices[0];
    following(() => {
      if (delta.content) view.add("text", delta.content);
      if (delta.nanochat) view.add(delta.nanochat.type, delta.nanochat.text);
      if (reason === "length") view.note("The reply ends here: it reached its longest length.");
    });
  }
}

async function ask(text) {
  add(messages, "article", "turn user text", text).setAttribute("aria-label", "You");
  conversation.push({ role: "user", content: text });
  const mine = conversation;
  const view = new ReplyView();
  scroll.scrollTop = scroll.scrollHeight;
  underWay = new AbortController();
  showState();
  let problem = null;
  try {
    await stream(view, underWay.signal);
  } catch (error) {
    problem = error;
  }
  if (mine !== conversation) return; // a new chat was begun meanwhile
  underWay = null;
  following(() => {
    view.end();
    if (problem?.name === "AbortError") view.note("Stopped.");
    else if (problem instanceof TypeError) view.note("The server cannot be reached.", "failed");
    else if (problem) view.note(problem.message, "failed");
  });
  if (view.parts.length) {
    conversation.push({ role: "assistant", content: view.parts });
  } else {
    conversation.pop(); // nothing was said: the question is not part of the conversation either
    if (problem && !input.value) input.value = text;
  }
  showState();
}

function showState() {
  composer.classList.toggle("busy", underWay !== null);
  send.setAttribute("aria-label", underWay ? "Stop" : "Send");
  send.title = underWay ? "Stop (Esc)" : "Send (Enter)";
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

function newChat() {
  underWay?.abort();
  underWay = null;
  conversation = [];
  messages.replaceChildren();
  showState();
  input.focus();
}

async function showModel() {
  const response = await fetch("/v1/models");
  const { nanochat: about } = (await response.json()).data[0];
  element("model").textContent = about.description;
  temperature.value = about.defaults.temperature;
  topK.value = about.defaults.top_k ?? 0;
  showTemperature();
}

function showTemperature() {
  element("temperature-value").textContent = Number(temperature.value).toFixed(2);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (underWay) underWay.abort();
  else submit();
});

input.addEventListener("input", showState);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: an input method's Enter
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !element("settings").open) underWay?.abort();
});

element("new-chat").addEventListener("click", newChat);
element("settings-button").addEventListener("click", () => element("settings").showModal());
temperature.addEventListener("input", showTemperature);
for (const button of document.querySelectorAll(".suggestions button")) {
  button.addEventListener("click", () => ask(button.textContent));
}

showState();
showModel().catch(() => { element("model").textContent = "not reachable"; });
