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

local function count(key, limit, ended, latest)
  redis.call("ZREMRANGEBYSCORE", key, "-inf", ended)
  local members = redis.call("ZCARD", key)
  if members < limit then return members end
  return members - redis.call("ZREMRANGEBYSCORE", key, latest + 1, "+inf")
end

local function count_requests(key, limit, window)
  return limit > 0 and count(key, limit, now - window, now + CLOCK_SKEW) or 0
end

-- µs until the request of that rank, oldest first, leaves the window.
local function ends_in(key, rank, window)
  return tonumber(redis.call("ZRANGE", key, rank, rank, "WITHSCORES")[2]) + window - now
end

local function record_request(key, id, window)
  redis.call("ZADD", key, now, id)
  redis.call("PEXPIRE", key, math.ceil(window / 1000))
end

local function renew(leases, id, lease)
  redis.call("ZADD", leases, now + lease, id)
  redis.call("PEXPIRE", leases, math.ceil(lease / 1000))
end

-- --- token buckets -----------------------------------------------------------------------------------------------

-- When the bucket will be full again, and in how many µs it holds one more (not above 0: it does). `interval` is µs a
-- request, 0: there is no bucket.
local function bucket(key, interval, burst)
  if interval == 0 then return now, 0 end
  local full_at = tonumber(redis.call("GET", key) or 0)
  if full_at > now + burst * interval + CLOCK_SKEW then full_at = 0 end
  full_at = math.max(full_at, now)
  return full_at, full_at - (burst - 1) * interval - now
end

local function take(key, full_at)
  redis.call("SET", key, string.format("%.2f", full_at), "PX", math.ceil((full_at - now) / 1000))
end

-- --- operations --------------------------------------------------------------------------------------------------

-- The limit that refused it, µs until that window is empty or that bucket full again, and µs until it has room for one
-- more (0: not known).
local function refusal(which, empty_after, room_after)
  return string.format("%d %.0f %.0f", which, math.ceil(empty_after), math.ceil(room_after))
end

local ADMIT = "^(%S+) (%S+)" .. string.rep(" ([%d.]+)", 7) .. " (%S+) ([%d.]+) ([%d.]+)$"

-- Key id; exchange id; window, µs; lease, µs; then limits, for each of which 0 is none: the key's requests a window; its
-- concurrent requests; requests a window of all keys together; µs a request and burst of the key's bucket; route, µs a
-- request and burst of its bucket. Answers a refusal, or 0 and what is left of the key's requests a window.
function operations.admit(words)
  local key, id, window, lease, limit, concurrent, all_limit, interval, burst, route, route_interval, route_burst =
    string.match(words, ADMIT)
  local requests, leases = REQUESTS_OF .. key, LEASES_OF .. key
  local rate, route_rate = RATE_OF .. "k:" .. key, RATE_OF .. "r:" .. route
  window, lease, limit, concurrent = tonumber(window), tonumber(lease), tonumber(limit), tonumber(concurrent)
  all_limit, interval, route_interval = tonumber(all_limit), tonumber(interval), tonumber(route_interval)

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
  local full_at, wait = bucket(rate, interval, tonumber(burst))
  if wait >= 1 then return refusal(RATE, full_at - now, wait) end
  local route_full_at, route_wait = bucket(route_rate, route_interval, tonumber(route_burst))
  if route_wait >= 1 then return refusal(ROUTE_RATE, route_full_at - now, route_wait) end

  if limit > 0 then record_request(requests, id, window) end
  if concurrent > 0 then renew(leases, id, lease) end
  if all_limit > 0 then record_request(ALL, id, window) end
  if interval > 0 then take(rate, full_at + interval) end
  if route_interval > 0 then take(route_rate, route_full_at + route_interval) end
  return string.format("0 %d", math.max(limit - taken - 1, 0))
end

-- Key id; exchange id; lease, µs.
function operations.renew(words)
  local key, id, lease = string.match(words, "^(%S+) (%S+) (%d+)")
  renew(LEASES_OF .. key, id, tonumber(lease))
end

-- Key id; exchange id.
function operations.release(words)
  local key, id = string.match(words, "^(%S+) (%S+)")
  redis.call("ZREM", LEASES_OF .. key, id)
end
