from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core import Node, Placement, Service, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import greedy

MIB = 2**20
NODES = (Node("a", 2.0, 1024 * MIB), Node("b", 2.0, 1024 * MIB))
WITH_GPUS = (Node("a", 2.0, 1024 * MIB), Node("b", 2.0, 1024 * MIB, gpus=2))
ENCODE = Service("encode", "core", 1.0, 256 * MIB)
POOL = Service("pool", "light", 0.25, 64 * MIB)


def test_replicas_of_a_service_spread_over_the_nodes() -> None:
    assert greedy.place([POOL], NODES, {"pool": Target(2)}).ready == {"pool": {"a": 1, "b": 1}}


def test_core_services_are_placed_before_light_ones_take_their_room() -> None:
    small = (Node("a", 1.0, 1024 * MIB), Node("b", 0.5, 1024 * MIB))
    assert greedy.place([POOL, ENCODE], small, {"pool": Target(1), "encode": Target(1)}).ready == {
        "encode": {"a": 1},
        "pool": {"b": 1},
    }


def test_among_equals_the_node_nearest_to_its_neighbours_wins() -> None:
    nodes = (Node("far", 2.0, 1024 * MIB), Node("near", 1.5, 1024 * MIB), Node("home", 1.0, 1024 * MIB))
    pinned = Service("encode", "core", 1.0, 256 * MIB, nodes=("home",))
    latencies = {("far", "home"): 0.02, ("near", "home"): 0.001}
    placed = greedy.place(
        [pinned, POOL], nodes, {"encode": Target(1), "pool": Target(1)}, flows=[("encode", "pool")], latencies_s=latencies
    )
    assert placed.ready["pool"] == {"near": 1}


def test_what_runs_stays_and_only_the_difference_is_placed() -> None:
    keep = Placement({"pool": {"b": 2}}, {})
    assert greedy.place([POOL], NODES, {"pool": Target(3)}, keep=keep).ready == {"pool": {"b": 2, "a": 1}}


def test_scaling_down_gives_up_the_fullest_node_first() -> None:
    keep = Placement({"pool": {"a": 3, "b": 1}}, {})
    assert greedy.place([POOL], NODES, {"pool": Target(2)}, keep=keep).ready == {"pool": {"a": 1, "b": 1}}


def test_a_new_ready_replica_goes_where_one_waits_on_standby() -> None:
    keep = Placement({"pool": {"a": 1, "b": 1}}, {"pool": {"b": 1}})
    placed = greedy.place([POOL], NODES, {"pool": Target(3)}, keep=keep)
    assert placed.ready == {"pool": {"a": 1, "b": 2}}


def test_everything_may_move_where_it_does_not_fit_otherwise() -> None:
    nodes = (Node("a", 1.0, 1024 * MIB), Node("b", 0.5, 1024 * MIB))
    keep = Placement({"pool": {"a": 1}}, {})
    placed = greedy.place([POOL, ENCODE], nodes, {"pool": Target(1), "encode": Target(1)}, keep=keep)
    assert placed.ready == {"encode": {"a": 1}, "pool": {"b": 1}}


def test_a_standby_needs_memory_but_no_cores() -> None:
    full = (Node("a", 1.0, 512 * MIB),)
    assert greedy.place([ENCODE], full, {"encode": Target(1, 1)}).standby == {"encode": {"a": 1}}


@pytest.mark.parametrize(
    ("service", "target", "message"),
    [
        (Service("encode", "core", 1.5, 256 * MIB), Target(3),
         "no node has room for replica 3 of 3 of encode (1.5 cpus and 256 MiB): a lacks 1 cpus; b lacks 1 cpus. "
         "The smallest relaxation: give a 1 cpus more, or ask for 2"),
        (Service("encode", "core", 0.1, 700 * MIB), Target(1, 2),
         "no node has room for standby 2 of 2 of encode (700 MiB): a lacks 376 MiB; b lacks 376 MiB. "
         "The smallest relaxation: give a 376 MiB more, or ask for 1"),
        (Service("encode", "core", 1.5, 800 * MIB, nodes=("b",)), Target(2),
         "no node has room for replica 2 of 2 of encode (1.5 cpus and 800 MiB): b lacks 1 cpus and 576 MiB. "
         "The smallest relaxation: give b 1 cpus and 576 MiB more, or ask for 1"),
    ],
)  # fmt: skip
def test_infeasible_names_what_lacks_and_the_smallest_relaxation(service: Service, target: Target, message: str) -> None:
    with pytest.raises(Infeasible) as caught:
        greedy.place([service], NODES, {"encode": target})
    assert str(caught.value) == message


def test_who_needs_a_gpu_goes_where_one_is_and_a_standby_holds_it_too() -> None:
    vision = Service("vision", "light", 0.1, 64 * MIB, gpus=1)
    assert greedy.place([vision], WITH_GPUS, {"vision": Target(1, 1)}) == Placement({"vision": {"b": 1}}, {"vision": {"b": 1}})
    with pytest.raises(Infeasible, match=r"a lacks 1 gpus; b lacks 1 gpus\. The smallest relaxation: give b 1 gpus more"):
        greedy.place([vision], WITH_GPUS, {"vision": Target(2, 1)})


sizes = st.floats(0.1, 1.5)
counts = st.integers(0, 3)
services_drawn = st.lists(
    st.builds(Service, st.sampled_from("uvwx"), st.sampled_from(["core",
    "light"]), sizes, st.integers(1, 400).map(MIB.__mul__), gpus=st.integers(0, 1)),
    unique_by=lambda s: s.name, min_size=1,
)  # fmt: skip
targets_drawn = st.fixed_dictionaries({name: st.builds(Target, counts, counts) for name in "uvwx"})
places_drawn = st.dictionaries(st.sampled_from("uvwx"), st.dictionaries(st.sampled_from("ab"), counts))


@given(services_drawn, targets_drawn, st.builds(Placement, places_drawn, places_drawn))
@settings(max_examples=150, deadline=None)
def test_a_placement_meets_its_targets_within_every_capacity(
    services: list[Service], targets: Mapping[str, Target], keep: Placement
) -> None:
    try:
        placed = greedy.place(services, WITH_GPUS, targets, keep=keep)
    except Infeasible:
        return
    for service in services:
        assert placed.target(service.name) == targets[service.name]
    for node in WITH_GPUS:
        ready = {s: placed.ready_on(s.name, node.name) for s in services}
        assert sum(s.cpus * n for s, n in ready.items()) <= node.cpus + 1e-6
        loaded = {s: n + placed.standby_on(s.name, node.name) for s, n in ready.items()}
        assert sum(s.memory_bytes * n for s, n in loaded.items()) <= node.memory_bytes
        assert sum(s.gpus * n for s, n in loaded.items()) <= node.gpus
