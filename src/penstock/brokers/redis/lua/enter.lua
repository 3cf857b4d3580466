-- In a tier that can lose the last writes, a server that was restarted or replaced begins a new epoch: what was leased
-- before it may be unknown now, so the next claim of each job takes an attempt number that was never given (EPOCH_STEP)
-- and remembers how long the log was (see claim.lua). Answers {epoch, shards}.
local meta = base .. "meta"
local known_run, known_shards = unpack(call("HMGET", meta, "run_id", "shards"))
if not known_shards then call("HSET", meta, "shards", shards, "epoch", 0) end
if known_run ~= run_id then
  if known_run and can_lose then call("HINCRBY", meta, "epoch", 1) end
  call("HSET", meta, "run_id", run_id)
end
tick()
return { { call("HGET", meta, "epoch"), call("HGET", meta, "shards") }, {} }
