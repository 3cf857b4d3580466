// The fold of a log: in whatever order streams, replays and reconnects bring it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Gap, Log, segments } from "../../../src/penstock/web/js/log.js";

const token = (text, attempt = 1, index = undefined) => ({ token: text, token_id: 7, attempt, index });

test("tokens become a text", () => {
  const log = new Log();
  assert.equal(log.text, "");
  assert.ok(log.add(1, token("a")));
  assert.ok(log.add(2, token("b")));
  assert.equal(log.text, "ab");
  assert.equal(log.head, 2);
});

test("a position counts once, however often it comes", () => {
  const log = new Log();
  log.add(1, token("a"));
  log.add(2, token("b"));
  assert.equal(log.add(1, token("a")), false);
  assert.equal(log.add(2, token("b")), false);
  assert.equal(log.text, "ab");
});

test("a missing position is a gap, and nothing is taken", () => {
  const log = new Log();
  log.add(1, token("a"));
  assert.throws(() => log.add(3, token("c")), Gap);
  assert.equal(log.text, "a");
  assert.ok(log.add(2, token("b")));
});

test("attempts begin where another one goes on", () => {
  const log = new Log();
  assert.equal(log.attempt, 0);
  log.add(1, token("a", 1));
  log.add(2, token("b", 1));
  log.add(3, token("c", 4));
  assert.deepEqual(log.attempts, [{ attempt: 1, from: 1 }, { attempt: 4, from: 3 }]);
  assert.equal(log.attempt, 4);
});

test("each choice has a text of its own", () => {
  const log = new Log();
  log.add(1, token("a", 1, 2));
  log.add(2, token("b"));
  log.add(3, token("c", 1, 2));
  assert.deepEqual(log.texts, ["b", "", "ac"]);
});

test("tokens are kept where they are wanted", () => {
  const [lean, full] = [new Log(), new Log({ keepTokens: true })];
  for (const log of [lean, full]) log.add(1, token("a"));
  assert.deepEqual(lean.tokens, []);
  assert.deepEqual(full.tokens, [{ position: 1, token: "a", token_id: 7, attempt: 1, index: 0, phase: undefined }]);
});

test("a token is cut where its phase changes, by characters and not by halves of them", () => {
  assert.deepEqual(segments("ab", undefined), [["text", "ab"]]);
  assert.deepEqual(segments("ab", "tool"), [["tool", "ab"]]);
  assert.deepEqual(segments("🚰.b🚰", [["reasoning", 2], ["text", 2]]), [["reasoning", "🚰."], ["text", "b🚰"]]);
});

test("thoughts are kept apart, and calls are no text", () => {
  const log = new Log();
  log.add(1, { ...token("Hm"), phase: "reasoning" });
  log.add(2, { ...token("🚰.b"), phase: [["reasoning", 2], ["text", 1]] });
  log.add(3, { ...token("{}"), phase: "tool" });
  log.add(4, token("c"));
  log.add(5, { ...token("So", 1, 1), phase: "reasoning" });
  assert.deepEqual([log.texts, log.thoughts, log.thought], [["bc", ""], ["Hm🚰.", "So"], "Hm🚰."]);
  log.reset();
  assert.deepEqual(log.thoughts, [""]);
});

test("the first end is the end", () => {
  const log = new Log();
  log.end({ status: "completed" });
  log.end({ status: "failed" });
  assert.deepEqual(log.ended, { status: "completed" });
});

test("a log that was rewound begins anew", () => {
  const log = new Log({ keepTokens: true });
  log.add(1, token("a", 1, 1));
  log.end({});
  log.reset();
  assert.deepEqual([log.head, log.texts, log.attempts, log.tokens, log.ended], [0, [""], [], [], null]);
  assert.ok(log.add(1, token("b")));
  assert.equal(log.tokens.length, 1);
});
