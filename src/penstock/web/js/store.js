// What this browser remembers: who the user is, and what was asked. One key per conversation, so that several tabs
// of one user don't overwrite each other. Replies of unfinished jobs are not here: their log is the server's.

import { randomId } from "./api.js";

/** @import { CardRecord } from "./types.js" */

/**
 * Where storage is closed to the page, it remembers until it is closed itself.
 * @returns {Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">}
 */
function storage() {
  try {
    localStorage.setItem("penstock.probe", "1");
    localStorage.removeItem("penstock.probe");
    return localStorage;
  } catch {
    /** @type {Map<string, string>} */
    const values = new Map();
    return {
      getItem: (key) => values.get(key) ?? null,
      setItem: (key, value) => void values.set(key, value),
      removeItem: (key) => void values.delete(key),
      key: (index) => [...values.keys()][index] ?? null,
      get length() {
        return values.size;
      },
    };
  }
}

const kept = storage();

/**
 * @template {string | null} Fallback
 * @param {string} name
 * @param {Fallback} fallback
 * @returns {string | Fallback}
 */
export function setting(name, fallback) {
  return kept.getItem(`penstock.${name}`) ?? fallback;
}

/**
 * @param {string} name
 * @param {string | null} value null forgets it
 */
export function setSetting(name, value) {
  if (value === null) kept.removeItem(`penstock.${name}`);
  else kept.setItem(`penstock.${name}`, value);
}

/** This browser's user id; made up at the first visit. */
export function userId() {
  let id = setting("user", null);
  if (!id) setSetting("user", (id = randomId("user_", 4)));
  return id;
}

/** @param {string} user */
const prefix = (user) => `penstock.card.${encodeURIComponent(user)}.`;

/**
 * The key of the conversation of `user` that is kept under `name`; null where that is none of theirs. The names of users
 * may have dots, keys have none: what is of "a.b" is not of "a".
 * @param {string} user
 * @param {string | null} name
 */
function keyOf(user, name) {
  const key = name?.startsWith(prefix(user)) ? name.slice(prefix(user).length) : "";
  return key && !key.includes(".") ? key : null;
}

/**
 * The conversations of `user`, the oldest first.
 * @param {string} user
 */
export function loadCards(user) {
  /** @type {CardRecord[]} */
  const cards = [];
  for (let index = 0; index < kept.length; index++) {
    const name = kept.key(index);
    if (name === null || keyOf(user, name) === null) continue;
    try {
      cards.push(JSON.parse(kept.getItem(name) ?? ""));
    } catch {
      // Half written by a browser that crashed.
    }
  }
  return cards.sort((one, other) => one.created - other.created);
}

/**
 * @param {string} user
 * @param {CardRecord} card
 */
export function saveCard(user, card) {
  const text = JSON.stringify(card);
  try {
    kept.setItem(prefix(user) + card.key, text);
  } catch {
    // Full: the oldest conversations make room.
    for (const old of loadCards(user).filter(({ key }) => key !== card.key)) {
      forgetCard(user, old);
      try {
        kept.setItem(prefix(user) + card.key, text);
        return;
      } catch {
        continue;
      }
    }
  }
}

/**
 * @param {string} user
 * @param {CardRecord} card
 */
export function forgetCard(user, card) {
  kept.removeItem(prefix(user) + card.key);
}

/**
 * Calls `heard` when another tab saved (or forgot: null) a conversation of `user`. Returns how to stop.
 * @param {string} user
 * @param {(key: string, card: CardRecord | null) => void} heard
 */
export function hearCards(user, heard) {
  /** @param {StorageEvent} event */
  const listener = ({ key: name, newValue }) => {
    const key = keyOf(user, name);
    if (key !== null) heard(key, newValue ? JSON.parse(newValue) : null);
  };
  addEventListener("storage", listener);
  return () => removeEventListener("storage", listener);
}
