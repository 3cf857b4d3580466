// What a user has running: conversations, their jobs, and the one feed that carries all of their tokens.
// Nothing here knows of the page. A reload builds it anew from the remembered job ids and the server's logs.

import { ApiError, backoff, call, pause, randomId } from "./api.js";
import { Feed } from "./feed.js";
import { Gap, Log } from "./log.js";
import { forgetCard, hearCards, loadCards, saveCard } from "./store.js";
import { isEnded } from "./ui.js";

/** @import { Beginning, Card, CardRecord, ConnectionState, End, JobCompleteEvent, JobSummary, JobView } from "./types.js" */
/** @import { ErrorEvent, Turn, UserTokenEvent } from "./types.js" */

/**
 * @typedef {object} RunsListener
 * @property {(card: Card) => void} changed
 * @property {(card: Card) => void} removed
 * @property {(run: Run) => void} ended of each end that was seen
 * @property {(state: ConnectionState) => void} state of the connection
 */

/** Milliseconds of silence after which a run is asked for: what the feed should have told may have gone missing. */
const SILENCE = 5000;
/** Seconds after which a refused prompt is sent again at the latest: the server may say a minute, but somebody is watching. */
const PATIENCE = 10;
/** Milliseconds over which the rate of tokens is taken. */
const RATE_OVER = 3000;

/** One turn of a conversation and the job that answers it. `turn` is what is remembered of it. */
export class Run {
  /** @type {"sending" | "queued" | "running" | "ended"} "sending": not yet accepted */
  phase = "sending";
  log = new Log();
  /** @type {number | null} Place in the queue, as far as it is known. */
  position = null;
  /** What a person should know while it waits. */
  notice = "";
  stopping = false;
  /** @type {AbortController | null} Ends the wait before the submit is tried again. */
  retry = null;
  heardAt = 0;
  /** @type {number | null} When its first token was seen here, in milliseconds. */
  firstAt = null;
  /** @type {number | null} When it was sent, in milliseconds; not known after a reload. */
  sentAt = null;
  /** @type {{at: number, head: number}[]} */
  #samples = [];
  #stuckAt = -1;

  /**
   * @param {Card} card
   * @param {Turn} turn
   */
  constructor(card, turn) {
    this.card = card;
    this.turn = turn;
    if (turn.end) this.phase = "ended";
    else if (turn.job) this.phase = "queued";
  }

  get live() {
    return this.phase !== "ended";
  }

  get text() {
    return this.turn.reply ?? this.log.text;
  }

  /** What the model thought before its text. */
  get thought() {
    return this.turn.reasoning ?? this.log.thought;
  }

  get attempts() {
    return this.turn.end?.attempts ?? this.log.attempts;
  }

  get tokens() {
    return this.turn.end?.usage?.completion_tokens ?? this.log.head;
  }

  /** Seconds from the submit to the first token: the server's own figure once it has ended, until then as seen here. */
  get firstTokenAfter() {
    if (this.turn.end?.timings) return this.turn.end.timings.time_to_first_token;
    return this.firstAt === null || !this.sentAt ? null : (this.firstAt - this.sentAt) / 1000;
  }

  /** Tokens a second: of the last moments while it runs, of the whole once it has ended. */
  get rate() {
    if (!this.live) return this.turn.end?.timings?.tokens_per_second ?? null;
    const [first, last] = [this.#samples.at(0), this.#samples.at(-1)];
    if (!first || !last || last.at - first.at < 400) return null;
    return (1000 * (last.head - first.head)) / (last.at - first.at);
  }

  /** @param {number} now */
  sample(now) {
    if (this.log.head === 0) return;
    this.#samples.push({ at: now, head: this.log.head });
    while (now - this.#samples[0].at > RATE_OVER) this.#samples.shift();
  }

  /** What comes now is a replay, not a rate. */
  forgetRate() {
    this.#samples = [];
  }

  /**
   * The server has tokens that did not come: true the second time that nothing has come in between.
   * @param {number} tokens
   */
  isStuck(tokens) {
    if (tokens <= this.log.head) return false;
    const stuck = this.#stuckAt === this.log.head;
    this.#stuckAt = this.log.head;
    return stuck;
  }
}

export class Runs {
  /** @type {Map<string, Card>} Conversations by their key, the oldest first. */
  cards = new Map();
  #user;
  #on;
  #feed;
  /** @type {Map<string, Log>} */
  #logs = new Map(); // by job, also of jobs that no answer has named yet
  /** @type {Map<string, Run>} */
  #runs = new Map(); // by job
  #over = new AbortController();
  #unhear;

  /**
   * @param {string} user
   * @param {RunsListener} on
   */
  constructor(user, on) {
    this.#user = user;
    this.#on = on;
    for (const record of loadCards(user)) this.#adopt(record);
    this.#feed = new Feed(user, {
      token: (data) => this.#token(data),
      end: (data) => this.#end(data),
      rewound: (data) => this.#rewound(data),
      open: () => this.#opened(),
      state: on.state,
    });
    this.#unhear = hearCards(user, (key, record) => this.#heard(key, record));
    this.#watch();
    this.#sampling();
  }

  close() {
    this.#on = { changed() {}, removed() {}, state() {}, ended() {} }; // what is still under way is nobody's any more
    this.#over.abort();
    this.#feed.close();
    this.#unhear();
  }

  all() {
    return [...this.cards.values()].flatMap((card) => card.runs);
  }

  // -------------------------------------------------------------------------------------------- what people do

  /**
   * Starts a conversation.
   * @param {Beginning} record
   * @param {string} text
   */
  start(record, text) {
    const newest = Math.max(0, ...[...this.cards.values()].map((card) => card.record.created));
    const created = Math.max(Date.now(), newest + 1); // several started in one millisecond keep their order
    const card = this.#adopt({ ...record, key: randomId("card_"), created, turns: [] });
    this.reply(card, text);
    return card;
  }

  /**
   * The next turn of a conversation.
   * @param {Card} card
   * @param {string} text
   */
  reply(card, text) {
    /** @type {Turn} */
    const turn = { key: randomId("turn_", 16), text, job: null, reply: null, end: null };
    card.record.turns.push(turn);
    const run = new Run(card, turn);
    card.runs.push(run);
    run.sentAt = Date.now();
    this.#save(card); // before it is sent: a reload in this moment sends it again, with the same key
    this.#send(run);
  }

  /**
   * Cancels a run; one whose submit is not answered yet as soon as it is.
   * @param {Run} run
   */
  async stop(run) {
    if (!run.live) return;
    run.stopping = true;
    this.#changed(run);
    if (run.turn.job) await this.#cancel(run);
    else run.retry?.abort(); // ask at once whether there is a job to cancel
  }

  /**
   * Forgets a conversation here; what still runs is cancelled.
   * @param {Card} card
   */
  remove(card) {
    for (const run of card.runs) {
      this.stop(run);
      this.#drop(run);
    }
    this.cards.delete(card.record.key);
    forgetCard(this.#user, card.record);
    this.#on.removed(card);
  }

  // -------------------------------------------------------------------------------------------- submit, cancel

  /** @param {Run} run */
  async #send(run) {
    let failures = 0;
    while (!this.#over.signal.aborted) {
      try {
        const job = await call("POST", "v1/jobs", {
          body: body(run, this.#user),
          headers: { "idempotency-key": run.turn.key },
          signal: this.#over.signal,
        });
        this.#accepted(run, job);
        return;
      } catch (error) {
        if (!(error instanceof ApiError)) return; // closed meanwhile
        if (!error.passing) {
          this.#finish(run, { status: "refused", error: { message: error.message, code: error.code } });
          return;
        }
        if (run.stopping && error.status === 429) {
          this.#finish(run, { status: "cancelled", error: { message: "Stopped before the server took it." } });
          return;
        }
        run.notice = `${error.message} This page goes on trying.`;
        this.#changed(run);
        // It may have been accepted all the same (but not if it was refused). The same key finds that job again.
        run.retry = new AbortController();
        await pause(Math.min(PATIENCE, error.retryAfter ?? backoff(++failures)), AbortSignal.any([this.#over.signal, run.retry.signal]));
        if (!this.cards.has(run.card.record.key) && failures > 3) return;
      }
    }
  }

  /**
   * @param {Run} run
   * @param {JobSummary} job as far as it is told to who submits it
   */
  #accepted(run, job) {
    run.turn.job = job.id;
    run.notice = "";
    run.phase = "queued";
    run.position = job.position_in_queue;
    if (this.cards.has(run.card.record.key)) this.#follow(run, job.id);
    if (run.stopping) this.#cancel(run);
    if (isEnded(job.status)) this.#ask(run);
    if (!this.all().some(({ phase }) => phase === "sending")) {
      for (const [id, log] of this.#logs) if (log.ended && !this.#runs.has(id)) this.#logs.delete(id);
    }
  }

  /**
   * From now on what the feed says of its job is this run's; some of it may have come before the answer did.
   * @param {Run} run
   * @param {string} job
   */
  #follow(run, job) {
    run.log = this.#logs.get(job) ?? run.log;
    run.heardAt = Date.now();
    this.#logs.set(job, run.log);
    this.#runs.set(job, run);
    if (run.log.head > 0) this.#begun(run);
    this.#save(run.card);
    if (run.log.ended) this.#settle(run, run.log.ended);
  }

  /**
   * Lets go of a run's job and its log.
   * @param {Run} run
   */
  #drop(run) {
    if (run.turn.job === null) return;
    this.#runs.delete(run.turn.job);
    this.#logs.delete(run.turn.job);
  }

  /** @param {Run} run */
  async #cancel(run) {
    for (let failures = 0; run.live && !this.#over.signal.aborted; failures++) {
      try {
        const job = await call("POST", `v1/jobs/${run.turn.job}/cancel`, { signal: this.#over.signal });
        if (isEnded(job.status)) this.#learn(run, job);
        return;
      } catch (error) {
        if (!(error instanceof ApiError) || !error.passing) return;
        await pause(error.retryAfter ?? backoff(failures), this.#over.signal);
      }
    }
  }

  // -------------------------------------------------------------------------------------------- what the feed says

  /** @param {UserTokenEvent} event */
  #token({ job_id: job, position, ...token }) {
    let log = this.#logs.get(job);
    if (!log) this.#logs.set(job, (log = new Log()));
    try {
      if (!log.add(position, token)) return;
    } catch (error) {
      if (!(error instanceof Gap)) throw error;
      this.#feed.reopen({ anew: true });
      return;
    }
    const run = this.#runs.get(job);
    if (run) this.#begun(run);
  }

  /** @param {Run} run */
  #begun(run) {
    run.heardAt = Date.now();
    run.firstAt ??= run.heardAt;
    run.phase = "running";
    run.position = null;
    this.#changed(run);
  }

  /** @param {JobCompleteEvent} data */
  #end(data) {
    const run = this.#runs.get(data.job_id);
    if (run) this.#settle(run, data);
    else if (this.all().some(({ phase }) => phase === "sending")) {
      const log = this.#logs.get(data.job_id) ?? new Log(); // perhaps of the job whose answer is on its way
      log.end(data);
      this.#logs.set(data.job_id, log);
    } else this.#logs.delete(data.job_id);
  }

  /** @param {ErrorEvent} event */
  #rewound({ job_id: job }) {
    this.#logs.get(job)?.reset();
    const run = this.#runs.get(job);
    if (!run) return;
    run.notice = "The server lost the end of this log; it is written anew.";
    run.forgetRate();
    this.#changed(run);
  }

  #opened() {
    for (const run of this.all().filter(({ live }) => live)) {
      run.forgetRate();
      // What ended while nobody listened may not be told any more: ask soon, unless something comes.
      run.heardAt = Math.min(run.heardAt, Date.now() - SILENCE + 1000);
    }
  }

  /**
   * A run's end, from its terminal event.
   * @param {Run} run
   * @param {JobCompleteEvent} data
   */
  #settle(run, data) {
    const { status, finish_reason, error, usage } = data;
    this.#finish(run, { status, finish_reason, error, usage, attempts: run.log.attempts });
    this.#ask(run); // the server's own timings
  }

  /**
   * @param {Run} run
   * @param {End} end
   */
  #finish(run, end) {
    if (!run.live) return;
    run.phase = "ended";
    run.notice = "";
    run.turn.reply = run.log.text;
    if (run.log.thought) run.turn.reasoning = run.log.thought;
    run.turn.end = end;
    this.#drop(run);
    this.#save(run.card);
    if (this.cards.has(run.card.record.key)) this.#on.ended(run);
  }

  // -------------------------------------------------------------------------------------------- what it asks for

  /**
   * Ask for a run's job: how it stands, or, once it has ended, everything.
   * @param {Run} run
   */
  async #ask(run) {
    try {
      this.#learn(run, await call("GET", `v1/jobs/${run.turn.job}`, { signal: this.#over.signal }));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) {
        const { code, message } = error;
        this.#finish(run, { status: "gone", error: { code, message }, attempts: run.log.attempts });
      }
    }
  }

  /**
   * @param {Run} run
   * @param {JobView} job
   */
  #learn(run, job) {
    run.heardAt = Date.now();
    if (!isEnded(job.status)) {
      run.phase = job.status === "running" || run.log.head > 0 ? "running" : "queued";
      run.position = job.position_in_queue;
      if (run.isStuck(job.tokens)) this.#feed.reopen();
      this.#changed(run);
      return;
    }
    const { status, finish_reason, error, usage, timings } = job;
    const attempts = run.attempts.length ? run.attempts : [{ attempt: job.attempt, from: 1 }];
    if (run.live) this.#finish(run, { status, finish_reason, error, usage, timings, attempts });
    run.turn.reply = job.result?.text ?? "";
    if (job.result?.reasoning) run.turn.reasoning = job.result.reasoning;
    if (run.turn.end) run.turn.end.timings = timings;
    this.#save(run.card);
  }

  /** Once a second, while there is something to wait for and somebody may be looking. */
  async #watch() {
    while (!this.#over.signal.aborted) {
      await pause(1, this.#over.signal);
      const live = [...this.#runs.values()].filter((run) => run.live);
      if (document.hidden || live.length === 0) continue;
      if (live.some(({ phase }) => phase === "queued")) await this.#askForPlaces(live);
      const silent = live.filter((run) => run.live && Date.now() - run.heardAt > SILENCE);
      await Promise.all(silent.map((run) => this.#ask(run)));
    }
  }

  /** @param {Run[]} live */
  async #askForPlaces(live) {
    const query = new URLSearchParams({ status: "queued", user_id: this.#user, limit: "500" });
    /** @type {JobSummary[]} */
    let waiting;
    try {
      waiting = (await call("GET", `v1/jobs?${query}`, { signal: this.#over.signal })).data;
    } catch {
      return; // the connection's state says it
    }
    const places = new Map(waiting.map((job) => [job.id, job.position_in_queue]));
    for (const run of live.filter(({ phase }) => phase === "queued")) {
      const job = run.turn.job ?? "";
      run.position = places.get(job) ?? null;
      if (places.has(job)) run.heardAt = Date.now();
      this.#changed(run);
    }
  }

  async #sampling() {
    while (!this.#over.signal.aborted) {
      await pause(0.5, this.#over.signal);
      for (const run of this.#runs.values()) {
        if (run.phase !== "running") continue;
        run.sample(Date.now());
        this.#changed(run);
      }
    }
  }

  // -------------------------------------------------------------------------------------------- what is remembered

  /** @param {CardRecord} record */
  #adopt(record) {
    /** @type {Card} */
    const card = { record, runs: [] };
    card.runs = record.turns.map((turn) => new Run(card, turn));
    this.cards.set(record.key, card);
    for (const run of card.runs.filter(({ live }) => live)) {
      if (run.turn.job) {
        this.#logs.set(run.turn.job, run.log);
        this.#runs.set(run.turn.job, run);
      } else this.#send(run);
    }
    return card;
  }

  /**
   * Another tab of this user has started, continued, ended or removed a conversation.
   * @param {string} key
   * @param {CardRecord | null} record
   */
  #heard(key, record) {
    const card = this.cards.get(key);
    if (!record) {
      this.cards.delete(key);
      if (card) this.#on.removed(card);
    } else if (!card) {
      if (record.turns.every(({ job, end }) => job || end)) this.#on.changed(this.#adopt(record));
    } else if (record.turns.length > card.runs.length && record.turns.at(-1)?.job) {
      for (const turn of record.turns.slice(card.runs.length)) {
        card.record.turns.push(turn);
        const run = new Run(card, turn);
        card.runs.push(run);
        if (run.live && turn.job) this.#follow(run, turn.job);
      }
      this.#on.changed(card);
    }
  }

  /** @param {Card} card */
  #save(card) {
    if (!this.cards.has(card.record.key)) return; // removed meanwhile
    saveCard(this.#user, card.record);
    this.#on.changed(card);
  }

  /** @param {Run} run */
  #changed(run) {
    if (this.cards.has(run.card.record.key)) this.#on.changed(run.card);
  }
}

/**
 * What is submitted for a run: the same whenever it is asked, for the idempotency key's sake.
 * @param {Run} run
 * @param {string} user
 */
function body(run, user) {
  const { kind, model, system, params, turns } = run.card.record;
  const shared = { model, user_id: user, ...params };
  if (kind === "completion") return { ...shared, prompt: run.turn.text };
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    messages.push({ role: "user", content: turn.text });
    if (turn === run.turn) break;
    messages.push({ role: "assistant", content: turn.reply ?? "" });
  }
  return { ...shared, messages };
}
