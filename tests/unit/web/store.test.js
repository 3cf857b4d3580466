// What a browser remembers, in a storage that fills up and that other tabs write to.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

/** As a browser's, with room for `room` characters. */
class Storage {
  #values = new Map();
  room = Infinity;

  get length() {
    return this.#values.size;
  }
  key(index) {
    return [...this.#values.keys()][index] ?? null;
  }
  getItem(name) {
    return this.#values.get(name) ?? null;
  }
  setItem(name, value) {
    const others = [...this.#values].filter(([each]) => each !== name);
    if (others.reduce((sum, each) => sum + each.join("").length, name.length + value.length) > this.room) throw new Error("full");
    this.#values.set(name, value);
  }
  removeItem(name) {
    this.#values.delete(name);
  }
  clear() {
    this.#values.clear();
    this.room = Infinity;
  }
}

const storage = new Storage();
Object.defineProperty(globalThis, "localStorage", { value: storage, configurable: true });
const tab = new EventTarget();
globalThis.addEventListener = tab.addEventListener.bind(tab);
globalThis.removeEventListener = tab.removeEventListener.bind(tab);
const STORE = "../../../src/penstock/web/js/store.js";
const { forgetCard, hearCards, loadCards, saveCard, setSetting, setting, userId } = await import(STORE);

beforeEach(() => storage.clear());

const card = (key, created = 1, text = "") => ({ key, created, text, turns: [] });
const keys = (user) => loadCards(user).map(({ key }) => key);

test("a setting is kept until it is forgotten", () => {
  assert.equal(setting("theme", "system"), "system");
  setSetting("theme", "dark");
  assert.equal(setting("theme", "system"), "dark");
  setSetting("theme", null);
  assert.equal(setting("theme", null), null);
});

test("a user id is made up once", () => {
  const id = userId();
  assert.match(id, /^user_[0-9a-f]{8}$/);
  assert.equal(userId(), id);
  setSetting("user", "ann");
  assert.equal(userId(), "ann");
});

test("conversations come back, the oldest first", () => {
  saveCard("ann", card("card_2", 20));
  saveCard("ann", card("card_1", 10));
  saveCard("ann", card("card_2", 20, "changed"));
  assert.deepEqual(loadCards("ann"), [card("card_1", 10), card("card_2", 20, "changed")]);
  forgetCard("ann", card("card_1"));
  assert.deepEqual(keys("ann"), ["card_2"]);
});

test("each user has their own, whatever the name", () => {
  const users = ["a", "a.b", "a.b.", "ä/%", "a%2Eb", ""];
  for (const user of users) saveCard(user, card(`card_${users.indexOf(user)}`));
  for (const user of users) assert.deepEqual(keys(user), [`card_${users.indexOf(user)}`], user);
});

test("what was half written when a browser crashed costs nothing else", () => {
  saveCard("ann", card("card_1"));
  storage.setItem("penstock.card.ann.card_2", '{"key":"card_');
  assert.deepEqual(keys("ann"), ["card_1"]);
});

test("when it is full the oldest make room", () => {
  for (const number of [1, 2, 3]) saveCard("ann", card(`card_${number}`, number, "x".repeat(100)));
  storage.room = 600;
  saveCard("ann", card("card_4", 4, "x".repeat(250)));
  assert.deepEqual(keys("ann"), ["card_3", "card_4"]);
});

test("what is larger than all of it is not kept, and raises nothing", () => {
  storage.room = 600;
  saveCard("ann", card("card_1", 1, "x".repeat(1000)));
  assert.deepEqual(keys("ann"), []);
});

test("another tab is heard, until nobody listens", () => {
  const heard = [];
  const told = (key, newValue) => tab.dispatchEvent(Object.assign(new Event("storage"), { key, newValue }));
  const stop = hearCards("a", (...what) => heard.push(what));
  told("penstock.card.a.card_1", JSON.stringify(card("card_1")));
  told("penstock.card.a.card_1", null);
  told("penstock.card.b.card_1", "{}");
  told("penstock.card.a.b.card_1", "{}");
  told("penstock.theme", "dark");
  told(null, null); // all was cleared
  stop();
  told("penstock.card.a.card_2", "{}");
  assert.deepEqual(heard, [["card_1", card("card_1")], ["card_1", null]]);
});

test("where storage is closed to the page it remembers all the same", async () => {
  Object.defineProperty(globalThis, "localStorage", { get: () => { throw new Error("closed"); }, configurable: true });
  const closed = await import(`${STORE}?closed`);
  closed.saveCard("ann", card("card_1"));
  closed.setSetting("theme", "dark");
  assert.deepEqual(closed.loadCards("ann"), [card("card_1")]);
  assert.equal(closed.setting("theme", null), "dark");
  closed.forgetCard("ann", card("card_1"));
  assert.deepEqual(closed.loadCards("ann"), []);
  Object.defineProperty(globalThis, "localStorage", { value: storage, configurable: true });
});
