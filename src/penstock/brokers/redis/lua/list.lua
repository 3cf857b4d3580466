-- Answers {jobs, seq}: {record, position, seq} each, and the seq to go on before ("" at the end).
local wanted = {}
for _, status in ipairs(statuses) do wanted[status] = true end

local function fits(job) return (#statuses == 0 or wanted[job.s]) and (not model or job.m == model) end

local function listed(job, seq)
  return { record(job.id), job.s == "queued" and queue_position(job) or 0, seq }
end

if key then
  local id = call("GET", idempotency_key(tenant, key))
  local job = id and load(id)
  local here = job and (not user or job.u == user) and (before == "+inf" or tonumber(job.q) < tonumber(before))
  return { { here and fits(job) and { listed(job, job.q) } or {}, "" }, {} }
end

local keys = list_keys({ t = tenant, u = user })
local list = keys[#keys]
local jobs = {}
while max_looks > 0 do
  local chunk =
    call("ZRANGE", list, "(" .. before, "-inf", "BYSCORE", "REV", "LIMIT", 0, math.min(100, max_looks), "WITHSCORES")
  if #chunk == 0 then return { { jobs, "" }, {} } end
  for i = 1, #chunk, 2 do
    local id = chunk[i]
    before, max_looks = chunk[i + 1], max_looks - 1
    local job = load(id)
    if not job then
      call("ZREM", list, id) -- its keys went by themselves: nobody swept for long
    elseif fits(job) then
      local found = listed(job, before)
      local _, details = unpack(found[1])
      jobs[#jobs + 1], room = found, room - #details
      if #jobs == limit or room <= 0 then return { { jobs, before }, {} } end
    end
  end
end
return { { jobs, before }, {} }
