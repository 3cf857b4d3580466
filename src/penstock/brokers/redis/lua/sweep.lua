local now, lease_now = tick()
local touched = 0

local function due(zset, until_) return call("ZRANGE", base .. zset, "-inf", until_, "BYSCORE", "LIMIT", 0, limit) end

for _, id in ipairs(due("deadlines", now)) do
  local job = load(id)
  if not job or (job.s ~= "queued" and job.s ~= "running") then
    call("ZREM", base .. "deadlines", id)
  else
    if job.s == "running" then
      end_running(job, "expired", nil, expired, now)
    else
      end_queued(job, "expired", expired, now)
    end
    touched = touched + 1
  end
end

for _, id in ipairs(due("leases", lease_now)) do
  local job = load(id)
  if not job or job.s ~= "running" then
    call("ZREM", base .. "leases", id)
  else
    local losses = tonumber(job.lo or 0) + 1
    if losses > MAX_LOSSES then
      end_running(job, "failed", nil, poisoned, now)
    else
      call("HSET", base .. "job:" .. id, "lo", losses)
      call("HINCRBY", base .. "meta", "lost", 1)
      requeue(job, 0, lease_now)
    end
    touched = touched + 1
  end
end

for _, id in ipairs(due("delayed", lease_now)) do
  call("ZREM", base .. "delayed", id)
  local job = load(id)
  if job and job.s == "queued" and job.rd == "0" then
    call("HSET", base .. "job:" .. id, "rd", 1)
    enter_ready_queue(job)
    touched = touched + 1
  end
end

for _, id in ipairs(due("ended", now - RESULT_TTL)) do
  call("ZREM", base .. "ended", id)
  local job = load(id)
  if job then
    call("SET", base .. "gone:" .. id, job.t, "EX", tombstone_ttl)
    drop(job)
    touched = touched + 1
  else
    call("UNLINK", base .. "req:" .. id, base .. "log:" .. id)
  end
end

local horizon = lease_now - max_silence
for _, worker in ipairs(call("ZRANGE", base .. "alive", "-inf", horizon, "BYSCORE")) do
  call("ZREM", base .. "alive", worker)
  call("HDEL", base .. "workers", worker)
end
if call("HLEN", base .. "ends") > 120 then
  for _, second in ipairs(call("HKEYS", base .. "ends")) do
    if math.abs(tonumber(second) - now) > 61 then call("HDEL", base .. "ends", second) end
  end
end
return deliver(touched)
