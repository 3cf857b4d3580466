// OpenAI's SDK for Node, unchanged: a file of requests is uploaded, run as a batch, and its results are fetched.
//
//     cd examples/openai-node && npm ci && node batches.js
//
// PENSTOCK_URL names another server than http://127.0.0.1:8000.

import assert from "node:assert/strict";
import { createReadStream } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import OpenAI from "openai";

const url = process.env.PENSTOCK_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const model = (await client.models.list()).data[0].id;

// One request a line. Results come in any order, so each has a name.
const questions = { river: "What is a river?", mill: "What is a mill?", fox: "What is a fox?" };
const lines = Object.entries(questions).map(([name, question]) => ({
  custom_id: name,
  method: "POST",
  url: "/v1/chat/completions",
  body: { model, messages: [{ role: "user", content: question }], max_tokens: 60 },
}));
const folder = await mkdtemp(join(tmpdir(), "batch-"));
const path = join(folder, "questions.jsonl");
await writeFile(path, lines.map((line) => JSON.stringify(line) + "\n").join(""));

// Neither side has to hold the file in memory: it is read, sent and written to the server's disk as it comes.
const input = await client.files.create({ file: createReadStream(path), purpose: "batch" });
await rm(folder, { recursive: true });

let batch = await client.batches.create({
  input_file_id: input.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
});
console.log("batch:", batch.id);
while (["validating", "in_progress", "finalizing"].includes(batch.status)) {
  await setTimeout(200);
  batch = await client.batches.retrieve(batch.id);
}
assert.equal(batch.status, "completed");
assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });

const content = await client.files.content(batch.output_file_id);
for (const line of (await content.text()).trimEnd().split("\n")) {
  const { custom_id: name, response } = JSON.parse(line);
  assert.equal(response.status_code, 200);
  console.log(`${questions[name]} ${response.body.choices[0].message.content}`);
}

// Every batch that there is; the SDK fetches page after page.
const known = [];
for await (const each of client.batches.list({ limit: 2 })) known.push(each.id);
assert.ok(known.includes(batch.id));

// Files are kept for thirty days, or until they are deleted.
await client.files.delete(input.id);
await client.files.delete(batch.output_file_id);
