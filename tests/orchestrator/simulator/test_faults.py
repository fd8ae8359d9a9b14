from __future__ import annotations

import pytest

from orchestrator.simulator.faults import LinkFault, Loss, Silence


def test_what_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lost at 5.0 s cannot be back at 4.0 s"):
        Loss("n0", 5.0, back=4.0)
    with pytest.raises(ValueError, match=r"from 5.0 s until 4.0 s"):
        LinkFault("n0", "n1", 5.0, 4.0)
    with pytest.raises(ValueError, match=r"from 5.0 s until 5.0 s"):
        Silence(5.0, 5.0)


@pytest.mark.parametrize(("latency_factor", "bandwidth_factor"), [(-1.0, 1.0), (1.0, 0.0)])
def test_a_link_without_bandwidth_is_one_that_is_cut(latency_factor: float, bandwidth_factor: float) -> None:
    with pytest.raises(ValueError, match="cut it"):
        LinkFault("n0", "n1", 0.0, latency_factor=latency_factor, bandwidth_factor=bandwidth_factor)
