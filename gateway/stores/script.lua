#!lua
-- One call for any number of operations, done in their order. This file, limits.lua and budgets.lua are one script:
-- each operation is a function in `operations`, and answers a line of integers, or nothing. All of a call happens in
-- one moment, `now`.
--
-- The first line makes the server look before it starts whether it may write and has memory left; without it a script
-- that begins by removing something is let through. It takes Redis 7 or Valkey.
-- https://redis.io/docs/latest/develop/programmability/lua-api/#script_flags
--
-- ARGV[1]  the run id of the server, as it was when the connection was opened
-- ARGV[2]  "new" in the first call on a connection, else empty: another run may have lost its memory
-- ARGV[3]  a line for each operation: its name, a space, and words
--
-- aig:epoch   when the memory of this server began, as far as we can rely on it, µs
-- aig:server  the run of the server that this memory is of
--
-- One string of lines and one out, because redis-py spends more time on packing an argument than Lua on reading it. So
-- the names of keys are made here, and the server may have replicas but may not be a cluster.
--
-- Answers the epoch, and a line for each operation.

-- Servers that fail over to each other are less than this apart. Times further in the future were written before the
-- clock was set back: they are dropped, or a limit would stay full until the clock has caught up.
local CLOCK_SKEW = 30 * 1000000 -- µs

local clock = redis.call("TIME")
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

-- Lua writes a number with 14 digits; a time in µs has 16.
local function whole(number)
  return string.format("%.0f", number)
end

local epoch, server = redis.call("GET", "aig:epoch"), ARGV[1]
if not epoch or ARGV[2] == "new" and redis.call("GET", "aig:server") ~= server then
  epoch = whole(now)
  redis.call("SET", "aig:epoch", epoch)
  redis.call("SET", "aig:server", server)
end

local operations = {}

function operations.probe() end

-- `define_more` is called for the first operation that is not defined yet. To make the functions of budgets.lua takes
-- as long as two operations.
local function answers(define_more)
  local lines, asked, at = {epoch}, ARGV[3], 1
  while at <= #asked do
    local space = string.find(asked, " ", at, true)
    local after = string.find(asked, "\n", space, true) or #asked + 1
    local name = string.sub(asked, at, space - 1)
    if not operations[name] then define_more() end
    lines[#lines + 1] = operations[name](string.sub(asked, space + 1, after - 1)) or ""
    at = after + 1
  end
  return table.concat(lines, "\n")
end
