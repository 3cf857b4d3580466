-- A page of a tenant's jobs, newest first. ARGV: 3 tenant, 4 user ("" for all), 5 statuses, 6 model ("" for all), 7 the seq
-- before which it begins ("+inf" for the newest), 8 limit, 9 how many jobs to look at, 10 idempotency key ("" for all; else
-- it is at most the job that was submitted under it), 11 bytes of requests that are enough. Answers {jobs, seq}: {record, position, seq} each, and the seq to go on
-- before ("" at the end). The page may be shorter than the limit though there is more.
local tenant, user, model, before = ARGV[3], ARGV[4], ARGV[6], ARGV[7]
local limit, left, room = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[11])
local statuses, wanted = cmsgpack.unpack(ARGV[5]), {}
for _, status in ipairs(statuses) do wanted[status] = true end

local function fits(job) return (#statuses == 0 or wanted[job.s]) and (model == "" or job.m == model) end

local function entry(job, seq)
  return { record(job.id), job.s == "queued" and queue_position(job) or 0, seq }
end

if ARGV[10] ~= "" then
  local id = call("GET", idempotency_key(tenant, ARGV[10]))
  local job = id and load(id)
  local here = job and (user == "" or job.u == user) and (before == "+inf" or tonumber(job.q) < tonumber(before))
  return { { here and fits(job) and { entry(job, job.q) } or {}, "" }, {} }
end

local keys = list_keys({ t = tenant, u = user })
local list = keys[#keys]
local jobs = {}
while left > 0 do
  local chunk = call("ZRANGE", list, "(" .. before, "-inf", "BYSCORE", "REV", "LIMIT", 0, math.min(100, left), "WITHSCORES")
  if #chunk == 0 then return { { jobs, "" }, {} } end
  for i = 1, #chunk, 2 do
    local id = chunk[i]
    before, left = chunk[i + 1], left - 1
    local job = load(id)
    if not job then
      call("ZREM", list, id) -- its keys went by themselves: nobody swept for long
    elseif fits(job) then
      local found = entry(job, before)
      jobs[#jobs + 1], room = found, room - #found[1][2]
      if #jobs == limit or room <= 0 then return { { jobs, before }, {} } end
    end
  end
end
return { { jobs, before }, {} }
