from __future__ import annotations

from pathlib import Path

from orchestrator.core import Target
from orchestrator.orders import Orders


def test_orders_survive_a_restart(tmp_path: Path) -> None:
    orders = Orders(tmp_path / "state" / "orders.json")
    orders.scale("pool", Target(3, 1))
    orders.restart(["pool", "encode"])
    orders.restart(["pool"])
    orders.scale("encode", Target(1))
    orders.scale("rank", Target(2))
    orders.release("rank")
    for node in ("edge-2", "edge-1", "edge-2"):
        orders.drain(node)
    orders.undrain("edge-1")
    again = Orders(tmp_path / "state" / "orders.json")
    assert again.targets == {"pool": Target(3, 1), "encode": Target(1, 0)}
    assert again.drained == {"edge-2"}
    assert [again.generation(name) for name in ("pool", "encode", "rank")] == [2, 1, 0]


def test_a_file_that_cannot_be_read_holds_no_orders(tmp_path: Path) -> None:
    (tmp_path / "orders.json").write_text("{")
    assert Orders(tmp_path / "orders.json").targets == {}
