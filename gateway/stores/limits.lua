-- Admits requests, renews and gives back their leases. A request is recorded against all of its limits or against none.
--
-- aig:limits:requests     requests of all keys: member exchange id, score when it was granted, µs
-- aig:limits:requests:ID  of the key ID: the same
-- aig:limits:leases:ID    its leases: member exchange id, score when the lease ends, µs
-- aig:limits:rate:NAME    a token bucket, of the key k:ID or of the route r:PATH: when it will be full again, µs.
--                         That one number is all of it: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm

local REQUESTS, CONCURRENT, ALL_REQUESTS, RATE, ROUTE_RATE = 1, 2, 3, 4, 5
local ALL, REQUESTS_OF, LEASES_OF, RATE_OF =
  "aig:limits:requests", "aig:limits:requests:", "aig:limits:leases:", "aig:limits:rate:"

-- --- windows and leases ------------------------------------------------------------------------------------------

-- What a call has found out, and said, by key: how many members there are once those that ended are removed, and that
-- the key will expire.
local members, expires = {}, {}

local function count(key, limit, ended, latest)
  if not members[key] then
    redis.call("ZREMRANGEBYSCORE", key, "-inf", ended)
    members[key] = redis.call("ZCARD", key)
  end
  if members[key] >= limit then
    members[key] = members[key] - redis.call("ZREMRANGEBYSCORE", key, latest + 1, "+inf")
  end
  return members[key]
end

local function add(key, id, score, life)
  local added = redis.call("ZADD", key, score, id)
  if members[key] then members[key] = members[key] + added end
  if not expires[key] then
    redis.call("PEXPIRE", key, math.ceil(life / 1000))
    expires[key] = true
  end
end

local function remove(key, id)
  local removed = redis.call("ZREM", key, id)
  if members[key] then members[key] = members[key] - removed end
  if (members[key] or 0) == 0 then expires[key] = nil end -- a key without members is gone
end

local function count_requests(key, limit, window)
  return limit > 0 and count(key, limit, now - window, now + CLOCK_SKEW) or 0
end

-- µs until the request of that rank, oldest first, leaves the window.
local function ends_in(key, rank, window)
  return tonumber(redis.call("ZRANGE", key, rank, rank, "WITHSCORES")[2]) + window - now
end

-- --- token buckets -----------------------------------------------------------------------------------------------

-- When the bucket will be full again, and in how many µs it holds one more (not above 0: it does). `interval` is µs a
-- request, 0: there is no bucket.
local function bucket(name, interval, burst)
  if interval == 0 then return now, 0 end
  local full_at = tonumber(redis.call("GET", RATE_OF .. name) or 0)
  if full_at > now + burst * interval + CLOCK_SKEW then full_at = 0 end
  full_at = math.max(full_at, now)
  return full_at, full_at - (burst - 1) * interval - now
end

local function take(name, full_at)
  redis.call("SET", RATE_OF .. name, string.format("%.2f", full_at), "PX", math.ceil((full_at - now) / 1000))
end

-- --- operations --------------------------------------------------------------------------------------------------

-- The limit that refused it, µs until that window is empty or that bucket full again, and µs until it has room for one
-- more (0: not known).
local function refusal(which, empty_after, room_after)
  return string.format("%d %.0f %.0f", which, math.ceil(empty_after), math.ceil(room_after))
end

local LIMITS = "^" .. string.rep("(%S+) ", 10) .. "(%S+)$"

-- What is asked of one key in a call is often asked again of it: the words that were read last, and what they say.
local read, key, window, lease, limit, concurrent, all_limit, interval, burst, route, route_interval, route_burst

local function read_limits(words)
  read = words
  key, window, lease, limit, concurrent, all_limit, interval, burst, route, route_interval, route_burst =
    string.match(words, LIMITS)
  window, lease, limit, concurrent = tonumber(window), tonumber(lease), tonumber(limit), tonumber(concurrent)
  all_limit, interval, burst = tonumber(all_limit), tonumber(interval), tonumber(burst)
  route_interval, route_burst = tonumber(route_interval), tonumber(route_burst)
end

-- Exchange id; key id; window, µs; lease, µs; then limits, for each of which 0 is none: the key's requests a window; its
-- concurrent requests; requests a window of all keys together; µs a request and burst of the key's bucket; route, µs a
-- request and burst of its bucket. Answers a refusal, or 0 and what is left of the key's requests a window.
function operations.admit(words)
  local space = string.find(words, " ", 1, true)
  local id, limits = string.sub(words, 1, space - 1), string.sub(words, space + 1)
  if limits ~= read then read_limits(limits) end
  local requests, leases, rate, route_rate = REQUESTS_OF .. key, LEASES_OF .. key, "k:" .. key, "r:" .. route

  local taken = count_requests(requests, limit, window)
  if limit > 0 and taken >= limit then
    return refusal(REQUESTS, ends_in(requests, -1, window), ends_in(requests, taken - limit, window))
  end
  if concurrent > 0 and count(leases, concurrent, now, now + lease + CLOCK_SKEW) >= concurrent then
    return refusal(CONCURRENT, 0, 0) -- nobody knows when a request ends
  end
  local all_taken = count_requests(ALL, all_limit, window)
  if all_limit > 0 and all_taken >= all_limit then
    return refusal(ALL_REQUESTS, ends_in(ALL, -1, window), ends_in(ALL, all_taken - all_limit, window))
  end
  local full_at, wait = bucket(rate, interval, burst)
  if wait >= 1 then return refusal(RATE, full_at - now, wait) end
  local route_full_at, route_wait = bucket(route_rate, route_interval, route_burst)
  if route_wait >= 1 then return refusal(ROUTE_RATE, route_full_at - now, route_wait) end

  if limit > 0 then add(requests, id, now, window) end
  if concurrent > 0 then add(leases, id, now + lease, lease) end
  if all_limit > 0 then add(ALL, id, now, window) end
  if interval > 0 then take(rate, full_at + interval) end
  if route_interval > 0 then take(route_rate, route_full_at + route_interval) end
  return string.format("0 %d", math.max(limit - taken - 1, 0))
end

-- Key id; exchange id; lease, µs.
function operations.renew(words)
  local key, id, lease = string.match(words, "^(%S+) (%S+) (%d+)")
  lease = tonumber(lease)
  add(LEASES_OF .. key, id, now + lease, lease)
end

-- Key id; exchange id.
function operations.release(words)
  local key, id = string.match(words, "^(%S+) (%S+)")
  remove(LEASES_OF .. key, id)
end
