// @ts-nocheck
// The Prometheus text format, as far as this server writes it, and what can be told from two scrapes.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** A scrape: `values(name)` are its samples `{labels, value}`; none where the process does not export it. */
export class Scrape {
  #samples = new Map();

  constructor(text) {
    for (const line of text.split("\n")) {
      const found = line.startsWith("#") ? null : LINE.exec(line);
      if (!found) continue;
      const labels = {};
      for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
      const value = found[3] === "+Inf" ? Infinity : Number(found[3]);
      if (!this.#samples.has(found[1])) this.#samples.set(found[1], []);
      this.#samples.get(found[1]).push({ labels, value });
    }
  }

  has(name) {
    return this.#samples.has(name);
  }

  values(name) {
    return this.#samples.get(name) ?? [];
  }

  /** The sum over all (or those that fit) of a name's series; null where there are none. */
  sum(name, fits = () => true) {
    const values = this.values(name).filter(({ labels }) => fits(labels));
    return values.length ? values.reduce((sum, { value }) => sum + value, 0) : null;
  }

  /** Buckets of a histogram over all its series: `[upper bound, count up to it]`, ascending. */
  buckets(name) {
    const counts = new Map();
    for (const { labels, value } of this.values(`${name}_bucket`)) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].sort(([one], [other]) => one - other);
  }
}

/**
 * The quantile `q` of what a histogram observed between two scrapes, interpolated within its bucket as Prometheus
 * does; null if nothing was observed.
 */
export function quantile(q, earlier, later) {
  const before = new Map(earlier);
  const counts = later.map(([bound, value]) => [bound, value - (before.get(bound) ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null; // also after a restart, where counts are smaller than before
  const rank = q * total;
  let lower = 0;
  let below = 0;
  for (const [bound, value] of counts) {
    if (value >= rank && value > below) {
      return bound === Infinity ? lower : lower + ((bound - lower) * (rank - below)) / (value - below);
    }
    lower = bound;
    below = value;
  }
  return null;
}

/** By how much a counter grew, a second; null where that cannot be said. */
export function rate(earlier, later, seconds) {
  if (earlier === null || later === null || later < earlier || !(seconds > 0)) return null;
  return (later - earlier) / seconds;
}
