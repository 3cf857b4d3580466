// How openai-node reads thoughts and calls. test_reasoning_sdks.py runs this in examples/openai-node, where the SDK is;
// PENSTOCK_SAYS has what each model is asked and says.

"use strict";
const assert = require("node:assert/strict");
const { test } = require("node:test");
const OpenAI = require(require.resolve("openai", { paths: [process.cwd()] }));

const client = new OpenAI({ baseURL: `${process.env.PENSTOCK_URL}/v1`, apiKey: "none", maxRetries: 0 });
const { thought, text, ask, tools, calls } = JSON.parse(process.env.PENSTOCK_SAYS);
const families = Object.keys(calls);
const messages = [{ role: "user", content: ask }];
const functions = tools.map((tool) => ({ type: "function", strict: false, ...tool.function }));

const made = (found) => found.map(({ name, arguments: given }) => [name, JSON.parse(given)]);

test("a chat in one piece", async () => {
  for (const model of families) {
    const reply = await client.chat.completions.create({ model, messages, tools, max_tokens: 300 });
    const { message, finish_reason } = reply.choices[0];
    assert.equal(message.reasoning, thought, model);
    assert.equal(message.content.trim(), text, model);
    assert.deepEqual(made(message.tool_calls.map((call) => call.function)), calls[model]);
    assert.equal(finish_reason, "tool_calls");
  }
});

test("a chat as it comes", async () => {
  for (const model of families) {
    const stream = client.chat.completions.stream({ model, messages, tools, max_tokens: 300 });
    let told = "";
    stream.on("chunk", (chunk) => (told += chunk.choices[0]?.delta.reasoning ?? ""));
    const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
    assert.equal(told, thought, model);
    assert.equal(message.content.trim(), text, model);
    assert.deepEqual(made(message.tool_calls.map((call) => call.function)), calls[model]);
    assert.equal(finish_reason, "tool_calls");
  }
});

test("a response in one piece and as it comes", async () => {
  for (const model of families) {
    const asked = { model, input: ask, tools: functions, max_output_tokens: 300 };
    const stream = client.responses.stream(asked);
    let told = "";
    stream.on("response.reasoning_text.delta", (event) => (told += event.delta));
    for (const reply of [await client.responses.create(asked), await stream.finalResponse()]) {
      const of = (type) => reply.output.filter((item) => item.type === type);
      assert.equal(of("reasoning").map((item) => item.content.map((part) => part.text).join("")).join(""), thought, model);
      assert.equal(reply.output_text.trim(), text, model);
      assert.deepEqual(made(of("function_call")), calls[model]);
    }
    assert.equal(told, thought, model);
  }
});
