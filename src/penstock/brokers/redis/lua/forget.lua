local now = tick()
local job = load(id)
if job and job.t == tenant then
  if job.s == "running" then
    end_running(job, "cancelled", nil, cancelled, now)
  elseif job.s == "queued" then
    end_queued(job, "cancelled", cancelled, now)
  end
  call("ZREM", base .. "ended", id)
  drop(load(id))
end
return deliver(0)
