// A log read over HTTP, from a server that cuts, refuses and splits as networks do.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, afterEach, before, test } from "node:test";

import { ApiError } from "../../../src/penstock/web/js/api.js";
import { parse, readLog } from "../../../src/penstock/web/js/sse.js";

/** What the server answers to each request in turn: `(request, response) => void`. */
let answers = [];
let asked = [];
const server = createServer((request, response) => {
  asked.push(request.headers["last-event-id"]);
  (answers.shift() ?? assert.fail("one request too many"))(response);
});

before(() => new Promise((listening) => server.listen(0, "127.0.0.1", listening)));
after(() => server.close());
afterEach(() => {
  assert.equal(answers.length, 0, "all answers were asked for");
  [answers, asked] = [[], []];
});

const url = () => `http://127.0.0.1:${server.address().port}/v1/jobs/job_1/events`;
const block = (id, event, data) => `id: ${id}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n`;
const token = (id) => block(id, "token", { token: `${id}` });
const DONE = block(9, "done", { status: "completed" });

const stream = (...parts) => (response) => {
  response.writeHead(200, { "content-type": "text/event-stream" });
  response.end(parts.join(""));
};

/** Sends, and cuts the connection when that has arrived. */
const cut = (...parts) => (response) => {
  response.writeHead(200, { "content-type": "text/event-stream" });
  response.write(parts.join(""), () => setImmediate(() => response.destroy()));
};

const refuse = (status, headers = {}) => (response) => {
  response.writeHead(status, headers);
  response.end(JSON.stringify({ error: { message: "No.", code: "not_now" } }));
};

async function read(options = {}) {
  const events = [];
  const states = [];
  const over = new AbortController();
  const log = readLog(url(), { signal: over.signal, onState: (state) => states.push(state), ...options });
  for await (const { id, event } of log) events.push(`${event} ${id}`);
  return { events, states };
}

test("a log to its end", async () => {
  answers = [stream(token(1), token(2), DONE)];
  assert.deepEqual(await read(), { events: ["token 1", "token 2", "done 9"], states: ["live"] });
  assert.deepEqual(asked, ["0"]);
});

test("it begins behind what is known", async () => {
  answers = [stream(DONE)];
  await read({ after: 7 });
  assert.deepEqual(asked, ["7"]);
});

test("after a cut it goes on behind the last event", async () => {
  answers = [cut(token(1), token(2), "id: 3\nevent: tok"), stream(token(3), DONE)];
  const { events, states } = await read();
  assert.deepEqual(events, ["token 1", "token 2", "token 3", "done 9"]);
  assert.deepEqual(states, ["live", "waiting", "live"]);
  assert.deepEqual(asked, ["0", "2"]);
});

test("a stream that ends without its last event is a cut", async () => {
  answers = [stream(token(1)), stream(DONE)];
  assert.deepEqual((await read()).events, ["token 1", "done 9"]);
});

test("what passes is asked again", async () => {
  answers = [refuse(503), stream(DONE)];
  assert.deepEqual(await read(), { events: ["done 9"], states: ["waiting", "live"] });
});

test("what does not pass is thrown", async () => {
  answers = [refuse(404)];
  await assert.rejects(read(), (error) => error instanceof ApiError && error.status === 404 && error.code === "not_now");
});

test("204: there is nothing behind that", async () => {
  answers = [(response) => response.writeHead(204).end()];
  assert.deepEqual((await read()).events, []);
});

test("an `error` event ends it", async () => {
  answers = [stream(block(1, "error", { error: { code: "cancelled" } }), token(2))];
  assert.deepEqual((await read()).events, ["error 1"]);
});

test("who has gone gets nothing more", async () => {
  answers = [(response) => response.writeHead(200).write(token(1))];
  const over = new AbortController();
  const events = [];
  for await (const { id } of readLog(url(), { signal: over.signal })) {
    events.push(id);
    over.abort();
  }
  assert.deepEqual(events, ["1"]);
});

test("blocks come whole, wherever the network splits them", async () => {
  const bytes = new TextEncoder().encode(`: a comment\n\nretry: 5\n\n${block(1, "token", { token: "é🙂" })}${DONE}`);
  for (let at = 1; at < bytes.length; at++) {
    const parts = new ReadableStream({
      start(controller) {
        controller.enqueue(bytes.slice(0, at));
        controller.enqueue(bytes.slice(at));
        controller.close();
      },
    });
    const found = [];
    for await (const event of parse(parts)) found.push(event);
    assert.deepEqual(found, [
      { id: "1", event: "token", data: { token: "é🙂" } },
      { id: "9", event: "done", data: { status: "completed" } },
    ]);
  }
});
