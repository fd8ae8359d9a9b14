#!/usr/bin/env bash
# Pins each image's requirements from its extra in pyproject.toml. Torch is pinned by hand in torch.txt, which says why.
set -euo pipefail
cd "$(dirname "$0")"
find_links=()
[ -z "${PIP_FIND_LINKS:-}" ] || find_links=(--find-links "$PIP_FIND_LINKS")
for extra in stage gateway orchestrator loadgen models dev; do
  ../../.venv/bin/uv pip compile ../../pyproject.toml --extra "$extra" --python-version 3.11 --generate-hashes \
    --no-emit-package torch --no-emit-package espalier --no-annotate --no-header --quiet "${find_links[@]}" --output-file "$extra.txt"
done
