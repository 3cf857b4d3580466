// The view where prompts are asked: the form, the cards, and what all of them together do.

import { CardView } from "./card.js";
import { Composer } from "./composer.js";
import { $, announce, count, plural, setText, short } from "./ui.js";

/** @import { Card } from "./types.js" */
/** @import { Run, Runs } from "./runs.js" */

export class Playground {
  /** @type {Runs | null} */
  #shown = null;
  /** @type {Map<string, CardView>} */
  #views = new Map(); // by card key
  /** @type {Set<Card>} */
  #changed = new Set();
  #frame = 0;
  #composer;
  #sent = false; // prompts were sent whose cards are not drawn yet

  constructor() {
    this.#composer = new Composer((record, text) => {
      this.#sent = true;
      this.#runs.start(record, text);
    });
    $("#stop-all").addEventListener("click", () => this.#runs.all().forEach((run) => this.#runs.stop(run)));
    $("#clear").addEventListener("click", () => this.#clear());
    for (const button of /** @type {NodeListOf<HTMLButtonElement>} */ (document.querySelectorAll("[data-prompt]"))) {
      const { kind, prompt = "", lines } = button.dataset;
      button.addEventListener("click", () => this.#composer.fill({ kind }, prompt, lines !== undefined));
    }
  }

  /** What `Runs` is to call. */
  get listener() {
    return {
      changed: (/** @type {Card} */ card) => this.#change(card),
      removed: (/** @type {Card} */ card) => this.#remove(card),
      ended: (/** @type {Run} */ run) => this.#say(run),
    };
  }

  /** The conversations that are shown: there are some as soon as anything can be clicked. */
  get #runs() {
    if (this.#shown === null) throw new Error("nothing is shown yet");
    return this.#shown;
  }

  /**
   * Shows the conversations of (another) user.
   * @param {Runs} runs
   */
  show(runs) {
    this.#shown = runs;
    this.#views.clear();
    this.#changed.clear();
    $("#cards").replaceChildren();
    for (const card of runs.cards.values()) this.#change(card);
    this.#schedule();
  }

  refreshModels() {
    this.#composer.refreshModels();
  }

  // -------------------------------------------------------------------------------------------- drawing

  /** @param {Card} card */
  #change(card) {
    this.#changed.add(card);
    this.#schedule();
  }

  #schedule() {
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#frame = 0;
    const fresh = [];
    for (const card of this.#changed) {
      let view = this.#views.get(card.record.key);
      if (!view) {
        view = new CardView(card, {
          stop: (run) => this.#runs.stop(run),
          remove: (removed) => this.#runs.remove(removed),
          reuse: ({ record }) => this.#composer.fill(record, record.turns[0].text),
          reply: (continued, text) => this.#runs.reply(continued, text),
        });
        this.#views.set(card.record.key, view);
        fresh.unshift(view.element); // the latest first
      }
      view.draw();
    }
    $("#cards").prepend(...fresh);
    if (this.#sent) fresh[0]?.scrollIntoView({ block: "nearest" }); // on a phone it is below the form
    this.#sent = false;
    this.#changed.clear();
    this.#total();
  }

  #total() {
    const runs = this.#runs.all();
    const running = runs.filter(({ phase }) => phase === "running");
    const waiting = runs.filter(({ phase }) => phase === "queued" || phase === "sending");
    const parts = [];
    if (running.length) parts.push(`${count(running.length)} running`);
    if (waiting.length) parts.push(`${count(waiting.length)} waiting`);
    const rate = running.reduce((sum, run) => sum + (run.rate ?? 0), 0);
    if (rate > 0) parts.push(`${short(rate)} tokens/s`);
    setText($("#totals"), parts.join(" · "));
    $("#stop-all").disabled = running.length + waiting.length === 0;
    $("#clear").disabled = runs.every(({ live }) => live);
    $("#no-cards").hidden = this.#runs.cards.size > 0;
  }

  /** @param {Card} card */
  #remove(card) {
    const view = this.#views.get(card.record.key);
    if (view) {
      const next = view.element.nextElementSibling ?? view.element.previousElementSibling;
      const focused = view.element.contains(document.activeElement);
      view.element.remove();
      if (focused) (next?.querySelector("button:not([hidden])") ?? $("#composer textarea[name=prompt]")).focus();
    }
    this.#views.delete(card.record.key);
    this.#changed.delete(card);
    this.#schedule();
  }

  #clear() {
    for (const card of [...this.#runs.cards.values()]) {
      if (card.runs.every(({ live }) => !live)) this.#runs.remove(card);
    }
  }

  /** @param {Run} run */
  #say(run) {
    const what = run.turn.text.length > 60 ? `${run.turn.text.slice(0, 60)}…` : run.turn.text;
    const { status, error } = run.turn.end ?? {};
    const end = status === "completed" ? `is complete: ${plural(run.tokens, "token")}` : `ended: ${error?.message ?? status}`;
    announce(`The reply to “${what}” ${end}`);
  }
}
