#!lua
-- Admits requests, renews and gives back their leases: one call for any number of operations, done in their order.
-- A request is recorded against all of its limits or against none.
--
-- The first line makes the server look before it starts whether it may write and has memory left; without it a script
-- that begins by removing something is let through. It takes Redis 7 or Valkey.
-- https://redis.io/docs/latest/develop/programmability/lua-api/#script_flags
--
-- ARGV[1], [2], [3]  window, µs; lease, µs; requests a window of all keys together (0: no limit)
-- ARGV[4]            a line for each operation, five words: "admit", "renew" or "release"; key id; exchange id; the
--                    key's requests a window and concurrent requests (0: no limit; only "admit" reads them)
--
-- aig:limits:requests     requests of all keys: member exchange id, score when it was granted, µs
-- aig:limits:requests:ID  of the key ID: the same
-- aig:limits:leases:ID    its leases: member exchange id, score when the lease ends, µs
--
-- One string in and one out, because redis-py spends more time on packing an argument than Lua on reading it. So the
-- names of keys are made here, and the server may have replicas but may not be a cluster.
--
-- Answers four integers for each "admit", all in one string:
-- the limit that refused it (0: granted), what is left of the window of that limit (of the key's own, when granted),
-- µs until that window is empty again, and µs until it has room for one more (0: granted, or not known).

local GRANTED, REQUESTS, CONCURRENT, ALL_REQUESTS = 0, 1, 2, 3

-- Servers that fail over to each other are less than this apart. Scores further in the future were written before the
-- clock was set back: they are dropped when they fill a limit, or it would stay full until the clock has caught up.
local CLOCK_SKEW = 30 * 1000000 -- µs

local clock = redis.call("TIME")
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local window, lease, all_limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local ALL, REQUESTS_OF, LEASES_OF = "aig:limits:requests", "aig:limits:requests:", "aig:limits:leases:"

local function count(key, limit, ended, latest)
  redis.call("ZREMRANGEBYSCORE", key, "-inf", ended)
  local members = redis.call("ZCARD", key)
  if members < limit then return members end
  return members - redis.call("ZREMRANGEBYSCORE", key, latest + 1, "+inf")
end

local function count_requests(key, limit)
  return limit > 0 and count(key, limit, now - window, now + CLOCK_SKEW) or 0
end

local function count_leases(key, limit)
  return limit > 0 and count(key, limit, now, now + lease + CLOCK_SKEW) or 0
end

-- µs until the request of that rank, oldest first, leaves the window.
local function ends_in(key, rank)
  return tonumber(redis.call("ZRANGE", key, rank, rank, "WITHSCORES")[2]) + window - now
end

local function record_request(key, id)
  redis.call("ZADD", key, now, id)
  redis.call("PEXPIRE", key, math.ceil(window / 1000))
end

local function renew(leases, id)
  redis.call("ZADD", leases, now + lease, id)
  redis.call("PEXPIRE", leases, math.ceil(lease / 1000))
end

local function admit(requests, leases, id, limit, concurrent)
  local taken = count_requests(requests, limit)
  if limit > 0 and taken >= limit then
    return REQUESTS, 0, ends_in(requests, -1), ends_in(requests, taken - limit)
  end
  if concurrent > 0 and count_leases(leases, concurrent) >= concurrent then
    return CONCURRENT, 0, 0, 0 -- nobody knows when a request ends
  end
  local all_taken = count_requests(ALL, all_limit)
  if all_limit > 0 and all_taken >= all_limit then
    return ALL_REQUESTS, 0, ends_in(ALL, -1), ends_in(ALL, all_taken - all_limit)
  end
  if limit > 0 then record_request(requests, id) end
  if concurrent > 0 then renew(leases, id) end
  if all_limit > 0 then record_request(ALL, id) end
  return GRANTED, math.max(limit - taken - 1, 0), limit > 0 and window or 0, 0
end

local answers = {}
for operation, key, id, limit, concurrent in string.gmatch(ARGV[4], "(%S+) (%S+) (%S+) (%d+) (%d+)") do
  local requests, leases = REQUESTS_OF .. key, LEASES_OF .. key
  if operation == "admit" then
    local answer = {admit(requests, leases, id, tonumber(limit), tonumber(concurrent))}
    answers[#answers + 1] = table.concat(answer, " ")
  elseif operation == "renew" then
    renew(leases, id)
  else
    redis.call("ZREM", leases, id)
  end
end
return table.concat(answers, " ")
