-- One engine step of all running jobs of a worker. ARGV: 3 the appends, 4 the error of an expired job, 5… runs, reasons,
-- errors and stop strings, msgpack each. An append: {job, tenant, attempt, position, how many tokens, prompt tokens, run,
-- status, reasons, error, stops}; the last five are numbers of arguments or a word, false for none. Fenced by attempt,
-- deduplicated by position, renews the leases. A run that overlaps the log is stored whole: its beginning is what readers
-- have already. Answers a word for each append.
local now, lease_now = tick()
local appends = cmsgpack.unpack(ARGV[3])
local lease_until = lease_now + LEASE_TTL
local verdicts, charges = {}, {}

-- An append that is no longer its job's own: what is its worker told?
local function why(job, tenant, attempt, position, count)
  if not job or job.t ~= tenant or tonumber(job.a) ~= attempt then return "lost" end
  if job.s == "cancelled" or job.s == "expired" then return job.s end
  -- Its own last append, sent again, is fine; anything beyond the log was never written.
  if (job.s == "completed" or job.s == "failed") and position + count <= tonumber(job.h) + 1 then return "ok" end
  return "lost"
end

for i, append in ipairs(appends) do
  local id, tenant, attempt, position, count = append[1], append[2], append[3], append[4], append[5]
  local key = base .. "job:" .. id
  local own = call("HMGET", key, "t", "s", "a", "h", "dl", "pt", "es", "w", "by", "rs", "lu")
  local job = own[1] and { id = id, t = own[1], s = own[2], a = own[3], h = own[4], dl = own[5], pt = own[6], rs = own[10] }
  if not holds(job, tenant, attempt) then
    verdicts[i] = why(job, tenant, attempt, position, count)
  elseif job.dl and tonumber(job.dl) <= now then
    verdicts[i] = "expired"
    end_running(job, "expired", nil, ARGV[4], now)
  elseif position > tonumber(job.h) + 1 then
    verdicts[i] = "lost" -- a gap: this worker's view of the log is wrong
  else
    verdicts[i] = "ok"
    if lease_until - tonumber(own[11]) >= RENEWAL then
      call("ZADD", base .. "leases", lease_until, id)
      call("HSET", key, "lu", lease_until)
    end
    local weight, cost = tonumber(own[8]), 0
    if append[6] and not job.pt then
      job.pt = append[6]
      call("HSET", key, "pt", job.pt)
      cost = INPUT_COST * (job.pt - tonumber(own[7]))
    end
    local head, last = tonumber(job.h), position + count - 1
    if count > 0 and last > head then
      local run = ARGV[append[7]]
      call("XADD", base .. "log:" .. id, last .. "-0", "t", run)
      call("HSET", key, "h", last, "by", tonumber(own[9]) + #run + 32)
      if head == 0 then call("HSET", key, "fa", now) end
      job.h = last
      tell(id, job.rs, run)
      cost = cost + OUTPUT_COST * (last - head)
      local sum = charges[tenant] or { 0, 0 }
      charges[tenant] = sum
      sum[2] = sum[2] + #run + 32
    end
    if cost ~= 0 then
      local sum = charges[tenant] or { 0, 0 }
      charges[tenant] = sum
      sum[1] = sum[1] + cost / weight
    end
    if append[8] then
      local error, stops = append[10] and ARGV[append[10]], append[11] and ARGV[append[11]]
      end_running(job, append[8], ARGV[append[9]], error or nil, now, stops or nil)
    end
  end
end
for tenant, sum in pairs(charges) do
  charge(tenant, sum[1])
  if sum[2] > 0 then call("HINCRBY", base .. "tenant:" .. tenant, "by", sum[2]) end
end
return deliver(verdicts)
