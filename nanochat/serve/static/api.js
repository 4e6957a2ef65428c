// Client of the server's API: models, streamed replies, Markdown rendering. Prompts for the API key if required.

const KEY = "nanochat:key";
let askForKey = async () => null;

// `ask(wrong)` shows a dialog and resolves to the key entered.
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
        throw new Error(error?.message ?? `The server returned status ${response.status}.`);
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
      signal?.throwIfAborted();
      continue;
    }
    const entered = await askForKey(Boolean(key));
    if (!entered) throw new Error("This server requires an API key.");
    localStorage.setItem(KEY, entered);
  }
}

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

// Converts Markdown texts to safe HTML.
export async function render(texts) {
  return (await (await request("render", { texts })).json()).html;
}

// Sends a conversation. Yields {dropped} once, then {type, text} for each delta, then {reason} and {usage}.
export async function* reply(body, signal) {
  const response = await request(
    "v1/chat/completions",
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

// Parses a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
