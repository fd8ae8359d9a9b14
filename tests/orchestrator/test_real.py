"""The whole system once, with the real stages, gateway and load generator, on the minimal testbed."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from orchestrator.__main__ import main

MINIMAL = Path(__file__).parents[2] / "deploy" / "testbeds" / "minimal.yaml"


def test_the_minimal_testbed_serves_its_workload_on_time(tmp_path: Path, minilm: Path) -> None:
    state = ["--state-dir", str(tmp_path)]
    try:
        up = CliRunner().invoke(main, ["up", str(MINIMAL), "--models-dir", str(minilm.parent), *state])
        assert up.exit_code == 0, up.output
        report = tmp_path / "report.json"
        arguments = ["--report", str(report), "--duration", "2", "--warmup", "0.5"]
        bench = CliRunner().invoke(main, ["bench", str(MINIMAL), *state, *arguments])
        assert bench.exit_code == 0, bench.output
        found = json.loads(report.read_text())
        assert found["outcomes"]["failed"] == 0
        assert found["sent"] > 5
        assert found["cost"] > 0
        assert found["pipelines"]["embed"]["cost"] == found["cost"], "there is but one pipeline to pay for it"
        assert set(found["stages"]) == {"tokenise", "encode", "pool"}
    finally:
        assert CliRunner().invoke(main, ["down", *state]).exit_code == 0
