-- Give leases back. ARGV: 3 the releases, 4 the error of a poisoned job, 5… errors. A release: {job, tenant, attempt, jobs it
-- crashed beside | false, number of the argument with the error to retry after | false, delay in seconds}. A lease that is
-- no longer held is ignored, so that a release sent twice counts once.
local now, lease_now = tick()
for _, release in ipairs(cmsgpack.unpack(ARGV[3])) do
  local job = load(release[1])
  if holds(job, release[2], release[3]) then
    local crashed_beside, retry = release[4], release[5]
    local retries, crashes = tonumber(job.re or 0), tonumber(job.cr or 0)
    local alone = tonumber(job.da or 0)
    local key, failure = base .. "job:" .. job.id, nil
    if crashed_beside then
      if crashed_beside <= 1 then alone = alone + 1 end
      if alone >= 2 then
        failure = ARGV[4]
      else
        local suspects = math.max(1, math.floor(crashed_beside / 2))
        call("HSET", key, "cr", crashes + 1, "da", alone, "su", suspects)
        job.su = suspects
      end
    end
    if retry and not failure then
      if retries + 1 > MAX_ATTEMPTS then
        failure = ARGV[retry]
      else
        call("HSET", key, "re", retries + 1)
      end
    end
    if failure then
      end_running(job, "failed", nil, failure, now)
    else
      requeue(job, release[6], lease_now)
    end
  end
end
return deliver({})
