#!/usr/bin/env bash
# deploy/install-engine.sh: a Docker engine with compose v2 and buildx on a Debian machine, from the distribution's packages.
#
#   deploy/install-engine.sh         install what is missing and start the engine; says nothing where all of it is there
#   deploy/install-engine.sh stop    stop the engine, if it was this script that started it
#
# Where an init system runs, the engine is its service; elsewhere (a container, a build machine) this script starts dockerd
# itself, with its pid and log under ESPALIER_ENGINE_DIR (default /run/espalier). Words in DOCKERD_OPTIONS are handed to that
# dockerd. Exit status: 0 ok, 2 something has to be installed or allowed first, 3 a step failed.
set -euo pipefail

readonly DIR=${ESPALIER_ENGINE_DIR:-/run/espalier}
readonly PID_FILE=$DIR/dockerd.pid
readonly LOG=$DIR/dockerd.log
readonly LIMIT_S=60
readonly LATER_SUITE=trixie  # the first Debian with compose v2; its packages need nothing that bookworm lacks

say() { echo "install-engine: $*" >&2; }
stop() { local code=$1; shift; say "$*"; exit "$code"; }

engine_answers() { docker version > /dev/null 2>&1; }
has_compose() { [[ $(docker compose version --short 2> /dev/null) =~ ^v?([2-9]|[1-9][0-9]) ]]; }
has_buildx() { docker buildx version > /dev/null 2>&1; }

need_debian_root() {
  local wanted="a Docker engine of 20.10 or later, compose v2 and buildx"
  command -v apt-get > /dev/null || stop 2 "this machine has no apt: install $wanted, and start the engine"
  [ "$(id -u)" = 0 ] || stop 2 "not root: run this script with sudo, or install $wanted and start the engine"
}

install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null 2>&1; }

install_engine() {
  apt-get update -qq > /dev/null || stop 3 "apt-get update failed"
  # iptables is what the engine's networks are made with, and a mere recommendation.
  install docker.io iptables ca-certificates || stop 3 "apt-get install docker.io failed: run it by hand to see why"
  installed+=(docker.io)
  command -v docker > /dev/null || install docker-cli || stop 3 "apt-get install docker-cli failed: run it by hand to see why"
}

offers_compose() {  # does this machine's own suite have compose v2?
  [[ $(apt-cache policy docker-compose 2> /dev/null) =~ Candidate:\ ([2-9]|[1-9][0-9])\. ]]
}

install_plugins() {
  apt-get update -qq > /dev/null || stop 3 "apt-get update failed"
  if offers_compose; then
    install docker-compose docker-buildx || stop 3 "apt-get install docker-compose docker-buildx failed: run it by hand to see why"
  else
    install_from_later_suite docker-compose docker-buildx
  fi
  installed+=(docker-compose docker-buildx)
}

install_from_later_suite() {  # packages of LATER_SUITE from this machine's own mirror, by an apt configuration made for that
  local mirror
  # shellcheck disable=SC2016  # apt's fields, not ours
  mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' \
    | awk '$1 == "Debian" {print $2; exit}')
  [ -n "$mirror" ] || stop 2 "compose v2 is in no source of apt: install docker-compose 2 and docker-buildx"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial"
  echo "deb $mirror $LATER_SUITE main" > "$work/sources.list"
  local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
    -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o APT::Sandbox::User=root)
  (cd "$work" && "${apt[@]}" update && "${apt[@]}" download "$@") > "$work/log" 2>&1 \
    || { tail -n 5 "$work/log" >&2; stop 3 "$* could not be fetched from suite $LATER_SUITE"; }
  dpkg -i "$work"/*.deb > "$work/log" 2>&1 || { tail -n 5 "$work/log" >&2; stop 3 "dpkg could not install $*"; }
}

start_engine() {
  local pid=
  if [ -d /run/systemd/system ]; then
    systemctl start docker || stop 3 "systemctl start docker failed: see journalctl -u docker"
    started="as a service"
  else
    mkdir -p "$DIR"
    rm -f "$PID_FILE"
    # shellcheck disable=SC2086  # options are words
    setsid dockerd --pidfile "$PID_FILE" ${DOCKERD_OPTIONS:-} < /dev/null > "$LOG" 2>&1 &
    pid=$!
    started="with its log in $LOG"
  fi
  local deadline=$((SECONDS + LIMIT_S))
  until engine_answers; do
    [ -z "$pid" ] || kill -0 "$pid" 2> /dev/null || { tail -n 5 "$LOG" >&2; stop 3 "dockerd ended: $LOG says why"; }
    [ $SECONDS -lt $deadline ] || stop 3 "the engine does not answer after $LIMIT_S s${pid:+: $LOG says why}"
    sleep 0.2
  done
}

our_dockerd() {  # the pid of the dockerd that this script started, if it still is one
  local pid
  pid=$(cat "$PID_FILE" 2> /dev/null) && [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = dockerd ] \
    && tr '\0' '\n' < "/proc/$pid/cmdline" | grep -qxF -- "$PID_FILE" && echo "$pid"
}

stop_engine() {
  local pid deadline=$((SECONDS + LIMIT_S))
  pid=$(our_dockerd) || stop 2 "no engine was started by this script ($PID_FILE names no dockerd); nothing is stopped"
  kill "$pid"
  while [ -d "/proc/$pid" ]; do
    [ $SECONDS -lt $deadline ] || stop 3 "dockerd (process $pid) has not ended after $LIMIT_S s"
    sleep 0.2
  done
  say "stopped the engine (process $pid)"
}

case "${1:-}" in
  stop) stop_engine; exit ;;
  "") ;;
  *) stop 2 "unknown argument $1; it takes none, or stop" ;;
esac

installed=() started=""
if ! command -v dockerd > /dev/null && ! engine_answers; then
  need_debian_root
  install_engine
fi
if ! has_compose || ! has_buildx; then
  need_debian_root
  install_plugins
fi
if ! engine_answers; then
  [ "$(id -u)" = 0 ] || stop 2 "no engine answers, and only root can start one: run this script with sudo, or start it"
  start_engine
fi
if [ ${#installed[@]} != 0 ] || [ -n "$started" ]; then
  say "${installed[*]:+installed ${installed[*]}; }engine $(docker version --format '{{.Server.Version}}') runs${started:+, started $started}"
fi

