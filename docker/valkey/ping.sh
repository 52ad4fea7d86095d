#!/bin/sh
# Succeeds once the store answers its user.
REDISCLI_AUTH=$(cat /run/timernn/store-password)
export REDISCLI_AUTH
valkey-cli --user timernn ping | grep -q PONG
