-- Admits a request of one organization under all of its limits, or takes nothing; never trusts a router's clock.
--
-- A scope is an organization, a principal, or one of them with one model. KEYS holds two keys for each:
--   state   three doubles: when it was written (microseconds), the requests and the tokens that were in use then
--   leases  a sorted set of the requests that run, each with the time at which its slot is free unless it is renewed
-- ARGV holds the operation, the lease in microseconds, and four numbers for each scope: requests per second, burst,
-- tokens per minute, concurrent requests; 0 where the scope has no such limit. What each operation adds follows them.
--
-- Requests and tokens are GCRA, as ITU-T I.371 writes it with a continuous-state leaky bucket: what is in use drains at
-- the sustained rate, fractions and all, and a request is admitted if it fits under the burst. router/rate_limits.py
-- does the same arithmetic for a router that is alone.

local operation, lease = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local scopes = #KEYS / 2
local first = 3 + 4 * scopes
-- A limit is reached a millionth of a unit late, so that waiting for exactly as long as was told always helps.
local slack = 1e-6

local function limits(scope)
  local at = 4 * scope - 1
  return tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
end

local function in_use(scope, rate, per_minute)
  local state = redis.call('GET', KEYS[2 * scope - 1])
  if not state then return 0, 0 end
  local written, requests, tokens = struct.unpack('ddd', state)
  -- A replica that took over may have another clock.
  local elapsed = math.max(0, now - written)
  return math.max(0, requests - elapsed * rate / 1e6), math.max(0, tokens - elapsed * per_minute / 6e7)
end

local function keep(scope, requests, tokens, rate, per_minute)
  local drained_s = 0
  if rate > 0 then drained_s = requests / rate end
  if per_minute > 0 then drained_s = math.max(drained_s, 60 * tokens / per_minute) end
  local state = struct.pack('ddd', now, requests, tokens)
  redis.call('SET', KEYS[2 * scope - 1], state, 'PX', math.ceil(drained_s) * 1000 + 1000)
end

local function lend(scope, member)
  redis.call('ZADD', KEYS[2 * scope], now + lease, member)
  redis.call('PEXPIRE', KEYS[2 * scope], math.ceil(lease / 1000))
end

-- Adds: a name for the request, its ceiling of tokens. Answers with
--   what refuses it (0 nothing, 1 requests, 2 tokens, 3 concurrency), in which scope, for how many milliseconds;
--   the scope with the fewest requests left, how many, and milliseconds until all are back; the same for tokens, or 0.
if operation == 'admit' then
  local member, cost = ARGV[first], tonumber(ARGV[first + 1])
  local kind, refusing, wait = 0, 0, -1
  local used = {}
  for scope = 1, scopes do
    local rate, burst, per_minute, slots = limits(scope)
    local requests, tokens = in_use(scope, rate, per_minute)
    used[scope] = {rate, burst, per_minute, slots, requests, tokens}
    if rate > 0 and requests + 1 > burst + slack then
      local until_free = (requests + 1 - burst) / rate * 1000
      if until_free > wait then kind, refusing, wait = 1, scope, until_free end
    end
    if per_minute > 0 and tokens + cost > per_minute + slack then
      local until_free = (tokens + cost - per_minute) / per_minute * 60000
      if until_free > wait then kind, refusing, wait = 2, scope, until_free end
    end
    if slots > 0 and redis.call('ZCARD', KEYS[2 * scope]) >= slots then
      redis.call('ZREMRANGEBYSCORE', KEYS[2 * scope], '-inf', now)
      -- When a running request will end is not known.
      if redis.call('ZCARD', KEYS[2 * scope]) >= slots and wait < 0 then kind, refusing, wait = 3, scope, 0 end
    end
  end

  local answer = {kind, refusing, math.ceil(math.max(wait, 0)), 0, 0, 0, 0, 0, 0}
  for scope = 1, scopes do
    local rate, burst, per_minute, slots, requests, tokens = unpack(used[scope])
    if kind == 0 then
      requests, tokens = requests + 1, tokens + cost
      keep(scope, requests, tokens, rate, per_minute)
      if slots > 0 then lend(scope, member) end
    end
    if rate > 0 then
      local left = math.max(0, math.floor(burst - requests + slack))
      if answer[4] == 0 or left < answer[5] then
        answer[4], answer[5], answer[6] = scope, left, math.ceil(requests / rate * 1000)
      end
    end
    if per_minute > 0 then
      local left = math.max(0, math.floor(per_minute - tokens + slack))
      if answer[7] == 0 or left < answer[8] then
        answer[7], answer[8], answer[9] = scope, left, math.ceil(tokens / per_minute * 60000)
      end
    end
  end
  return answer
end

-- Adds: the request's name, its tokens less those it was admitted with. A request that is no longer known, because it
-- was settled or its lease has ended, changes nothing.
if operation == 'settle' then
  local member, correction = ARGV[first], tonumber(ARGV[first + 1])
  local known = 0
  for scope = 1, scopes do
    known = known + redis.call('ZREM', KEYS[2 * scope], member)
  end
  if known > 0 and correction ~= 0 then
    for scope = 1, scopes do
      local rate, _, per_minute = limits(scope)
      if per_minute > 0 then
        local requests, tokens = in_use(scope, rate, per_minute)
        keep(scope, requests, math.max(0, tokens + correction), rate, per_minute)
      end
    end
  end
  return known
end

-- Adds: names of requests that still run. Those that are no longer known are known again.
if operation == 'renew' then
  for scope = 1, scopes do
    local _, _, _, slots = limits(scope)
    if slots > 0 then
      for at = first, #ARGV do lend(scope, ARGV[at]) end
    end
  end
  return #ARGV - first + 1
end

return redis.error_reply('ERR unknown operation')
