-- Fenced by attempt, deduplicated by position, renews the leases. A run that overlaps the log is stored whole: its
-- beginning is what readers have already. Answers a word for each append.
local now, lease_now = tick()
local lease_until = lease_now + LEASE_TTL
local verdicts = {}
local charges = {} -- tenant → {cost =, bytes =}

-- An append that is no longer its job's own: what is its worker told?
local function why(job, append, count)
  if not job or job.t ~= append.tenant or tonumber(job.a) ~= append.attempt then return "lost" end
  if job.s == "cancelled" or job.s == "expired" then return job.s end
  -- Its own last append, sent again, is fine; anything beyond the log was never written.
  if (job.s == "completed" or job.s == "failed") and append.position + count <= tonumber(job.h) + 1 then return "ok" end
  return "lost"
end

local function charge_later(tenant, cost, bytes)
  local sum = charges[tenant]
  if not sum then
    sum = { cost = 0, bytes = 0 }
    charges[tenant] = sum
  end
  sum.cost, sum.bytes = sum.cost + cost, sum.bytes + bytes
end

for i, append in ipairs(appends) do
  local id, position, count = append.job, append.position, append.count or 0
  local key = base .. "job:" .. id
  local owner, status, attempt, head, deadline, prompt_tokens, estimate, weight, bytes, readers, leased_until, cached, thoughts =
    unpack(call("HMGET", key, "t", "s", "a", "h", "dl", "pt", "es", "w", "by", "rs", "lu", "ct", "rt"))
  local job = owner
    and {
      id = id, t = owner, s = status, a = attempt, h = head, dl = deadline, pt = prompt_tokens, ct = cached, rt = thoughts,
      rs = readers,
    }
  if not holds(job, append.tenant, append.attempt) then
    verdicts[i] = why(job, append, count)
  elseif deadline and tonumber(deadline) <= now then
    verdicts[i] = "expired"
    end_running(job, "expired", nil, expired, now)
  elseif position > tonumber(job.h) + 1 then
    verdicts[i] = "lost" -- a gap: this worker's view of the log is wrong
  else
    verdicts[i] = "ok"
    if lease_until - tonumber(leased_until) >= RENEWAL then
      call("ZADD", base .. "leases", lease_until, id)
      call("HSET", key, "lu", lease_until)
    end
    local cost, added = 0, 0
    if append.prompt_tokens and not job.pt then
      job.pt = append.prompt_tokens
      job.ct = append.cached_tokens or 0
      call("HSET", key, "pt", job.pt, "ct", job.ct)
      cost = INPUT_COST * (job.pt - tonumber(estimate))
    end
    local head, last = tonumber(job.h), position + count - 1
    if count > 0 and last > head then
      local run = blobs(append.run)
      added = #run + 32
      call("XADD", base .. "log:" .. id, last .. "-0", "t", run)
      call("HSET", key, "h", last, "by", tonumber(bytes) + added)
      if head == 0 then call("HSET", key, "fa", now) end
      if (append.reasoning_tokens or 0) > tonumber(job.rt or 0) then
        job.rt = append.reasoning_tokens
        call("HSET", key, "rt", job.rt)
      end
      job.h = last
      tell(id, readers, run)
      cost = cost + OUTPUT_COST * (last - head)
    end
    if cost ~= 0 or added > 0 then charge_later(append.tenant, cost / tonumber(weight), added) end
    if append.status then
      local failure, stops = append.error and blobs(append.error), append.stops and blobs(append.stops)
      end_running(job, append.status, blobs(append.reasons), failure, now, stops)
    end
  end
end
for tenant, sum in pairs(charges) do
  charge(tenant, sum.cost)
  if sum.bytes > 0 then call("HINCRBY", base .. "tenant:" .. tenant, "by", sum.bytes) end
end
return deliver(verdicts)
