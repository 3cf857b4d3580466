-- What the transitions share. Prepended to every script (see scripts.py, which also writes the locals that hold what a
-- script is given; CLOCK is nil for Redis' own time). KEYS[1] is the prefix of all keys of a shard, with its hash tag, so
-- that a shard lives in one slot. A script answers {its answer, {inbox, message, …} that the caller is to deliver}.
--
-- clock          hash  raw, lease: the wall clock as last seen, the lease clock (see tick)
-- meta           hash  epoch, run_id, shards (see enter.lua); seq, served, last, lost
-- job:ID         hash  t tenant, u user, m model, p priority, w weight, es estimated prompt tokens, ik idempotency key,
--                      fp fingerprint, dl deadline, q seq, s status, a attempt, h head (last position), rd 1 when it may
--                      be claimed, hd 1 when it goes before the others, re retries, cr crashes, da deaths alone,
--                      su suspects, lo leases lost, pt prompt tokens, ct those of them that were cached, rt tokens of thoughts,
--                      ca/sa/fa/ea created, started, first token, ended at, lu lease until,
--                      ep epoch of its submit or last claim, fl head when it was claimed in a new epoch, rs readers, by bytes,
--                      ke seconds to keep it after its end, n choices (missing: 1), en the end
-- req:ID         string  msgpack of the request and what no script looks at
-- log:ID         stream  one entry a run, id = last position: t tokens | e the end
-- gone:ID        string  tenant: the job's retention is over
-- key:N:TENANT:K string  id of the job that was submitted under this idempotency key
-- tenant:T       hash  c virtual token counter, s when it was last picked, n queued, r running, by bytes,
--                      pk 1 when it was taken out of lanes:P:M because it runs all it may
-- lane:P:N:M:T   zset  a ready queue: ids that a tenant has ready in a class, by order of service. Suspects of an engine's
--                      death wait in queues of their own (M is then MODEL\0suspects): not every worker may take them
-- lanes:P:M      zset  tenants with a ready queue in this class that may run more, by counter (a lower bound, see top)
-- waiting        zset  tenants with queued jobs, by counter (a lower bound)
-- classes:T      set   P:M of the tenant's ready queues
-- leases, deadlines, delayed, ended   zset  ids by what the sweep looks for (ended: by the end, plus what "ke" adds to the TTL)
-- list:T, user:N:T:U                  zset  ids by seq
-- depth, ready   hash  queued jobs, and those that may be claimed, by class
-- counts, ends   hash  jobs by status; ends by second
-- workers, alive hash, zset   what workers said of themselves, and when (lease clock)
-- idle:M         zset  claimants that wait, or did lately, by how many jobs they run
-- called:M       zset  claimants that were woken and have not claimed yet, by when (lease clock)
-- reply:R        string  what claim R was given, for when its reply is lost

local call = redis.call
local pack = cmsgpack.pack
local base = KEYS[1]

local NIL = "\192"
-- The head of a tenant's queue: added to the seq of jobs that were requeued (a double holds integers up to 2^53).
local AHEAD = -2 ^ 52
-- The lease clock advances by at most this many seconds at a time, so that an outage of Redis expires no live lease.
local LEASE_STEP = 0.25
-- A lease is renewed when so much of it is gone: not at each of a hundred appends a second.
local RENEWAL = LEASE_TTL / 10
-- An idle tenant's counter is forgotten after a day: coming back it is lifted anyway.
local TENANT_TTL = math.max(86400, math.ceil(2 * RESULT_TTL))
-- What is big of a job goes by itself, later than any sweep would drop it.
local SAFETY_TTL = math.ceil(2 * RESULT_TTL) + 3600
-- Attempts that a new epoch skips: more than what was lost with the old one can hold.
local EPOCH_STEP = 1000

local clock_now = 0 -- the lease clock, once `tick` has looked at it

-- (wall clock, lease clock) in seconds. The wall clock takes no small step back; a big one is taken for the truth.
local function tick()
  local wall = CLOCK
  if not wall then
    local seconds, microseconds = unpack(call("TIME"))
    wall = tonumber(seconds) + tonumber(microseconds) / 1e6
  end
  local raw, lease = unpack(call("HMGET", base .. "clock", "raw", "lease"))
  raw, lease = tonumber(raw or wall), tonumber(lease or 0)
  local passed = wall - raw
  if passed < 0 and passed > -1 then
    clock_now = lease
    return raw, lease
  end
  clock_now = lease + math.max(0, math.min(passed, LEASE_STEP))
  call("HSET", base .. "clock", "raw", wall, "lease", clock_now)
  return wall, clock_now
end

-- ------------------------------------------------------------------------------------------------- telling readers

local news = {} -- inbox → {events = msgpack each, ids = of their jobs}

-- Note an event for every process that follows the job; `deliver` sends one message to each of them.
local function tell(id, readers, tokens, ended)
  if not readers or readers == "" then return end
  local event = "\147" .. pack(id) .. (tokens or NIL) .. (ended or NIL)
  for inbox in string.gmatch(readers, "[^,]+") do
    local own = news[inbox]
    if not own then
      own = { events = {}, ids = {} }
      news[inbox] = own
    end
    own.events[#own.events + 1] = event
    own.ids[#own.ids + 1] = id
  end
end

local function without(readers, inbox)
  local left = {}
  for each in string.gmatch(readers or "", "[^,]+") do
    if each ~= inbox then left[#left + 1] = each end
  end
  return table.concat(left, ",")
end

-- Send what was noted, and give the script's answer. A process that does not listen is forgotten: when it comes back
-- it says so.
local function deliver(result)
  local deferred = {}
  for inbox, own in pairs(news) do
    local message = "e\221" .. struct.pack(">I4", #own.events) .. table.concat(own.events)
    if DEFER then
      deferred[#deferred + 1] = inbox
      deferred[#deferred + 1] = message
    elseif call("SPUBLISH", base .. "inbox:" .. inbox, message) == 0 then
      for _, id in ipairs(own.ids) do
        local readers = call("HGET", base .. "job:" .. id, "rs")
        if readers then call("HSET", base .. "job:" .. id, "rs", without(readers, inbox)) end
      end
    end
  end
  return { result, deferred }
end

-- ------------------------------------------------------------------------------------------------- workers

-- A worker is alive, and says this of itself.
local function register(worker, registration)
  call("HSET", base .. "workers", worker, registration)
  call("ZADD", base .. "alive", clock_now, worker)
end

-- ------------------------------------------------------------------------------------------------- queue and fairness

local function class(priority, model) return priority .. ":" .. model end

-- What a job waits for: its model, or a worker that may take suspects.
local function waits_for(job)
  if tonumber(job.su or 0) > 0 then return job.m .. "\0suspects" end
  return job.m
end

local function ready_queue_key(priority, model, tenant)
  return base .. "lane:" .. priority .. ":" .. #model .. ":" .. model .. ":" .. tenant
end

local function ready_tenants_key(priority, model) return base .. "lanes:" .. class(priority, model) end

local function list_keys(job)
  local keys = { base .. "list:" .. job.t }
  if job.u and job.u ~= "" then keys[2] = base .. "user:" .. #job.t .. ":" .. job.t .. ":" .. job.u end
  return keys
end

-- Under which the id stands of the job that was submitted with an idempotency key.
local function idempotency_key(tenant, key) return base .. "key:" .. #tenant .. ":" .. tenant .. ":" .. key end

local function counter(tenant) return tonumber(call("HGET", base .. "tenant:" .. tenant, "c") or 0) end

local function add(hash, field, by)
  if call("HINCRBY", base .. hash, field, by) == 0 then call("HDEL", base .. hash, field) end
end

-- Wake the claimant with the least to do. One that has died does not hear it; one that no longer waits passes it on.
local function notify(model)
  local idle = base .. "idle:" .. model
  while true do
    local claimant = call("ZPOPMIN", idle)[1]
    if not claimant then return end
    local inbox, worker = string.match(claimant, "^(.-)/(.*)$")
    if call("SPUBLISH", base .. "inbox:" .. inbox, "r" .. worker .. "/" .. model) > 0 then
      call("ZADD", base .. "called:" .. model, clock_now, claimant)
      call("EXPIRE", base .. "called:" .. model, 60)
      return
    end
  end
end

local function enter_ready_queue(job)
  local model = waits_for(job)
  call("ZADD", ready_queue_key(job.p, model, job.t), job.hd == "1" and job.q + AHEAD or job.q, job.id)
  call("ZADD", ready_tenants_key(job.p, model), counter(job.t), job.t)
  call("SADD", base .. "classes:" .. job.t, class(job.p, model))
  add("ready", class(job.p, model), 1)
  notify(model)
end

-- The smallest counter among tenants with queued jobs, or nil. Their scores are lower bounds: raise those at the top.
local function smallest_waiting()
  while true do
    local tenant, score = unpack(call("ZRANGE", base .. "waiting", 0, 0, "WITHSCORES"))
    if not tenant then return nil end
    local true_counter = counter(tenant)
    if true_counter <= tonumber(score) then return true_counter end
    call("ZADD", base .. "waiting", "XX", true_counter, tenant)
  end
end

-- Count a job in. A tenant that arrives with nothing waiting is lifted (VTC, algorithm 2, lines 6-13).
local function enter_queue(job, arriving, ready)
  local key = base .. "tenant:" .. job.t
  local value, queued = unpack(call("HMGET", key, "c", "n"))
  value, queued = tonumber(value or 0), tonumber(queued or 0)
  if queued == 0 then
    if arriving then
      local floor = smallest_waiting()
      if not floor then
        local last = call("HGET", base .. "meta", "last")
        floor = last and counter(last) or 0
      end
      if floor > value then
        value = floor
        call("HSET", key, "c", value)
      end
    end
    call("ZADD", base .. "waiting", value, job.t)
    call("PERSIST", key)
  end
  call("HINCRBY", key, "n", 1)
  add("depth", class(job.p, job.m), 1)
  add("counts", "queued", 1)
  if ready then enter_ready_queue(job) end
end

local function forget_when_idle(tenant)
  local key = base .. "tenant:" .. tenant
  local queued, running = unpack(call("HMGET", key, "n", "r"))
  if tonumber(queued or 0) == 0 and tonumber(running or 0) == 0 then call("EXPIRE", key, TENANT_TTL) end
end

local function leave_queue(job)
  if job.rd == "1" then
    local model = waits_for(job)
    local queue = ready_queue_key(job.p, model, job.t)
    call("ZREM", queue, job.id)
    if call("EXISTS", queue) == 0 then
      call("ZREM", ready_tenants_key(job.p, model), job.t)
      call("SREM", base .. "classes:" .. job.t, class(job.p, model))
    end
    add("ready", class(job.p, model), -1)
  else
    call("ZREM", base .. "delayed", job.id)
  end
  if call("HINCRBY", base .. "tenant:" .. job.t, "n", -1) == 0 then
    call("ZREM", base .. "waiting", job.t)
    call("HSET", base .. "meta", "last", job.t)
    forget_when_idle(job.t)
  end
  add("depth", class(job.p, job.m), -1)
  add("counts", "queued", -1)
end

-- Count a job out of the running ones; the ready queues of a tenant that ran all it may come back.
local function leave_running(job)
  call("ZREM", base .. "leases", job.id)
  call("HINCRBY", base .. "tenant:" .. job.t, "r", -1)
  add("counts", "running", -1)
  forget_when_idle(job.t)
  if call("HDEL", base .. "tenant:" .. job.t, "pk") == 1 then
    for _, each in ipairs(call("SMEMBERS", base .. "classes:" .. job.t)) do
      call("ZADD", base .. "lanes:" .. each, counter(job.t), job.t)
      notify(string.match(each, "^%d+:(.*)$"))
    end
  end
end

-- Add to a tenant's counter. Where it falls (a prompt was shorter than estimated) the scores, lower bounds of it, follow.
local function charge(tenant, cost)
  if cost == 0 then return end
  local value = call("HINCRBYFLOAT", base .. "tenant:" .. tenant, "c", string.format("%.17g", cost))
  if cost < 0 then
    call("ZADD", base .. "waiting", "XX", "LT", value, tenant)
    for _, each in ipairs(call("SMEMBERS", base .. "classes:" .. tenant)) do
      call("ZADD", base .. "lanes:" .. each, "XX", "LT", value, tenant)
    end
  end
end

-- ------------------------------------------------------------------------------------------------- jobs

local JOB = {
  "t", "u", "m", "p", "w", "es", "dl", "q", "s", "a", "h", "rd", "hd", "pt", "ik", "rs", "re", "cr", "da", "su", "lo", "ep",
  "by", "n", "ct", "rt",
}

-- What the transitions look at of a job, or nil. Missing fields are false.
local function load(id)
  local values = call("HMGET", base .. "job:" .. id, unpack(JOB))
  if not values[1] then return nil end
  local job = { id = id }
  for i, name in ipairs(JOB) do job[name] = values[i] end
  return job
end

-- The answer of a script about a job that is not there, or not this tenant's.
local function absent(id, tenant)
  return { { call("GET", base .. "gone:" .. id) == tenant and "expired" or "unknown" }, {} }
end

-- A job's own fields and its request.
local function record(id)
  return { call("HGETALL", base .. "job:" .. id), call("GET", base .. "req:" .. id) or "" }
end

-- 1 for the next job. An estimate, as every fair queue's: other tenants take turns with this one. Counts the classes
-- above, the tenant's own jobs ahead, and of every other tenant at most as many plus one.
local function queue_position(job)
  local model = waits_for(job)
  local own = call("ZRANK", ready_queue_key(job.p, model, job.t), job.id)
  if not own then return 0 end
  local ahead = 0
  for priority = 0, tonumber(job.p) - 1 do
    ahead = ahead + tonumber(call("HGET", base .. "ready", class(priority, model)) or 0)
  end
  local tenants = ready_tenants_key(job.p, model)
  local others = call("ZCARD", tenants) - 1
  if others > 64 then -- too many to ask each
    local all = tonumber(call("HGET", base .. "ready", class(job.p, model)) or 0)
    return 1 + own + ahead + math.min(others * (own + 1), all - own - 1)
  end
  for _, tenant in ipairs(call("ZRANGE", tenants, 0, -1)) do
    if tenant ~= job.t then
      ahead = ahead + math.min(own + 1, call("ZCARD", ready_queue_key(job.p, model, tenant)))
    end
  end
  return 1 + own + ahead
end

-- Jobs that end a minute, by the last minute, or by the part of it in which any did (five seconds at least).
local function ends_a_minute(now)
  local count, second, span = 0, math.floor(now), 5
  local ends = call("HGETALL", base .. "ends")
  for i = 1, #ends, 2 do
    local age = second - tonumber(ends[i])
    if age >= 0 and age < 60 then
      count, span = count + tonumber(ends[i + 1]), math.max(span, age + 1)
    end
  end
  return math.floor(count * 60 / span)
end

-- Close a log: exactly one terminal event, at the position after the last token.
local function close_log(job, status, reasons, error, now, stops)
  local head = tonumber(job.h)
  local usage = {
    prompt_tokens = tonumber(job.pt or 0), completion_tokens = head,
    reasoning_tokens = tonumber(job.rt or 0), cached_tokens = tonumber(job.ct or 0),
  }
  local ended = "\151" .. pack(head + 1) .. pack(tonumber(job.a)) .. pack(status) .. (reasons or "\144") .. pack(usage)
    .. (error or NIL) .. (stops or "\144")
  local key, log = base .. "job:" .. job.id, base .. "log:" .. job.id
  call("HSET", key, "s", status, "ea", now, "en", ended)
  call("HDEL", key, "rs")
  call("XADD", log, (head + 1) .. "-0", "e", ended)
  local longer = tonumber(call("HGET", key, "ke") or RESULT_TTL) - RESULT_TTL
  local safety = SAFETY_TTL + math.ceil(math.max(0, longer))
  call("EXPIRE", log, safety)
  call("EXPIRE", base .. "req:" .. job.id, safety)
  if job.dl then call("ZREM", base .. "deadlines", job.id) end
  call("ZADD", base .. "ended", now + longer, job.id)
  add("counts", status, 1)
  call("HINCRBY", base .. "ends", string.format("%d", math.floor(now)), 1)
  tell(job.id, job.rs, nil, ended)
end

local function end_running(job, status, reasons, error, now, stops)
  close_log(job, status, reasons, error, now, stops)
  leave_running(job)
end

local function end_queued(job, status, error, now)
  leave_queue(job)
  close_log(job, status, nil, error, now)
end

-- Remove everything of a job that has ended.
local function drop(job)
  for _, list in ipairs(list_keys(job)) do call("ZREM", list, job.id) end
  if job.ik then
    local key = idempotency_key(job.t, job.ik)
    if call("GET", key) == job.id then call("DEL", key) end
  end
  add("counts", job.s, -1)
  call("HINCRBY", base .. "tenant:" .. job.t, "by", -tonumber(job.by))
  forget_when_idle(job.t)
  call("UNLINK", base .. "job:" .. job.id, base .. "req:" .. job.id, base .. "log:" .. job.id)
end

-- From running back to the head of its tenant's queue; *delay* seconds pass before it can be claimed again.
local function requeue(job, delay, lease_now)
  local ready = delay <= 0
  job.hd, job.rd = "1", ready and "1" or "0"
  call("HSET", base .. "job:" .. job.id, "s", "queued", "hd", "1", "rd", job.rd)
  leave_running(job)
  if not ready then call("ZADD", base .. "delayed", lease_now + delay, job.id) end
  enter_queue(job, false, ready)
end

-- Does this process hold the lease that it names?
local function holds(job, tenant, attempt)
  return job and job.s == "running" and tonumber(job.a) == attempt and job.t == tenant
end
