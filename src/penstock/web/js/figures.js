// What can be told from two looks at what a server counts (`/v1/stats`).

/** @import { Distribution } from "./types.js" */

/**
 * The quantile `q` of what was observed between two looks, interpolated within its bucket as Prometheus does; null if
 * nothing was observed, or the server began anew in between.
 * @param {number} q
 * @param {Distribution} earlier
 * @param {Distribution} later
 */
export function quantile(q, earlier, later) {
  const counts = later.counts.map((count, bucket) => count - (earlier.counts[bucket] ?? 0));
  if (counts.some((count) => count < 0)) return null;
  const rank = q * counts.reduce((sum, count) => sum + count, 0);
  if (rank === 0) return null;
  let below = 0;
  for (const [bucket, count] of counts.entries()) {
    const lower = bucket === 0 ? 0 : later.bounds[bucket - 1];
    const upper = later.bounds[bucket] ?? lower; // beyond the last bound nothing is known but that
    if (below + count >= rank) return lower + ((upper - lower) * (rank - below)) / count;
    below += count;
  }
  return null;
}

/**
 * By how much a counter grew, a second; null where that cannot be said.
 * @param {number} earlier
 * @param {number} later
 * @param {number} seconds
 */
export function rate(earlier, later, seconds) {
  if (later < earlier || !(seconds > 0)) return null;
  return (later - earlier) / seconds;
}
