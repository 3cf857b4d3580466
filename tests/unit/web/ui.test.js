// Numbers and words as people read them.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ago, bytes, count, duration, isEnded, plural, short } from "../../../src/penstock/web/js/ui.js";

const table = (format, rows) => {
  for (const [value, text] of rows) assert.equal(format(value), text, `${value}`);
};

test("numbers", () => {
  table(count, [[0, "0"], [1234.4, "1,234"]]);
  table(short, [[0, "0"], [0.423, "0.42"], [1, "1"], [7.31, "7.3"], [48.4, "48"], [99.6, "100"], [1234, "1,234"]]);
});

test("durations", () => {
  table(duration, [
    [0, "0 s"], [0.00085, "850 µs"], [0.0042, "4.2 ms"], [0.012, "12 ms"], [1.44, "1.4 s"], [42.4, "42 s"],
    [185, "3 min 5 s"], [3600, "1 h 0 min"], [7380, "2 h 3 min"],
  ]);
});

test("bytes", () => {
  table(bytes, [[0, "0 B"], [812, "812 B"], [831_488, "812 KiB"], [100 * 2 ** 20, "100 MiB"], [1.5 * 2 ** 30, "1.5 GiB"]]);
});

test("how long ago", () => {
  const before = (seconds) => ago(Date.now() / 1000 - seconds);
  table(before, [[-5, "now"], [0.1, "now"], [12.5, "12 s ago"], [125, "2 min ago"], [7300, "2 h ago"]]);
});

test("words", () => {
  assert.deepEqual([0, 1, 2].map((number) => plural(number, "token")), ["0 tokens", "1 token", "2 tokens"]);
  assert.deepEqual(["queued", "running", "completed", "failed", "cancelled", "expired"].map(isEnded), [false, false, true, true, true, true]);
});
