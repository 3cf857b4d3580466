// The one EventSource: every stream of a user. Whatever cuts it, it comes back behind the last event.

import { backoff } from "./api.js";

/** @import { ConnectionState, ErrorEvent, JobCompleteEvent, UserTokenEvent } from "./types.js" */

/**
 * @typedef {object} FeedListener
 * @property {(data: UserTokenEvent) => void} token
 * @property {(data: JobCompleteEvent) => void} end
 * @property {(data: ErrorEvent) => void} rewound
 * @property {() => void} open the stream is (again) there
 * @property {(state: ConnectionState) => void} state
 */

/** How the connection stands, and what people read about it. */
export const STATES = {
  connecting: "Connecting…",
  live: "Live",
  waiting: "Reconnecting…",
  offline: "Offline",
};

export class Feed {
  #user;
  #on;
  /** @type {EventSource | null} */
  #source = null;
  /** @type {string | null} */
  #cursor = null;
  #failures = 0;
  #timer = 0;
  #closed = false;
  #online = () => this.reopen();
  #offline = () => this.#tell("offline");
  /** @type {ConnectionState} */
  state = "connecting";

  /**
   * @param {string} user whose streams these are
   * @param {FeedListener} on is told what the events say
   */
  constructor(user, on) {
    this.#user = user;
    this.#on = on;
    addEventListener("online", this.#online);
    addEventListener("offline", this.#offline);
    this.#open();
  }

  /** A new connection, behind the last event; or, for who missed something, `anew` from the beginning. */
  reopen({ anew = false } = {}) {
    if (this.#closed) return;
    if (anew) this.#cursor = null;
    this.#open();
  }

  close() {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#source?.close();
    removeEventListener("online", this.#online);
    removeEventListener("offline", this.#offline);
  }

  #open() {
    clearTimeout(this.#timer);
    this.#source?.close();
    const query = new URLSearchParams({ user_id: this.#user });
    if (this.#cursor) query.set("after", this.#cursor);
    const source = new EventSource(`v1/events?${query}`);
    this.#source = source;
    const take = (/** @type {(data: any) => void} */ handle) => (/** @type {MessageEvent} */ event) => {
      if (source !== this.#source) return; // what an earlier connection still had in hand
      if (event.lastEventId) this.#cursor = event.lastEventId;
      handle(JSON.parse(event.data));
    };
    source.addEventListener("token", take(this.#on.token));
    source.addEventListener("job_complete", take(this.#on.end));
    source.addEventListener("open", () => {
      this.#failures = 0;
      this.#tell("live");
      this.#on.open();
    });
    source.addEventListener("error", (event) => {
      if (source !== this.#source) return;
      if (event instanceof MessageEvent) take(this.#on.rewound)(event); // the server's own `error` event
      else this.#lost();
    });
    this.#tell(navigator.onLine ? (this.#failures ? "waiting" : "connecting") : "offline");
  }

  /** The browser reconnects by itself after a cut, but gives up after an answer that is no stream (a 502, a 503). */
  #lost() {
    this.#tell(navigator.onLine ? "waiting" : "offline");
    if (this.#source?.readyState !== EventSource.CLOSED) return;
    this.#failures += 1;
    // A cursor that is refused again and again (400) may be another server's. Anew is always right: positions
    // already known are skipped, and what ended meanwhile is asked for.
    if (this.#failures % 4 === 0) this.#cursor = null;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#open(), backoff(this.#failures) * 1000);
  }

  /** @param {ConnectionState} state */
  #tell(state) {
    this.state = state;
    this.#on.state(state);
  }
}
