"""The itinerary: the rest of a chain, carried in the parameters of an ordinary inference request.

The first hop is the stage that reads it. A stage takes its inputs out of the request by reference, computes, keeps what is
still needed, and sends the rest of the itinerary on with it; so a tensor crosses each link once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from services.dataplane.errors import BadRequest

PARAMETER = "itinerary"
HOPS = "hops"
"""Field of an error, and parameter of a gateway's answer, that lists what each hop measured, first hop first."""
HEADER = "x-espalier-hops"
"""Header of a stage's answer that does. A stage puts its own report before what came from further on, and hands the body on
unread."""
TOTAL_HEADER = "x-espalier-total"
"""Header of a stage's answer with the time it took from the request's arrival [s]."""
MAX_HOPS = 32
REPORTED_TIMES = ("wait_s", "queue_s", "compute_s", "first_s", "transfer_s", "total_s", "call_s")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may serve a hop."""

    replica: str
    url: str
    """Base address with the path of the stage's model, as far as `/infer`."""


@dataclass(frozen=True, slots=True)
class Further:
    """A service that this hop's stage itself calls while it works, once for every token."""

    service: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a chain."""

    step: str
    service: str
    candidates: tuple[Candidate, ...]
    """In order of preference; empty for the hop that has already been reached."""
    take: Mapping[str, str]
    """Input tensor of the stage -> reference among the tensors sent."""
    keep: tuple[str, ...]
    """References to pass on once this hop is done: what later hops or the gateway still need."""
    reserve_s: float
    """Time [s] the rest of the way needs after this hop; the hop's own deadline lies that much earlier."""
    parts: tuple[Further, ...] = ()
    """The further parts of a decoder whose first part this hop is, in order."""


def to_parameter(hops: tuple[Hop, ...]) -> list[dict[str, Any]]:
    """The itinerary as JSON. The first hop travels without candidates: the request is already on its way to one."""
    return [
        {
            "step": hop.step,
            "service": hop.service,
            "candidates": [] if i == 0 else _pairs(hop.candidates),
            "take": dict(hop.take),
            "keep": list(hop.keep),
            "reserve_s": round(hop.reserve_s, 6),
            **({"parts": [[part.service, _pairs(part.candidates)] for part in hop.parts]} if hop.parts else {}),
        }
        for i, hop in enumerate(hops)
    ]


def from_parameter(value: Any) -> tuple[Hop, ...]:
    """Parse an itinerary.

    Raises:
        BadRequest: it is not what `to_parameter` makes.
    """
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_HOPS:
        raise BadRequest(f"parameters.{PARAMETER} must be a list of 1 to {MAX_HOPS} hops")
    try:
        return tuple(_hop(entry) for entry in value)
    except (KeyError, TypeError, ValueError):
        raise BadRequest(f"parameters.{PARAMETER} is malformed; only a gateway makes one, leave it out") from None


def _pairs(candidates: tuple[Candidate, ...]) -> list[list[str]]:
    return [[candidate.replica, candidate.url] for candidate in candidates]


def _hop(entry: Any) -> Hop:
    take, keep, candidates, reserve_s = entry["take"], entry["keep"], entry["candidates"], entry["reserve_s"]
    if not (isinstance(take, dict) and all(isinstance(each, list) for each in (keep, candidates, *candidates))):
        raise TypeError
    pairs = [(replica, url) for replica, url in candidates]
    texts = (entry["step"], entry["service"], *take.values(), *keep, *(text for pair in pairs for text in pair))
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    # A negative reserve would put the hop's instant behind the deadline.
    if isinstance(reserve_s, bool) or not isinstance(reserve_s, int | float) or not 0 <= reserve_s < math.inf:
        raise TypeError
    return Hop(
        step=entry["step"],
        service=entry["service"],
        candidates=tuple(Candidate(replica, url) for replica, url in pairs),
        take=take,
        keep=tuple(keep),
        reserve_s=float(reserve_s),
        parts=tuple(_further(each) for each in entry["parts"]) if "parts" in entry else (),
    )


def _further(entry: Any) -> Further:
    service, candidates = entry
    pairs = [(replica, url) for replica, url in candidates]
    if not all(isinstance(text, str) for text in (service, *(text for pair in pairs for text in pair))):
        raise TypeError
    return Further(service, tuple(Candidate(replica, url) for replica, url in pairs))


def reports(value: Any) -> list[dict[str, Any]]:
    """What the hops of a chain measured, as an answer or an error carries it.

    Raises:
        ValueError: it is not a list of objects that each name their replica and tell times as numbers.
    """
    if not isinstance(value, list):
        raise ValueError("the hops' reports are not a list")
    for report in value:
        if not isinstance(report, dict) or not isinstance(report.get("replica"), str):
            raise ValueError("a hop's report names no replica")
        for key in REPORTED_TIMES:
            seconds = report.get(key, 0.0)
            if not isinstance(seconds, int | float) or not math.isfinite(seconds):
                raise ValueError(f"a hop's report tells {key} as {str(seconds)[:40]!r}")
    return value


def way_s(call_s: float, total_s: float) -> float:
    """What of a call the stage it went to did not see [s]: the way there and back. `total_s` is what the stage took."""
    return round(max(call_s - total_s, 0.0), 6)


def headers(own: Mapping[str, Any], further: str | None) -> list[tuple[bytes, bytes]]:
    """Headers of a stage's answer: its own report before the list that came from further on, and its total time again."""
    first = orjson.dumps(own)
    value = b"[%b]" % first if further is None else b"[%b,%b" % (first, further[1:].encode("latin-1"))
    return [(HEADER.encode(), value), (TOTAL_HEADER.encode(), str(own["total_s"]).encode())]


def read_header(value: str | None) -> list[dict[str, Any]]:
    """The reports of a chain, each with the time its call spent on the way where the hop before it tells.

    Raises:
        ValueError: it is not what `headers` makes.
    """
    hops = reports(orjson.loads(value.encode("latin-1")) if value is not None else None)
    for before, hop in itertools.pairwise(hops):
        if "call_s" in before:
            hop["transfer_s"] = way_s(before["call_s"], hop.get("total_s", 0.0))
    return hops
