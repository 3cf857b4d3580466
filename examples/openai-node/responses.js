// OpenAI's SDK for Node, unchanged: a conversation of two responses, the second one streamed.
//
//     cd examples/openai-node && npm ci && node responses.js
//
// PENSTOCK_URL names another server than http://127.0.0.1:8000.

import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.env.PENSTOCK_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const model = (await client.models.list()).data[0].id;

const first = await client.responses.create({ model, input: "What is a river?", max_output_tokens: 60 });
console.log(first.output_text);

// The server keeps the conversation: what was said before need not be sent again.
const stream = client.responses.stream({
  model,
  input: "And what is a lake?",
  previous_response_id: first.id,
  max_output_tokens: 60,
});
let shown = "";
for await (const event of stream) {
  if (event.type === "response.output_text.delta") {
    process.stdout.write(event.delta);
    shown += event.delta;
  }
}
console.log();
const second = await stream.finalResponse();
assert.equal(second.output_text, shown);

// Everything that the second response answered: question, answer, question. The SDK fetches page after page.
const asked = [];
for await (const item of client.responses.inputItems.list(second.id, { order: "asc", limit: 2 })) {
  asked.push(item.content[0].text);
}
assert.deepEqual(asked, ["What is a river?", first.output_text, "And what is a lake?"]);

// They are kept for a while (`result_ttl`, an hour), or until they are deleted.
await client.responses.delete(first.id);
await client.responses.delete(second.id);
await assert.rejects(client.responses.retrieve(second.id), OpenAI.NotFoundError);
