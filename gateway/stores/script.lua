#!lua
-- One call for any number of operations, done in their order. This file, limits.lua and budgets.lua are one script:
-- each operation is a function in `operations`, and answers a line of integers, or nothing.
--
-- The first line makes the server look before it starts whether it may write and has memory left; without it a script
-- that begins by removing something is let through. It takes Redis 7 or Valkey.
-- https://redis.io/docs/latest/develop/programmability/lua-api/#script_flags
--
-- ARGV[1]  the server's run id when it did not know this script, else empty: another run may have lost its memory
-- ARGV[2]  a line for each operation: its name, a space, and words
-- ARGV[3]  and on: the payloads of those operations that carry one, in their order
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

local epoch = redis.call("GET", "aig:epoch")
local server = ARGV[1]
if not epoch or server ~= "" and redis.call("GET", "aig:server") ~= server then
  epoch = whole(now)
  redis.call("SET", "aig:epoch", epoch)
end
if server ~= "" then redis.call("SET", "aig:server", server) end

local payloads = 2
local function payload() -- of the operation that asks for it
  payloads = payloads + 1
  return ARGV[payloads]
end

local operations = {}

function operations.probe() end

local function answers()
  local lines = {epoch}
  for name, words in string.gmatch(ARGV[2], "(%S+) ([^\n]*)") do
    lines[#lines + 1] = operations[name](words) or ""
  end
  return table.concat(lines, "\n")
end
