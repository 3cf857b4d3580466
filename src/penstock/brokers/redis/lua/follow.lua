-- Answers the epoch, and {head, status, epoch of its last claim, floor} for each id, or {-1} for one that is gone.
for _, id in ipairs(left) do
  local readers = call("HGET", base .. "job:" .. id, "rs")
  if readers then call("HSET", base .. "job:" .. id, "rs", without(readers, inbox)) end
end
local heads = {}
for i, id in ipairs(ids) do
  local key = base .. "job:" .. id
  local head, status, claimed_in, floor, readers = unpack(call("HMGET", key, "h", "s", "ep", "fl", "rs"))
  if not head then
    heads[i] = { -1 }
  else
    local others = readers or ""
    local open = status == "queued" or status == "running"
    if open and not string.find("," .. others .. ",", "," .. inbox .. ",", 1, true) then
      call("HSET", key, "rs", others == "" and inbox or others .. "," .. inbox)
    end
    heads[i] = { tonumber(head), status, claimed_in or "0", floor or "-1" }
  end
end
return { { call("HGET", base .. "meta", "epoch") or "0", heads }, {} }
