from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from orchestrator import units


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.duration_s, "300ms", 0.3),
        (units.duration_s, "0.2 ms", 0.0002),
        (units.duration_s, "20µs", 20e-6),
        (units.duration_s, "2min", 120.0),
        (units.size_bytes, "4GiB", 4 * 2**30),
        (units.size_bytes, "1.5kB", 1500),
        (units.bytes_per_s, "1Gb/s", 125e6),
        (units.bytes_per_s, "100Mbps", 12.5e6),
        (units.bytes_per_s, "8Mbit/s", 1e6),
        (units.bytes_per_s, "10MB/s", 10e6),
        (units.bytes_per_s, "1MiB/s", 2.0**20),
    ],
)
def test_quantities_are_read_in_their_own_unit(read: Callable[[object], float], text: str, value: float) -> None:
    assert read(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (units.duration_s, 300, "300 has no unit; write it like 300ms or 1.5s"),
        (units.duration_s, "300msec", "unknown unit 'msec'; write it like 300ms or 1.5s"),
        (units.duration_s, "fast", "'fast' is not a quantity; write it like 300ms or 1.5s"),
        (units.duration_s, True, "must be a quantity such as 300ms or 1.5s"),
        (units.size_bytes, "4Gb", "unknown unit 'Gb' (that is bits); write it like 512MiB or 4GiB"),
        (units.size_bytes, "4gib", "unknown unit 'gib' (did you mean GiB?); write it like 512MiB or 4GiB"),
        (units.size_bytes, "-1GiB", "'-1GiB' is not a quantity; write it like 512MiB or 4GiB"),
        (units.bytes_per_s, "1Gb", "unknown unit 'Gb'; write it like 1Gb/s (bits) or 125MB/s (bytes)"),
    ],
)
def test_anything_else_is_refused_with_what_to_write(read: Callable[[object], float], text: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(text)
