-- Gives an Idempotency-Key to one request at a time and keeps the answer of the one that succeeded; never trusts a
-- router's clock.
--
-- KEYS[1] is a hash about the key. It holds the digest of the request, and while one runs its token; of one that has
-- succeeded the type of its answer, its request id, and the compressed answer, unless that was too large.
-- KEYS[2] is a hash about the organization: for each hour, counted from 1970, the bytes that were kept in it.

local operation = ARGV[1]
-- What an entry takes besides its answer, roughly.
local overhead_bytes = 256
local kept_hours = 24

local function hour()
  return math.floor(redis.call('TIME')[1] / 3600)
end

local function claim(digest, token, lease_ms)
  redis.call('HSET', KEYS[1], 'digest', digest, 'token', token)
  redis.call('PEXPIRE', KEYS[1], lease_ms)
end

-- Adds: the request's digest, a token, the lease in milliseconds, the bytes that an organization may have kept.
-- Answers with what became of it; if an answer was kept, with its type, its request id and itself.
if operation == 'claim' then
  local digest, token, lease_ms, limit_bytes = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
  local found = redis.call('HMGET', KEYS[1], 'digest', 'token', 'type', 'request', 'answer')
  if found[1] then
    if found[1] ~= digest then return {'reused'} end
    if found[2] then return {'in_use'} end
    if not found[5] then return {'too_large'} end
    return {'replayed', found[3], found[4], found[5]}
  end
  local oldest, kept_bytes = hour() - kept_hours, 0
  local by_hour = redis.call('HGETALL', KEYS[2])
  for at = 1, #by_hour, 2 do
    if tonumber(by_hour[at]) < oldest then
      redis.call('HDEL', KEYS[2], by_hour[at])
    else
      kept_bytes = kept_bytes + by_hour[at + 1]
    end
  end
  if kept_bytes >= limit_bytes then return {'full'} end
  claim(digest, token, lease_ms)
  return {'claimed'}
end

-- Adds: the request's digest, its token, the lease in milliseconds. A claim that Redis has lost is there again.
if operation == 'renew' then
  local digest, token, lease_ms = ARGV[2], ARGV[3], ARGV[4]
  if redis.call('EXISTS', KEYS[1]) == 0 then
    claim(digest, token, lease_ms)
  elseif redis.call('HGET', KEYS[1], 'token') == token then
    redis.call('PEXPIRE', KEYS[1], lease_ms)
  end
  return 1
end

-- Adds: the request's digest, its token, the type of the answer, the request id, and the answer unless it is too large.
-- Answers with 0 where the key is another's, because the lease had ended.
if operation == 'keep' then
  local digest, token, type, request, answer = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
  local found = redis.call('HMGET', KEYS[1], 'digest', 'token')
  if found[1] and found[2] ~= token then return 0 end
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'digest', digest, 'type', type, 'request', request)
  if answer then redis.call('HSET', KEYS[1], 'answer', answer) end
  redis.call('EXPIRE', KEYS[1], kept_hours * 3600)
  redis.call('HINCRBY', KEYS[2], hour(), overhead_bytes + #(answer or ''))
  redis.call('EXPIRE', KEYS[2], (kept_hours + 1) * 3600)
  return 1
end

-- Adds: the request's token.
if operation == 'release' then
  if redis.call('HGET', KEYS[1], 'token') ~= ARGV[2] then return 0 end
  return redis.call('DEL', KEYS[1])
end

return redis.error_reply('ERR unknown operation')
