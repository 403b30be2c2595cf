// Agents' packages of npm over the scripted server: AI SDK (three providers), @openai/agents, openai and
// @anthropic-ai/sdk.  node agents_js.mjs BASE MODEL
import assert from "node:assert/strict";
import { Agent, run, setDefaultOpenAIClient, setTracingDisabled, tool as agentTool } from "@openai/agents";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import Anthropic from "@anthropic-ai/sdk";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [base, model] = process.argv.slice(2);
const text = "It is sunny: 21 degrees.";
globalThis.AI_SDK_LOG_WARNINGS = false;
setTracingDisabled(true);
let passed = 0;
const failed = [];
async function check(name, run) {
  try {
    await run();
    console.log(`ok   ${name}`);
    passed += 1;
  } catch (error) {
    console.log(`FAIL ${name}:`, error);
    failed.push(name);
  }
}

const inputSchema = z.object({ city: z.string() });
const weather = tool({ description: "w", inputSchema, execute: async ({ city }) => `sunny in ${city}` });
const asked = { prompt: "Weather?", tools: { get_weather: weather }, stopWhen: stepCountIs(3), maxRetries: 0 };
const given = { baseURL: `${base}/v1`, apiKey: "EMPTY" };
const providers = {
  openai: createOpenAI(given),
  anthropic: createAnthropic(given),
  "openai-compatible": createOpenAICompatible({ ...given, name: "jmoe", includeUsage: true }),
};
for (const [name, provider] of Object.entries(providers)) {
  await check(`ai, ${name}: text`, async () => {
    assert.equal((await generateText({ model: provider(model), prompt: "hi", maxRetries: 0 })).text, text);
  });
  await check(`ai, ${name}: a tool`, async () => {
    const answer = await generateText({ ...asked, model: provider(model) });
    assert.deepEqual([answer.text, answer.steps.length], [text, 2]);
  });
  await check(`ai, ${name}: a streamed tool`, async () => {
    let failure = null;
    const answer = streamText({ ...asked, model: provider(model), onError: ({ error }) => { failure = error; } });
    const kinds = new Set();
    for await (const part of answer.fullStream) kinds.add(part.type);
    if (failure) throw failure;
    assert.equal(await answer.text, text);
    assert.ok(kinds.has("tool-call") && kinds.has("tool-result"));
  });
}
await check("ai, openai: an object", async () => {
  const schema = z.object({ city: z.string(), degrees: z.number() });
  const { object } = await generateObject({ model: providers.openai(model), prompt: "hi", schema, maxRetries: 0 });
  assert.deepEqual(object, { city: "Paris", degrees: 21 });
});

const client = new OpenAI({ ...given, maxRetries: 0 });
setDefaultOpenAIClient(client);
const execute = async ({ city }) => `sunny in ${city}`;
const ownTool = agentTool({ name: "get_weather", description: "w", parameters: inputSchema, execute });
const agent = new Agent({ name: "a", instructions: "Help.", tools: [ownTool], model });
await check("@openai/agents: whole", async () => {
  assert.equal((await run(agent, "Weather?", { maxTurns: 4 })).finalOutput, text);
});
await check("@openai/agents: stream", async () => {
  const result = await run(agent, "Weather?", { stream: true, maxTurns: 4 });
  for await (const _ of result);
  assert.equal(result.finalOutput, text);
});
await check("openai: a streamed response", async () => {
  const stream = client.responses.stream({ model, input: "hi" });
  for await (const _ of stream);
  assert.equal((await stream.finalResponse()).output_text, text);
});
await check("@anthropic-ai/sdk: a streamed message", async () => {
  const anthropic = new Anthropic({ baseURL: base, apiKey: "EMPTY", maxRetries: 0 });
  const messages = [{ role: "user", content: "hi" }];
  const message = await anthropic.messages.stream({ model, max_tokens: 100, messages }).finalMessage();
  assert.equal(message.content.at(-1).text, text);
});

console.log(`${passed} of ${passed + failed.length} checks${failed.map((name) => `; ${name}`).join("")}`);
process.exit(failed.length ? 1 : 0);
