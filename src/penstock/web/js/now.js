// @ts-nocheck
// The view of what happens now: tiles, charts, models and workers, from /health and /metrics.

import { ApiError, call, text } from "./api.js";
import { Chart } from "./chart.js";
import { Scrape, quantile, rate } from "./prometheus.js";
import { $, announce, ago, bytes, count, duration, el, fillRows, setText, short } from "./ui.js";

/** Seconds between scrapes, seconds over which rates and quantiles are taken, and seconds that are shown. */
const EVERY = 2;
const OVER = 20;
const SPAN = 300;

const TTFT = "gen_ai_server_time_to_first_token_seconds";
const DURATION = "gen_ai_server_request_duration_seconds";
const QUANTILES = [
  { label: "p50", colour: "--chart-1", q: 0.5 },
  { label: "p95", colour: "--chart-2", q: 0.95 },
  { label: "p99", colour: "--chart-3", q: 0.99 },
];

/** Steps of a grid for what is counted, and for bytes. */
const WHOLE = [1, 10, 100, 1000, 10_000, 100_000].flatMap((ten) => [ten, 2 * ten, 5 * ten]);
const BINARY = Array.from({ length: 40 }, (_, power) => 2 ** power);

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
  #charts = {};
  #tiles = {};
  #history = []; // {at, scrape, point}
  #timer = 0;
  #shown = false;
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

  /** Looks as long as somebody does: a scrape has its price. */
  async #look() {
    clearTimeout(this.#timer);
    if (!this.#shown || document.hidden) return;
    try {
      const [health, metrics] = await Promise.all([call("GET", "health"), text("metrics")]);
      this.#take(health, new Scrape(metrics));
      this.#say(null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      const hidden = error.status === 404 || error.status === 403;
      this.#say(hidden ? "This view needs /health and /metrics, which are not public here. Open it on the gateway itself." : error.message);
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), EVERY * 1000);
  }

  #say(message) {
    $("#now-error").hidden = message === null;
    setText($("#now-error"), message ?? "");
  }

  #take(health, scrape) {
    const at = Date.now() / 1000;
    const point = this.#measure(at, health, scrape);
    const last = this.#history.at(-1);
    // A pause (another view, a sleeping laptop) is a gap in the lines, not a slope.
    if (last && at - last.at > 4 * EVERY) this.#history.push({ at: at - 0.001, scrape: null, point: {} });
    this.#history.push({ at, scrape, point });
    while (at - this.#history[0].at > SPAN + OVER) this.#history.shift();
    this.#draw(point);
    this.#drawModels(health);
    this.#drawWorkers(health);
    const { kind, durability } = health.broker;
    setText($("#store"), `Store: ${kind}${durability ? `, ${durability}` : ""}. Figures are taken over the last ${OVER} seconds, every ${EVERY} seconds while this view is open.`);
  }

  /** One point of every line. */
  #measure(at, health, scrape) {
    const { at: then, scrape: before } = this.#history.find((each) => each.scrape && at - each.at <= OVER) ?? { scrape: null };
    const recent = this.#history.findLast((each) => each.scrape) ?? { scrape: null };
    const tokens = scrape.has("llm_worker_tokens_generated_total") ? "llm_worker_tokens_generated_total" : "llm_gateway_tokens_generated_total";
    const of = (name, q) => (before && scrape.has(`${name}_bucket`) ? quantile(q, before.buckets(name), scrape.buckets(name)) : null);
    // A gateway without workers in its process knows its own requests only.
    const whole = scrape.has(`${DURATION}_bucket`) ? DURATION : "llm_gateway_request_latency_seconds";
    const engines = (health.workers ?? []).reduce((sum, { memory_bytes: memory }) => sum + (memory ?? 0), 0);
    return {
      running: scrape.sum("llm_jobs", ({ status }) => status === "running") ?? 0,
      queued: health.queue?.queued ?? scrape.sum("llm_queue_depth") ?? 0,
      // Between two looks, not over the whole window: the line is to follow what happens.
      tokens: recent.scrape && at - recent.at < 4 * EVERY ? rate(recent.scrape.sum(tokens), scrape.sum(tokens), at - recent.at) : null,
      ttft: QUANTILES.map(({ q }) => of(TTFT, q)),
      latency: QUANTILES.map(({ q }) => of(whole, q)),
      streams: scrape.sum("llm_sse_connections"),
      cpu: scrape.sum("llm_process_cpu_percent"),
      memory: [scrape.sum("llm_process_memory_bytes"), engines],
    };
  }

  #draw(point) {
    const show = (name, value, format) => setText(this.#tiles[name], value === null || value === undefined ? "–" : format(value));
    show("queued", point.queued, count);
    show("running", point.running, count);
    show("tokens", point.tokens, short);
    show("ttft", point.ttft[1], duration);
    show("latency", point.latency[1], duration);
    show("streams", point.streams, count);
    show("cpu", point.cpu, (value) => `${short(value)} %`);
    show("memory", point.memory[0] + point.memory[1], bytes);
    const column = (value) => this.#history.map(({ point: each }) => value(each) ?? null);
    const times = this.#history.map(({ at }) => at);
    const update = (name, ...values) => this.#charts[name].update([times, ...values.map(column)]);
    update("jobs", (each) => each.running, (each) => each.queued);
    update("tokens", (each) => each.tokens);
    update("ttft", ...QUANTILES.map((_, index) => (each) => each.ttft?.[index]));
    update("latency", ...QUANTILES.map((_, index) => (each) => each.latency?.[index]));
    update("cpu", (each) => each.cpu);
    update("memory", (each) => each.memory?.[0], (each) => each.memory?.[1]);
  }

  // -------------------------------------------------------------------------------------------- models, workers

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

  #manageButton(id, state) {
    const action = { ready: "unload", unloaded: "load", failed: "load" }[state];
    if (!action) return null;
    return el("button", {
      type: "button", class: "quiet", text: action === "load" ? "Load" : "Unload", disabled: this.#busy.has(id),
      "aria-label": `${action === "load" ? "Load" : "Unload"} ${id}`, onclick: () => this.#manage(id, action),
    });
  }

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
