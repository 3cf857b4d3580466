/**
 * The shapes that the scripts share; for people, editors and `make check`, not for browsers. Times are seconds since the
 * epoch unless it says otherwise.
 */

// ---------------------------------------------------------------------------------------------- what the API answers

export type Status = "queued" | "running" | "completed" | "failed" | "cancelled" | "expired";

export interface Failure {
  message: string;
  code?: string | null;
  param?: string | null;
}

export interface UsageView {
  prompt_tokens: number;
  completion_tokens: number;
  reasoning_tokens?: number;
}

/** Durations in seconds. */
export interface Timings {
  time_to_first_token: number | null;
  tokens_per_second: number | null;
}

export interface JobSummary {
  id: string;
  status: Status;
  model: string;
  user_id: string | null;
  priority: string;
  position_in_queue: number | null;
  attempt: number;
  created_at: number;
  started_at: number | null;
  ended_at: number | null;
  deadline_at: number | null;
  metadata: Record<string, string>;
  tokens: number;
  finish_reason: string | null;
  error: Failure | null;
}

/** An ended one has the rest. */
export interface JobView extends JobSummary {
  result?: { text: string; reasoning?: string };
  usage?: UsageView;
  timings?: Timings;
}

export interface JobPage {
  data: JobSummary[];
  next_cursor: string | null;
}

/** What a token is part of. */
export type PhaseName = "text" | "reasoning" | "tool";

/** Of a token that ends one and begins another, each with its number of characters (code points). None: text. */
export type TokenPhase = PhaseName | [PhaseName, number][] | undefined;

export interface TokenEvent {
  job_id: string;
  token: string;
  token_id: number;
  attempt: number;
  index?: number;
  phase?: TokenPhase;
}

export interface UserTokenEvent extends TokenEvent {
  position: number;
}

export interface JobCompleteEvent {
  job_id: string;
  status: Status;
  finish_reason: string | null;
  usage: UsageView;
  error: Failure | null;
}

/** Also of a position beyond the log (`log_rewound`), where the log begins anew. */
export interface ErrorEvent {
  job_id: string;
  error: Failure;
}

export interface ModelView {
  id: string;
  state: string;
  engine?: string;
  chat?: boolean;
  unsupported?: string[];
}

export interface ModelHealth {
  id: string;
  state: string;
  queued: number;
  info: { engine: string; precision: string; context_length: number } | null;
}

export interface WorkerHealth {
  id: string;
  state: string;
  slots: number;
  models: string[];
  seen_at: number;
  detail: string | null;
  error: Failure | null;
  memory_bytes: number | null;
  standby: number;
}

export interface Health {
  broker: { kind: string; durability?: string };
  queue?: { queued: number };
  workers?: WorkerHealth[];
  models: ModelHealth[];
  manageable: boolean;
}

/** Counted since the process began: `counts` by bucket, the last one beyond all `bounds`. */
export interface Distribution {
  bounds: number[];
  counts: number[];
}

export interface Stats {
  uptime: number;
  queued: number;
  running: number;
  streams: number;
  tokens: number;
  time_to_first_token: Distribution | null;
  request_duration: Distribution;
  cpu_seconds: number;
  memory_bytes: number;
}

// ---------------------------------------------------------------------------------------------- what the page makes of it

export interface RequestOptions {
  body?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal;
  /** Seconds; none or 0: as long as it takes. */
  within?: number;
}

/** A token of a log that was read. */
export interface LogToken {
  position: number;
  token: string;
  token_id: number;
  attempt: number;
  index: number;
  phase: TokenPhase;
}

/** Where an attempt begins in a log. */
export interface AttemptStart {
  attempt: number;
  from: number;
}

/** What the form asks for besides the prompt; sent as it is. */
export interface Params {
  [number: string]: any;
  seed?: number;
  stop?: string[];
  ignore_eos?: boolean;
  priority?: string;
}

/** A conversation as it begins. */
export interface Beginning {
  kind: "chat" | "completion";
  model: string;
  system: string;
  params: Params;
}

/** How a turn ended. `status`: the job's, or "refused" (never became one), or "gone" (no longer kept). */
export interface End {
  status: Status | "refused" | "gone";
  finish_reason?: string | null;
  error?: Failure | null;
  usage?: UsageView;
  timings?: Timings;
  attempts?: AttemptStart[];
}

export interface Turn {
  /** Its idempotency key. */
  key: string;
  text: string;
  /** The id of its job, once it is accepted. */
  job: string | null;
  reply: string | null;
  /** What the model thought before its reply. */
  reasoning?: string;
  end: End | null;
}

/** A conversation as it is remembered. `created`: milliseconds since the epoch. */
export interface CardRecord extends Beginning {
  key: string;
  created: number;
  turns: Turn[];
}

export interface Card {
  record: CardRecord;
  runs: import("./runs.js").Run[];
}

export type ConnectionState = "connecting" | "live" | "waiting" | "offline";

export interface View {
  /** `rest`: what the address says behind the view's name. */
  show(rest: string): void;
  hide(): void;
}
