// One conversation on the page. It is drawn at most once a frame, and a text that grew is only appended to.

import { $, copyWith, count, duration, el, plural, setText, short } from "./ui.js";

/** @import { Card, End } from "./types.js" */
/** @import { Run } from "./runs.js" */

/**
 * @typedef {object} CardActions
 * @property {(run: Run) => void} stop
 * @property {(card: Card) => void} remove
 * @property {(card: Card) => void} reuse
 * @property {(card: Card, text: string) => void} reply
 */

/** @type {Record<string, string>} */
const ENDS = {
  completed: "Done",
  failed: "Failed",
  cancelled: "Stopped",
  expired: "Too late",
  refused: "Refused",
  gone: "No longer kept",
};

export class CardView {
  #card;
  /** @type {TurnView[]} */
  #turns = [];
  #status = el("span", { class: "chip" });
  #log = el("div", { class: "log", tabindex: "0", role: "group" });
  #figures = el("p", { class: "figures" });
  #stop;
  #copy;
  #buttons;
  /** @type {HTMLFormElement | null} */
  #followUp = null;

  /**
   * @param {Card} card
   * @param {CardActions} actions
   */
  constructor(card, actions) {
    const { record } = card;
    const title = `${record.kind === "chat" ? "Chat" : "Completion"} with ${record.model}`;
    const id = `title-${record.key}`;
    this.#card = card;
    this.#log.setAttribute("aria-label", `${title}: text`);
    this.#stop = el("button", { type: "button", class: "quiet danger", text: "Stop", onclick: () => actions.stop(latest(card)) });
    this.#copy = el("button", { type: "button", class: "quiet", text: "Copy", onclick: () => copyWith(this.#copy, latest(card).text) });
    this.#buttons = el("div", { class: "buttons" },
      this.#stop,
      this.#copy,
      el("button", { type: "button", class: "quiet", text: "Reuse", title: "Put this request into the form again", onclick: () => actions.reuse(card) }),
      el("a", { class: "quiet button", text: "Log", hidden: true }),
      el("button", { type: "button", class: "quiet", text: "Remove", onclick: () => actions.remove(card) }),
    );
    this.element = el("article", { class: "card", "aria-labelledby": id },
      el("header", {},
        el("h3", { id }, record.model, el("small", { text: record.kind })),
        this.#status,
      ),
      this.#log,
      el("footer", {}, this.#figures, this.#buttons),
    );
    if (record.kind === "chat") this.#addFollowUp(actions);
    for (const button of this.#buttons.children) button.setAttribute("aria-describedby", id);
  }

  /** @param {CardActions} actions */
  #addFollowUp(actions) {
    const field = el("input", { type: "text", name: "text", placeholder: "Follow up…", "aria-label": "Follow up" });
    const button = el("button", { type: "submit", class: "quiet", text: "Send" });
    this.#followUp = el("form", { class: "follow-up", autocomplete: "off", onsubmit: (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (!text || button.disabled) return;
      field.value = "";
      actions.reply(this.#card, text);
    } }, field, button);
    this.element.append(this.#followUp);
  }

  draw() {
    const { runs, record } = this.#card;
    const atEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 24;
    runs.forEach((run, index) => (this.#turns[index] ??= this.#addTurn(run)).draw());
    if (atEnd) this.#log.scrollTop = this.#log.scrollHeight;
    const run = latest(this.#card);
    const [state, words] = standing(run);
    this.element.dataset.state = state;
    setText(this.#status, words);
    setText(this.#figures, figures(run));
    this.#log.setAttribute("aria-busy", String(run.live));
    this.#stop.hidden = !run.live;
    this.#stop.disabled = run.stopping;
    this.#copy.disabled = run.text === "";
    setText(this.#stop, run.stopping ? "Stopping…" : "Stop");
    const link = $("a", this.#buttons);
    link.hidden = !run.turn.job;
    if (run.turn.job) link.href = `#jobs/${run.turn.job}`;
    if (this.#followUp) {
      // Not while a reply is written, unless somebody is in it already; nor where there is nothing to go on from.
      const able = !run.live && run.turn.end?.status !== "refused";
      this.#followUp.hidden = !able && !this.#followUp.contains(document.activeElement);
      $("button", this.#followUp).disabled = !able;
    }
    this.element.dataset.kind = record.kind;
  }

  /** @param {Run} run */
  #addTurn(run) {
    const turn = new TurnView(run);
    this.#log.append(...turn.elements);
    return turn;
  }
}

class TurnView {
  #run;
  #text = document.createTextNode("");
  #thought = document.createTextNode("");
  #thinking = false;
  #summary = el("summary");
  #thoughts = el("details", { class: "thought", hidden: true }, this.#summary, this.#thought);
  #reply = el("div", { class: "reply" });
  #note = el("p", { class: "note", hidden: true });

  /** @param {Run} run */
  constructor(run) {
    this.#run = run;
    const prompt = el("div", { class: "prompt", text: run.turn.text });
    this.#reply.append(this.#text, el("span", { class: "caret", "aria-hidden": "true" }));
    this.elements = [prompt, this.#thoughts, this.#reply, this.#note];
  }

  draw() {
    const { text, thought, live, turn, notice, attempts } = this.#run;
    grow(this.#text, text);
    grow(this.#thought, thought);
    this.#thoughts.hidden = thought === "";
    const thinking = live && text === "";
    setText(this.#summary, thinking ? "Thinking…" : "Thought");
    // Open while there is nothing else to read; then it is the reader's.
    if (thinking !== this.#thinking) this.#thoughts.open = this.#thinking = thinking;
    this.#reply.classList.toggle("live", live);
    const notes = [];
    if (notice) notes.push(notice);
    if (turn.end?.error) notes.push(turn.end.error.message);
    if (attempts.length > 1) {
      const later = attempts.slice(1).map(({ attempt, from }) => `attempt ${attempt} from token ${count(from)} on`);
      notes.push(`Survived: ${later.join(", ")}.`);
    }
    this.#note.hidden = notes.length === 0;
    setText(this.#note, notes.join(" "));
    this.#note.classList.toggle("bad", Boolean(turn.end?.error) && turn.end?.status !== "cancelled");
  }
}

/**
 * Makes the text of `node` what it has grown to.
 * @param {Text} node
 * @param {string} text
 */
function grow(node, text) {
  if (text === node.data) return;
  if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}

/**
 * The run that the card stands for: there is one from the beginning.
 * @param {Card} card
 */
const latest = (card) => card.runs[card.runs.length - 1];

/**
 * A run's state for the style sheet, and in words.
 * @param {Run} run
 */
function standing(run) {
  if (run.phase === "sending") return ["sending", run.stopping ? "Stopping" : run.notice ? "Not sent yet" : "Sending"];
  if (run.phase === "queued") return ["queued", run.position ? `Queued, place ${count(run.position)}` : "Waiting"];
  if (run.phase === "running") return ["running", "Running"];
  const { status, finish_reason } = /** @type {End} */ (run.turn.end);
  const why = status === "completed" && finish_reason ? `: ${finish_reason}` : "";
  return [status, `${ENDS[status] ?? status}${why}`];
}

/** @param {Run} run */
function figures(run) {
  const parts = [];
  if (run.tokens > 0) parts.push(plural(run.tokens, "token"));
  if (run.firstTokenAfter !== null) parts.push(`first after ${duration(Math.max(0, run.firstTokenAfter))}`);
  if (run.rate !== null && run.tokens > 0) parts.push(`${short(run.rate)} tokens/s`);
  return parts.join(" · ");
}
