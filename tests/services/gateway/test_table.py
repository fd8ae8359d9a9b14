from __future__ import annotations

from services.dataplane.pipeline import Pipeline, Step
from services.gateway.table import Table, Target
from tests.services.harness import chain, document, with_standbys

URLS = [f"http://double:{i}" for i in range(4)]
KEPT = document([chain("double")], {"double": URLS})


def target(table: Table) -> Target:
    return table.targets["double"]


def names(table: Table) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids of the replicas that tasks are sent to, and of those that may be let out."""
    return target(table).replicas, tuple(standby.candidate.replica for standby in target(table).standbys)


def test_standbys_are_there_to_be_let_out_only_within_an_allowance() -> None:
    assert names(Table(with_standbys(KEPT, "double-3", allowance=1))) == (("double-0", "double-1", "double-2"), ("double-3",))
    assert names(Table(with_standbys(KEPT, "double-3", allowance=0))) == (("double-0", "double-1", "double-2"), ())


def test_a_standby_that_is_let_out_is_ready_from_then_on_and_spends_the_allowance() -> None:
    table = Table(with_standbys(KEPT, "double-1", "double-2", "double-3", allowance=2))
    table.let_out("double", target(table).standbys[1])
    assert names(table) == (("double-0", "double-2"), ("double-1", "double-3"))
    assert target(table).candidates[-1].url == "http://double:2/v2/models/double/infer"
    table.let_out("double", target(table).standbys[1])
    assert names(table) == (("double-0", "double-2", "double-3"), ())


def test_one_that_is_refused_is_taken_back_and_no_other_is_let_out() -> None:
    table = Table(with_standbys(KEPT, "double-1", "double-2", "double-3", allowance=3))
    for _ in range(2):
        table.let_out("double", target(table).standbys[0])
    table.take_back("double", "double-1")
    assert names(table) == (("double-0", "double-2"), ())
    table.take_back("double", "double-0")
    assert names(table)[0] == ("double-0", "double-2"), "the document says that it is ready"
    table.take_back("gone", "gone-1")


def test_a_pipeline_is_served_where_every_service_has_somebody_at_work_or_to_be_let_out() -> None:
    everybody = [f"double-{i}" for i in range(4)]
    assert Table(with_standbys(KEPT, *everybody)).ready("task")
    assert not Table(with_standbys(KEPT, *everybody, allowance=0)).ready("task")


def test_the_hops_after_a_segment_are_those_of_the_longest_way() -> None:
    """a -> (b -> c, d) -> join: after a come three hops, after b and c the join, and so after d."""
    ends = {
        "a": {"x": "request.x"}, "b": {"x": "a.y"}, "c": {"x": "b.y"}, "d": {"x": "a.y"}, "join": {"x": "c.y", "z": "d.y"},
    }  # fmt: skip
    pipeline = Pipeline(
        name="task", deadline_s=1.0, epsilon=0.05,
        steps=tuple(Step(id=name, service="double", inputs=inputs) for name, inputs in ends.items()), outputs={"y": "join.y"},
    )  # fmt: skip
    plan = Table(document([pipeline], {"double": URLS})).plans["task"]
    after = {tuple(step.id for step in s.steps): hops for s, hops in zip(plan.segments, plan.hops_after, strict=True)}
    assert after == {("a",): 3, ("b", "c"): 1, ("d",): 1, ("join",): 0}
