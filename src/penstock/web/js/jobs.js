// The view of all jobs: which there are, page by page, and one of them opened.

import { call } from "./api.js";
import { Detail } from "./detail.js";
import { setSetting, setting } from "./store.js";
import { $, ago, count, duration, el, fillRows } from "./ui.js";

/** @import { JobPage, JobSummary, ModelView } from "./types.js" */

/** Seconds between looks at the page that is shown. */
const EVERY = 2;
const LIMIT = "25";

export class Jobs {
  #user;
  #filters = $("#filters");
  /** @type {(string | null)[]} */
  #cursors = [null]; // of the pages up to the one that is shown
  /** @type {string | null} */
  #next = null;
  #timer = 0;
  #look = 0;
  #shown = false;
  #detail = new Detail($("#detail"), () => this.refresh());
  #open = "";

  /** @param {() => string} user says who "mine" is */
  constructor(user) {
    this.#user = user;
    this.#filters.elements.whose.value = setting("whose", "mine");
    this.#filters.addEventListener("submit", (/** @type {SubmitEvent} */ event) => event.preventDefault());
    this.#filters.addEventListener("change", () => {
      setSetting("whose", this.#filters.elements.whose.value);
      this.#first();
    });
    $("#newer").addEventListener("click", () => this.#turn(() => this.#cursors.pop()));
    $("#older").addEventListener("click", () => this.#turn(() => this.#cursors.push(this.#next)));
  }

  /**
   * Shows the list, and the job with this id, if any.
   * @param {string} id
   */
  show(id) {
    this.#shown = true;
    this.#open = id;
    $("#jobs").classList.toggle("has-detail", Boolean(id));
    this.#detail.show(id);
    this.refresh();
    this.#models();
  }

  hide() {
    this.#shown = false;
    clearTimeout(this.#timer);
    this.#detail.show("");
  }

  userChanged() {
    this.#first();
  }

  #first() {
    this.#cursors = [null];
    this.refresh();
  }

  /** @param {() => void} change */
  #turn(change) {
    change();
    this.refresh();
  }

  async #models() {
    const select = this.#filters.elements.model;
    try {
      /** @type {{data: ModelView[]}} */
      const { data } = await call("GET", "v1/models");
      const chosen = select.value;
      select.replaceChildren(el("option", { value: "", text: "Any" }), ...data.map(({ id }) => el("option", { value: id, text: id })));
      select.value = chosen;
    } catch {
      // The list itself says that the server cannot be reached.
    }
  }

  async refresh() {
    if (!this.#shown) return;
    clearTimeout(this.#timer);
    const look = ++this.#look;
    const { whose, user, status, model } = this.#filters.elements;
    $("#filter-user").hidden = whose.value !== "all";
    $("#jobs").classList.toggle("mine", whose.value === "mine");
    const query = new URLSearchParams({ limit: LIMIT });
    const name = whose.value === "mine" ? this.#user() : user.value.trim();
    if (name) query.set("user_id", name);
    if (status.value) query.set("status", status.value);
    if (model.value) query.set("model", model.value);
    const cursor = this.#cursors.at(-1);
    if (cursor) query.set("cursor", cursor);
    try {
      if (!document.hidden) {
        const page = await call("GET", `v1/jobs?${query}`);
        if (look !== this.#look || !this.#shown) return; // another filter or page meanwhile
        this.#draw(page);
      }
    } catch (error) {
      if (look !== this.#look) return;
      this.#empty(error.message);
    }
    this.#timer = setTimeout(() => this.refresh(), EVERY * 1000);
  }

  /** @param {JobPage} page */
  #draw({ data, next_cursor: next }) {
    this.#next = next;
    $("#newer").disabled = this.#cursors.length === 1;
    $("#older").disabled = next === null;
    $("#page-number").textContent = `Page ${this.#cursors.length}`;
    fillRows($("#job-rows"), data.map((job) => row(job, job.id === this.#open)));
    this.#empty(data.length ? null : this.#cursors.length > 1 ? "Nothing more." : "No jobs like these.");
  }

  /** @param {string | null} message */
  #empty(message) {
    $("#no-jobs").hidden = message === null;
    $("#no-jobs").textContent = message ?? "";
  }
}

/**
 * @param {JobSummary} job
 * @param {boolean} open
 */
function row(job, open) {
  const until = job.ended_at ?? (job.started_at ? Date.now() / 1000 : null);
  const took = job.started_at && until ? duration(Math.max(0, until - job.started_at)) : "–";
  const place = job.status === "queued" && job.position_in_queue ? `, place ${count(job.position_in_queue)}` : "";
  return el("tr", { "data-key": job.id, "aria-current": open && "true", "data-state": job.status },
    el("th", { scope: "row" }, el("a", { href: `#jobs/${job.id}`, title: job.id, text: job.id.slice(4, 14) })),
    el("td", {}, el("span", { class: "chip", text: job.status + place })),
    el("td", { text: job.model }),
    el("td", { class: "user-column", text: job.user_id ?? "–" }),
    el("td", { class: "number", text: count(job.tokens) }),
    el("td", { class: "number", text: count(job.attempt) }),
    el("td", { class: "number", text: took }),
    el("td", {}, el("time", {
      datetime: new Date(job.created_at * 1000).toISOString(),
      text: ago(job.created_at),
    })),
  );
}
