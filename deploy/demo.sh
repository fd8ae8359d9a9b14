#!/usr/bin/env bash
# The whole system once: models exported, everything up, a minute of load, the on-time table. Whatever happens, what was started
# is drained and stopped again. RUNTIME=engine runs it in containers, RUNTIME=processes without; by default an engine decides.
set -euo pipefail
cd "$(dirname "$0")/.."
testbed=deploy/testbeds/demo.yaml
report=out/demo/report.json

build() { docker compose --progress quiet --profile load build; }

in_containers() {
  # A project of its own, so that a system that is up already is not taken for the demo's.
  export COMPOSE_PROJECT_NAME=espalier-demo ESPALIER_BIND=127.0.0.1
  mkdir -p out/demo
  trap 'docker compose --progress quiet down' EXIT
  docker compose --progress quiet up --detach --quiet-pull
  # As the caller, so that the report is the caller's file.
  docker compose --profile load run --rm --no-deps --user "$(id -u):$(id -g)" --volume "$PWD/out/demo:/out" loadgen \
    espalier bench /etc/espalier/testbed.yaml --url http://orchestrator:8090 --wait 240 --report /out/report.json
}

as_processes() {
  make --no-print-directory .venv/.ready
  export PATH="$PWD/.venv/bin:$PATH"
  espalier export "$testbed"
  trap 'espalier down --testbed "$testbed"' EXIT
  espalier up "$testbed" --limit 180
  espalier bench "$testbed" --report "$report"
}

engine_answers() { docker version > /dev/null 2>&1 && docker compose version > /dev/null 2>&1; }

case "${RUNTIME:-}" in
  engine) build && in_containers ;;
  processes) as_processes ;;
  "")
    if ! engine_answers; then
      as_processes
    elif build; then
      in_containers
    else
      echo "The images could not be built (no base image? deploy/base-image.sh makes one), so processes it is." >&2
      as_processes
    fi
    ;;
  *) echo "RUNTIME is '$RUNTIME'; it can be engine or processes" >&2; exit 2 ;;
esac
echo "report: $report"
