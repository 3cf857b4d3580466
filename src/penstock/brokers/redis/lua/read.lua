-- A part of a log, and from now on its news. ARGV: 3 tenant, 4 id, 5 after, 6 how many runs at most, 7 inbox of the process
-- that follows it ("" for none). Answers {"log", head, status, epoch now, floor, runs} | {"rewound", head} | {"expired"} |
-- {"unknown"}; a run is {field, blob}.
local id, after = ARGV[4], tonumber(ARGV[5])
local own = call("HMGET", base .. "job:" .. id, "t", "h", "s", "rs", "fl")
if own[1] ~= ARGV[3] then
  return absent(id, ARGV[3])
end
local head, open = tonumber(own[2]), own[3] == "queued" or own[3] == "running"
local last = open and head or head + 1
if after > last then return { { "rewound", head }, {} } end
local inbox = ARGV[7]
if inbox ~= "" and open then
  local others = without(own[4], inbox)
  call("HSET", base .. "job:" .. id, "rs", others == "" and inbox or others .. "," .. inbox)
end
local runs = {}
if after < last then
  for i, entry in ipairs(call("XRANGE", base .. "log:" .. id, string.format("%d-0", after + 1), "+", "COUNT", ARGV[6])) do
    runs[i] = entry[2]
  end
end
return { { "log", head, own[3], call("HGET", base .. "meta", "epoch") or "0", own[5] or "-1", runs }, {} }
