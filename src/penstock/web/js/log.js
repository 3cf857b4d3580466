// The fold of one job's log: whatever order of streams, replays and reconnects it comes by, each position counts once.

/** @import { AttemptStart, LogToken, PhaseName, TokenPhase } from "./types.js" */

/** A position came before the one in front of it: something was missed. */
export class Gap extends Error {}

/**
 * A token, cut where its phase changes.
 * @param {string} token
 * @param {TokenPhase} phase
 * @returns {[PhaseName, string][]}
 */
export function segments(token, phase) {
  if (!Array.isArray(phase)) return [[phase ?? "text", token]];
  const characters = [...token]; // code points, not what `length` counts
  return phase.map(([name, count]) => [name, characters.splice(0, count).join("")]);
}

export class Log {
  /** Position of the last token. */
  head = 0;
  /** The text of each choice, and what was thought before it. */
  texts = [""];
  thoughts = [""];
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

  get thought() {
    return this.thoughts[0];
  }

  get attempt() {
    return this.attempts.at(-1)?.attempt ?? 0;
  }

  /**
   * Takes a token; false if it is known already. Throws `Gap`.
   * @param {number} position
   * @param {{token: string, token_id: number, attempt: number, index?: number, phase?: TokenPhase}} token
   */
  add(position, { token, token_id, attempt, index = 0, phase }) {
    if (position <= this.head) return false;
    if (position !== this.head + 1) throw new Gap(`position ${position} came after ${this.head}`);
    this.head = position;
    for (const choices of [this.texts, this.thoughts]) while (choices.length <= index) choices.push("");
    for (const [name, text] of segments(token, phase)) {
      if (name === "text") this.texts[index] += text;
      else if (name === "reasoning") this.thoughts[index] += text;
    }
    if (attempt !== this.attempt) this.attempts.push({ attempt, from: position });
    if (this.#keepTokens) this.tokens.push({ position, token, token_id, attempt, index, phase });
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
    this.thoughts = [""];
    this.attempts = [];
    this.tokens = [];
    this.ended = null;
  }
}
