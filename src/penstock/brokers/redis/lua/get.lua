-- Answers {"job", record, position in the queue or 0} | {"expired"} | {"unknown"}.
local job = load(id)
if not job or job.t ~= tenant then
  return absent(id, tenant)
end
return { { "job", record(id), job.s == "queued" and queue_position(job) or 0 }, {} }
