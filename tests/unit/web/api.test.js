// Calls of the API: what they answer, and how they fail.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, test } from "node:test";

import { ApiError, backoff, call, pause, randomId, request } from "../../../src/penstock/web/js/api.js";

let answer;
const asked = [];
const server = createServer((incoming, response) => {
  let body = "";
  incoming.on("data", (part) => (body += part));
  incoming.on("end", () => {
    asked.push({ method: incoming.method, type: incoming.headers["content-type"], body });
    answer(response);
  });
});

before(() => new Promise((listening) => server.listen(0, "127.0.0.1", listening)));
after(() => server.close());

const url = () => `http://127.0.0.1:${server.address().port}/v1/jobs`;
const json = (status, body, headers = {}) => (response) => response.writeHead(status, headers).end(JSON.stringify(body));
const failure = (asking) => asking.then(() => assert.fail("no failure"), (error) => error);

test("a body goes as JSON, and comes as JSON", async () => {
  answer = json(200, { id: "job_1" });
  assert.deepEqual(await call("POST", url(), { body: { prompt: "é" } }), { id: "job_1" });
  assert.deepEqual(asked.at(-1), { method: "POST", type: "application/json", body: '{"prompt":"é"}' });
  await call("GET", url());
  assert.equal(asked.at(-1).type, undefined);
});

test("204 is nothing", async () => {
  answer = (response) => response.writeHead(204).end();
  assert.equal(await call("DELETE", url()), null);
});

test("a refusal says what, where and when to ask again", async () => {
  answer = json(429, { error: { message: "Full.", code: "overloaded", param: "n" } }, { "retry-after-ms": "1500" });
  const error = await failure(call("GET", url()));
  assert.ok(error instanceof ApiError);
  assert.deepEqual([error.status, error.message, error.code, error.param, error.retryAfter], [429, "Full.", "overloaded", "n", 1.5]);
});

test("somebody else's page is a failure as well", async () => {
  answer = (response) => response.writeHead(502).end("<html>Bad gateway");
  const error = await failure(call("GET", url()));
  assert.deepEqual([error.status, error.message, error.retryAfter], [502, "The server answered 502.", null]);
});

test("only some failures pass by themselves", () => {
  const passing = [0, 400, 401, 403, 404, 409, 422, 429, 500, 502, 503, 504].filter((status) => new ApiError(status, { message: "" }).passing);
  assert.deepEqual(passing, [0, 429, 502, 503]);
});

test("nobody there: status 0", async () => {
  const free = createServer();
  await new Promise((listening) => free.listen(0, "127.0.0.1", listening));
  const { port } = free.address();
  await new Promise((closed) => free.close(closed));
  assert.equal((await failure(call("GET", `http://127.0.0.1:${port}/`))).status, 0);
});

test("an answer that does not come in time is none", async () => {
  let held;
  answer = (response) => (held = response);
  assert.equal((await failure(call("GET", url(), { within: 0.05 }))).status, 0);
  held.end();
});

test("who gives up gets their own reason, not a failure of the server", async () => {
  const over = new AbortController();
  answer = () => over.abort(new Error("enough"));
  assert.equal((await failure(request("GET", url(), { signal: over.signal }))).message, "enough");
});

test("a pause ends with its signal", async () => {
  const over = new AbortController();
  const pausing = pause(1000, over.signal);
  over.abort();
  await pausing;
  await pause(1000, over.signal); // nor does it begin
});

test("pauses double up to 15 s, and are spread", () => {
  for (const [failures, most] of [[0, 0.5], [1, 1], [3, 4], [5, 15], [50, 15]]) {
    const found = Array.from({ length: 200 }, () => backoff(failures));
    assert.ok(found.every((seconds) => seconds >= most / 2 && seconds <= most), `${failures}: ${found}`);
    assert.ok(new Set(found).size > 100);
  }
});

test("ids are random, and as long as was asked for", () => {
  const ids = Array.from({ length: 100 }, () => randomId("turn_", 16));
  assert.equal(new Set(ids).size, 100);
  for (const id of ids) assert.match(id, /^turn_[0-9a-f]{32}$/);
});
