-- Answers {"log", head, status, epoch now, floor, runs} | {"rewound", head} | {"expired"} | {"unknown"}; a run is {field, blob}.
local key = base .. "job:" .. id
local owner, head, status, readers, floor = unpack(call("HMGET", key, "t", "h", "s", "rs", "fl"))
if owner ~= tenant then
  return absent(id, tenant)
end
head = tonumber(head)
local open = status == "queued" or status == "running"
local last = open and head or head + 1
if after > last then return { { "rewound", head }, {} } end
if inbox and open then
  local others = without(readers, inbox)
  call("HSET", key, "rs", others == "" and inbox or others .. "," .. inbox)
end
local runs = {}
if after < last then
  local first = string.format("%d-0", after + 1)
  for i, entry in ipairs(call("XRANGE", base .. "log:" .. id, first, "+", "COUNT", max_runs)) do
    local _, fields = unpack(entry)
    runs[i] = fields
  end
end
return { { "log", head, status, call("HGET", base .. "meta", "epoch") or "0", floor or "-1", runs }, {} }
