// Elements, numbers and words: what every view needs. Text from outside is only ever set as text.

/** @typedef {string | number | boolean | null | undefined | ((event: any) => void)} Attribute */

/**
 * An element. In `attributes`: "class", "text", functions (listeners, as `onclick`), booleans (set or left out),
 * anything else as an attribute.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, Attribute>} [attributes]
 * @param {(Node | string | null | undefined)[]} children
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = String(value);
    else if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/**
 * Makes the rows of `body` what `rows` are, by their `data-key`. What has not changed is left alone, so that a focus, a
 * selection and a click that is half done outlive a refresh.
 * @param {HTMLTableSectionElement} body
 * @param {HTMLTableRowElement[]} rows
 */
export function fillRows(body, rows) {
  const wanted = new Set(rows.map(({ dataset }) => dataset.key));
  for (const row of [...body.rows]) if (!wanted.has(row.dataset.key)) row.remove();
  const known = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  rows.forEach((fresh, place) => {
    const row = known.get(fresh.dataset.key) ?? fresh;
    if (row !== body.rows[place]) body.insertBefore(row, body.rows[place] ?? null);
    if (row === fresh) return;
    for (const name of ["aria-current", "data-state"]) {
      const value = fresh.getAttribute(name);
      if (value !== null) row.setAttribute(name, value);
      else row.removeAttribute(name);
    }
    [...fresh.cells].forEach((cell, at) => row.cells[at].isEqualNode(cell) || row.cells[at].replaceWith(cell));
  });
}

/**
 * The page's own element, of whatever kind `index.html` says: one that is not there is a fault of ours.
 * @param {string} selector
 * @param {ParentNode} within
 * @returns {any}
 */
export const $ = (selector, within = document) => within.querySelector(selector);

/**
 * Sets text only where it changes: assistive technology and selections notice every write.
 * @param {Node} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let announcing = 0;

/**
 * Say one thing to who does not see the page. Never tokens: a stream of them would drown everything else.
 * @param {string} text
 */
export function announce(text) {
  const region = $("#announcer");
  region.textContent = "";
  cancelAnimationFrame(announcing);
  announcing = requestAnimationFrame(() => (region.textContent = text)); // an equal text is said again
}

/**
 * Copies text; false where the browser does not let this page.
 * @param {string} text
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/**
 * What a copy button does: copies, and says on itself for a moment whether that worked.
 * @param {HTMLButtonElement} button
 * @param {string} text
 */
export async function copyWith(button, text) {
  const label = button.textContent;
  const done = await copy(text);
  button.textContent = done ? "Copied" : "Not allowed";
  announce(done ? "Copied" : "The browser does not allow copying here");
  setTimeout(() => (button.textContent = label), 1200);
}

// ---------------------------------------------------------------------------------------------- numbers

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** @param {number} number as 1,234 */
export const count = (number) => whole.format(number);

/** @param {number} number in three digits or so: 0.42, 7.3, 48, 1,234 */
export function short(number) {
  if (number >= 100) return whole.format(number);
  return number >= 10 ? number.toFixed(0) : number >= 1 || number === 0 ? trim(number.toFixed(1)) : number.toFixed(2);
}

/** @param {string} text */
const trim = (text) => text.replace(/\.0$/, "");

/** @param {number} seconds as 850 µs, 12 ms, 1.4 s, 3 min 5 s */
export function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${Math.max(0, Math.round(seconds * 1e6))} µs`;
  if (seconds < 1) return `${seconds < 0.01 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** @param {number} number of bytes, as 812 KiB, 96 MiB, 1.5 GiB */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${short(number)} ${units[unit]}`;
}

/** @param {number} time as "12 s ago" */
export function ago(time) {
  const seconds = Math.max(0, Date.now() / 1000 - time);
  if (seconds < 1) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString();
}

/** @param {number} time as 20:15:03.127 */
export function clock(time) {
  const date = new Date(time * 1000);
  const pad = (/** @type {number} */ number, digits = 2) => String(number).padStart(digits, "0");
  return `${pad(date.getHours())}:${pad(date.getMinutes())}:${pad(date.getSeconds())}.${pad(date.getMilliseconds(), 3)}`;
}

/**
 * @param {number} number
 * @param {string} word
 */
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** @param {string} status */
export const isEnded = (status) => ["completed", "failed", "cancelled", "expired"].includes(status);
