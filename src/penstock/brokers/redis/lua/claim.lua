-- Answers {the leases, {attempt, record, log} each; does a job wait for more slots than are left (1/0)}.
local now, lease_now = tick()
local free = limit
local meta = base .. "meta"
-- Seconds within which a claimant that was woken is expected.
local CALLED = 0.25

if worker then register(worker, registration) end

local function lease(job, attempt)
  local log = {}
  if job.h ~= "0" then
    for i, entry in ipairs(call("XRANGE", base .. "log:" .. job.id, "-", "+")) do
      local _, run = unpack(entry)
      log[i] = run[2] -- behind its field
    end
  end
  return { attempt, record(job.id), log }
end

local before = call("GET", base .. "reply:" .. request)
if before then
  local leases = {}
  for _, given in ipairs(cmsgpack.unpack(before)) do
    local id, attempt = unpack(given)
    local job = load(id)
    if job and job.s == "running" and tonumber(job.a) == attempt then leases[#leases + 1] = lease(job, attempt) end
  end
  return { { leases, 0 }, {} }
end

-- The tenant served least among those in a class: (tenant, counter, when it was last picked). Scores are lower bounds of
-- the counters: raise the ones at the top until the first is true. Ties go to the longest unserved.
local function top(priority, model)
  local tenants = ready_tenants_key(priority, model)
  while true do
    local first, lowest = unpack(call("ZRANGE", tenants, 0, 0, "WITHSCORES"))
    if not first then return nil end
    local score = tonumber(lowest)
    local best, best_served
    for _, tenant in ipairs(call("ZRANGE", tenants, lowest, lowest, "BYSCORE", "LIMIT", 0, 16)) do
      local value, served, running = unpack(call("HMGET", base .. "tenant:" .. tenant, "c", "s", "r"))
      value, served, running = tonumber(value or 0), tonumber(served or 0), tonumber(running or 0)
      if value > score then
        call("ZADD", tenants, "XX", value, tenant)
      elseif MAX_RUNNING > 0 and running >= MAX_RUNNING then
        call("ZREM", tenants, tenant)
        call("HSET", base .. "tenant:" .. tenant, "pk", 1)
      elseif not best or served < best_served then
        best, best_served = tenant, served
      end
    end
    if best then return best, score, best_served end
  end
end

-- The last class of which there may be another job.
local function lowest()
  return free > reserve and 2 or 1
end

local function next_job()
  for priority = 0, lowest() do
    local best, best_counter, best_served, best_model
    for _, model in ipairs(models) do
      local tenant, value, served = top(priority, model)
      if tenant and (not best or value < best_counter or (value == best_counter and served < best_served)) then
        best, best_counter, best_served, best_model = tenant, value, served, model
      end
    end
    if best then
      return load(call("ZRANGE", ready_queue_key(priority, best_model, best), 0, 0)[1])
    end
  end
end

for _, model in ipairs(models) do
  call("ZREM", base .. "idle:" .. model, claimant)
  call("ZREM", base .. "called:" .. model, claimant)
end

-- Others that wait, or were woken just now, get their share of what there is.
local function share()
  local others, ready = 0, 0
  for _, model in ipairs(models) do
    local called = call("ZCOUNT", base .. "called:" .. model, lease_now - CALLED, "+inf")
    others = math.max(others, called + call("ZCARD", base .. "idle:" .. model))
    for priority = 0, lowest() do
      ready = ready + tonumber(call("HGET", base .. "ready", class(priority, model)) or 0)
    end
  end
  return math.max(1, math.ceil(ready / (others + 1)))
end

if limit > 1 then limit = math.min(limit, share()) end
local epoch = call("HGET", meta, "epoch") or "0"
local leases, given, held = {}, {}, 0
while #leases < limit and free > 0 do
  local job = next_job()
  if not job then break end
  local kept = job.p == "2" and reserve or 0
  if job.dl and tonumber(job.dl) <= now then
    end_queued(job, "expired", expired, now)
  elseif math.min(tonumber(job.n or 1), slots - kept) > free - kept then
    held = 1 -- it is waited for: what would overtake it now, others would tomorrow
    break
  else
    free = free - math.min(tonumber(job.n or 1), slots)
    local key, tenant = base .. "job:" .. job.id, base .. "tenant:" .. job.t
    call("HINCRBY", tenant, "r", 1) -- first, so that the tenant is never idle in between
    leave_queue(job)
    local attempt = tonumber(job.a) + 1
    if job.ep ~= epoch then
      attempt = attempt + EPOCH_STEP
      call("HSET", key, "fl", job.h)
    end
    call("HSET", key, "s", "running", "a", attempt, "ep", epoch, "lu", lease_now + LEASE_TTL)
    call("ZADD", base .. "leases", lease_now + LEASE_TTL, job.id)
    if job.a == "0" then
      call("HSET", key, "sa", now)
      -- Input is charged once; what later attempts redo is not the tenant's doing.
      charge(job.t, INPUT_COST * tonumber(job.es) / tonumber(job.w))
    end
    call("HSET", tenant, "s", call("HINCRBY", meta, "served", 1))
    add("counts", "running", 1)
    leases[#leases + 1] = lease(job, attempt)
    given[#given + 1] = { job.id, attempt }
  end
end

if #leases > 0 then
  call("SET", base .. "reply:" .. request, pack(given), "EX", 30)
elseif running then
  for _, model in ipairs(models) do
    call("ZADD", base .. "idle:" .. model, running, claimant)
    call("EXPIRE", base .. "idle:" .. model, 60)
  end
end
return deliver({ leases, held })
