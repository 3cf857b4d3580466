// OpenAI's SDK for Node, unchanged: a chat is streamed, its connection lost in the middle, and gone on with.
//
//     cd examples/openai-node && npm ci && node chat.js
//
// PENSTOCK_URL names another server than http://127.0.0.1:8000.

import { randomUUID } from "node:crypto";
import OpenAI from "openai";

const url = process.env.PENSTOCK_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const model = (await client.models.list()).data[0].id;

// With a key a request can be repeated: it finds the reply that it began, instead of beginning another.
const headers = { "Idempotency-Key": randomUUID() };
const ask = () =>
  client.chat.completions
    .create(
      {
        model,
        messages: [{ role: "user", content: "Tell me a story about a fox." }],
        max_completion_tokens: 60,
        stream: true,
      },
      { headers },
    )
    .withResponse();

let shown = "";
const first = await ask();
console.log("job:", first.response.headers.get("x-penstock-job"));
for await (const chunk of first.data) {
  const text = chunk.choices[0].delta.content ?? "";
  process.stdout.write(text);
  shown += text;
  if (shown.length > 40) break; // as if the network had gone; the job goes on for 10 s without a reader
}

// The same reply, from its beginning: what was shown already is left out.
let skip = shown.length;
for await (const chunk of (await ask()).data) {
  const text = chunk.choices[0].delta.content ?? "";
  process.stdout.write(text.slice(skip));
  skip = Math.max(0, skip - text.length);
}
console.log();
