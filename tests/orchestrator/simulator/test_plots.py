from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SetupFailed
from orchestrator.simulator import plots
from orchestrator.simulator.scenario import Plot, Scenario
from tests.orchestrator.simulator.scenarios import loaded, row


def scenario_with(*names: Plot) -> Scenario:
    return loaded().scenario.model_copy(update={"plots": names, "vary": {"nodes": (8, 16)}})


def rows() -> list[dict[str, Any]]:
    """Two policies with everything that any plot looks at."""
    series = {"t": [0.0, 1.0], "ready": [2.0, 3.0], "standby": [1.0, 1.0], "ended": [0.0, 9.0], "late": [0.0, 1.0]}
    told = {"promised": {"p": 0.01}, "epsilon_by_pipeline": {"p": 0.05}, "late_by_pipeline": {"p": 0.02}, "series": series}
    return [
        row(f"{name} v={v:g}", 1 - 0.1 / v - 0.01 * seed, 10 + v, seed=seed, family=name, case={"nodes": nodes},
            options={"v": v}, virtual_queue=v, **told)
        for name in ("ours", "hpa") for v in (1.0, 2.0, 4.0) for seed in (1, 2, 3) for nodes in (8, 16)
    ]  # fmt: skip


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_every_plot_is_a_picture(tmp_path: Path) -> None:
    names = tuple(plots._PLOTS)
    written = plots.draw(scenario_with(*names), rows(), tmp_path)
    assert [path.stem for path in written] == list(names)
    for path in written:
        width, height = size(path)
        assert 400 < width < 4000
        assert 200 < height < 8000


def test_the_same_rows_give_the_same_picture(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (one,) = plots.draw(scenario_with("loads"), rows(), tmp_path)
    (two,) = plots.draw(scenario_with("loads"), rows(), tmp_path / "again")
    assert one.read_bytes() == two.read_bytes()


def test_plots_of_what_was_not_measured_are_left_out(tmp_path: Path) -> None:
    bare = [row("ours", 0.9, 1.0)]
    assert plots.draw(scenario_with("promises", "response", "v-sweep"), bare, tmp_path) == []
    assert len(plots.draw(scenario_with("violins"), bare, tmp_path)) == 1


def test_without_matplotlib_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SetupFailed, match="pip install matplotlib"):
        plots.draw(scenario_with("violins"), rows(), tmp_path)
