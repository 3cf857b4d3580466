// The fold of one job's log: whatever order of streams, replays and reconnects it comes by, each position counts once.

/** @import { AttemptStart, LogToken } from "./types.js" */

/** A position came before the one in front of it: something was missed. */
export class Gap extends Error {}

export class Log {
  /** Position of the last token. */
  head = 0;
  /** The text of each choice. */
  texts = [""];
  /** @type {AttemptStart[]} Where each attempt begins. */
  attempts = [];
  /** @type {LogToken[]} The tokens themselves, where they are kept. */
  tokens = [];
  /** @type {any} The terminal event's data. */
  ended = null;
  #keepTokens;

  constructor({ keepTokens = false } = {}) {
    this.#keepTokens = keepTokens;
  }

  get text() {
    return this.texts[0];
  }

  get attempt() {
    return this.attempts.at(-1)?.attempt ?? 0;
  }

  /**
   * Takes a token; false if it is known already. Throws `Gap`.
   * @param {number} position
   * @param {{token: string, token_id: number, attempt: number, index?: number}} token
   */
  add(position, { token, token_id, attempt, index = 0 }) {
    if (position <= this.head) return false;
    if (position !== this.head + 1) throw new Gap(`position ${position} came after ${this.head}`);
    this.head = position;
    while (this.texts.length <= index) this.texts.push("");
    this.texts[index] += token;
    if (attempt !== this.attempt) this.attempts.push({ attempt, from: position });
    if (this.#keepTokens) this.tokens.push({ position, token, token_id, attempt, index });
    return true;
  }

  /** @param {any} data */
  end(data) {
    this.ended ??= data;
  }

  /** The server has another log than the one that was read (`log_rewound`): from the beginning. */
  reset() {
    this.head = 0;
    this.texts = [""];
    this.attempts = [];
    this.tokens = [];
    this.ended = null;
  }
}
