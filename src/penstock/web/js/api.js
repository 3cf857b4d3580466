// The public API. Addresses are relative, so that the page works behind any path.

/** @import { Failure, RequestOptions } from "./types.js" */

/** An answer that is an error: `status`, `code` and what to do about it. `status` 0: nobody answered. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {Failure} info
   * @param {number | null} [retryAfter]
   */
  constructor(status, info, retryAfter = null) {
    super(info.message);
    this.status = status;
    this.code = info.code ?? "";
    this.param = info.param ?? null;
    /** Seconds after which to ask again, where the server said so. */
    this.retryAfter = retryAfter;
  }

  /** Could the same request do better a moment later? */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status === 502 || this.status === 503;
  }
}

/**
 * The JSON that `path` answers `within` seconds. Throws `ApiError`.
 * @param {string} method
 * @param {string} path
 * @param {RequestOptions} [options]
 * @returns {Promise<any>}
 */
export async function call(method, path, { within = 20, ...options } = {}) {
  const response = await request(method, path, { within, ...options });
  return response.status === 204 ? null : await response.json();
}

/**
 * A successful response, given up after `within` seconds, if any. Throws `ApiError`.
 * @param {string} method
 * @param {string} path
 * @param {RequestOptions} [options]
 */
export async function request(method, path, { body, headers = {}, signal, within } = {}) {
  // A connection that is dead without a word would hold a request for ever.
  const limits = [signal, within ? AbortSignal.timeout(within * 1000) : undefined].filter((limit) => limit !== undefined);
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: body === undefined ? headers : { "content-type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.any(limits),
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, { message: "The server cannot be reached." });
  }
  if (response.ok) return response;
  let info = { message: `The server answered ${response.status}.` };
  try {
    info = (await response.json()).error ?? info;
  } catch {
    // Not ours: some proxy's page.
  }
  const wait = Number(response.headers.get("retry-after-ms"));
  throw new ApiError(response.status, info, wait > 0 ? wait / 1000 : null);
}

/**
 * Waits `seconds`; sooner if `signal` is aborted.
 * @param {number} seconds
 * @param {AbortSignal} [signal]
 * @returns {Promise<void>}
 */
export function pause(seconds, signal) {
  return new Promise((resolve) => {
    if (signal?.aborted) return resolve();
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/**
 * Seconds to wait before the attempt after `failures` in a row: doubled each time, spread out, 15 at most.
 * @param {number} failures
 */
export const backoff = (failures) => Math.min(15, 0.5 * 2 ** failures) * (0.5 + Math.random() / 2);

/**
 * Random, also where the page is not on a secure origin (crypto.randomUUID is not there).
 * @param {string} prefix
 */
export function randomId(prefix, bytes = 12) {
  const random = crypto.getRandomValues(new Uint8Array(bytes));
  return prefix + Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
