#!/bin/sh
# Make what compose.yaml mounts below /run/secrets: the password of Redis, and who may do what there.
#   deploy/docker/make-secrets.sh [DIRECTORY]
# Files that are there stay as they are: Redis and the search service would not agree any more.
set -eu

directory=${1:-$(dirname "$0")/secrets}
password=$directory/redis-password
users=$directory/redis-users.acl
if [ -e "$password" ] || [ -e "$users" ]; then
  echo "$directory has secrets already: delete them first if you want new ones" >&2
  exit 1
fi

# Compose mounts files as they are, and the containers' users are others than yours: the directory
# keeps people out, not the files' own modes.
mkdir -p "$directory"
chmod 700 "$directory"
umask 022
openssl rand -hex 32 >"$password"
hash=$(tr -d '\n' <"$password" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
# Who gives no password may ask whether Redis is there, for its health check, and nothing else. The
# commands of the other one are all that the search service needs (docs/operations.md, Redis).
cat >"$users" <<END
user default on nopass resetkeys resetchannels -@all +ping
user hashlens on #$hash resetchannels ~hl:* -@all +info +config|get +bgrewriteaof +evalsha +script|load +client|id +client|unblock +exists +expire +hdel +hget +hgetall +hkeys +hlen +hmget +hset +hsetnx +hvals +sadd +smembers +srem +time +unlink +xadd +xlen +xrange +xread +xtrim
END
echo "$password and $users are made"
