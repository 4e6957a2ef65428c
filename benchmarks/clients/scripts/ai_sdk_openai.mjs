/* ai @ai-sdk/openai

generateText, streamText, two turns, a tool and an object, with Responses and with chat().
createOpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" })
*/
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { Output, generateText, jsonSchema, streamText, tool } from "ai";

const provider = createOpenAI({ baseURL: `${process.env.NANOCHAT_URL}/v1`, apiKey: "none" });
const schema = { type: "object", properties: { age: { type: "integer" } }, required: ["age"], additionalProperties: false };
const tools = { weather: tool({ description: "Weather", inputSchema: jsonSchema({ type: "object", properties: {} }) }) };

for (const model of [provider(process.env.NANOCHAT_MODEL), provider.chat(process.env.NANOCHAT_MODEL)]) {
  const asked = { model, maxOutputTokens: 60, temperature: 0, maxRetries: 0 };
  const messages = [{ role: "system", content: "Answer briefly." }, { role: "user", content: "Who are you?" }];
  const first = await generateText({ ...asked, messages, tools, allowSystemInMessages: true });
  assert(first.text && first.usage.inputTokens > 0);
  // The provider refers to the first answer by its id, which the server has to remember.
  const turns = [...messages, ...first.response.messages, { role: "user", content: "And again?" }];
  const second = await generateText({ ...asked, messages: turns, allowSystemInMessages: true });
  assert(second.text && second.usage.inputTokens > first.usage.inputTokens);
  const stream = streamText({ ...asked, messages, allowSystemInMessages: true });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, first.text);
  assert(["stop", "length"].includes(await stream.finishReason));
  const age = await generateText({ ...asked, prompt: "How old?", output: Output.object({ schema: jsonSchema(schema) }) });
  assert(Number.isInteger(age.output.age));
}
