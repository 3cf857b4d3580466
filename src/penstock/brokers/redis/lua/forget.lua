-- Drop a job now, whatever its state; nothing where there is none. ARGV: 3 tenant, 4 id, 5 the error of a cancelled job.
local now = tick()
local job = load(ARGV[4])
if job and job.t == ARGV[3] then
  if job.s == "running" then
    end_running(job, "cancelled", nil, ARGV[5], now)
  elseif job.s == "queued" then
    end_queued(job, "cancelled", ARGV[5], now)
  end
  call("ZREM", base .. "ended", job.id)
  drop(load(job.id))
end
return deliver(0)
