// Rates and quantiles of what lies between two looks at the server's counts.

import assert from "node:assert/strict";
import { test } from "node:test";

import { quantile, rate } from "../../../src/penstock/web/js/figures.js";

const bounds = [0.1, 1, 10];
const observed = (...counts) => ({ bounds, counts });
const NOTHING = observed(0, 0, 0, 0);

test("a quantile lies within its bucket, in proportion", () => {
  const later = observed(0, 100, 0, 0);
  assert.equal(quantile(0.5, NOTHING, later), 0.1 + 0.9 * 0.5);
  assert.equal(quantile(1, NOTHING, later), 1);
});

test("the first bucket begins at zero", () => {
  assert.equal(quantile(0.5, NOTHING, observed(10, 0, 0, 0)), 0.05);
});

test("it is found in the bucket where its rank is", () => {
  const later = observed(50, 40, 10, 0);
  assert.equal(quantile(0.5, NOTHING, later), 0.1);
  assert.equal(quantile(0.9, NOTHING, later), 1);
  assert.ok(Math.abs(quantile(0.95, NOTHING, later) - 5.5) < 1e-9);
});

test("only what came in between counts", () => {
  assert.equal(quantile(0.5, observed(1000, 0, 0, 0), observed(1000, 0, 2, 0)), 5.5);
});

test("empty buckets are passed over", () => {
  assert.equal(quantile(0.99, NOTHING, observed(0, 0, 1, 0)), 1 + 9 * 0.99);
});

test("beyond the last bound nothing more is known", () => {
  assert.equal(quantile(0.5, NOTHING, observed(0, 0, 0, 3)), 10);
});

test("of nothing there is none", () => {
  assert.equal(quantile(0.5, NOTHING, NOTHING), null);
  assert.equal(quantile(0.5, observed(1, 2, 3, 4), observed(1, 2, 3, 4)), null);
});

test("nor over a restart, where counts begin anew", () => {
  assert.equal(quantile(0.5, observed(5, 0, 0, 0), observed(1, 9, 0, 0)), null);
});

test("a rate is what came in a second", () => {
  assert.equal(rate(10, 30, 4), 5);
  assert.equal(rate(10, 10, 4), 0);
  assert.equal(rate(30, 10, 4), null);
  assert.equal(rate(10, 30, 0), null);
  assert.equal(rate(10, 30, -1), null);
});
