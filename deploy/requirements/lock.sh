#!/usr/bin/env bash
# Pins each image's requirements from its extra in pyproject.toml, and what builds our own wheel (build.txt) from its build-system.
# Torch's CPU build is pinned by hand in torch.txt, which says why; torch-cuda.txt is what the common index has instead.
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
echo "torch==2.13.0" | ../../.venv/bin/uv pip compile - --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --generate-hashes --no-annotate --no-header --quiet --no-config --output-file torch-cuda.txt
