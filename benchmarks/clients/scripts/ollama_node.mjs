/* ollama

List, show, chat, generate, streams, JSON schema, errors.
new Ollama({ host: "http://127.0.0.1:8000" })
*/
import assert from "node:assert";
import { Ollama } from "ollama";

const model = process.env.NANOCHAT_MODEL;
const client = new Ollama({ host: process.env.NANOCHAT_URL });
assert((await client.list()).models.some((entry) => entry.name === `${model}:latest`));
assert((await client.show({ model })).capabilities.includes("completion"));
const asked = { model, messages: [{ role: "user", content: "Who are you?" }], options: { temperature: 0, num_predict: 30 } };
const whole = await client.chat(asked);
let text = "";
for await (const part of await client.chat({ ...asked, stream: true })) text += part.message.content;
assert(text && text === whole.message.content);
assert((await client.generate({ model, prompt: "Who are you?", options: { num_predict: 10 } })).response);
const format = { type: "object", properties: { age: { type: "integer" } }, required: ["age"] };
assert(Number.isInteger(JSON.parse((await client.chat({ ...asked, format })).message.content).age));
await assert.rejects(client.chat({ ...asked, model: "llama3" }), /llama3/);
