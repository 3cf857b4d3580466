// The form: which model, what to ask, how to sample.

import { call } from "./api.js";
import { setSetting, setting } from "./store.js";
import { $, el } from "./ui.js";

/** @import { Beginning, ModelView, Params } from "./types.js" */

const NUMBERS = [
  "max_tokens", "temperature", "top_p", "seed", "top_k", "min_p", "presence_penalty", "frequency_penalty",
  "repetition_penalty", "deadline",
];

export class Composer {
  #form = $("#composer");
  /** @type {ModelView[]} */
  #models = [];
  #send;

  /** @param {(record: Beginning, text: string) => void} send is called for each prompt that is to run: `Runs.start` */
  constructor(send) {
    this.#send = send;
    this.#form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#form.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
    this.#form.addEventListener("change", (/** @type {{target: HTMLInputElement}} */ { target }) => {
      if (target.name === "model") setSetting("model", target.value);
      this.#adapt();
    });
    this.refreshModels();
    this.#adapt();
  }

  /**
   * Puts a request into the form again.
   * @param {{kind?: string, model?: string, system?: string, params?: Params}} record
   * @param {string} text
   */
  fill({ kind, model, system = "", params = {} }, text, lines = false) {
    const { elements } = this.#form;
    elements.kind.value = kind;
    if ([...elements.model.options].some(({ value }) => value === model)) elements.model.value = model;
    elements.system.value = system;
    elements.prompt.value = text;
    elements.lines.checked = lines;
    if (Object.keys(params).length) {
      for (const name of NUMBERS) elements[name].value = params[name] ?? "";
      elements.priority.value = params.priority ?? "normal";
      elements.stop.value = (params.stop ?? []).map(escaped).join("\n");
      elements.ignore_eos.checked = params.ignore_eos ?? false;
    }
    this.#adapt();
    elements.prompt.focus();
  }

  async refreshModels() {
    /** @type {ModelView[]} */
    let models;
    try {
      models = (await call("GET", "v1/models")).data;
    } catch {
      return; // the connection's state says it; asked again when it is back
    }
    const select = this.#form.elements.model;
    const wanted = select.value || setting("model", null);
    const shown = models.map(({ id, state }) => el("option", { value: id, text: state === "ready" ? id : `${id} (${state})` }));
    if (models.length === 0) shown.push(el("option", { value: "", text: "None yet" }));
    this.#models = models;
    if (String(shown.map((option) => option.text)) !== String([...select.options].map((option) => option.text))) {
      select.replaceChildren(...shown);
      select.value = models.some(({ id }) => id === wanted) ? wanted : (models[0]?.id ?? "");
    }
    this.#adapt();
  }

  /** Shows what the kind of request needs, and switches off what the model's engine cannot honour. */
  #adapt() {
    const { elements } = this.#form;
    const model = this.#models.find(({ id }) => id === elements.model.value);
    const [chat, completion] = elements.kind;
    chat.disabled = model?.chat === false;
    if (chat.disabled && chat.checked) completion.checked = true;
    chat.parentElement.title = chat.disabled ? "This model has no chat template" : "";
    for (const element of this.#form.querySelectorAll("[data-kind]")) {
      element.hidden = element.dataset.kind !== elements.kind.value;
    }
    elements.prompt.placeholder = elements.kind.value === "chat" ? "What is a river?" : "Once upon a time, a fox";
    const unsupported = new Set(model?.unsupported ?? []);
    for (const name of [...NUMBERS, "stop", "ignore_eos"]) {
      elements[name].disabled = unsupported.has(name);
      elements[name].title = unsupported.has(name) ? `The engine ${model?.engine} cannot honour this` : "";
    }
  }

  #submit() {
    const { elements } = this.#form;
    const text = elements.prompt.value;
    const prompts = elements.lines.checked ? text.split("\n").filter((/** @type {string} */ line) => line.trim()) : text.trim() ? [text] : [];
    if (prompts.length === 0 || !elements.model.value) {
      this.#say(elements.model.value ? null : "No model is known yet: the server has none, or cannot be reached.");
      return; // also the second click of two: the first one took the prompt out of the form
    }
    const times = Number(elements.times.value) || 1;
    if (prompts.length * times > 100) {
      this.#say("That would be more than 100 jobs at once.");
      return;
    }
    const shared = { kind: elements.kind.value, model: elements.model.value, system: "" };
    if (shared.kind === "chat") shared.system = elements.system.value.trim();
    for (const prompt of prompts) {
      for (let time = 0; time < times; time++) {
        const params = this.#params();
        if (params.seed !== undefined) params.seed += time; // the same prompt again is to be another reply
        this.#send({ ...shared, params }, prompt);
      }
    }
    this.#say(null);
    elements.prompt.value = "";
  }

  #params() {
    const { elements } = this.#form;
    /** @type {Params} */
    const params = {};
    for (const name of NUMBERS) {
      if (!elements[name].disabled && elements[name].value !== "") params[name] = Number(elements[name].value);
    }
    const stop = elements.stop.value.split("\n").filter(Boolean).map(unescaped);
    if (stop.length && !elements.stop.disabled) params.stop = stop;
    if (elements.ignore_eos.checked && !elements.ignore_eos.disabled) params.ignore_eos = true;
    if (elements.priority.value !== "normal") params.priority = elements.priority.value;
    return params;
  }

  /** @param {string | null} message */
  #say(message) {
    const place = $("#composer-error");
    place.hidden = !message;
    place.textContent = message ?? "";
  }
}

// A stop string may hold a line break: it is written as \n.
/** @param {string} text */
const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
/** @param {string} text */
const unescaped = (text) => text.replace(/\\(\\|n)/g, (_, letter) => (letter === "n" ? "\n" : "\\"));
