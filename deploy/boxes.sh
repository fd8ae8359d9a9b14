#!/usr/bin/env bash
# Three boxes on this machine, each with an engine of its own, joined to one Swarm: a testbed deployed over them as a stack, its
# first answer, load, the on-time table, out/boxes/report.json. Whatever happens, all boxes are gone afterwards. `make boxes`.
set -euo pipefail
cd "$(dirname "$0")/.."
testbed=deploy/testbeds/boxes.yaml
stack=edge
out=out/boxes
export ESPALIER_BOXES=${ESPALIER_BOXES:-make-boxes}

say() { echo "boxes: $*" >&2; }

on_box_1() { deploy/local-boxes docker box-1 "$@"; }

first_answer() {  # from the gateway at an address: an embedding
  curl --silent --show-error --fail --noproxy '*' --max-time 5 "http://$1:8080/v2/models/embed/infer" \
    -d '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["an espalier is a trained tree"]}]}' 2> /dev/null
}

make --no-print-directory .venv/.ready
export PATH="$PWD/.venv/bin:$PATH"
docker compose --progress quiet --profile load build \
  || { say "the images could not be built (no base image? deploy/base-image.sh makes one)"; exit 3; }
espalier export "$testbed"
mkdir -p "$out"
trap 'deploy/local-boxes down' EXIT
began=$SECONDS
deploy/local-boxes up 3 --models out/models > "$out/status"
deploy/local-boxes load box-1 "espalier/loadgen:${ESPALIER_TAG:-0.1.0}"
say "three boxes are up after $((SECONDS - began)) s"

began=$SECONDS
espalier render stack "$testbed" --name "$stack" --models /models --tag "${ESPALIER_TAG:-0.1.0}" --out "$out/stack.yaml"
socket=$(awk '$1 == "box-1" {print $5}' "$out/status")
DOCKER_HOST=unix://$socket docker stack deploy --detach=true --resolve-image never -c "$out/stack.yaml" "$stack" > /dev/null
for box in box-1 box-2 box-3; do
  address=$(awk -v box="$box" '$1 == box {print $3}' "$out/status")
  until first_answer "$address" > "$out/answer.json"; do
    [ $((SECONDS - began)) -lt 180 ] || { on_box_1 service ls >&2; say "no answer by $box after 180 s"; exit 3; }
    sleep 0.5
  done
  say "the first answer by $box, $((SECONDS - began)) s after the stack was deployed"
done

# From within the network, as the caller, so that the report is the caller's file.
cp "$testbed" "$(dirname "$socket")/testbed.yaml"
on_box_1 run --rm --network "${stack}_default" --user "$(id -u):$(id -g)" --volume /run/box:/out \
  "espalier/loadgen:${ESPALIER_TAG:-0.1.0}" espalier bench /out/testbed.yaml --url http://orchestrator:8090 --wait 120 \
  --duration "${DURATION:-60}" --report /out/report.json
cp "$(dirname "$socket")/report.json" "$out/report.json"
echo "report: $out/report.json"
