// Vercel's AI SDK: texts, tools, structures and streams through its OpenAI, Anthropic and OpenAI-compatible providers.
// The same file for its versions 6 and 7.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import assert from "node:assert/strict";
import { test } from "node:test";
import { z } from "zod";

const { PENSTOCK_URL: url, PENSTOCK_MODEL: name, PENSTOCK_EMBED: embed } = process.env;
const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "penstock",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  chat: openai.chat(name),
  responses: openai.responses(name),
  anthropic: createAnthropic({ baseURL, apiKey: "none" })(name),
  compatible: compatible(name),
};
const user = z.object({ name: z.string(), age: z.number().int() });
const tools = {
  weather: tool({
    description: "The weather in a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};

for (const [kind, model] of Object.entries(models)) {
  const ask = (settings) => generateText({ model, maxRetries: 0, ...settings });
  const stream = (settings) => streamText({ model, maxRetries: 0, onError: () => {}, ...settings });

  test(`${kind}: a text`, async () => {
    const result = await ask({ prompt: "Say 'good morning'." });
    assert.equal(result.text, "good morning");
    assert.equal(result.finishReason, "stop");
    assert.ok(result.usage.inputTokens > 0 && result.usage.outputTokens > 0);
  });

  test(`${kind}: a text as it comes`, async () => {
    const result = stream({ prompt: "Say 'one two three four five six'." });
    const parts = [];
    for await (const part of result.textStream) parts.push(part);
    assert.equal(parts.join(""), "one two three four five six");
    assert.ok(parts.length > 1);
    assert.ok((await result.usage).outputTokens > 0);
  });

  test(`${kind}: a tool, and what is made of its result`, async () => {
    const result = await ask({ prompt: "What is the weather in Paris?", tools, stopWhen: stepCountIs(3) });
    assert.deepEqual(result.steps[0].toolCalls.map((call) => call.input), [{ city: "Paris" }]);
    assert.equal(result.text, "The tool says: sunny in Paris");
  });

  test(`${kind}: two calls at once`, async () => {
    const result = await ask({ prompt: "What is the weather in Paris and in Rome?", tools, stopWhen: stepCountIs(3) });
    assert.deepEqual(result.steps[0].toolCalls.map((call) => call.input), [{ city: "Paris" }, { city: "Rome" }]);
    assert.equal(result.text, "The tool says: sunny in Paris and sunny in Rome");
  });

  test(`${kind}: a tool in a stream`, async () => {
    const result = stream({ prompt: "What is the weather in Paris?", tools, stopWhen: stepCountIs(3) });
    const types = [];
    for await (const part of result.fullStream) types.push(part.type);
    for (const type of ["tool-input-start", "tool-input-delta", "tool-call", "tool-result", "text-delta", "finish"])
      assert.ok(types.includes(type), `${type} is missing in ${types}`);
    assert.ok(!types.includes("error"));
    assert.equal(await result.text, "The tool says: sunny in Paris");
  });

  test(`${kind}: a tool that must be called`, async () => {
    const result = await ask({ prompt: "Hello in Paris", tools, toolChoice: { type: "tool", toolName: "weather" } });
    assert.deepEqual(result.toolCalls.map((call) => call.input), [{ city: "Paris" }]);
  });

  test(`${kind}: a structure`, async () => {
    const result = await ask({ prompt: "Extract: Jason is 25 years old.", output: Output.object({ schema: user }) });
    assert.deepEqual(result.output, { name: "Jason", age: 25 });
  });

  test(`${kind}: a structure as it comes`, async () => {
    const result = stream({ prompt: "Extract: Jason is 25 years old.", output: Output.object({ schema: user }) });
    const parts = [];
    for await (const part of result.partialOutputStream) parts.push(part);
    assert.deepEqual(parts.at(-1), { name: "Jason", age: 25 });
  });

  test(`${kind}: a choice of some words`, async () => {
    const output = Output.choice({ options: ["sunny", "rainy"] });
    assert.equal((await ask({ prompt: "Is it rainy or not?", output })).output, "rainy");
  });

  test(`${kind}: a second turn behind calls`, async () => {
    const first = await ask({ prompt: "What is the weather in Paris?", tools, stopWhen: stepCountIs(3) });
    const messages = [
      { role: "system", content: "Be brief." },
      { role: "user", content: "What is the weather in Paris?" },
      ...first.response.messages,
      { role: "user", content: "Say 'thanks'." },
    ];
    assert.equal((await ask({ messages, tools, allowSystemInMessages: true })).text, "thanks");
  });

  test(`${kind}: a reply that is cut, with settings`, async () => {
    const settings = { maxOutputTokens: 16, temperature: 0, topP: 0.5 };
    const result = await ask({ prompt: `Say '${"word ".repeat(30)}'.`, ...settings });
    assert.equal(result.finishReason, "length");
    assert.ok(result.text.startsWith("word word"));
  });

  test(`${kind}: a prompt that is too long`, async () => {
    const refused = (error) => APICallError.isInstance(error) && error.statusCode === 400 && !error.isRetryable;
    await assert.rejects(ask({ prompt: "word ".repeat(70_000) }), refused);
  });

  test(`${kind}: a tool that fails`, async () => {
    const failing = { weather: { ...tools.weather, execute: async () => Promise.reject(new Error("no such city")) } };
    const result = await ask({ prompt: "What is the weather in Paris?", tools: failing, stopWhen: stepCountIs(3) });
    assert.match(result.text, /no such city/);
  });

  test(`${kind}: a tool that must be called, in a stream`, async () => {
    const result = stream({ prompt: "Hello in Paris", tools, toolChoice: "required" });
    const deltas = [];
    for await (const part of result.fullStream) if (part.type === "tool-input-delta") deltas.push(part.delta);
    assert.deepEqual((await result.toolCalls).map((call) => call.input), [{ city: "Paris" }]);
    assert.equal(deltas.join(""), '{"city": "Paris"}');
  });

  test(`${kind}: a reply that is given up`, async () => {
    const controller = new AbortController();
    const result = stream({ prompt: `Say '${"word ".repeat(500)}'.`, abortSignal: controller.signal });
    const types = [];
    for await (const part of result.fullStream) {
      types.push(part.type);
      if (part.type === "text-delta") controller.abort();
    }
    assert.equal(types.at(-1), "abort");
  });
}

for (const kind of ["chat", "compatible", "anthropic"])
  test(`${kind}: a stop sequence`, async () => {
    const result = await generateText({ model: models[kind], prompt: "Say 'one two three'.", stopSequences: ["three"] });
    assert.equal(result.text.trim(), "one two");
  });

// Its OpenAI provider shows summaries of thoughts only, and these are no summaries.
for (const kind of ["compatible", "anthropic"]) {
  const prompt = "Think 'a river runs'. What is the weather in Paris?";

  test(`${kind}: a thought before a call, and what is made of its result`, async () => {
    const result = await generateText({ model: models[kind], maxRetries: 0, prompt, tools, stopWhen: stepCountIs(3) });
    assert.deepEqual(result.steps.map((step) => step.reasoningText), ["a river runs", "a river runs"]);
    assert.deepEqual(result.steps[0].toolCalls.map((call) => call.input), [{ city: "Paris" }]);
    assert.equal(result.text, "The tool says: sunny in Paris");
  });

  test(`${kind}: a thought as it comes`, async () => {
    const result = streamText({ model: models[kind], maxRetries: 0, onError: () => {}, prompt, tools });
    const types = [];
    for await (const part of result.fullStream) types.push(part.type);
    assert.equal(await result.reasoningText, "a river runs");
    assert.ok(types.filter((type) => type === "reasoning-delta").length > 1);
    assert.ok(types.indexOf("reasoning-end") < types.indexOf("tool-input-start"));
    assert.ok(!types.includes("error"));
  });
}

test("chat: options of OpenAI's", async () => {
  const providerOptions = { openai: { logprobs: 2, user: "somebody", metadata: { a: "b" }, store: false } };
  const { text, providerMetadata } = await generateText({ model: models.chat, prompt: "Say 'one two'.", providerOptions });
  assert.equal(text, "one two");
  assert.deepEqual(providerMetadata.openai.logprobs.map((each) => each.token), ["one", " two"]);
});

test("responses: the turn before by its id", async () => {
  const first = await generateText({ model: models.responses, prompt: "Say 'one'." });
  const previousResponseId = first.providerMetadata.openai.responseId;
  const second = await generateText({
    model: models.responses,
    prompt: "Say 'two'.",
    providerOptions: { openai: { previousResponseId, store: false, user: "somebody", metadata: { a: "b" } } },
  });
  assert.equal(second.text, "two");
  assert.ok(second.usage.inputTokens > first.usage.inputTokens);
});

test("responses: nothing is stored, and calls are sent back whole", async () => {
  const providerOptions = { openai: { store: false } };
  const ask = { model: models.responses, tools, stopWhen: stepCountIs(3), providerOptions };
  const result = await generateText({ ...ask, prompt: "What is the weather in Paris?" });
  assert.equal(result.text, "The tool says: sunny in Paris");
});

test("anthropic: what is to be cached is marked", async () => {
  const providerOptions = { anthropic: { cacheControl: { type: "ephemeral" } } };
  const result = await generateText({
    model: models.anthropic,
    allowSystemInMessages: true,
    tools: { weather: { ...tools.weather, providerOptions } },
    messages: [
      { role: "system", content: "Be brief.", providerOptions },
      { role: "user", content: [{ type: "text", text: "Say 'hello'.", providerOptions }] },
    ],
  });
  assert.equal(result.text, "hello");
});

test("chat: a schema that is no zod, with a description", async () => {
  const schema = jsonSchema({ type: "object", properties: { age: { type: "integer", description: "Years" } }, required: ["age"] });
  const result = await generateText({ model: models.compatible, prompt: "Jason is 25", output: Output.object({ schema }) });
  assert.deepEqual(result.output, { age: 25 });
});

for (const [kind, model] of Object.entries({
  openai: openai.embedding(embed),
  compatible: (compatible.embeddingModel ?? compatible.textEmbeddingModel)(embed),
}))
  test(`${kind}: embeddings`, async () => {
    const { embeddings, usage } = await embedMany({ model, values: ["a fox", "a river"] });
    assert.deepEqual(embeddings.map((vector) => vector.length), [64, 64]);
    assert.ok(usage.tokens > 0);
  });
