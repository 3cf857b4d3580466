// A live chart: a figure whose caption says in words what the lines show at this moment, or under the pointer.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { el, setText } from "./ui.js";

const HEIGHT = 150;

/**
 * @typedef {object} Line
 * @property {string} label
 * @property {string} colour a custom property of the style sheet
 * @property {boolean} [fill]
 *
 * @typedef {object} ChartOptions
 * @property {string} title
 * @property {Line[]} series
 * @property {(value: number) => string} format
 * @property {number[]} [steps] between the lines of the grid, if not every one will do
 * @property {number} span seconds that are shown
 */

/**
 * A colour of the style sheet as a canvas takes it.
 * @param {string} name
 */
function colour(name) {
  const probe = el("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

export class Chart {
  #series;
  #format;
  #steps;
  #place = el("div", { class: "plot", "aria-hidden": "true" });
  #values;
  /** @type {uPlot | null} */
  #plot = null;
  /** @type {uPlot.AlignedData} */
  #data;
  #span;

  /** @param {ChartOptions} options */
  constructor({ title, series, format, steps, span }) {
    this.#series = series;
    this.#format = format;
    this.#steps = steps;
    this.#span = span;
    this.#data = [[], ...series.map(() => [])];
    this.#values = series.map(() => el("b", { text: "–" }));
    const labels = series.map(({ label, colour: name }, index) => {
      const dot = el("i");
      dot.style.background = `var(${name})`;
      return el("span", {}, dot, `${label} `, this.#values[index]);
    });
    this.element = el("figure", { class: "chart panel" },
      el("figcaption", {}, el("h3", { text: title }), el("p", { class: "legend" }, ...labels)),
      this.#place,
    );
    new ResizeObserver(() => this.#fit()).observe(this.#place);
  }

  /** @param {uPlot.AlignedData} data times, then the values of each series, null where there is none */
  update(data) {
    this.#data = data;
    if (this.#plot) {
      const now = data[0].at(-1) ?? Date.now() / 1000;
      const since = Math.min(data[0][0] ?? now, now - 60);
      this.#plot.setData(data, false);
      this.#plot.setScale("x", { min: Math.max(since, now - this.#span), max: now });
    }
    this.#say(null);
  }

  /** Draws anew, in the colours that hold now. */
  recolour() {
    this.#plot?.destroy();
    this.#plot = null;
    this.#fit();
  }

  #fit() {
    const width = this.#place.clientWidth;
    if (width === 0) return; // not shown
    if (this.#plot) this.#plot.setSize({ width, height: HEIGHT });
    else {
      this.#plot = this.#make(width);
      this.update(this.#data);
    }
  }

  /** @param {number} width */
  #make(width) {
    const [line, muted] = [colour("--line"), colour("--muted")];
    const axis = { stroke: muted, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    return new uPlot(
      {
        width,
        height: HEIGHT,
        padding: [8, 30, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: true }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.08 : 1] } },
        axes: [
          { ...axis, size: 24, space: 70, values: (_, times) => times.map(time) },
          { ...axis, size: 58, space: 34, incrs: this.#steps, values: (_, values) => values.map((value) => this.#format(value)) },
        ],
        series: [{}, ...this.#series.map((series) => this.#line(series))],
        hooks: { setCursor: [({ cursor }) => this.#say(cursor.idx ?? null)] },
      },
      this.#data,
      this.#place,
    );
  }

  /**
   * @param {Line} line
   * @returns {uPlot.Series}
   */
  #line({ colour: name, fill }) {
    const stroke = colour(name);
    return { stroke, width: 1.75, points: { show: true, size: 4, fill: stroke, filter: alone }, spanGaps: false, fill: fill ? faded(stroke) : undefined };
  }

  /**
   * The values at an index; null: the latest.
   * @param {number | null} index
   */
  #say(index) {
    const at = index ?? this.#data[0].length - 1;
    this.#values.forEach((place, series) => {
      const value = this.#data[series + 1][at];
      setText(place, value === null || value === undefined ? "–" : this.#format(value));
    });
  }
}

/**
 * Only a value between two gaps needs a point: no line leads to it.
 * @param {uPlot} plot
 * @param {number} series
 */
function alone({ data }, series) {
  return Array.from(data[series]).flatMap((value, at, values) => (value != null && values[at - 1] == null && values[at + 1] == null ? [at] : []));
}

/** @param {string} stroke */
function faded(stroke) {
  const [red, green, blue] = stroke.match(/[\d.]+/g) ?? [];
  return `rgba(${red}, ${green}, ${blue}, 0.12)`;
}

/** @param {number} seconds */
function time(seconds) {
  const date = new Date(seconds * 1000);
  const two = (/** @type {number} */ number) => String(number).padStart(2, "0");
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}
