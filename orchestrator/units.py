"""Quantities as people write them (`300ms`, `4GiB`, `1Gb/s`), turned into seconds and bytes once, on entry.

A bare number is refused, since nobody can see its unit. Bits and bytes are told apart by the case of the letter b, as in
network practice: `Gb` is 10^9 bits, `GB` 10^9 bytes, `GiB` 2^30 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµμ/]*)\s*")
_DURATIONS: Mapping[str, float] = {"us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZES: Mapping[str, int] = {"B": 1} | {
    prefix + unit: base**power for power, prefix in enumerate("kMGT", start=1) for unit, base in (("B", 1000), ("iB", 1024))
}
_SIZES = {**_SIZES, "KB": 1000, "KiB": 1024}
_BITS: Mapping[str, int] = {"b": 1} | {prefix + "b": 1000**power for power, prefix in enumerate("kMGT", start=1)}
_RATES: Mapping[str, float] = (
    {f"{unit}/s": float(factor) for unit, factor in _SIZES.items()}
    | {f"{unit}{per}": factor / 8 for unit, factor in _BITS.items() for per in ("/s", "ps")}
    | {f"{unit}it/s": factor / 8 for unit, factor in _BITS.items()}
)


def duration_s(text: object) -> float:
    """`300ms` -> 0.3 [s].

    Raises:
        ValueError: not a number with a unit of time.
    """
    return _quantity(text, _DURATIONS, "300ms or 1.5s")


def size_bytes(text: object) -> int:
    """`4GiB` -> 4294967296 [bytes].

    Raises:
        ValueError: not a number with a unit of size; bits are named as such.
    """
    return round(_quantity(text, _SIZES, "512MiB or 4GiB"))


def bytes_per_s(text: object) -> float:
    """`1Gb/s` -> 125000000.0 [bytes/s].

    Raises:
        ValueError: not a number with a unit of bits or bytes per second.
    """
    return _quantity(text, _RATES, "1Gb/s (bits) or 125MB/s (bytes)")


def _quantity(text: object, units: Mapping[str, float] | Mapping[str, int], example: str) -> float:
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"must be a quantity such as {example}")
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{str(text)!r} is not a quantity; write it like {example}")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{number} has no unit; write it like {example}")
    if unit not in units:
        raise ValueError(f"unknown unit {unit!r}{_hint(unit, units)}; write it like {example}")
    return float(number) * units[unit]


def _hint(unit: str, units: Mapping[str, float] | Mapping[str, int]) -> str:
    if units is _SIZES and unit in _BITS:
        return " (that is bits)"
    return next((f" (did you mean {known}?)" for known in units if known.lower() == unit.lower()), "")
