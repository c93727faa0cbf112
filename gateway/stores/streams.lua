-- Streams that can be resumed. KEYS[1] is the stream; ARGV[1] says what to do.
--
-- aig:stream:NAME         its bytes, some at a time: the first half of an entry's id is how many there are up to its
--                         end, the second says what it is: 0 bytes, 1 that it was begun, 2 how it ended
-- aig:stream:NAME:lease   while whoever makes it lives
-- aig:stream:NAME:reader  while somebody in another process reads it
-- aig:streams:KEY         all of the key KEY: member aig:stream:NAME, score when it was begun

local stream = KEYS[1]
local lease, reader = stream .. ":lease", stream .. ":reader"
local todo = {}

-- How many bytes there are, and how it ended; nil: there is no such stream.
local function look()
  local last = redis.call("XREVRANGE", stream, "+", "-", "COUNT", 1)[1]
  if not last then return nil end
  local size, kind = string.match(last[1], "^(%d+)%-(%d)$")
  return tonumber(size), kind == "2" and last[2][2] or ""
end

local function keep(lease_ms, ttl_ms)
  redis.call("SET", lease, 1, "PX", lease_ms)
  redis.call("PEXPIRE", stream, ttl_ms)
end

-- KEYS[2] those of its key; ARGV most, now, lease, ttl in ms. 1; 0 when too many of them run.
function todo.begin(most, now, lease_ms, ttl_ms)
  local others = redis.call("ZRANGE", KEYS[2], 0, -1)
  local room = most - #others
  for pass = 1, 2 do -- those that expired make room before those that ended
    for _, other in ipairs(others) do
      if room > 0 then break end
      if redis.call("EXISTS", pass == 1 and other or other .. ":lease") == 0 and redis.call("ZREM", KEYS[2], other) == 1
      then
        redis.call("UNLINK", other)
        room = room + 1
      end
    end
  end
  if room <= 0 then return 0 end
  redis.call("ZADD", KEYS[2], now, stream)
  redis.call("PEXPIRE", KEYS[2], ttl_ms + 7200000) -- the longest stream ends within an hour, by default
  redis.call("XADD", stream, "0-1", "begun", now)
  keep(lease_ms, ttl_ms)
  return 1
end

-- ARGV where the bytes begin, the bytes, before what none are kept, lease, ttl, how it ends ("": it goes on). How many
-- there are then, -1 when it ended before; and whether somebody reads it.
function todo.append(first, bytes, oldest, lease_ms, ttl_ms, how)
  local size, ended = look()
  if size and ended ~= "" then return {-1, 0} end
  size = size or 0
  if size ~= tonumber(first) then return {size, 0} end
  if how == "interrupted" and redis.call("EXISTS", lease) == 1 then return {size, 0} end
  if #bytes > 0 then
    size = size + #bytes
    redis.call("XADD", stream, "MINID", "=", oldest, string.format("%d-0", size), "bytes", bytes)
  end
  keep(lease_ms, ttl_ms)
  if how ~= "" then
    redis.call("XADD", stream, string.format("%d-2", size), "ended", how)
    redis.call("DEL", lease)
  end
  return {size, redis.call("EXISTS", reader)}
end

-- ARGV how many bytes the reader has, how many entries and bytes it takes, for how long it counts as there, ms. Nothing
-- when there is no such stream; else how many bytes there are, how it ended, whether its maker lives, and the entries.
function todo.read(after, count, bytes, reader_ms)
  local size, ended = look()
  if not size then return {} end
  -- A Redis that is full takes nothing, of its maker neither: whether that lives nobody can say.
  local full = redis.pcall("SET", reader, 1, "PX", reader_ms)["err"]
  local entries = redis.call("XRANGE", stream, string.format("%.0f-2", after), "+", "COUNT", count)
  local left = tonumber(bytes)
  for number, entry in ipairs(entries) do
    left = left - #entry[2][2]
    if left < 0 and number > 1 then
      for last = #entries, number, -1 do entries[last] = nil end
      break
    end
  end
  return {size, ended, full and 1 or redis.call("EXISTS", lease), entries}
end

function todo.drop()
  return redis.call("UNLINK", stream, lease)
end

return todo[ARGV[1]](unpack(ARGV, 2))
