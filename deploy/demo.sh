#!/usr/bin/env bash
# The whole system once: models exported, everything up, a minute of load, the on-time table, two answers looked at. Whatever
# happens, what was started is drained and stopped again. RUNTIME=engine runs it in containers, RUNTIME=processes without; by
# default an engine decides.
set -euo pipefail
cd "$(dirname "$0")/.."
testbed=deploy/testbeds/demo.yaml
report=out/demo/report.json
gateway=http://127.0.0.1:8080

build() { docker compose --progress quiet --profile load build; }

ask() { curl --silent --show-error --fail --max-time 30 "$gateway$1" --data "$2"; }

# Of the models only the text encoder is trained, so only classify-text can be right; a seeded one can only say the same twice.
check_answers() {
  if ! command -v curl > /dev/null; then
    echo "answers: not looked at, since there is no curl"
    return
  fi
  local prompt='{"model": "generate", "prompt": "The train", "max_tokens": 12}' label first second
  label=$(ask /v2/models/classify-text/infer '{"inputs": [
    {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["The train to the coast leaves at nine."]},
    {"name": "labels", "datatype": "BYTES", "shape": [3], "data": ["travel", "cooking", "football"]}]}')
  if [[ $label != *'"data":["travel"]'* ]]; then
    echo "a train to the coast is travel, but classify-text says: $label" >&2
    return 1
  fi
  first=$(ask /v1/completions "$prompt")
  second=$(ask /v1/completions "$prompt")
  # What comes before (id, time) is each answer's own.
  if [[ ${first#*'"choices"'} != "${second#*'"choices"'}" ]]; then
    echo "generate goes on from the same prompt once with $first, once with $second" >&2
    return 1
  fi
  echo "answers: a train to the coast is travel (classify-text); the same prompt is continued the same way twice (generate)"
}

in_containers() {
  # A project of its own, so that a system that is up already is not taken for the demo's.
  export COMPOSE_PROJECT_NAME=espalier-demo ESPALIER_BIND=127.0.0.1
  mkdir -p out/demo
  trap 'docker compose --progress quiet down' EXIT
  docker compose --progress quiet up --detach --quiet-pull
  # As the caller, so that the report is the caller's file.
  docker compose --profile load run --rm --no-deps --user "$(id -u):$(id -g)" --volume "$PWD/out/demo:/out" loadgen \
    espalier bench /etc/espalier/testbed.yaml --url http://orchestrator:8090 --wait 240 --report /out/report.json
  check_answers
}

as_processes() {
  make --no-print-directory .venv/.ready
  export PATH="$PWD/.venv/bin:$PATH"
  espalier export "$testbed"
  trap 'espalier down --testbed "$testbed"' EXIT
  espalier up "$testbed" --limit 180
  espalier bench "$testbed" --report "$report"
  check_answers
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
