from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import Node, Service, Target
from orchestrator.scaling import policies
from orchestrator.scaling.manual import Manual
from orchestrator.scaling.site import Site
from tests.orchestrator.scaling.test_manual import POLICY

SITE = policies.describe(POLICY)[1]["site"]
names = st.text(max_size=5)
pairs = st.tuples(names, names)
numbers = st.floats(allow_nan=False, allow_infinity=False)
sites = st.builds(
    Site,
    st.lists(
        st.builds(
            Service, names, st.sampled_from(["core", "light"]), numbers, st.integers(0), st.integers(0), st.tuples(names)
        ),
        max_size=2,
    ).map(tuple),
    st.lists(st.builds(Node, names, numbers, st.integers(0, 2**53)), max_size=2).map(tuple),
    st.dictionaries(names, st.builds(Target, st.integers(), st.integers()), max_size=2),
    flows=st.frozensets(pairs, max_size=3),
    latencies_s=st.none() | st.dictionaries(pairs, numbers, max_size=3),
    stale_after_s=numbers,
)
manuals = st.builds(Manual, sites, numbers)


@given(manuals)
def test_a_policy_survives_json_with_all_its_parameters(policy: Manual) -> None:
    name, parameters = policies.describe(policy)
    again = policies.build(name, json.loads(json.dumps(parameters, allow_nan=False)))
    assert again == policy
    assert isinstance(again, Manual)
    assert list(again.site.targets) == list(policy.site.targets)
    assert again.site.latencies_s is None or list(again.site.latencies_s) == list(policy.site.latencies_s or {})


def test_equal_parameters_give_equal_text_in_every_process() -> None:
    """Sets of strings have another order in every process; the text has not."""
    flows = frozenset((f"a{i}", f"b{i}") for i in range(20))
    code = (
        "import json; from dataclasses import replace; from orchestrator.scaling import policies;"
        "from tests.orchestrator.scaling.test_manual import POLICY;"
        "flows = frozenset((f'a{i}', f'b{i}') for i in range(20));"
        "print(json.dumps(policies.describe(replace(POLICY, site=replace(POLICY.site, flows=flows)))[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert json.loads(done.stdout) == policies.describe(replace(POLICY, site=replace(POLICY.site, flows=flows)))[1]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tea_leaves", {}, "there is no policy 'tea_leaves' in this version; it has manual, static"),
        (
            "manual",
            {"site": {**SITE, "latencies_s": [1]}},
            "parameter site.latencies_s of policy manual: .* must be rows of a key and a value",
        ),
        ("manual", {"site": {**SITE, "nodes": None}}, "parameter site.nodes of policy manual"),
        ("manual", {"gain": 2.0}, "policy manual of this version has other parameters than the log's"),
    ],
)
def test_parameters_that_do_not_fit_are_named(name: str, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policies.build(name, {**policies.describe(POLICY)[1], **change})
