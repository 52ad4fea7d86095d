#!/bin/sh
# Starts the store: append-only, never evicting, with one user who may do what the service does and no more.
# The user's rights are those of service/store/permissions.py, which a test compares. The password stays
# out of the command line and the environment: the store gets its SHA-256 on standard input.
set -eu
digest=$(tr -d '\r\n' </run/timernn/store-password | sha256sum | cut -d ' ' -f 1)
# Floats do not shrink, and training makes the append-only file grow fast.
exec valkey-server - <<CONFIG
bind * -::*
dir /data
appendonly yes
appendfsync everysec
save ""
rdbcompression no
auto-aof-rewrite-min-size 256mb
maxmemory 2gb
maxmemory-policy noeviction
user default reset off
user timernn reset on #$digest ~s{* ~m{* ~t{* ~r{* -@all +ping +eval +evalsha +info +exists +get +getrange +persist +pexpire +pexpiretime +pttl +rename +set +setrange +strlen +time +unlink +hdel +hget +hgetall +hincrby +hkeys +hlen +hmget +hset +zadd +zcard +zcount +zrange +zrangebylex +zrangebyscore +zrem +zscore
CONFIG
