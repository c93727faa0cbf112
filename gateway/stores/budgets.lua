-- Charges budgets. What an exchange may use is charged when it is reserved and corrected when it is settled; a hold says
-- what is charged for it so far. An exchange has several payers (its key, its account, the deployment): all of them are
-- charged or none.
--
-- aig:spent:EPOCH:PAYER:MONTH  a hash: `micros`, and for each day `tokens:DAY` and `micros:DAY`. Made from the ledger,
--                              and forgotten when nobody charged it for LIFE: then the ledger has it all
-- aig:hold:EPOCH:ID            of the exchange ID: tokens and micros that are charged, day, and for each payer its name,
--                              its tokens a minute, and 1 when it has a counter
-- aig:owed:ID                  a sum that was charged once and must not be charged again
-- aig:pace:PAYER               a token bucket of as many tokens as the payer may use a minute: when it will be full
--                              again, µs
--
-- DAY is YYYYMMDD and MONTH its YYYYMM, by the gateways' clocks, as in the ledger. Micros are micro-dollars. All numbers stay
-- below 2^53, which Lua counts exactly.
--
-- What has the epoch in its name is not found again after the memory was lost, even when a part of it came back.

local GRANTED, UNKNOWN, EXHAUSTED, TOO_FAST = 0, 1, 2, 3
local TOKENS_A_DAY, MICROS_A_DAY, MICROS_A_MONTH = 1, 2, 3

-- Of counters and holds, which are renewed while an exchange runs. A hold must not live longer than the counters that
-- it charged: others that were made since do not have what is given back. So long somebody may find the journal of a
-- process that was killed, and settle exactly.
local LIFE = 60 * 60 -- s
local MINUTE = 60 * 1000000 -- µs
local LONGEST_DEBT = 60 * MINUTE -- of a bucket; and it may be wrong by no more when the clock was set back

local PAYER = "(%S+) (%d+) (%d+) (%d+) (%d+)"

-- --- counters and buckets ----------------------------------------------------------------------------------------

local function counter(payer, day)
  return "aig:spent:" .. epoch .. ":" .. payer .. ":" .. string.sub(day, 1, 6)
end

-- False when there is no such counter.
local function charge(key, day, tokens, micros)
  if redis.call("EXPIRE", key, LIFE) == 0 then return false end
  if tokens ~= 0 then redis.call("HINCRBY", key, "tokens:" .. day, whole(tokens)) end
  if micros ~= 0 then
    redis.call("HINCRBY", key, "micros:" .. day, whole(micros))
    redis.call("HINCRBY", key, "micros", whole(micros))
  end
  return true
end

-- µs until the bucket is full again: above a minute it holds less than nothing.
local function full_after(payer)
  local full_at = tonumber(redis.call("GET", "aig:pace:" .. payer) or 0)
  return math.min(math.max(full_at - now, 0), LONGEST_DEBT)
end

local function pace(payer, per_minute, tokens)
  local key, after = "aig:pace:" .. payer, full_after(payer) + tokens * MINUTE / per_minute
  if after >= 1 then
    redis.call("SET", key, string.format("%.2f", now + after), "PX", math.ceil(after / 1000))
  elseif tokens < 0 then
    redis.call("DEL", key)
  end
end

-- --- holds -------------------------------------------------------------------------------------------------------

local function hold_of(id)
  return "aig:hold:" .. epoch .. ":" .. id
end

local function read_hold(id)
  local text = redis.call("GET", hold_of(id))
  if not text then return nil end
  local tokens, micros, day, payers = string.match(text, "^(%d+) (%d+) (%d+) (.*)$")
  return {tokens = tonumber(tokens), micros = tonumber(micros), day = day, payers = payers}
end

local function write_hold(id, tokens, micros, day, payers)
  local text = table.concat({whole(tokens), whole(micros), day, payers}, " ")
  redis.call("SET", hold_of(id), text, "EX", LIFE)
end

-- Charges all payers of a hold what it holds more, or less, than before.
local function charge_all(payers, day, tokens, micros)
  for payer, per_minute, counted in string.gmatch(payers, "(%S+) (%d+) (%d)") do
    if counted == "1" then charge(counter(payer, day), day, tokens, micros) end
    if per_minute ~= "0" and tokens ~= 0 then pace(payer, tonumber(per_minute), tokens) end
  end
end

-- --- reserving ---------------------------------------------------------------------------------------------------

local function read_payer(day, name, per_minute, tokens_a_day, micros_a_day, micros_a_month)
  local payer = {name = name, per_minute = tonumber(per_minute)}
  local limits = {tonumber(tokens_a_day), tonumber(micros_a_day), tonumber(micros_a_month)}
  payer.counted = limits[1] > 0 or limits[2] > 0 or limits[3] > 0
  if not payer.counted then return payer end
  local spent = redis.call("HMGET", counter(name, day), "tokens:" .. day, "micros:" .. day, "micros")
  payer.unknown = not spent[3] -- a day that is missing has seen no charge yet
  payer.left = {}
  for which, limit in ipairs(limits) do
    payer.left[which] = limit > 0 and limit - tonumber(spent[which] or 0) or math.huge
  end
  return payer
end

-- What an exchange costs that gets so much output, of `want.output` tokens for `want.output_micros`.
local function price_of(want, output)
  return want.prompt_micros + math.ceil(want.output_micros * output / want.output)
end

-- Tokens of output that this much money pays for, at most those that are wanted.
local function output_for(want, micros)
  local all = price_of(want, want.output)
  if all == 0 or micros >= all then return want.output end
  if micros < want.prompt_micros then return -1 end
  return math.floor((micros - want.prompt_micros) * want.output / want.output_micros)
end

-- Tokens of output, in all, that all payers can pay for; else which payer's which budget has the least left.
local function affordable(want, held, payers)
  local output, short_payer, short_budget = want.output, 0, 0
  for index, payer in ipairs(payers) do
    for which, left in ipairs(payer.left or {}) do
      local most = which == TOKENS_A_DAY and left + held.tokens - want.prompt or output_for(want, left + held.micros)
      if most < output then output, short_payer, short_budget = most, index, which end
    end
  end
  return output, short_payer, short_budget
end

-- Which payer uses its tokens too fast for this prompt and one token more, and µs until it will not. A prompt that is
-- larger than the whole bucket passes when it is full.
local function too_fast(want, payers)
  local slowest, longest = 0, 0
  for index, payer in ipairs(payers) do
    if payer.per_minute > 0 then
      local needed = math.min(want.prompt + 1, payer.per_minute) * MINUTE / payer.per_minute
      local wait = full_after(payer.name) + needed - MINUTE
      if wait >= 1 and wait > longest then slowest, longest = index, wait end
    end
  end
  return slowest, longest
end

local function shown(number)
  return number == math.huge and "-1" or whole(math.max(number, 0))
end

-- Tokens that may be used at once by the payer whose bucket has the fewest; who it is; and µs until it is full again.
local function tightest(payers)
  local who, fewest, after = 0, math.huge, 0
  for index, payer in ipairs(payers) do
    if payer.per_minute > 0 then
      local full = full_after(payer.name)
      local tokens = math.max(math.floor((MINUTE - full) * payer.per_minute / MINUTE + 0.001), 0)
      if tokens < fewest then who, fewest, after = index, tokens, full end
    end
  end
  return table.concat({who, who > 0 and whole(fewest) or "0", whole(math.ceil(after))}, " ")
end

local function hold_payers(payers)
  local words = {}
  for index, payer in ipairs(payers) do
    words[index] = table.concat({payer.name, whole(payer.per_minute), payer.counted and "1" or "0"}, " ")
  end
  return table.concat(words, " ")
end

local RESERVE = "^(%S+)" .. string.rep(" (%d+)", 5) .. " (.*)$"

local function reserve(words, first)
  local id, day, prompt, output, prompt_micros, output_micros, rest = string.match(words, RESERVE)
  local want = {
    prompt = tonumber(prompt), output = tonumber(output),
    prompt_micros = tonumber(prompt_micros), output_micros = tonumber(output_micros),
  }
  local payers, unknown = {}, {UNKNOWN}
  for name, per_minute, tokens_a_day, micros_a_day, micros_a_month in string.gmatch(rest, PAYER) do
    payers[#payers + 1] = read_payer(day, name, per_minute, tokens_a_day, micros_a_day, micros_a_month)
    if payers[#payers].unknown then unknown[#unknown + 1] = #payers end
  end
  if #unknown > 1 then return table.concat(unknown, " ") end

  local before = read_hold(id) or {tokens = 0, micros = 0}
  local granted, short_payer, short_budget = affordable(want, before, payers)
  if first and granted < 1 then return table.concat({EXHAUSTED, short_payer, short_budget}, " ") end
  if first then
    local payer, wait = too_fast(want, payers)
    if payer > 0 then return table.concat({TOO_FAST, payer, whole(math.ceil(wait))}, " ") end
  end

  local tokens, micros = want.prompt + granted - before.tokens, 0
  if tokens > 0 then
    micros = math.max(price_of(want, granted) - before.micros, 0)
    local text = hold_payers(payers)
    charge_all(text, day, tokens, micros)
    write_hold(id, before.tokens + tokens, before.micros + micros, day, text)
  else
    granted, tokens = math.max(before.tokens - want.prompt, 0), 0
  end
  local answer = {GRANTED, whole(granted), tightest(payers)}
  for _, payer in ipairs(payers) do
    local left = payer.left or {math.huge, math.huge, math.huge}
    answer[#answer + 1] = shown(left[TOKENS_A_DAY] - tokens)
    answer[#answer + 1] = shown(math.min(left[MICROS_A_DAY], left[MICROS_A_MONTH]) - micros)
  end
  return table.concat(answer, " ")
end

-- --- operations --------------------------------------------------------------------------------------------------

-- Exchange id; day; tokens of the prompt; tokens of output that are wanted in all; micros of that prompt, and of
-- that output; for each payer its name and budgets: tokens a minute, tokens a day, micros a day, micros a month (0: no
-- limit). Less output is granted when less is left. One of:
--   GRANTED; tokens of output, in all; of the payer that is nearest to its tokens a minute (0: none has such a limit)
--     number, tokens that are left, µs until all are; and for each payer tokens and micros that are left (-1: no limit)
--   UNKNOWN; numbers of the payers whose counters are missing
--   EXHAUSTED; number of the payer; which of its budgets
--   TOO_FAST; number of the payer; µs until it may use so many tokens
function operations.reserve(words)
  return reserve(words, true)
end

-- The same for more output of an exchange that runs, which is not refused: it gets what it had, or more.
function operations.extend(words)
  return reserve(words, false)
end

-- Exchange id; day; tokens; micros; payers as a hold has them. The exchange runs and may use so much: what Redis
-- does not know of it is charged. 1, or 0 when a counter is missing: then nothing was done.
function operations.keep(words)
  local id, day, tokens, micros, payers = string.match(words, "^(%S+) (%d+) (%d+) (%d+) (.*)$")
  local before = read_hold(id) or {tokens = 0, micros = 0}
  for payer, counted in string.gmatch(payers, "(%S+) %d+ (%d)") do
    if counted == "1" and redis.call("EXPIRE", counter(payer, day), LIFE) == 0 then return "0" end
  end
  tokens, micros = math.max(tonumber(tokens), before.tokens), math.max(tonumber(micros), before.micros)
  charge_all(payers, day, tokens - before.tokens, micros - before.micros)
  write_hold(id, tokens, micros, day, payers)
  return "1"
end

-- Exchange id; tokens; micros; and by whom it was reserved: the epoch of the hold, day, payers as a hold has them.
-- What it used in the end. Without a hold nothing is done: it was settled. Unless the hold was lost with the memory:
-- then the counters that were made since do not have it yet.
function operations.settle(words)
  local id, tokens, micros, rest = string.match(words, "^(%S+) (%d+) (%d+)(.*)$")
  tokens, micros = tonumber(tokens), tonumber(micros)
  local held = read_hold(id)
  if held then
    charge_all(held.payers, held.day, tokens - held.tokens, micros - held.micros)
    redis.call("DEL", hold_of(id))
    return
  end
  local of_epoch, day, payers = string.match(rest, "^ (%d+) (%d+) (.*)$")
  if of_epoch and of_epoch ~= epoch then charge_all(payers, day, tokens, micros) end
end

-- Id of the sum; epoch; payer; day; tokens; micros. What a payer used while Redis was gone; a memory that was
-- lost meanwhile is made from the ledger, which has it.
function operations.owe(words)
  local id, of_epoch, payer, day, tokens, micros = string.match(words, "^(%S+) (%d+) (%S+) (%d+) (%d+) (%d+)$")
  if of_epoch == epoch and redis.call("SET", "aig:owed:" .. id, "", "NX", "EX", LIFE) then
    charge(counter(payer, day), day, tonumber(tokens), tonumber(micros))
  end
end

-- Payer; day; tokens and micros of the day; micros of the month. From the ledger; a counter that somebody made
-- meanwhile stays.
function operations.seed(words)
  local payer, day, tokens, micros, micros_month = string.match(words, "^(%S+) (%d+) (%d+) (%d+) (%d+)$")
  local key = counter(payer, day)
  if redis.call("EXISTS", key) == 1 then return end
  redis.call("HSET", key, "tokens:" .. day, tokens, "micros:" .. day, micros, "micros", micros_month)
  redis.call("EXPIRE", key, LIFE)
end

-- Payer; day. Tokens and micros of the day, and micros of the month; nothing when the counter is missing.
function operations.spent(words)
  local payer, day = string.match(words, "^(%S+) (%d+)$")
  local spent = redis.call("HMGET", counter(payer, day), "tokens:" .. day, "micros:" .. day, "micros")
  if not spent[3] then return end
  return table.concat({spent[1] or "0", spent[2] or "0", spent[3]}, " ")
end
