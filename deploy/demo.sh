#!/usr/bin/env bash
# The whole system once: models exported, gateway, stages and orchestrator up as processes, a minute of load, the on-time table.
# Whatever happens, what was started is drained and stopped again. `espalier` must be on the PATH (make demo sees to it).
set -euo pipefail
cd "$(dirname "$0")/.."
testbed=deploy/testbeds/demo.yaml
report=out/demo/report.json

espalier export "$testbed"
trap 'espalier down --testbed "$testbed"' EXIT
espalier up "$testbed"
espalier bench "$testbed" --report "$report"
echo "report: $report"
