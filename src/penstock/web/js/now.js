// The view of what happens now: tiles, charts, models and workers, from /health and /v1/stats.

import { ApiError, call } from "./api.js";
import { Chart } from "./chart.js";
import { quantile, rate } from "./figures.js";
import { $, announce, ago, bytes, count, duration, el, fillRows, setText, short } from "./ui.js";

/** @import { Distribution, Health, Stats } from "./types.js" */

/**
 * A point of every line; null where there is nothing to tell.
 * @typedef {object} Point
 * @property {number} running
 * @property {number} queued
 * @property {number} streams
 * @property {number | null} tokens a second
 * @property {(number | null)[]} ttft by quantile
 * @property {(number | null)[]} latency by quantile
 * @property {number | null} cpu percent of one core
 * @property {number} memory of the server
 * @property {number} engines memory of all engines
 */

/** @typedef {{at: number, stats: Stats, point: Point}} Look */

/** Seconds between looks, seconds over which rates and quantiles are taken, and seconds that are shown. */
const EVERY = 2;
const OVER = 20;
const SPAN = 300;

const QUANTILES = [
  { label: "p50", colour: "--chart-1", q: 0.5 },
  { label: "p95", colour: "--chart-2", q: 0.95 },
  { label: "p99", colour: "--chart-3", q: 0.99 },
];

/** @type {Record<string, string>} What can be done with a model, by its state. */
const ACTIONS = { ready: "unload", unloaded: "load", failed: "load" };

/** Steps of a grid for what is counted, and for bytes. */
const WHOLE = [1, 10, 100, 1000, 10_000, 100_000].flatMap((ten) => [ten, 2 * ten, 5 * ten]);
const BINARY = Array.from({ length: 40 }, (_, power) => 2 ** power);

/** @type {Record<string, Omit<import("./chart.js").ChartOptions, "span">>} */
const CHARTS = {
  jobs: { title: "Jobs", format: count, steps: WHOLE, series: [
    { label: "running", colour: "--chart-1", fill: true },
    { label: "queued", colour: "--chart-2" },
  ] },
  tokens: { title: "Tokens a second", format: short, series: [{ label: "generated", colour: "--chart-1", fill: true }] },
  ttft: { title: "Time to first token", format: duration, series: QUANTILES },
  latency: { title: "Time of a whole job", format: duration, series: QUANTILES },
  cpu: { title: "CPU of the server process", format: (value) => `${short(value)} %`, series: [
    { label: "of one core", colour: "--chart-1", fill: true },
  ] },
  memory: { title: "Memory", format: bytes, steps: BINARY, series: [
    { label: "server", colour: "--chart-1", fill: true },
    { label: "engines", colour: "--chart-2", fill: true },
  ] },
};

export class Now {
  /** @type {Record<string, Chart>} */
  #charts = {};
  /** @type {Record<string, HTMLElement>} */
  #tiles = {};
  /** @type {(Look | {at: number, stats: null, point: null})[]} null: a gap */
  #history = [];
  #timer = 0;
  #shown = false;
  /** @type {Set<string>} */
  #busy = new Set(); // models that are being loaded or unloaded

  constructor() {
    for (const [name, chart] of Object.entries(CHARTS)) {
      this.#charts[name] = new Chart({ ...chart, span: SPAN });
      $("#charts").append(this.#charts[name].element);
    }
    for (const [name, label] of Object.entries({
      queued: "Queued", running: "Running", tokens: "Tokens/s", ttft: "First token p95",
      latency: "Whole job p95", streams: "Open streams", cpu: "CPU", memory: "Memory",
    })) {
      this.#tiles[name] = el("dd", { text: "–" });
      $("#tiles").append(el("dl", { class: "tile panel" }, el("dt", { text: label }), this.#tiles[name]));
    }
    document.addEventListener("visibilitychange", () => this.#shown && !document.hidden && this.#look());
  }

  show() {
    this.#shown = true;
    this.#look();
  }

  hide() {
    this.#shown = false;
    clearTimeout(this.#timer);
  }

  recolour() {
    for (const chart of Object.values(this.#charts)) chart.recolour();
  }

  /** Looks as long as somebody does: a look has its price. */
  async #look() {
    clearTimeout(this.#timer);
    if (!this.#shown || document.hidden) return;
    try {
      const [health, stats] = await Promise.all([call("GET", "health"), call("GET", "v1/stats")]);
      this.#take(health, stats);
      this.#say(null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      const hidden = error.status === 404 || error.status === 403;
      this.#say(hidden ? "This view needs /health and /v1/stats, which are not public here. Open it on the gateway itself." : error.message);
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), EVERY * 1000);
  }

  /** @param {string | null} message */
  #say(message) {
    $("#now-error").hidden = message === null;
    setText($("#now-error"), message ?? "");
  }

  /**
   * @param {Health} health
   * @param {Stats} stats
   */
  #take(health, stats) {
    const at = Date.now() / 1000;
    const point = this.#measure(at, health, stats);
    const last = this.#history.at(-1);
    // A pause (another view, a sleeping laptop) is a gap in the lines, not a slope.
    if (last && at - last.at > 4 * EVERY) this.#history.push({ at: at - 0.001, stats: null, point: null });
    this.#history.push({ at, stats, point });
    while (at - this.#history[0].at > SPAN + OVER) this.#history.shift();
    this.#draw(point);
    this.#drawModels(health);
    this.#drawWorkers(health);
    const { kind, durability } = health.broker;
    setText($("#store"), `Store: ${kind}${durability ? `, ${durability}` : ""}. Figures are taken over the last ${OVER} seconds, every ${EVERY} seconds while this view is open.`);
  }

  /**
   * One point of every line.
   * @param {number} at
   * @param {Health} health
   * @param {Stats} stats
   * @returns {Point}
   */
  #measure(at, health, stats) {
    const before = this.#history.find((each) => each.stats && at - each.at <= OVER)?.stats;
    const last = this.#history.at(-1);
    // Between two looks, not over the whole window: the line is to follow what happens.
    const recent = last && at - last.at < 4 * EVERY ? last.stats : null;
    const grown = (/** @type {"tokens" | "cpu_seconds"} */ name) =>
      recent ? rate(recent[name], stats[name], stats.uptime - recent.uptime) : null;
    const quantiles = (/** @type {"time_to_first_token" | "request_duration"} */ name) => QUANTILES.map(({ q }) => {
      const [earlier, later] = [before?.[name], stats[name]];
      return earlier && later ? quantile(q, earlier, later) : null;
    });
    const cpu = grown("cpu_seconds");
    return {
      running: stats.running,
      queued: stats.queued,
      streams: stats.streams,
      tokens: grown("tokens"),
      ttft: quantiles("time_to_first_token"),
      latency: quantiles("request_duration"),
      cpu: cpu === null ? null : 100 * cpu,
      memory: stats.memory_bytes,
      engines: (health.workers ?? []).reduce((sum, { memory_bytes: memory }) => sum + (memory ?? 0), 0),
    };
  }

  /** @param {Point} point */
  #draw(point) {
    /** @type {(name: string, value: number | null, format: (value: number) => string) => void} */
    const show = (name, value, format) => setText(this.#tiles[name], value === null ? "–" : format(value));
    show("queued", point.queued, count);
    show("running", point.running, count);
    show("tokens", point.tokens, short);
    show("ttft", point.ttft[1], duration);
    show("latency", point.latency[1], duration);
    show("streams", point.streams, count);
    show("cpu", point.cpu, (value) => `${short(value)} %`);
    show("memory", point.memory + point.engines, bytes);
    const times = this.#history.map(({ at }) => at);
    /** @type {(name: string, ...values: ((point: Point) => number | null)[]) => void} */
    const update = (name, ...values) => {
      const columns = values.map((value) => this.#history.map(({ point: each }) => each && value(each)));
      this.#charts[name].update([times, ...columns]);
    };
    update("jobs", (each) => each.running, (each) => each.queued);
    update("tokens", (each) => each.tokens);
    update("ttft", ...QUANTILES.map((_, index) => (/** @type {Point} */ each) => each.ttft[index]));
    update("latency", ...QUANTILES.map((_, index) => (/** @type {Point} */ each) => each.latency[index]));
    update("cpu", (each) => each.cpu);
    update("memory", (each) => each.memory, (each) => each.engines);
  }

  // -------------------------------------------------------------------------------------------- models, workers

  /** @param {Health} health */
  #drawModels({ models, manageable }) {
    fillRows($("#models tbody"), models.map(({ id, state, queued, info }) => el("tr", { "data-key": id },
      el("th", { scope: "row", text: id }),
      el("td", {}, el("span", { class: "chip", "data-state": state, text: state })),
      el("td", { text: [info?.engine, info?.precision].filter(Boolean).join(", ") || "–" }),
      el("td", { class: "number", text: info?.context_length ? count(info.context_length) : "–" }),
      el("td", { class: "number", text: count(queued) }),
      el("td", {}, manageable ? this.#manageButton(id, state) : null),
    )));
  }

  /**
   * @param {string} id
   * @param {string} state
   */
  #manageButton(id, state) {
    const action = ACTIONS[state];
    if (!action) return null;
    return el("button", {
      type: "button", class: "quiet", text: action === "load" ? "Load" : "Unload", disabled: this.#busy.has(id),
      "aria-label": `${action === "load" ? "Load" : "Unload"} ${id}`, onclick: () => this.#manage(id, action),
    });
  }

  /**
   * @param {string} id
   * @param {string} action
   */
  async #manage(id, action) {
    this.#busy.add(id);
    this.#look();
    try {
      await call("POST", `v1/models/${id.split("/").map(encodeURIComponent).join("/")}/${action}`, { within: 0 });
      announce(`${id} is ${action}ed`);
    } catch (error) {
      this.#say(error.message);
      announce(error.message);
    }
    this.#busy.delete(id);
    this.#look();
  }

  /** @param {Health} health */
  #drawWorkers({ workers = [] }) {
    fillRows($("#workers tbody"), workers.map((worker) => el("tr", { "data-key": worker.id },
      el("th", { scope: "row", text: worker.id }),
      el("td", {}, el("span", { class: "chip", "data-state": worker.state, text: worker.state }), worker.detail ? ` ${worker.detail}` : "",
        worker.error ? el("p", { class: "error", text: worker.error.message }) : null),
      el("td", { text: worker.models.join(", ") }),
      el("td", { class: "number", text: count(worker.slots) }),
      el("td", { class: "number", text: worker.memory_bytes ? bytes(worker.memory_bytes) : "–" }),
      el("td", { class: "number", text: count(worker.standby) }),
      el("td", { text: ago(worker.seen_at) }),
    )));
  }
}
