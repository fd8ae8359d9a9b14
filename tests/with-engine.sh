#!/usr/bin/env bash
# Runs a command with a Docker engine and all images of the project at hand, and stops the engine afterwards if it started it.
# Where there is none and none can be had, it says so and runs the command all the same: tests that need one are skipped then,
# or fail with ESPALIER_REQUIRE_ENGINE=1.
set -euo pipefail
cd "$(dirname "$0")/.."

without() {
  echo "$1: tests that need containers are skipped" >&2
  [ "${ESPALIER_REQUIRE_ENGINE:-}" != 1 ] || exit 3
  "${@:2}"
  exit
}

build() { docker compose --progress quiet --profile load build; }

if ! { docker version && docker compose version; } > /dev/null 2>&1; then
  [ "$(id -u)" = 0 ] && [ -f /etc/debian_version ] || without "no Docker engine answers, and none can be installed here" "$@"
  trap 'deploy/install-engine.sh stop > /dev/null 2>&1 || true' EXIT
  deploy/install-engine.sh || without "no Docker engine could be brought up" "$@"
fi
# Where no registry is reached, the base image has to be made here.
build 2> /dev/null || deploy/base-image.sh || without "no base image could be had" "$@"
build || without "the images could not be built" "$@"
"$@"
