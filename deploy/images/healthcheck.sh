#!/usr/bin/env bash
# healthcheck PORT PATH: does this container answer GET PATH on PORT with 200? No interpreter starts: it is asked every 2 s.
set -euo pipefail
exec 3<> "/dev/tcp/127.0.0.1/$1"
printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$2" >&3
read -r -t 2 _ status _ <&3
[ "$status" = 200 ]
