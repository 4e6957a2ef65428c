/* openai

Models, chat, streams, JSON schema, Responses, errors.
new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" })
*/
import assert from "node:assert";
import OpenAI from "openai";

const model = process.env.NANOCHAT_MODEL;
const client = new OpenAI({ baseURL: `${process.env.NANOCHAT_URL}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model, messages: [{ role: "user", content: "Who are you?" }], max_tokens: 30, temperature: 0 };

const ids = [];
for await (const card of client.models.list()) ids.push(card.id);
assert(ids.includes(model));
const whole = await client.chat.completions.create(asked);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
  text += chunk.choices[0]?.delta.content ?? "";
assert(text && text === whole.choices[0].message.content);
const helper = client.chat.completions.stream(asked);
assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);

const schema = { type: "object", properties: { age: { type: "integer" } }, required: ["age"] };
const format = { type: "json_schema", json_schema: { name: "age", schema } };
const structured = await client.chat.completions.create({ ...asked, response_format: format });
assert(Number.isInteger(JSON.parse(structured.choices[0].message.content).age));

const first = await client.responses.create({ model, input: "Who are you?", max_output_tokens: 30, temperature: 0 });
assert(first.output_text);
const second = await client.responses.create({ model, input: "Again?", previous_response_id: first.id });
assert(second.usage.input_tokens > first.usage.input_tokens);
const stream = client.responses.stream({ model, input: "Who are you?", max_output_tokens: 30, temperature: 0 });
assert.equal((await stream.finalResponse()).output_text, first.output_text);

await assert.rejects(client.embeddings.create({ model, input: "hello" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...asked, temperature: 3 }), OpenAI.BadRequestError);
