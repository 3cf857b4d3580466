-- Store a job and queue it. ARGV: 3 id, 4 tenant, 5 user, 6 model, 7 priority, 8 estimated prompt tokens, 9 deadline ("" for
-- none), 10 the caller's clock, 11 idempotency key, 12 fingerprint, 13 weight, 14 request, 15 max queued, 16 max queued per
-- tenant, 17 max bytes per tenant, 18 is Redis nearly full (1/0), 19 seconds to keep it
-- after its end ("": the policy's), 20 choices. Answers {"new", created at, position} | {"old", record, position} | {"mismatch"} |
-- {"memory" | "full" | "tenant" | "bytes", how many, ends in the last minute}. Sent twice (same id), it answers "old".
local now = tick()
local id, tenant, model = ARGV[3], ARGV[4], ARGV[6]

local function known(job_id)
  return { "old", record(job_id), queue_position(load(job_id)) }
end

local key = ARGV[11] ~= "" and idempotency_key(tenant, ARGV[11])
if call("EXISTS", base .. "job:" .. id) == 1 then return { known(id), {} } end
if key then
  local first = call("GET", key)
  local print = first and call("HGET", base .. "job:" .. first, "fp")
  if print then
    if print ~= ARGV[12] then return { { "mismatch" }, {} } end
    return { known(first), {} }
  end
end

local function refuse(why, count) return { { why, count, ends_a_minute(now) }, {} } end

if ARGV[18] == "1" then return refuse("memory", 0) end
local limits = { tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17]) }
local queued = tonumber(call("HGET", base .. "counts", "queued") or 0)
if limits[1] > 0 and queued >= limits[1] then return refuse("full", queued) end
local own = call("HMGET", base .. "tenant:" .. tenant, "n", "by")
if limits[2] > 0 and tonumber(own[1] or 0) >= limits[2] then return refuse("tenant", tonumber(own[1])) end
if limits[3] > 0 and tonumber(own[2] or 0) >= limits[3] then return refuse("bytes", tonumber(own[2])) end

-- Order of arrival: the time in µs, but never the same twice, nor the same in two shards.
local meta = base .. "meta"
local seq = math.floor(now * 1e6 / SHARDS) * SHARDS + SHARD
local last = tonumber(call("HGET", meta, "seq") or 0)
if seq <= last then seq = last + SHARDS end
call("HSET", meta, "seq", seq)

local bytes = #ARGV[14] + 1024
local job = { id = id, t = tenant, u = ARGV[5], m = model, p = ARGV[7], q = seq, hd = "0", rd = "1" }
local fields = {
  "id", id, "t", tenant, "u", job.u, "m", model, "p", job.p, "w", ARGV[13], "es", ARGV[8], "fp", ARGV[12], "q", seq,
  "s", "queued", "a", 0, "h", 0, "rd", 1, "hd", 0, "ca", now, "by", bytes, "ep", call("HGET", meta, "epoch") or 0,
}
if ARGV[9] ~= "" then
  local deadline = tonumber(ARGV[9]) + (now - tonumber(ARGV[10]))
  fields[#fields + 1], fields[#fields + 2] = "dl", deadline
  call("ZADD", base .. "deadlines", deadline, id)
end
if ARGV[20] ~= "1" then fields[#fields + 1], fields[#fields + 2] = "n", ARGV[20] end
if ARGV[19] ~= "" then fields[#fields + 1], fields[#fields + 2] = "ke", ARGV[19] end
if key then
  fields[#fields + 1], fields[#fields + 2] = "ik", ARGV[11]
  call("SET", key, id)
end
call("HSET", base .. "job:" .. id, unpack(fields))
call("SET", base .. "req:" .. id, ARGV[14])
for _, list in ipairs(list_keys(job)) do call("ZADD", list, seq, id) end
call("HINCRBY", base .. "tenant:" .. tenant, "by", bytes)
enter_queue(job, true, true)
if job.u ~= "" then
  call("SPUBLISH", base .. "arrivals:" .. #tenant .. ":" .. tenant .. ":" .. job.u, id)
end
return { { "new", string.format("%.17g", now), queue_position(job) }, {} }
