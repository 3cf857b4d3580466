// What this browser remembers: who the user is, and what was asked. One key per conversation, so that several tabs
// of one user don't overwrite each other. Replies of unfinished jobs are not here: their log is the server's.

import { randomId } from "./api.js";

/** Where storage is closed to the page, it remembers until it is closed itself. */
function storage() {
  try {
    localStorage.setItem("penstock.probe", "1");
    localStorage.removeItem("penstock.probe");
    return localStorage;
  } catch {
    const values = new Map();
    return {
      getItem: (key) => values.get(key) ?? null,
      setItem: (key, value) => values.set(key, value),
      removeItem: (key) => values.delete(key),
      key: (index) => [...values.keys()][index] ?? null,
      get length() {
        return values.size;
      },
    };
  }
}

const kept = storage();

export function setting(name, fallback = null) {
  return kept.getItem(`penstock.${name}`) ?? fallback;
}

export function setSetting(name, value) {
  if (value === null) kept.removeItem(`penstock.${name}`);
  else kept.setItem(`penstock.${name}`, value);
}

/** This browser's user id; made up at the first visit. */
export function userId() {
  let id = setting("user");
  if (!id) setSetting("user", (id = randomId("user_", 4)));
  return id;
}

const prefix = (user) => `penstock.card.${encodeURIComponent(user)}.`;

/** The conversations of `user`, the oldest first. */
export function loadCards(user) {
  const cards = [];
  for (let index = 0; index < kept.length; index++) {
    const key = kept.key(index);
    if (!key.startsWith(prefix(user))) continue;
    try {
      cards.push(JSON.parse(kept.getItem(key)));
    } catch {
      // Half written by a browser that crashed.
    }
  }
  return cards.sort((one, other) => one.created - other.created);
}

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

export function forgetCard(user, card) {
  kept.removeItem(prefix(user) + card.key);
}

/** Calls `heard(key, card)` when another tab saved (or forgot: null) a conversation of `user`. Returns how to stop. */
export function hearCards(user, heard) {
  const listener = ({ key, newValue }) => {
    if (key?.startsWith(prefix(user))) {
      heard(key.slice(prefix(user).length), newValue ? JSON.parse(newValue) : null);
    }
  };
  addEventListener("storage", listener);
  return () => removeEventListener("storage", listener);
}
