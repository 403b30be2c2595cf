// The openai package of npm.  node openai_js.mjs BASE MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [base, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "EMPTY", maxRetries: 0 });
const request = { model, temperature: 0, max_tokens: 16, messages: [{ role: "user", content: "Hi, two tickets please." }] };

const running = async () => {
  const text = await (await fetch(`${base}/metrics`)).text();
  const found = [...text.matchAll(/^jmoe_num_requests_(?:running|waiting)(?:\{.*\})? (\S+)/gm)];
  return found.reduce((sum, match) => sum + Number(match[1]), 0);
};

const models = [];
for await (const found of client.models.list()) models.push(found.id);
assert.deepEqual(models, [model]);

const whole = await client.chat.completions.create(request);
const stream = await client.chat.completions.create({ ...request, stream: true, stream_options: { include_usage: true } });
let text = "", usage;
for await (const event of stream) {
  text += event.choices[0]?.delta?.content ?? "";
  usage = event.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(usage.total_tokens, whole.usage.total_tokens);

await assert.rejects(client.completions.create({ model, prompt: "x", max_tokens: -2 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "max_tokens");
  return true;
});
await assert.rejects(client.models.retrieve("gpt-9"), OpenAI.NotFoundError);

const aborted = await client.completions.create({ model, prompt: "Once", max_tokens: 900, stream: true, ignore_eos: true });
for await (const _ of aborted) break; // leaving the loop aborts the request
for (let i = 0; (await running()) && i < 100; i++) await new Promise((done) => setTimeout(done, 100));
assert.equal(await running(), 0);
console.log("whole and streamed answers equal, errors typed, a left stream frees its slot");
