// One job: what it is, its timeline, and its log as it is written, with the attempts that wrote it.

import { ApiError, backoff, call, pause } from "./api.js";
import { Gap, Log, segments } from "./log.js";
import { readLog } from "./sse.js";
import { announce, clock, copyWith, count, duration, el, isEnded, plural, setText } from "./ui.js";

/** @import { AttemptStart, JobView, LogToken, PhaseName, TokenEvent } from "./types.js" */

/** Tokens that the list of them shows: the latest. A page with a million elements helps nobody. */
const SHOWN = 2000;
/** Seconds between looks at a job that has not ended. */
const EVERY = 1;

export class Detail {
  #place;
  #listChanged;
  #id = "";
  #over = new AbortController();

  /**
   * @param {HTMLElement} place
   * @param {() => void} listChanged is called when the list is not what it was
   */
  constructor(place, listChanged) {
    this.#place = place;
    this.#listChanged = listChanged;
  }

  /**
   * Opens the job `id`; "" closes.
   * @param {string} id
   */
  show(id) {
    if (id === this.#id) return;
    this.#over.abort();
    this.#over = new AbortController();
    this.#id = id;
    this.#place.hidden = !id;
    this.#place.replaceChildren();
    this.#place.setAttribute("aria-label", `Job ${id}`);
    if (id) this.#open(id, this.#over.signal);
  }

  /**
   * @param {string} id
   * @param {AbortSignal} signal
   */
  async #open(id, signal) {
    const title = el("h2", { tabindex: "-1" }, "Job ", el("code", { text: id }));
    const close = el("a", { class: "quiet button", href: "#jobs", text: "Close" });
    const facts = el("div", {});
    const problem = el("p", { class: "error", role: "alert" });
    const say = (/** @type {string} */ message) => {
      facts.after(problem);
      setText(problem, message);
    };
    const log = new LogView();
    /** @type {(text: string, action: (event: any) => void, kind?: string) => HTMLButtonElement} */
    const act = (text, action, kind = "") => el("button", { type: "button", class: `quiet ${kind}`, text, onclick: action });
    const cancel = act("Cancel", () => this.#cancel(id, say, cancel), "danger");
    const remove = act("Delete", () => this.#delete(id, say), "danger");
    this.#place.append(
      el("header", {}, title, close),
      facts,
      el("div", { class: "buttons" },
        act("Copy id", (event) => copyWith(event.currentTarget, id)),
        act("Copy text", (event) => copyWith(event.currentTarget, log.text)),
        cancel,
        remove,
      ),
      log.element,
    );
    title.focus({ preventScroll: true });
    if (this.#place.getBoundingClientRect().top > innerHeight - 120) this.#place.scrollIntoView();
    let looks = 0;
    const look = async () => {
      const number = ++looks;
      /** @type {JobView} */
      const job = await patiently(() => call("GET", `v1/jobs/${id}`, { signal }), log, signal);
      if (number === looks) {
        facts.replaceChildren(...describe(job, log.firstAt));
        cancel.hidden = isEnded(job.status);
      }
      return job;
    };
    const read = new AbortController();
    try {
      log.isNew = (await look()).tokens === 0;
      this.#watch(look, AbortSignal.any([signal, read.signal]));
      for await (const { id: position, event, data } of readLog(`v1/jobs/${id}/events`, { signal, onState: (state) => log.state(state) })) {
        if (event === "token") log.token(Number(position), data);
        else if (data.error?.code === "log_rewound") log.rewound(data.error.message);
        else log.end();
      }
      read.abort();
      if (!signal.aborted) {
        log.end();
        await look();
      }
    } catch (error) {
      read.abort();
      if (signal.aborted) return;
      if (!(error instanceof ApiError) && !(error instanceof Gap)) throw error;
      say(error.message);
    }
  }

  /**
   * Looks again and again, also while nothing is written: the place in the queue changes, and the attempt.
   * @param {() => Promise<JobView>} look
   * @param {AbortSignal} over
   */
  async #watch(look, over) {
    while (true) {
      await pause(EVERY, over);
      if (over.aborted) return;
      if (document.hidden) continue;
      try {
        await look();
      } catch (error) {
        if (!over.aborted && !(error instanceof ApiError)) throw error; // what the server refuses is said by who reads the log
      }
    }
  }

  /**
   * @param {string} id
   * @param {(message: string) => void} say
   * @param {HTMLButtonElement} button
   */
  async #cancel(id, say, button) {
    button.disabled = true;
    try {
      await call("POST", `v1/jobs/${id}/cancel`);
      announce("Cancelled");
    } catch (error) {
      say(error.message);
    }
    button.disabled = false;
    this.#listChanged();
  }

  /**
   * @param {string} id
   * @param {(message: string) => void} say
   */
  async #delete(id, say) {
    if (!confirm("Delete this job, its log and its result? One that runs is cancelled.")) return;
    try {
      await call("DELETE", `v1/jobs/${id}`);
      announce("Deleted");
      location.hash = "jobs";
    } catch (error) {
      say(error.message);
    }
    this.#listChanged();
  }
}

/**
 * What `ask` answers; asked again as long as the failure is a passing one, which the log's state shows meanwhile.
 * @template T
 * @param {() => Promise<T>} ask
 * @param {LogView} log
 * @param {AbortSignal} signal
 */
async function patiently(ask, log, signal) {
  for (let failures = 0; ; failures++) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ApiError && error.passing)) throw error;
      log.state("waiting");
      await pause(backoff(failures), signal);
    }
  }
}

/** @param {JobView} job */
function tokensOf({ tokens, usage }) {
  const thoughts = usage?.reasoning_tokens ? `, ${count(usage.reasoning_tokens)} of them thoughts` : "";
  return count(tokens) + thoughts + (usage?.prompt_tokens ? ` after a prompt of ${count(usage.prompt_tokens)}` : "");
}

/**
 * What is known of a job, its timeline and its error.
 * @param {JobView} job
 * @param {number | null} firstSeen
 */
function describe(job, firstSeen) {
  /** @type {[string, Node | string][]} */
  const parts = [
    ["Status", el("span", { class: "chip", "data-state": job.status, text: job.status })],
    ["Model", job.model],
    ["User", job.user_id ?? "–"],
    ["Priority", job.priority],
    ["Tokens", tokensOf(job)],
    ["Attempt", count(job.attempt)],
  ];
  if (job.position_in_queue) parts.push(["Place in the queue", count(job.position_in_queue)]);
  if (job.finish_reason) parts.push(["Ended by", job.finish_reason]);
  if (job.timings?.tokens_per_second) parts.push(["Rate", `${job.timings.tokens_per_second.toFixed(1)} tokens/s`]);
  if (job.deadline_at) parts.push(["Deadline", clock(job.deadline_at)]);
  for (const [name, value] of Object.entries(job.metadata)) parts.push([name, value]);
  return [
    el("dl", { class: "facts" }, ...parts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", {}, value)))),
    timeline(job, firstSeen),
    ...(job.error ? [el("p", { class: "error", text: `${job.error.message} (${job.error.code})` })] : []),
  ];
}

/**
 * Created, started, first token, ended: as a bar in proportion, and as a list.
 * @param {JobView} job
 * @param {number | null} firstSeen
 */
function timeline(job, firstSeen) {
  const end = job.ended_at ?? Date.now() / 1000;
  const afterwards = job.timings?.time_to_first_token;
  const first = afterwards !== null && afterwards !== undefined ? job.created_at + afterwards : job.ended_at ? null : firstSeen;
  const moments = [
    { kind: "created", name: "Created", at: job.created_at },
    { kind: "started", name: "Started", at: job.started_at },
    { kind: "first", name: "First token", at: first },
    { kind: "ended", name: "Ended", at: job.ended_at },
  ].flatMap(({ at, ...rest }) => (at === null ? [] : [{ at, ...rest }]));
  /** @type {Record<string, string>} */
  const names = { created: "waited", started: "until the first token", first: "wrote" };
  const bar = el("div", { class: "timeline", role: "img" });
  /** @type {string[]} */
  const spoken = [];
  moments.forEach(({ kind, at }, index) => {
    const until = moments[index + 1]?.at ?? end;
    if (kind === "ended" || (kind === "created" && moments.length === 2 && job.ended_at)) return;
    const part = el("span", { class: `part ${kind}` });
    part.style.flexGrow = String(Math.max(0.0001, until - at));
    bar.append(part);
    spoken.push(`${names[kind]} ${duration(Math.max(0, until - at))}`);
  });
  bar.setAttribute("aria-label", `Timeline: ${spoken.join(", ")}`);
  const list = moments.map(({ kind, name, at }, index) => el("li", { class: kind },
    el("span", { text: name }),
    el("time", { datetime: new Date(at * 1000).toISOString(), text: clock(at) }),
    el("small", { text: index ? `+${duration(Math.max(0, at - moments[0].at))}` : "" }),
  ));
  return el("div", { class: "times" }, bar, el("ol", {}, ...list));
}

/** The log itself: as text, or token by token; a mark where another attempt went on. */
class LogView {
  #log = new Log({ keepTokens: true });
  #frame = 0;
  #drawn = 0;
  #asTokens = false;
  #state = el("p", { class: "hint" });
  #note = el("p", { class: "note", hidden: true });
  #text = el("div", { class: "log whole", tabindex: "0", role: "group", "aria-label": "Log" });
  /** Was it opened before its first token? Only then does the arrival of that say when it was written. */
  isNew = false;
  /** @type {number | null} */
  firstAt = null;

  constructor() {
    /** @type {(name: string, label: string, checked: boolean) => HTMLElement} */
    const way = (name, label, checked) => el("label", {},
      el("input", { type: "radio", name: "log-as", value: name, checked, onchange: () => this.#show(name) }), el("span", { text: label }));
    this.element = el("div", { class: "log-view" },
      el("div", { class: "strip" },
        el("h3", { text: "Log" }), this.#state,
        el("fieldset", { class: "segments small" }, el("legend", { class: "away", text: "Show the log as" }),
          way("text", "Text", true), way("tokens", "Tokens", false)),
      ),
      this.#note,
      this.#text,
    );
  }

  get text() {
    return this.#log.texts.join("\n\n");
  }

  /**
   * @param {number} position
   * @param {TokenEvent} data
   */
  token(position, data) {
    if (!this.#log.add(position, data)) return;
    if (position === 1 && this.isNew) this.firstAt = Date.now() / 1000;
    this.#schedule();
  }

  /** @param {string} message */
  rewound(message) {
    this.#log.reset();
    this.#note.hidden = false;
    this.#note.textContent = message;
    this.#show();
  }

  end() {
    this.#log.end({});
    this.#schedule();
  }

  /** @param {"live" | "waiting"} state */
  state(state) {
    this.element.dataset.connection = state;
    this.#schedule();
  }

  /** @param {string} [as] */
  #show(as) {
    if (as) this.#asTokens = as === "tokens";
    this.#drawn = 0;
    this.#text.replaceChildren();
    this.#text.classList.toggle("tokens", this.#asTokens);
    this.#schedule();
  }

  #schedule() {
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#frame = 0;
    const { tokens, attempts, ended } = this.#log;
    const live = this.element.dataset.connection === "waiting" ? "reconnecting" : "live";
    const tries = attempts.length > 1 ? `, ${plural(attempts.length, "attempt")}` : "";
    setText(this.#state, `${plural(tokens.length, "token")}${tries}, ${ended ? "complete" : live}`);
    const atEnd = this.#text.scrollHeight - this.#text.scrollTop - this.#text.clientHeight < 24;
    if (this.#asTokens) this.#drawTokens(tokens);
    else this.#drawText(tokens);
    if (atEnd && !ended) this.#text.scrollTop = this.#text.scrollHeight;
    if (ended && tokens.length === 0) setText(this.#text, "(nothing)");
  }

  /** @param {LogToken[]} tokens */
  #drawText(tokens) {
    for (const { position, token, attempt, index, phase } of tokens.slice(this.#drawn)) {
      if (position > 1 && tokens[position - 2].attempt !== attempt) this.#text.append(mark(attempt, position));
      for (const [name, text] of segments(token, phase)) this.#part(attempt, index, name).lastChild.appendData(text);
    }
    this.#drawn = tokens.length;
  }

  /**
   * Where the next text of a choice goes: its last part, or, where another phase begins, a new one behind that.
   * @param {number} attempt
   * @param {number} index
   * @param {PhaseName} phase
   * @returns {any}
   */
  #part(attempt, index, phase) {
    /** @type {any} */
    const last = [...this.#text.querySelectorAll(`[data-attempt="${attempt}"][data-index="${index}"]`)].at(-1);
    if (last?.dataset.phase === phase) return last;
    const part = newPart(attempt, index, phase);
    if (last) last.after(part);
    else this.#text.append(part);
    return part;
  }

  /** @param {LogToken[]} tokens */
  #drawTokens(tokens) {
    for (const { position, token, token_id, attempt, index, phase } of tokens.slice(Math.max(this.#drawn, tokens.length - SHOWN))) {
      if (position > 1 && tokens[position - 2].attempt !== attempt) this.#text.append(mark(attempt, position));
      const choice = index ? `, choice ${index + 1}` : "";
      const [name] = segments(token, phase)[0];
      this.#text.append(el("span", {
        class: "token", text: token || "∅", "data-attempt": String(attempt), "data-phase": name,
        title: `Position ${position}, token ${token_id}, attempt ${attempt}${choice}${name === "text" ? "" : `, ${PHASES[name]}`}`,
      }));
    }
    while (this.#text.childElementCount > SHOWN * 1.2) this.#text.firstElementChild?.remove();
    this.#drawn = tokens.length;
  }
}

/** What a part is that is no text. */
const PHASES = { reasoning: "thought", tool: "call" };

/**
 * A part of the log that is read in one go; its last child is its text.
 * @param {number} attempt
 * @param {number} index
 * @param {PhaseName} phase
 */
function newPart(attempt, index, phase) {
  const data = { "data-attempt": String(attempt), "data-index": String(index), "data-phase": phase };
  const text = document.createTextNode("");
  if (phase === "text") return el("span", { class: "part", ...data }, text);
  if (phase === "tool") return el("code", { class: "part call", ...data }, text);
  return el("details", { class: "part thought", open: true, ...data }, el("summary", { text: "Thought" }), text);
}

/**
 * @param {number} attempt
 * @param {number} position
 */
const mark = (attempt, position) =>
  el("span", { class: "mark", text: `attempt ${attempt} from ${count(position)}` });
