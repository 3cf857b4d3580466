-- jobs: one row a job. A row changes when the job changes state, never per token.
CREATE TABLE IF NOT EXISTS jobs (
  seq             INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
  id              TEXT NOT NULL UNIQUE,
  tenant          TEXT NOT NULL,
  user            TEXT,
  model           TEXT NOT NULL,
  priority        INTEGER NOT NULL,
  status          TEXT NOT NULL,
  head            INTEGER NOT NULL DEFAULT 0,         -- 1: a lease was lost or given back, goes before the others
  ready           INTEGER NOT NULL DEFAULT 1,         -- 0: a retry waiting for not_before
  not_before      REAL,
  attempt         INTEGER NOT NULL DEFAULT 0,
  retries         INTEGER NOT NULL DEFAULT 0,
  crashes         INTEGER NOT NULL DEFAULT 0,
  deaths_alone    INTEGER NOT NULL DEFAULT 0,         -- crashes where it was the only job in the engine
  suspects        INTEGER NOT NULL DEFAULT 0,
  estimate        INTEGER NOT NULL,                   -- prompt tokens charged at the claim, before they were counted
  prompt_tokens   INTEGER,
  cached_tokens   INTEGER NOT NULL DEFAULT 0,         -- of the prompt: those that the engine still had
  created_at      REAL NOT NULL,
  started_at      REAL,
  ended_at        REAL,
  deadline_at     REAL,
  idempotency_key TEXT,
  fingerprint     BLOB NOT NULL,
  keep            REAL,                               -- seconds after the end; NULL: the policy's
  details         BLOB NOT NULL,                      -- msgpack: request and what never takes part in a query
  ended           BLOB                                -- msgpack: the terminal event
);
CREATE UNIQUE INDEX IF NOT EXISTS jobs_key ON jobs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS jobs_queue ON jobs (model, priority, tenant, head DESC, seq) WHERE status = 'queued' AND ready = 1;
CREATE INDEX IF NOT EXISTS jobs_delayed ON jobs (not_before) WHERE status = 'queued' AND ready = 0;
CREATE INDEX IF NOT EXISTS jobs_live ON jobs (status) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS jobs_deadline ON jobs (deadline_at) WHERE ended_at IS NULL AND deadline_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS jobs_retention ON jobs (ended_at) WHERE ended_at IS NOT NULL AND keep IS NULL;
CREATE INDEX IF NOT EXISTS jobs_kept ON jobs (ended_at + keep) WHERE ended_at IS NOT NULL AND keep IS NOT NULL;
CREATE INDEX IF NOT EXISTS jobs_user ON jobs (tenant, user, seq);

-- log: one row per append of a job: n tokens from position pos on.
CREATE TABLE IF NOT EXISTS log (
  job     INTEGER NOT NULL,
  pos     INTEGER NOT NULL,
  n       INTEGER NOT NULL,
  at      REAL NOT NULL,
  reasoning_tokens INTEGER NOT NULL DEFAULT 0,        -- thoughts among all tokens up to the last of these
  tokens  BLOB NOT NULL,                              -- msgpack: core.events.Tokens
  PRIMARY KEY (job, pos)
) WITHOUT ROWID;

-- tenants: the Virtual Token Counter of each (Sheng et al., "Fairness in Serving Large Language Models", OSDI '24).
CREATE TABLE IF NOT EXISTS tenants (
  tenant  TEXT PRIMARY KEY,
  counter REAL NOT NULL DEFAULT 0,
  served  INTEGER NOT NULL DEFAULT 0,                 -- when it was last picked; breaks ties in favour of the longest unserved
  queued  INTEGER NOT NULL DEFAULT 0,
  running INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tenants_waiting ON tenants (counter) WHERE queued > 0;

-- lanes: what a tenant has waiting per model and class. Counter and served are the tenant's, repeated here so that
-- the next lane is the first row of an index, however many tenants wait.
CREATE TABLE IF NOT EXISTS lanes (
  model    TEXT NOT NULL,
  priority INTEGER NOT NULL,
  tenant   TEXT NOT NULL,
  queued   INTEGER NOT NULL,
  counter  REAL NOT NULL,
  served   INTEGER NOT NULL,
  PRIMARY KEY (tenant, model, priority)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lanes_next ON lanes (priority, counter, served, model) WHERE queued > 0;
CREATE TRIGGER IF NOT EXISTS lanes_follow AFTER UPDATE OF counter, served ON tenants BEGIN
  UPDATE lanes SET counter = new.counter, served = new.served WHERE tenant = new.tenant;
END;

CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;

-- tombstones: ids whose retention is over, so that asking for one says so.
CREATE TABLE IF NOT EXISTS tombstones (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tombstones_at ON tombstones (at);
