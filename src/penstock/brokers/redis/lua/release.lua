-- A lease that is no longer held is ignored, so that a release sent twice counts once.
local now, lease_now = tick()
for _, release in ipairs(releases) do
  local job = load(release.job)
  if holds(job, release.tenant, release.attempt) then
    local retries, crashes = tonumber(job.re or 0), tonumber(job.cr or 0)
    local alone = tonumber(job.da or 0)
    local key, failure = base .. "job:" .. job.id, nil
    if release.crashed_beside then
      if release.crashed_beside <= 1 then alone = alone + 1 end
      if alone >= 2 then
        failure = poisoned
      else
        local suspects = math.max(1, math.floor(release.crashed_beside / 2))
        call("HSET", key, "cr", crashes + 1, "da", alone, "su", suspects)
        job.su = suspects
      end
    end
    if release.retry and not failure then
      if retries + 1 > MAX_ATTEMPTS then
        failure = blobs(release.retry)
      else
        call("HSET", key, "re", retries + 1)
      end
    end
    if failure then
      end_running(job, "failed", nil, failure, now)
    else
      requeue(job, release.delay, lease_now)
    end
  end
end
return deliver({})
