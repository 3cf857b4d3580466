-- Answers as get.lua.
local now = tick()
local job = load(id)
if not job or job.t ~= tenant then
  return absent(id, tenant)
end
if job.s == "running" then
  end_running(job, "cancelled", nil, cancelled, now)
elseif job.s == "queued" then
  end_queued(job, "cancelled", cancelled, now)
end
return deliver({ "job", record(id), 0 })
