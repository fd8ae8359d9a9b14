#!/usr/bin/env bash
# Pins each image's requirements from its extra in pyproject.toml, and what builds our own wheel (build.txt) from its build-system.
# Torch is pinned by hand in torch.txt, which says why.
set -euo pipefail
cd "$(dirname "$0")"
find_links=()
[ -z "${PIP_FIND_LINKS:-}" ] || find_links=(--find-links "$PIP_FIND_LINKS")

pin() {  # pin NAME INPUT [OPTION...]: writes NAME.txt
  ../../.venv/bin/uv pip compile "${@:2}" --python-version 3.11 --generate-hashes --no-emit-package torch \
    --no-emit-package espalier --no-annotate --no-header --quiet "${find_links[@]}" --output-file "$1.txt"
}

for extra in stage stage-gpu gateway orchestrator loadgen models dev; do
  pin "$extra" ../../pyproject.toml --extra "$extra"
done
../../.venv/bin/python -c 'import tomllib; print(*tomllib.load(open("../../pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
  | pin build -
