// Tabs as the ARIA practices want them: one stop for the Tab key, arrows move, and the address says which is open.

import { $ } from "./ui.js";

/** @import { View } from "./types.js" */

/** @param {Record<string, View>} views by the id of their panel */
export function startTabs(views) {
  const names = Object.keys(views);
  const tab = (/** @type {string} */ name) => $(`#tab-${name}`);
  /** @type {string | null} */
  let open = null;

  function follow() {
    const [name, ...rest] = location.hash.slice(1).split("/");
    const next = names.includes(name) ? name : names[0];
    if (open !== null && open !== next) views[open].hide();
    open = next;
    for (const each of names) {
      const selected = each === next;
      tab(each).setAttribute("aria-selected", String(selected));
      tab(each).tabIndex = selected ? 0 : -1;
      $(`#${each}`).hidden = !selected;
    }
    document.title = `${tab(next).textContent} · Penstock`;
    views[next].show(rest.join("/"));
  }

  for (const name of names) {
    tab(name).addEventListener("click", () => (location.hash = name));
    tab(name).addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const at = names.indexOf(name);
      /** @type {Record<string, number>} */
      const ways = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 };
      const to = ways[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = names[(to + names.length) % names.length];
      location.hash = next;
      tab(next).focus();
    });
  }
  addEventListener("hashchange", follow);
  follow();
}
