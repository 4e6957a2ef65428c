/* ai @ai-sdk/openai-compatible

generateText and streamText, with chat and with completions.
createOpenAICompatible({ name: "nanochat", baseURL: "http://127.0.0.1:8000/v1" })
*/
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const provider = createOpenAICompatible({
  name: "nanochat",
  baseURL: `${process.env.NANOCHAT_URL}/v1`,
  includeUsage: true,
});
const id = process.env.NANOCHAT_MODEL;
for (const model of [provider(id), provider.completionModel(id)]) {
  const asked = { model, prompt: "Who are you?", maxOutputTokens: 40, temperature: 0, maxRetries: 0 };
  const whole = await generateText(asked);
  const stream = streamText(asked);
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert(text && text === whole.text);
  assert((await stream.usage).outputTokens > 0);
}
