-- One job. ARGV: 3 tenant, 4 id. Answers {"job", record, position in the queue or 0} | {"expired"} | {"unknown"}.
local job = load(ARGV[4])
if not job or job.t ~= ARGV[3] then
  return absent(ARGV[4], ARGV[3])
end
return { { "job", record(job.id), job.s == "queued" and queue_position(job) or 0 }, {} }
