// What starts the page: views as tabs, the theme, the user and the user's streams.

import { STATES } from "./feed.js";
import { Jobs } from "./jobs.js";
import { Now } from "./now.js";
import { Playground } from "./playground.js";
import { Runs } from "./runs.js";
import { setSetting, setting, userId } from "./store.js";
import { startTabs } from "./tabs.js";
import { $, announce, setText } from "./ui.js";

/** @import { ConnectionState } from "./types.js" */

const playground = new Playground();
const jobs = new Jobs(() => userId());
const now = new Now();
/** @type {Runs | null} */
let runs = null;

// ---------------------------------------------------------------------------------------------- the user

const user = $("#user");
/** @type {ConnectionState | null} */
let state = null;

function connect() {
  runs?.close();
  user.value = userId();
  runs = new Runs(userId(), { ...playground.listener, state: showState });
  playground.show(runs);
  jobs.userChanged();
}

/** @param {ConnectionState} next */
function showState(next) {
  const connection = $("#connection");
  connection.dataset.state = next;
  setText(connection, STATES[next]);
  if (next === "live" && state !== "live") playground.refreshModels();
  state = next;
}

user.addEventListener("change", () => {
  const name = user.value.trim();
  setSetting("user", name || null); // without a name: a new one is made up
  connect();
  announce(`These are the jobs of ${userId()}`);
});

addEventListener("pagehide", () => runs?.close());
addEventListener("pageshow", ({ persisted }) => persisted && connect());

// ---------------------------------------------------------------------------------------------- the theme

const THEMES = ["system", "light", "dark"];
const theme = $("#theme");

/** @param {string} name */
function showTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  theme.textContent = `Theme: ${name}`;
  now.recolour();
}

theme.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(setting("theme", "system")) + 1) % THEMES.length];
  setSetting("theme", next);
  showTheme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => now.recolour());

// ---------------------------------------------------------------------------------------------- go

connect();
showTheme(setting("theme", "system"));
startTabs({ playground: { show() {}, hide() {} }, jobs, now });
setInterval(() => document.hidden || playground.refreshModels(), 15_000);
