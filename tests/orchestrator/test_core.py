from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import Placement, Target

counts = st.dictionaries(st.sampled_from("ab"), st.dictionaries(st.sampled_from("xy"), st.integers(0, 3)))


def test_what_is_let_out_is_at_work_in_place_of_a_standby() -> None:
    placement = Placement({"pool": {"a": 1}}, {"pool": {"b": 2}}, {"pool": 2})
    out = placement.with_let_out({"pool": {"b": 1}})
    assert out == Placement({"pool": {"a": 1, "b": 1}}, {"pool": {"b": 1}}, {"pool": 2})
    assert placement.target("pool") == Target(1, 2), "and the placement stays what it is"


def test_where_there_should_be_no_standby_there_is_one_more_at_work() -> None:
    assert Placement({"pool": {"a": 1}}).with_let_out({"pool": {"a": 1}}).target("pool") == Target(2, 0)


@given(ready=counts, standby=counts, out=counts)
def test_standbys_become_replicas_at_work_and_none_is_lost(
    ready: dict[str, dict[str, int]], standby: dict[str, dict[str, int]], out: dict[str, dict[str, int]]
) -> None:
    before = Placement(ready, standby)
    after = before.with_let_out(out)
    for service in "ab":
        for node in "xy":
            n = out.get(service, {}).get(node, 0)
            assert after.ready_on(service, node) == before.ready_on(service, node) + n
            assert after.standby_on(service, node) == max(0, before.standby_on(service, node) - n)
