-- Answers {"new", created at, position} | {"old", record, position} | {"mismatch"} |
-- {"memory" | "full" | "tenant" | "bytes", how many, ends in the last minute}. Sent twice (same id), it answers "old".
local now = tick()

local function known(job_id)
  return { "old", record(job_id), queue_position(load(job_id)) }
end

local first_key = key and idempotency_key(tenant, key)
if call("EXISTS", base .. "job:" .. id) == 1 then return { known(id), {} } end
if first_key then
  local first = call("GET", first_key)
  local print = first and call("HGET", base .. "job:" .. first, "fp")
  if print then
    if print ~= fingerprint then return { { "mismatch" }, {} } end
    return { known(first), {} }
  end
end

local function refuse(why, count) return { { why, count, ends_a_minute(now) }, {} } end

if memory_full then return refuse("memory", 0) end
local queued = tonumber(call("HGET", base .. "counts", "queued") or 0)
if max_queued > 0 and queued >= max_queued then return refuse("full", queued) end
local own_queued, own_bytes = unpack(call("HMGET", base .. "tenant:" .. tenant, "n", "by"))
own_queued, own_bytes = tonumber(own_queued or 0), tonumber(own_bytes or 0)
if max_queued_per_tenant > 0 and own_queued >= max_queued_per_tenant then return refuse("tenant", own_queued) end
if max_bytes_per_tenant > 0 and own_bytes >= max_bytes_per_tenant then return refuse("bytes", own_bytes) end

-- Order of arrival: the time in µs, but never the same twice, nor the same in two shards.
local meta = base .. "meta"
local seq = math.floor(now * 1e6 / SHARDS) * SHARDS + SHARD
local last = tonumber(call("HGET", meta, "seq") or 0)
if seq <= last then seq = last + SHARDS end
call("HSET", meta, "seq", seq)

local bytes = #details + 1024
local job = { id = id, t = tenant, u = user, m = model, p = priority, q = seq, hd = "0", rd = "1" }
local fields = {
  "id", id, "t", tenant, "u", user, "m", model, "p", priority, "w", weight, "es", estimate, "fp", fingerprint, "q", seq,
  "s", "queued", "a", 0, "h", 0, "rd", 1, "hd", 0, "ca", now, "by", bytes, "ep", call("HGET", meta, "epoch") or 0,
}
local function set(name, value) fields[#fields + 1], fields[#fields + 2] = name, value end

if deadline then
  local by_our_clock = deadline + (now - caller_now)
  set("dl", by_our_clock)
  call("ZADD", base .. "deadlines", by_our_clock, id)
end
if choices ~= 1 then set("n", choices) end
if retain_for then set("ke", retain_for) end
if first_key then
  set("ik", key)
  call("SET", first_key, id)
end
call("HSET", base .. "job:" .. id, unpack(fields))
call("SET", base .. "req:" .. id, details)
for _, list in ipairs(list_keys(job)) do call("ZADD", list, seq, id) end
call("HINCRBY", base .. "tenant:" .. tenant, "by", bytes)
enter_queue(job, true, true)
if user ~= "" then
  call("SPUBLISH", base .. "arrivals:" .. #tenant .. ":" .. tenant .. ":" .. user, id)
end
return { { "new", string.format("%.17g", now), queue_position(job) }, {} }
