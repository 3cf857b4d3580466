// OpenAI's SDK for Node, unchanged: a response in the background, whose stream is lost in the middle and gone on with.
//
//     cd examples/openai-node && npm ci && node background_streaming.js
//
// PENSTOCK_URL names another server than http://127.0.0.1:8000. Kill the server while this runs, and start it again: the
// text comes to its end all the same.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { setTimeout } from "node:timers/promises";
import OpenAI from "openai";

const url = process.env.PENSTOCK_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const model = (await client.models.list()).data[0].id;

const ENDS = ["response.completed", "response.incomplete", "response.failed"];

/** The events of a new background response, each exactly once, whatever becomes of connections and servers. */
async function* events(request) {
  // With a key the request can be sent again when its answer was lost: it does not begin a second response.
  const headers = { "Idempotency-Key": randomUUID() };
  let id;
  let last = -1;
  for (;;) {
    try {
      const stream =
        last < 0
          ? await client.responses.create({ ...request, background: true, stream: true }, { headers })
          : await client.responses.retrieve(id, { stream: true, starting_after: last });
      for await (const event of stream) {
        id ??= event.response.id;
        last = event.sequence_number;
        yield { event, drop: () => stream.controller.abort() };
        if (ENDS.includes(event.type)) return;
      }
    } catch (error) {
      // What the server says counts, but that it is going down (503). Anything else is a broken connection.
      const broken = error instanceof OpenAI.APIConnectionError || !(error instanceof OpenAI.APIError);
      if (!broken && error.status !== 503) throw error;
    }
    await setTimeout(500);
  }
}

let shown = "";
let final;
let next = 0;
let dropped = false;
const story = events({ model, input: "Tell me a story about a fox.", max_output_tokens: 80 });
for await (const { event, drop } of story) {
  assert.equal(event.sequence_number, next++, "an event was lost or repeated");
  if (event.type === "response.created") console.log("response:", event.response.id);
  if (event.type === "response.output_text.delta") {
    process.stdout.write(event.delta);
    shown += event.delta;
    if (shown.length > 40 && !dropped) {
      dropped = true;
      drop(); // as if the network had gone; the response goes on, whether or not anybody reads it
    }
  }
  if (ENDS.includes(event.type)) final = event.response;
}
console.log();

const kept = await client.responses.retrieve(final.id);
assert.deepEqual(kept.output, final.output);
assert.equal(kept.output[0].content[0].text, shown);
