"""The Lua scripts that run inside Redis, each one atomic step.

They are plain scripts and not a function library; ``docs/adr/0001-lua-scripts-not-functions.md``
says why. Each checks the epoch first, so a process that still believes in a dropped collection
changes nothing in the one that has its name now. All keys are declared and share one hash tag.
"""

from __future__ import annotations

from typing import Final

_EPOCH = """
local call = redis.call
local meta = call('HMGET', KEYS[1], 'epoch', 'state', 'seq', 'n_items')
if not meta[1] then return {'missing'} end
if meta[1] ~= ARGV[1] then return {'epoch', meta[1]} end
"""

_CLOCK = """
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function touch(key, id)
  local seen = call('HGET', key, id)
  local rest = seen and string.match(seen, ' .*') or ' 0 '
  call('HSET', key, id, string.format('%.0f', now) .. rest)
end
"""

_GUARD = "#!lua" + _EPOCH

# A full memory must not keep from running what frees it.
_FREEING_GUARD = "#!lua flags=allow-oom" + _EPOCH

_WRITABLE = (
    _GUARD
    + """
if meta[2] ~= 'active' then return {meta[2]} end
if tonumber(meta[3]) < tonumber(ARGV[6]) then return {'behind', meta[3]} end
local seen = call('HMGET', KEYS[3], 'digest', 'seq', 'count')
if seen[1] then
  if seen[1] ~= ARGV[2] then return {'conflict'} end
  return {'ok', seen[2], seen[3]}
end
local sub, pack, unpack = string.sub, struct.pack, struct.unpack
local seq, n_items, count = tonumber(meta[3]), tonumber(meta[4]), 0
local body, code_bytes = ARGV[4], tonumber(ARGV[5])
local at, size = 1, #ARGV[4]
"""
)

_READING = (
    "#!lua flags=no-writes"
    + _EPOCH
    + """
if meta[2] ~= 'active' then return {meta[2]} end
"""
)

_WRITTEN = """
local last = string.format('%.0f', seq)
call('HSET', KEYS[1], 'seq', last, 'n_items', string.format('%.0f', n_items))
call('HSET', KEYS[3], 'digest', ARGV[2], 'seq', last, 'count', count)
call('EXPIRE', KEYS[3], ARGV[3])
return {'ok', last, count}
"""

CREATE: Final = """#!lua
local call = redis.call
if call('EXISTS', KEYS[1]) == 0 then
  call('HSET', KEYS[1], 'seq', 0, 'n_items', 0, 'state', 'active', unpack(ARGV))
end
return call('HGETALL', KEYS[1])
"""
"""KEYS meta; ARGV field, value, ... Makes the collection unless it is there; returns the meta."""

PUT: Final = (
    _WRITABLE
    + """
while at <= size do
  local bucket, op, id_bytes, payload_bytes, feature_bytes = unpack('<I4BI2I4I4', body, at)
  local record = at + 4
  local id_at = record + 11
  local code_at = id_at + id_bytes
  local payload_at = code_at + code_bytes
  local feature_at = payload_at + payload_bytes
  at = feature_at + feature_bytes
  seq, count = seq + 1, count + 1
  local id = sub(body, id_at, code_at - 1)
  local value = pack('<I8', seq) .. sub(body, code_at, payload_at - 1)
  call('XADD', KEYS[2], string.format('%.0f-1', seq), 'r', sub(body, record, at - 1))
  local added = call('HSET', KEYS[4 + 2 * bucket], id, value)
  n_items = n_items + added
  if payload_bytes > 0 then
    call('HSET', KEYS[5 + 2 * bucket], id, sub(body, payload_at, feature_at - 1))
  elseif added == 0 then
    call('HDEL', KEYS[5 + 2 * bucket], id)
  end
end
"""
    + _WRITTEN
)
"""Writes items. KEYS meta, log, request, then the bucket and the payload bucket of each ordinal;
ARGV epoch, digest, seconds to live of the request, body, code length, a seq that Redis is known to
have had. The body is, for each item, the ordinal of its bucket (u32) and its log record. Returns
status, seq, count; a Redis that went back behind the known seq writes nothing."""

DELETE: Final = (
    _WRITABLE
    + """
while at <= size do
  local bucket, op, id_bytes = unpack('<I4BI2', body, at)
  local record = at + 4
  local id_at = record + 11
  at = id_at + id_bytes
  local id = sub(body, id_at, at - 1)
  if call('HDEL', KEYS[4 + 2 * bucket], id) == 1 then
    seq, count, n_items = seq + 1, count + 1, n_items - 1
    call('HDEL', KEYS[5 + 2 * bucket], id)
    call('XADD', KEYS[2], string.format('%.0f-1', seq), 'r', sub(body, record, at - 1))
  end
end
"""
    + _WRITTEN
)
"""Removes items; as `PUT`. Ids that are not there leave no trace."""

EXPIRE: Final = (
    _FREEING_GUARD
    + """
if meta[2] ~= 'active' then return {'dropping'} end
if tonumber(meta[3]) < tonumber(ARGV[3]) then return {'behind', meta[3]} end
local sub, unpack = string.sub, struct.unpack
local clock = call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + tonumber(clock[2]) / 1000
local seq, n_items, count = tonumber(meta[3]), tonumber(meta[4]), 0
local body = ARGV[2]
local at, size = 1, #body
while at <= size do
  local bucket = unpack('<I4', body, at)
  local written = sub(body, at + 4, at + 11)
  local record = at + 12
  local op, id_bytes = unpack('<BI2', body, record)
  local id_at = record + 11
  at = id_at + id_bytes
  local id = sub(body, id_at, at - 1)
  local value = call('HGET', KEYS[3 + 2 * bucket], id)
  local extras = call('HGET', KEYS[4 + 2 * bucket], id)
  if value and extras and sub(value, 1, 8) == written then
    local expires_ms = unpack('<I8', extras)
    if expires_ms > 0 and expires_ms <= now_ms then
      seq, count, n_items = seq + 1, count + 1, n_items - 1
      call('HDEL', KEYS[3 + 2 * bucket], id)
      call('HDEL', KEYS[4 + 2 * bucket], id)
      call('XADD', KEYS[2], string.format('%.0f-1', seq), 'r', sub(body, record, at - 1))
    end
  end
end
if count > 0 then
  local last, left = string.format('%.0f', seq), string.format('%.0f', n_items)
  call('HSET', KEYS[1], 'seq', last, 'n_items', left)
end
return {'ok', string.format('%.0f', seq), count}
"""
)
"""Removes items that have expired by the server's own clock, and have not been written again. KEYS
meta, log, then the bucket and the payload bucket of each ordinal; ARGV epoch, body, a seq that
Redis is known to have had. The body is, for each item, the ordinal of its bucket (u32), the number
of its write (u64), the log record that removes it. Whoever asks again, or late, finds nothing to
do. Returns status, seq, count; a Redis that went back behind the known seq removes nothing."""

REGISTER: Final = (
    _FREEING_GUARD
    + _CLOCK
    + """
if meta[2] ~= 'active' then return {meta[2]} end
touch(KEYS[4], ARGV[2])
if tonumber(ARGV[3]) <= tonumber(meta[3]) then call('HSET', KEYS[3], ARGV[2], ARGV[3]) end
local first = call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
local at = ARGV[4] .. '-1'
local here = call('XRANGE', KEYS[2], at, at)
return {'ok', meta[3], first[1] and first[1][1] or '', here[1] and here[1][2][2] or ''}
"""
)
"""Tells Redis up to where a replica is safe: from there on the log is kept. KEYS meta, log,
replicas, seen; ARGV epoch, replica id, checkpointed seq, applied seq. Returns status, seq, first
entry of the log, the log record at the applied seq."""

TRIM: Final = (
    _FREEING_GUARD
    + _CLOCK
    + """
if meta[2] ~= 'active' then return {meta[2]} end
local own = tonumber(ARGV[3])
if own > tonumber(meta[3]) then return {'behind'} end
touch(KEYS[4], ARGV[2])
call('HSET', KEYS[3], ARGV[2], ARGV[3])
local entry = call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
local first = entry and tonumber(string.match(entry[1], '%d+')) or 0
local seen, floor = {}, own
local found = call('HGETALL', KEYS[4])
for i = 1, #found, 2 do
  local silent = now - tonumber(string.match(found[i + 1], '%d+'))
  if silent > tonumber(ARGV[6]) then
    call('HDEL', KEYS[4], found[i])
    call('HDEL', KEYS[3], found[i])
  elseif silent <= tonumber(ARGV[5]) then
    seen[found[i]] = true
  end
end
found = call('HGETALL', KEYS[3])
for i = 1, #found, 2 do
  local seq = tonumber(found[i + 1])
  if seen[found[i]] and math.max(seq, 1) >= first then floor = math.min(floor, seq) end
end
floor = math.max(floor, own - tonumber(ARGV[4]))
call('XTRIM', KEYS[2], 'MINID', '=', string.format('%.0f-1', floor))
return {'ok', string.format('%.0f', floor)}
"""
)
"""Moves a replica's checkpoint and trims the log to the slowest that is live, within a budget. The
entry at the checkpoint itself stays: by it a replica knows the log for its own. Not waited for are
replicas that were silent for too long and those whose place in the log is gone already. KEYS meta,
log, replicas, seen; ARGV epoch, replica id, checkpointed seq, most entries to keep for slower
replicas, milliseconds of silence after which a replica is not waited for, and after which it is
forgotten. Returns status, seq; a Redis that has lost what the replica holds keeps its log."""

HELLO: Final = (
    _FREEING_GUARD
    + _CLOCK
    + """
call('HSET', KEYS[2], ARGV[2], string.format('%.0f %s %s', now, ARGV[3], ARGV[4]))
return {'ok'}
"""
)
"""Says that a replica is alive, by the server's own clock. KEYS meta, seen; ARGV epoch, replica id,
erased seq, address."""

REPLICAS: Final = (
    "#!lua flags=no-writes"
    + _EPOCH
    + """
local clock = call('TIME')
local first = call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
return {
  'ok', meta[3], first[1] and first[1][1] or '', clock[1], clock[2],
  call('HGETALL', KEYS[3]), call('HGETALL', KEYS[4])
}
"""
)
"""Says which replicas there are. KEYS meta, log, replicas, seen; ARGV epoch. Returns status, seq,
first entry of the log, the server's clock in seconds and microseconds, and both hashes."""

DROP_BEGIN: Final = (
    _FREEING_GUARD
    + """
call('HSET', KEYS[1], 'state', 'dropping')
return {'ok'}
"""
)
"""KEYS meta; ARGV epoch. From here on nothing can be written."""

DROP_KEYS: Final = (
    _FREEING_GUARD
    + """
if meta[2] ~= 'dropping' then return {'active'} end
call('UNLINK', unpack(KEYS, 2))
return {'ok'}
"""
)
"""Removes keys of a collection that is being dropped. KEYS meta, the keys; ARGV epoch."""

DROP_END: Final = (
    _FREEING_GUARD
    + """
if meta[2] ~= 'dropping' then return {'active'} end
call('UNLINK', unpack(KEYS))
return {'ok'}
"""
)
"""Removes what is left of it. KEYS meta, log, replicas, seen; ARGV epoch."""

RESTORE_BEGIN: Final = """#!lua
local call = redis.call
local meta = call('HMGET', KEYS[1], 'epoch', 'state')
if meta[1] then
  if meta[1] == ARGV[1] and meta[2] == 'restoring' then return {'ok'} end
  return {'epoch', meta[1]}
end
call('HSET', KEYS[1], 'epoch', ARGV[1], 'seq', 0, 'n_items', 0, 'state', 'restoring',
  unpack(ARGV, 2))
return {'ok'}
"""
"""KEYS meta; ARGV epoch, field, value, ... Makes a collection that nobody sees yet."""

RESTORE_FILL: Final = (
    _GUARD
    + """
if meta[2] ~= 'restoring' then return {'epoch', meta[1]} end
local sub, unpack = string.sub, struct.unpack
local code_bytes, body, at, size, added = tonumber(ARGV[2]), ARGV[3], 1, #ARGV[3], 0
while at <= size do
  local bucket, _, id_bytes, extras_bytes = unpack('<I4I8I2I4', body, at)
  local id_at = at + 18
  local code_at = id_at + id_bytes
  local extras_at = code_at + code_bytes
  local id = sub(body, id_at, code_at - 1)
  local value = sub(body, at + 4, at + 11) .. sub(body, code_at, extras_at - 1)
  at = extras_at + extras_bytes
  added = added + call('HSET', KEYS[2 + 2 * bucket], id, value)
  if extras_bytes > 0 then
    call('HSET', KEYS[3 + 2 * bucket], id, sub(body, extras_at, at - 1))
  end
end
call('HSET', KEYS[1], 'n_items', string.format('%.0f', tonumber(meta[4]) + added))
return {'ok'}
"""
)
"""Puts items in. KEYS meta, then the bucket and the payload bucket of each ordinal; ARGV epoch,
code length, body: for each item the ordinal of its bucket (u32) and its entry in the export."""

RESTORE_END: Final = (
    _GUARD
    + """
if meta[2] == 'active' then return {'ok', meta[4]} end
if meta[2] ~= 'restoring' then return {'dropping'} end
if meta[4] ~= ARGV[3] then return {'ok', meta[4]} end
if ARGV[2] ~= '0' then call('XADD', KEYS[2], ARGV[2] .. '-1', 'r', ARGV[4]) end
call('HSET', KEYS[1], 'seq', ARGV[2], 'state', 'active')
return {'ok', meta[4]}
"""
)
"""Lets everyone see it, if all items are there. KEYS meta, log; ARGV epoch, seq, number of items,
log record to begin the log with. Returns status, number of items."""
RECORD_DROP: Final = """#!lua flags=allow-oom
return redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
"""
"""KEYS dropped; ARGV epoch, note."""

PROBE: Final = """#!lua
return 1
"""
"""Writes nothing, and is refused where a write would be: a script may write unless it says no."""

SCAN: Final = (
    _READING
    + """
local concat, limit = table.concat, tonumber(ARGV[2])
local ids, values, counts, extras, n = {}, {}, {}, {}, 0
for i = 2, #KEYS, 2 do
  local found = call('HKEYS', KEYS[i])
  counts[#counts + 1] = #found
  extras[#extras + 1] = call('HLEN', KEYS[i + 1])
  if found[1] then
    n = n + #found
    found[#found + 1] = ''
    ids[#ids + 1] = concat(found, '\\255')
    values[#values + 1] = concat(call('HVALS', KEYS[i]))
  end
  if n >= limit then break end
end
return {'ok', counts, extras, concat(ids), concat(values)}
"""
)
"""Reads buckets, whole, until a number of items is reached. KEYS meta, then bucket and payload
bucket, again and again; ARGV epoch, that number. Returns status, the items in each bucket that was
read, the payloads of each, the ids with a byte 255 behind each, which UTF-8 has not, and values."""

LOOK: Final = (
    _READING
    + """
local found = {'ok', meta[3], meta[4]}
for i = 2, #KEYS, 2 do
  found[#found + 1] = call('HGET', KEYS[i], ARGV[i / 2 + 1]) or ''
  found[#found + 1] = call('HGET', KEYS[i + 1], ARGV[i / 2 + 1]) or ''
end
return found
"""
)
"""Looks at items at one moment. KEYS meta, then bucket and payload bucket of each; ARGV epoch, the
ids. Returns status, seq, number of items, then value and extras of each, empty where there are
none."""

MARK: Final = (
    _FREEING_GUARD
    + """
if meta[2] ~= 'active' then return {meta[2]} end
if tonumber(meta[3]) < tonumber(ARGV[3]) then return {'behind', meta[3]} end
local seq = string.format('%.0f', tonumber(meta[3]) + 1)
call('XADD', KEYS[2], seq .. '-1', 'r', ARGV[2])
call('HSET', KEYS[1], 'seq', seq, 'erase_seq', seq)
return {'ok', seq}
"""
)
"""Asks all replicas to erase what is dead by now. The mark is a version of its own: once all have
it safe in their files, the log holds nothing that was written before. KEYS meta, log; ARGV epoch,
the mark's log record, a seq that Redis is known to have had. Returns status, seq."""
