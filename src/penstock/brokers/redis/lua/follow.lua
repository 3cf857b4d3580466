-- How the jobs stand that a process follows, and that it goes on following them. ARGV: 3 inbox, 4 ids, 5 ids it no longer
-- follows. Answers the epoch, and {head, status, epoch of its last claim, floor} for each id, or {-1} for one that is gone.
local inbox = ARGV[3]
for _, id in ipairs(cmsgpack.unpack(ARGV[5])) do
  local readers = call("HGET", base .. "job:" .. id, "rs")
  if readers then call("HSET", base .. "job:" .. id, "rs", without(readers, inbox)) end
end
local heads = {}
for i, id in ipairs(cmsgpack.unpack(ARGV[4])) do
  local own = call("HMGET", base .. "job:" .. id, "h", "s", "ep", "fl", "rs")
  if not own[1] then
    heads[i] = { -1 }
  else
    local readers = own[5] or ""
    if (own[2] == "queued" or own[2] == "running") and not string.find("," .. readers .. ",", "," .. inbox .. ",", 1, true) then
      call("HSET", base .. "job:" .. id, "rs", readers == "" and inbox or readers .. "," .. inbox)
    end
    heads[i] = { tonumber(own[1]), own[2], own[3] or "0", own[4] or "-1" }
  end
end
return { { call("HGET", base .. "meta", "epoch") or "0", heads }, {} }
