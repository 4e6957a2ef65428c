// Talks to the server: the models, a streamed reply, Markdown as HTML. Asks for the API key where the server wants one.

const KEY = "nanochat:key";
let askForKey = async () => null;

// `ask(wrong)` shows a dialog and gives the key that was typed.
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function request(path, body, signal) {
  for (;;) {
    const key = localStorage.getItem(KEY);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, { ...options, headers, signal });
    if (response.ok) return response;
    if (response.status !== 401) {
      const error = (await response.json().catch(() => null))?.error;
      if (error?.code !== "loading") {
        throw new Error(error?.message ?? `The server answered with status ${response.status}.`);
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
      signal?.throwIfAborted();
      continue;
    }
    const typed = await askForKey(Boolean(key));
    if (!typed) throw new Error("This server asks for its API key.");
    localStorage.setItem(KEY, typed);
  }
}

export async function models() {
  return (await (await request("/v1/models")).json()).data;
}

// Safe HTML for each of the texts.
export async function render(texts) {
  return (await (await request("/render", { texts })).json()).html;
}

// Sends a conversation; gives {dropped} once, then {type, text} for each piece, then {reason} and {usage}.
export async function* reply(body, signal) {
  const response = await request(
    "/v1/chat/completions",
    { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  );
  yield { dropped: Number(response.headers.get("X-Nanochat-Dropped-Messages") ?? 0) };
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) yield { usage: chunk.usage };
    const [choice] = chunk.choices;
    if (choice?.delta.content) yield { type: "text", text: choice.delta.content };
    if (choice?.delta.nanochat) yield choice.delta.nanochat;
    if (choice?.finish_reason) yield { reason: choice.finish_reason };
  }
}

// The JSON objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke off.");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
