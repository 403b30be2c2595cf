// Vercel's AI SDK with its provider for compatible servers.  node ai_sdk.mjs BASE MODEL
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

const [base, model] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "jmoe", baseURL: `${base}/v1`, apiKey: "EMPTY", includeUsage: true });
const request = { model: provider(model), prompt: "Hi, two tickets please.", temperature: 0, maxOutputTokens: 16, maxRetries: 0 };

const whole = await generateText(request);
assert.ok(whole.text.length > 0);
const stream = streamText(request);
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
assert.ok(whole.usage.inputTokens > 0);
const weather = tool({
  description: "The weather of a city", inputSchema: z.object({ city: z.string() }), execute: async () => "sunny",
});
const told = await generateText({ ...request, tools: { weather }, maxOutputTokens: 64 });
assert.ok(told.text.length > 0 || told.steps.some((step) => step.toolCalls.length > 0));
await assert.rejects(generateText({ ...request, model: provider("gpt-9") }), (error) => error.statusCode === 404);
console.log(`generateText and streamText agree over ${whole.usage.outputTokens} tokens`);
