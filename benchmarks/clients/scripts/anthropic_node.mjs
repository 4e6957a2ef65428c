/* @anthropic-ai/sdk

Messages, stream, countTokens, errors.
new Anthropic({ baseURL: "http://127.0.0.1:8000", apiKey: "none" })
*/
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";

const model = process.env.NANOCHAT_MODEL;
const client = new Anthropic({ baseURL: process.env.NANOCHAT_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Who are you?" }];
const whole = await client.messages.create({ model, messages, max_tokens: 30, temperature: 0 });
const stream = client.messages.stream({ model, messages, max_tokens: 30, temperature: 0 });
assert.equal(await stream.finalText(), whole.content[0].text);
assert.equal((await client.messages.countTokens({ model, messages })).input_tokens, whole.usage.input_tokens);
await assert.rejects(client.messages.create({ model: "claude", messages, max_tokens: 3 }), Anthropic.NotFoundError);
