-- End a job now if it has not ended. ARGV: 3 tenant, 4 id, 5 the error of a cancelled job. Answers as get.lua.
local now = tick()
local job = load(ARGV[4])
if not job or job.t ~= ARGV[3] then
  return absent(ARGV[4], ARGV[3])
end
if job.s == "running" then
  end_running(job, "cancelled", nil, ARGV[5], now)
elseif job.s == "queued" then
  end_queued(job, "cancelled", ARGV[5], now)
end
return deliver({ "job", record(job.id), 0 })
