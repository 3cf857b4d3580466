-- Answers {counts, depth, workers, ends a minute, leases lost, wall clock}; a worker is {what it said, seconds since}.
local now, lease_now = tick()
local workers = {}
for i, id in ipairs(call("ZRANGE", base .. "alive", lease_now - max_silence, "+inf", "BYSCORE")) do
  local silent = lease_now - tonumber(call("ZSCORE", base .. "alive", id))
  workers[i] = { call("HGET", base .. "workers", id) or "", string.format("%.17g", silent) }
end
return { {
  call("HGETALL", base .. "counts"), call("HGETALL", base .. "depth"), workers, ends_a_minute(now),
  tonumber(call("HGET", base .. "meta", "lost") or 0), string.format("%.17g", now),
}, {} }
