// What openai-node does besides the examples: its helpers, pages, uploads, errors and aborts. test_openai_node.py runs
// this in examples/openai-node, where the SDK is, against a server with the models millrace (in the box), synthetic (as
// fast as it can), paced (50 tokens/s) and crawl (2 tokens/s, one slot), whose queue takes 8 jobs.

"use strict";
const assert = require("node:assert/strict");
const { createReadStream, mkdtempSync, rmSync, writeFileSync } = require("node:fs");
const { tmpdir } = require("node:os");
const { join } = require("node:path");
const { test } = require("node:test");
const { setTimeout } = require("node:timers/promises");
const OpenAI = require(require.resolve("openai", { paths: [process.cwd()] }));

const url = process.env.PENSTOCK_URL;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const HELLO = [{ role: "user", content: "What is a river?" }];
const TERMINAL = ["response.completed", "response.incomplete", "response.failed"];
const PERSON = {
  type: "object",
  properties: { name: { enum: ["Ann", "Bob"] }, age: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["name", "age"],
  additionalProperties: false,
};

/** What the synthetic engine writes. */
const textOf = (count) => Array.from({ length: count }, (_, i) => `${i + 1}@1 `).join("");

const get = async (path) => (await fetch(url + path)).json();

async function until(look, good) {
  for (;;) {
    const seen = await look();
    if (good(seen)) return seen;
    await setTimeout(20);
  }
}

const jobEnd = (id) =>
  until(() => get(`/v1/jobs/${id}`), (job) => !["queued", "running"].includes(job.status));

async function all(iterable) {
  const found = [];
  for await (const each of iterable) found.push(each);
  return found;
}

/** Numbers without a gap, one terminal event at the end; the text. */
function checkSequence(events, first = 0) {
  assert.deepEqual(
    events.map((event) => event.sequence_number),
    events.map((_, i) => first + i),
  );
  assert.deepEqual(
    events.map((event) => TERMINAL.includes(event.type)),
    events.map((_, i) => i === events.length - 1),
  );
  return events.map((event) => (event.type === "response.output_text.delta" ? event.delta : "")).join("");
}

// ------------------------------------------------------------------------------------------------ chat and completions

test("a chat reply tells its job and its request", async () => {
  const { data, response, request_id } = await client.chat.completions
    .create({ model: "synthetic", messages: HELLO, max_completion_tokens: 4 })
    .withResponse();
  assert.equal(data.choices[0].message.content, textOf(4));
  assert.equal(data.choices[0].finish_reason, "length");
  assert.equal(data.usage.completion_tokens, 4);
  assert.equal(data._request_id, request_id);
  assert.equal(response.headers.get("x-penstock-job"), data.id.replace("chatcmpl-", "job_"));
});

test("a chat stream with usage", async () => {
  const chunks = await all(
    await client.chat.completions.create({
      model: "paced",
      messages: HELLO,
      max_tokens: 6,
      stream: true,
      stream_options: { include_usage: true },
    }),
  );
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  const last = chunks.pop();
  assert.deepEqual([last.choices, last.usage.completion_tokens], [[], 6]);
  assert.ok(chunks.every((chunk) => chunk.usage === null));
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), textOf(6));
});

test("chat.completions.stream gathers what it streams", async () => {
  const stream = client.chat.completions.stream({
    model: "paced",
    messages: HELLO,
    max_tokens: 6,
    stream_options: { include_usage: true },
  });
  let told = "";
  stream.on("content", (delta) => (told += delta));
  const completion = await stream.finalChatCompletion();
  assert.equal(told, textOf(6));
  assert.equal(completion.choices[0].message.content, told);
  assert.equal((await stream.totalUsage()).completion_tokens, 6);
});

test("chat.completions.stream parses a format", async () => {
  const stream = client.chat.completions.stream({
    model: "millrace",
    messages: HELLO,
    response_format: { type: "json_schema", json_schema: { name: "person", schema: PERSON, strict: true } },
    max_tokens: 100,
  });
  const person = JSON.parse(await stream.finalContent());
  assert.deepEqual(Object.keys(person), ["name", "age"]);
});

test("runTools calls functions, in one piece and streamed", async () => {
  for (const stream of [false, true]) {
    const seen = [];
    const runner = client.chat.completions.runTools({
      model: "millrace",
      messages: HELLO,
      tools: [
        {
          type: "function",
          function: {
            name: "look_up",
            description: "Looks up.",
            parameters: PERSON,
            parse: JSON.parse,
            function: (person) => (seen.push(person), `It is ${person.name}.`),
          },
        },
      ],
      tool_choice: { type: "function", function: { name: "look_up" } },
      stream,
    });
    await runner.done();
    assert.equal(seen.length, 1);
    assert.ok(["Ann", "Bob"].includes(seen[0].name));
    assert.equal((await runner.finalFunctionToolCall()).name, "look_up");
    assert.equal(await runner.finalFunctionToolCallResult(), `It is ${seen[0].name}.`);
  }
});

test("runTools goes on with what a call gave", async () => {
  const runner = client.chat.completions.runTools({
    model: "millrace",
    messages: [
      ...HELLO,
      {
        role: "assistant",
        content: null,
        tool_calls: [{ id: "call_1", type: "function", function: { name: "look_up", arguments: "{}" } }],
      },
      { role: "tool", tool_call_id: "call_1", content: "A river is water." },
    ],
    tools: [{ type: "function", function: { name: "look_up", parameters: {}, parse: JSON.parse, function: () => "" } }],
    tool_choice: "none",
    max_tokens: 20,
  });
  assert.ok((await runner.finalContent()).length > 0);
});

test("a stream of completions, pings in between", async () => {
  const stream = await client.completions.create({ model: "crawl", prompt: "x", max_tokens: 3, stream: true });
  const chunks = await all(stream);
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), textOf(3));
});

test("models are listed and retrieved", async () => {
  const models = await all(client.models.list());
  assert.deepEqual(models.map((each) => each.id), ["millrace", "synthetic", "paced", "crawl"]);
  assert.equal((await client.models.retrieve("paced")).id, "paced");
});

// ------------------------------------------------------------------------------------------------ responses

test("a response, retrieved and deleted", async () => {
  const reply = await client.responses.create({ model: "millrace", input: "What is a river?", temperature: 0 });
  assert.equal(reply.status, "completed");
  assert.ok(reply.output_text.startsWith("A river"));
  assert.deepEqual((await client.responses.retrieve(reply.id)).output, reply.output);
  await client.responses.delete(reply.id);
  await assert.rejects(client.responses.retrieve(reply.id), OpenAI.NotFoundError);
});

test("responses.stream gathers what it streams", async () => {
  const stream = client.responses.stream({ model: "millrace", input: "What is a river?", temperature: 0 });
  let told = "";
  stream.on("response.output_text.delta", (event) => {
    told += event.delta;
    assert.equal(event.snapshot, told);
  });
  const final = await stream.finalResponse();
  assert.equal(final.output_text, told);
  assert.equal(final.status, "completed");
});

test("responses.stream follows a response that there is", async () => {
  const reply = await client.responses.create({ model: "synthetic", input: "x", max_output_tokens: 5 });
  const stream = client.responses.stream({ response_id: reply.id, starting_after: 4 });
  const numbers = (await all(stream)).map((event) => event.sequence_number);
  assert.equal(numbers[0], 5);
  assert.equal((await stream.finalResponse()).output_text, textOf(5));
});

test("responses.parse and a streamed call", async () => {
  const format = { type: "json_schema", name: "person", schema: PERSON, strict: true };
  const parsed = await client.responses.parse({ model: "millrace", input: "Who?", text: { format } });
  assert.ok(["Ann", "Bob"].includes(JSON.parse(parsed.output_text).name));
  const tools = [{ type: "function", name: "look_up", parameters: PERSON, strict: true }];
  const stream = client.responses.stream({ model: "millrace", input: "Who?", tools, tool_choice: "required" });
  let told = "";
  stream.on("response.function_call_arguments.delta", (event) => (told += event.delta));
  const [call] = (await stream.finalResponse()).output;
  assert.deepEqual([call.type, call.name, call.arguments], ["function_call", "look_up", told]);
  const answered = await client.responses.create({
    model: "millrace",
    input: [{ type: "function_call_output", call_id: call.call_id, output: "It is Ann." }],
    previous_response_id: (await stream.finalResponse()).id,
    max_output_tokens: 8,
    tools,
    tool_choice: "none",
  });
  assert.equal(answered.output[0].type, "message");
});

test("a background stream is gone on with behind any number", async () => {
  const stream = await client.responses.create({
    model: "paced",
    input: "x",
    max_output_tokens: 20,
    background: true,
    stream: true,
  });
  const seen = [];
  for await (const event of stream) {
    seen.push(event);
    if (seen.length === 9) break;
  }
  assert.deepEqual(
    seen.slice(0, 3).map((event) => event.type),
    ["response.created", "response.queued", "response.in_progress"],
  );
  const { id } = seen[0].response;
  seen.push(...(await all(await client.responses.retrieve(id, { stream: true, starting_after: 8 }))));
  assert.equal(checkSequence(seen), textOf(20));
  for (const after of [0, 5, seen.length - 2, seen.length - 1]) {
    const again = await all(await client.responses.retrieve(id, { stream: true, starting_after: after }));
    assert.deepEqual(again, seen.slice(after + 1));
  }
  await assert.rejects(
    all(await client.responses.retrieve(id, { stream: true, starting_after: 1000 })),
    (error) => error instanceof OpenAI.APIError && error.code === "log_rewound",
  );
});

test("a background response is polled and cancelled", async () => {
  const reply = await client.responses.create({
    model: "crawl",
    input: "x",
    max_output_tokens: 500,
    background: true,
  });
  assert.ok(["queued", "in_progress"].includes(reply.status));
  const cancelled = await client.responses.cancel(reply.id);
  assert.equal(cancelled.status, "cancelled");
  assert.equal((await client.responses.cancel(reply.id)).status, "cancelled");
  const events = await all(await client.responses.retrieve(reply.id, { stream: true }));
  checkSequence(events);
  assert.equal(events.at(-1).response.status, "cancelled");
});

test("inputItems.list goes through its pages", async () => {
  const words = Array.from({ length: 25 }, (_, i) => `word${i}`);
  const { id } = await client.responses.create({
    model: "synthetic",
    input: words.map((content) => ({ role: "user", content })),
    max_output_tokens: 1,
  });
  const items = await all(client.responses.inputItems.list(id, { order: "asc", limit: 7 }));
  assert.deepEqual(items.map((item) => item.content[0].text), words);
  const newest = await client.responses.inputItems.list(id);
  assert.deepEqual([newest.data.length, newest.hasNextPage()], [20, true]);
  assert.equal((await newest.getNextPage()).data.length, 5);
});

// ------------------------------------------------------------------------------------------------ files and batches

const line = (name, body) => ({ custom_id: name, method: "POST", url: "/v1/chat/completions", body });
const jsonl = (lines) => lines.map((each) => JSON.stringify(each) + "\n").join("");
const chat = (fields) => ({ model: "synthetic", messages: HELLO, max_tokens: 3, ...fields });

test("files from a stream, a buffer, a File and a reply", async () => {
  const data = jsonl([line("a", chat()), line("b", chat())]);
  const folder = mkdtempSync(join(tmpdir(), "files-"));
  writeFileSync(join(folder, "lines.jsonl"), data);
  const sources = [
    createReadStream(join(folder, "lines.jsonl")),
    await OpenAI.toFile(Buffer.from(data), "lines.jsonl"),
    new File([data], "lines.jsonl"),
  ];
  const made = [];
  for (const file of sources) made.push(await client.files.create({ file, purpose: "batch" }));
  rmSync(folder, { recursive: true });
  const reply = await client.files.content(made[0].id);
  assert.equal(await reply.clone().text(), data);
  made.push(await client.files.create({ file: await OpenAI.toFile(reply, "lines.jsonl"), purpose: "batch" }));
  for (const file of made) {
    assert.deepEqual([file.bytes, file.filename, file.purpose], [data.length, "lines.jsonl", "batch"]);
    assert.equal((await client.files.waitForProcessing(file.id)).status, "processed");
    assert.equal(await (await client.files.content(file.id)).text(), data);
  }
  const ids = made.map((file) => file.id);
  const listed = (await all(client.files.list({ purpose: "batch", order: "asc", limit: 2 }))).map((file) => file.id);
  assert.deepEqual(listed.filter((id) => ids.includes(id)), ids);
  for (const id of ids) assert.equal((await client.files.delete(id)).deleted, true);
  await assert.rejects(client.files.retrieve(ids[0]), OpenAI.NotFoundError);
  await assert.rejects(client.files.content(ids[0]), OpenAI.NotFoundError);
});

const batchEnd = (id) =>
  until(
    () => client.batches.retrieve(id),
    (batch) => ["completed", "failed", "expired", "cancelled"].includes(batch.status),
  );

async function startBatch(lines) {
  const upload = await OpenAI.toFile(Buffer.from(jsonl(lines)), "in.jsonl");
  const file = await client.files.create({ file: upload, purpose: "batch" });
  return client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
    metadata: { night: "one" },
  });
}

test("a batch with a line that fails", async () => {
  const begun = await startBatch([line("a", chat()), line("b", chat({ temperature: 9 })), line("c", chat())]);
  const batch = await batchEnd(begun.id);
  assert.deepEqual([batch.status, batch.metadata.night], ["completed", "one"]);
  assert.deepEqual(batch.request_counts, { total: 3, completed: 2, failed: 1 });
  const read = async (id) =>
    (await (await client.files.content(id)).text()).trimEnd().split("\n").map((each) => JSON.parse(each));
  const output = await read(batch.output_file_id);
  assert.deepEqual(output.map((each) => each.custom_id).sort(), ["a", "c"]);
  assert.equal(output[0].response.body.choices[0].message.content, textOf(3));
  const [failed] = await read(batch.error_file_id);
  assert.deepEqual([failed.custom_id, failed.response.body.error.param], ["b", "temperature"]);
});

test("batches.list goes through its pages, newest first", async () => {
  const made = [];
  for (let i = 0; i < 5; i++) made.unshift((await startBatch([line("a", chat())])).id);
  const listed = (await all(client.batches.list({ limit: 2 }))).map((batch) => batch.id);
  assert.deepEqual(listed.slice(0, 5), made);
  for (const id of made) await batchEnd(id);
});

test("a batch is cancelled", async () => {
  const begun = await startBatch([line("a", chat({ model: "crawl", max_tokens: 500 }))]);
  await until(() => client.batches.retrieve(begun.id), (batch) => batch.status === "in_progress");
  assert.ok(["cancelling", "cancelled"].includes((await client.batches.cancel(begun.id)).status));
  assert.equal((await batchEnd(begun.id)).status, "cancelled");
});

// ------------------------------------------------------------------------------------------------ errors and aborts

test("errors are the SDK's classes, with code and param", async () => {
  const chat = (body) => () => client.chat.completions.create({ model: "synthetic", messages: HELLO, ...body });
  const respond = (body) => () => client.responses.create({ model: "synthetic", input: "x", ...body });
  const { NotFoundError, BadRequestError } = OpenAI;
  const cases = [
    [chat({ model: "nobody" }), NotFoundError, "model_not_found", "model"],
    [respond({ model: "nobody" }), NotFoundError, "model_not_found", "model"],
    [() => client.responses.retrieve("resp_" + "0".repeat(32)), NotFoundError, "not_found", "response_id"],
    [() => client.moderations.create({ input: "x" }), NotFoundError, "not_found", null],
    [chat({ temperature: 9 }), BadRequestError, "invalid_request", "temperature"],
    [chat({ seed: 1 }), BadRequestError, "unsupported", "seed"],
    [
      respond({ previous_response_id: "resp_nope" }),
      BadRequestError,
      "previous_response_not_found",
      "previous_response_id",
    ],
  ];
  for (const [call, kind, code, param] of cases) {
    await assert.rejects(call, (error) => {
      assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
      assert.deepEqual([error.code, error.param], [code, param]);
      assert.ok(error.requestID);
      return true;
    });
  }
});

test("another body under the same key is refused", async () => {
  const options = { headers: { "Idempotency-Key": "node-key" } };
  const ask = (prompt) => client.completions.create({ model: "synthetic", prompt, max_tokens: 2 }, options);
  assert.equal((await ask("a")).id, (await ask("a")).id);
  await assert.rejects(ask("b"), (error) => {
    return error instanceof OpenAI.UnprocessableEntityError && error.code === "idempotency_mismatch";
  });
});

test("a full queue is a RateLimitError with a time to come back", async () => {
  const fill = () => client.responses.create({ model: "crawl", input: "x", max_output_tokens: 500, background: true });
  const taken = [];
  try {
    const error = await (async () => {
      for (;;) taken.push((await fill()).id);
    })().catch((thrown) => thrown);
    assert.ok(error instanceof OpenAI.RateLimitError, String(error));
    assert.equal(error.code, "overloaded");
    assert.ok(Number(error.headers.get("retry-after-ms")) >= 1);
    assert.ok(taken.length >= 8);
  } finally {
    for (const id of taken) await client.responses.cancel(id);
  }
});

test("a failure in a stream is thrown", async () => {
  const { data, response } = await client.chat.completions
    .create({ model: "paced", messages: HELLO, max_tokens: 100_000, stream: true })
    .withResponse();
  const job = response.headers.get("x-penstock-job");
  let seen = 0;
  await assert.rejects(
    (async () => {
      for await (const _ of data) if (++seen === 3) await fetch(`${url}/v1/jobs/${job}/cancel`, { method: "POST" });
    })(),
    (error) => error instanceof OpenAI.APIError && error.code === "cancelled",
  );
});

test("an aborted stream cancels its job after the grace", async () => {
  for (const abort of [(controller) => controller.abort(), (_, stream) => stream.controller.abort()]) {
    const controller = new AbortController();
    const { data, response } = await client.chat.completions
      .create({ model: "paced", messages: HELLO, max_tokens: 100_000, stream: true }, { signal: controller.signal })
      .withResponse();
    for await (const chunk of data) if (chunk.choices[0].delta.content) abort(controller, data);
    assert.equal((await jobEnd(response.headers.get("x-penstock-job"))).status, "cancelled");
  }
});

test("an aborted request cancels its job, and is an APIUserAbortError", async () => {
  const controller = new AbortController();
  const user = `abort-${process.pid}`;
  const asking = client.chat.completions.create(
    { model: "paced", messages: HELLO, max_tokens: 100_000, user },
    { signal: controller.signal },
  );
  const rejected = assert.rejects(asking, OpenAI.APIUserAbortError);
  const { data } = await until(() => get(`/v1/jobs?user_id=${user}`), (page) => page.data.length > 0);
  controller.abort();
  await rejected;
  assert.equal((await jobEnd(data[0].id)).status, "cancelled");
});

test("an aborted stream leaves a job that is to go on", async () => {
  const common = { model: "paced", stream: true };
  const chat = { ...common, messages: HELLO, max_tokens: 30, metadata: { on_disconnect: "continue" } };
  const background = { ...common, input: "x", max_output_tokens: 30, background: true };
  for (const ask of [
    (options) => client.chat.completions.create(chat, options),
    (options) => client.responses.create(background, options),
  ]) {
    const controller = new AbortController();
    const { data, response } = await ask({ signal: controller.signal }).withResponse();
    let seen = 0;
    for await (const _ of data) if (++seen === 4) controller.abort();
    const job = await jobEnd(response.headers.get("x-penstock-job"));
    assert.deepEqual([job.status, job.result.text], ["completed", textOf(30)]);
  }
});

test("the streaming helpers abort too", async () => {
  const user = `helpers-${process.pid}`;
  const helpers = [
    client.chat.completions.stream({ model: "paced", messages: HELLO, max_tokens: 100_000, user }),
    client.responses.stream({ model: "paced", input: "x", max_output_tokens: 100_000, user }),
  ];
  for (const helper of helpers) {
    const ended = assert.rejects(helper.done(), OpenAI.APIUserAbortError);
    const begun = helper === helpers[0] ? "content" : "response.output_text.delta";
    await new Promise((resolve) => helper.once(begun, resolve));
    helper.abort();
    await ended;
  }
  const { data } = await get(`/v1/jobs?user_id=${user}`);
  assert.equal(data.length, 2);
  for (const job of data) assert.equal((await jobEnd(job.id)).status, "cancelled");
});

test("a request that is timed out and sent again under its key is one job", async () => {
  const user = `retry-${process.pid}`;
  const patient = client.withOptions({ timeout: 400, maxRetries: 20 });
  const reply = await patient.chat.completions.create(
    { model: "crawl", messages: HELLO, max_tokens: 3, user, metadata: { on_disconnect: "continue" } },
    { headers: { "Idempotency-Key": user } },
  );
  assert.equal(reply.choices[0].message.content, textOf(3));
  assert.equal((await get(`/v1/jobs?user_id=${user}`)).data.length, 1);
});
