"""A task's deadline: read from the request once, then carried as remaining time.

The contract is docs/deadlines.md. Clocks of different machines never meet: what travels is a duration, and what stays is an
instant of this process's monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.dataplane.errors import BadRequest, shown

TIMEOUT_HEADER = "x-request-timeout-seconds"
GRPC_HEADER = "grpc-timeout"
ENVOY_HEADER = "x-envoy-expected-rq-timeout-ms"
PARAMETER = "timeout"

_GRPC_UNITS: Mapping[str, float] = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


@dataclass(frozen=True, slots=True)
class Deadline:
    """A budget that began at an instant of the monotonic clock. Both in seconds."""

    arrived: float
    budget_s: float

    @property
    def due(self) -> float:
        """Instant [s, monotonic] at which the budget is spent."""
        return self.arrived + self.budget_s

    def remaining_s(self, now: float) -> float:
        """Time left [s]; negative once the deadline has passed."""
        return self.due - now


def read_budget_s(headers: Mapping[str, str], parameters: Mapping[str, Any], *, default_s: float, maximum_s: float) -> float:
    """Budget of a request [s]: the first of the forms below that is present, else the default; never more than the maximum.

    `X-Request-Timeout-Seconds` (s), `grpc-timeout` (at most 8 digits and a unit), `x-envoy-expected-rq-timeout-ms` (ms), and
    the OIP parameter `timeout` (whole microseconds, 0 for none).

    Args:
        headers: header names in lower case.
        parameters: parameters of the OIP request.
        default_s: for a request that states none.
        maximum_s: larger budgets are cut to this one.

    Raises:
        BadRequest: the first form present is not a positive duration.
    """
    if (text := headers.get(TIMEOUT_HEADER)) is not None:
        seconds = _number(text, TIMEOUT_HEADER, 1.0)
    elif (text := headers.get(GRPC_HEADER)) is not None:
        seconds = _grpc(text)
    elif (text := headers.get(ENVOY_HEADER)) is not None:
        seconds = _number(text, ENVOY_HEADER, 1e-3)
    elif parameters.get(PARAMETER) not in (None, 0):
        seconds = _microseconds(parameters[PARAMETER])
    else:
        seconds = default_s
    return min(seconds, maximum_s)


def to_parameter(remaining_s: float) -> int:
    """Remaining time as the OIP parameter `timeout` [µs], at least 1 because 0 means none."""
    return max(1, int(remaining_s * 1e6))


def _number(text: str, name: str, unit_s: float) -> float:
    try:
        if "_" in text or not text.isascii():  # float() takes '1_0' and the digits of every script
            raise ValueError
        seconds = float(text) * unit_s
    except ValueError:
        raise BadRequest(f"{name}: {text[:40]!r} is not a number") from None
    return _positive(seconds, name, text)


def _grpc(text: str) -> float:
    digits, unit = text[:-1], text[-1:]
    if unit not in _GRPC_UNITS or not (digits.isascii() and digits.isdecimal() and len(digits) <= 8):
        raise BadRequest(f"{GRPC_HEADER}: {text[:40]!r} is not up to 8 digits and one of {' '.join(_GRPC_UNITS)}")
    return _positive(int(digits) * _GRPC_UNITS[unit], GRPC_HEADER, text)


def _microseconds(value: Any) -> float:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequest(f"parameters.{PARAMETER}: {shown(value)} is not a whole number of microseconds")
    return _positive(value * 1e-6, f"parameters.{PARAMETER}", str(value))


def _positive(seconds: float, name: str, text: str) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadRequest(f"{name}: a deadline must be a positive time, not {text[:40]!r}")
    return seconds
