// One job's log read with fetch: an EventSource would be a second one, and could not tell a 404 from a cut.

import { ApiError, backoff, pause, request } from "./api.js";

/** @typedef {{id?: string, event?: string, data: any}} ServerEvent */

/**
 * Events of `path`, from behind position `after` to the terminal event. Comes back behind the
 * last position after a cut; `onState` says how it stands. Throws `ApiError` for what will not pass.
 * @param {string} path
 * @param {{after?: number, signal: AbortSignal, onState?: (state: "live" | "waiting") => void}} options
 */
export async function* readLog(path, { after = 0, signal, onState = () => {} }) {
  let failures = 0;
  while (!signal.aborted) {
    try {
      const response = await request("GET", path, { headers: { "last-event-id": String(after) }, signal });
      if (response.status === 204) return;
      onState("live");
      if (response.body === null) return;
      for await (const event of parse(response.body)) {
        failures = 0;
        if (event.id) after = Number(event.id);
        yield event;
        if (event.event !== "token") return; // `done` or `error`
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && !error.passing) throw error;
    }
    onState("waiting");
    await pause(backoff(failures++), signal);
  }
}

/**
 * Blocks of an event stream. Ours: one `data` line each, lines end with a line feed.
 * @param {ReadableStream<Uint8Array<ArrayBuffer>>} stream
 * @returns {AsyncGenerator<ServerEvent>}
 */
export async function* parse(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  /** @type {Record<string, string>} */
  let block = {};
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (block.data !== undefined) yield { id: block.id, event: block.event, data: JSON.parse(block.data) };
          block = {};
          continue;
        }
        const colon = line.indexOf(":");
        if (colon > 0) block[line.slice(0, colon)] = line.slice(colon + 1).replace(/^ /, "");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // cut already
  }
}
