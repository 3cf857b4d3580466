-- A process (re)connects. ARGV: 3 run id of the server, 4 can the tier lose writes (1/0), 5 tier, 6 shards.
-- In a tier that can lose the last writes, a server that was restarted or replaced begins a new epoch: what was leased
-- before it may be unknown now, so the next claim of each job takes an attempt number that was never given (EPOCH_STEP)
-- and remembers how long the log was (see claim.lua). Answers {epoch, shards}.
local meta = base .. "meta"
local known = call("HMGET", meta, "run_id", "shards")
if not known[2] then call("HSET", meta, "shards", ARGV[6], "epoch", 0) end
if known[1] ~= ARGV[3] then
  if known[1] and ARGV[4] == "1" then call("HINCRBY", meta, "epoch", 1) end
  call("HSET", meta, "run_id", ARGV[3])
end
tick()
return { call("HGET", meta, "epoch"), call("HGET", meta, "shards") }
