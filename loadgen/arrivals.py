"""When tasks arrive: arrival processes as values, their textual form, and the random streams behind a schedule.

A leaf without a clock. A process maps a random generator and a horizon to arrival times, so the whole schedule exists before
anything is sent, and the simulator replays the schedule of a live run by import. Two promises hold for every process here:
the same generator state gives the same times, and a longer horizon only adds times at the end.

    times     t_1 <= t_2 <= ... in [0, horizon)   [s]
    rates     [tasks/s]
    cv2       squared coefficient of variation of the gaps between arrivals; 1 for Poisson, more is burstier
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loadgen.errors import SpecError

__all__ = [
    "ArrivalProcess",
    "Constant",
    "Diurnal",
    "Gamma",
    "Mmpp",
    "Poisson",
    "SpecError",
    "State",
    "Step",
    "Trace",
    "natural_s",
    "parse",
    "scaled",
    "stream",
]

Times = NDArray[np.float64]

CHUNK = 1024
"""Gaps drawn at once. Fixed, so that the numbers drawn do not depend on the horizon."""


class ArrivalProcess(Protocol):
    """A law of arrivals. `str(process)` is its canonical specification: `parse(str(process)) == process`."""

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """Arrival times [s] in [0, horizon_s), ascending, shape (n,)."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals at a constant rate, P(gap > x) = exp(-rate x).

    rate  [tasks/s], > 0.  Tasks of many users who know nothing of each other.

        t  |.|..|....|...||.|.....|.|...|..|.||....|.
    """

    rate: float

    def __post_init__(self) -> None:
        _positive("poisson", "rate", self.rate)

    def __str__(self) -> str:
        return f"poisson:{_text(self.rate)}"

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess."""
        return _unit_poisson(rng, self.rate * horizon_s) / self.rate


@dataclass(frozen=True, slots=True)
class Constant:
    """One arrival every 1/rate seconds, the first at 0: t_k = k / rate.

    rate  [tasks/s], > 0.  The kindest load there is; use it to measure the floor, not to make promises.

        t  |...|...|...|...|...|...|...|...|...|...|.
    """

    rate: float

    def __post_init__(self) -> None:
        _positive("constant", "rate", self.rate)

    def __str__(self) -> str:
        return f"constant:{_text(self.rate)}"

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess; draws nothing."""
        return _before(np.arange(math.ceil(self.rate * horizon_s) + 1) / self.rate, horizon_s)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gaps from a gamma law of mean 1/rate and squared coefficient of variation cv2.

    Gap ~ Gamma(shape = 1/cv2, scale = cv2/rate)  [s].
    rate  [tasks/s], > 0;  cv2 > 0: below 1 smoother than Poisson, 1 Poisson, above 1 clumps with long pauses.
    The first gap is drawn like every other, so a short run of a bursty process starts with an arrival sooner or later than
    a stationary one would; over a horizon T the expected count is rate T + (cv2 - 1)/2 for large T.
    Source of the correction: the renewal theorem's second term, Cox 1962, section 4.2.

        t  ||||..............|||.|...........||||||...      cv2 = 4
    """

    rate: float
    cv2: float

    def __post_init__(self) -> None:
        _positive("gamma", "rate", self.rate)
        _positive("gamma", "cv2", self.cv2)

    def __str__(self) -> str:
        return f"gamma:{_text(self.rate)},cv2={_text(self.cv2)}"

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess."""
        shape, scale = 1.0 / self.cv2, self.cv2 / self.rate
        return _renewal(lambda: rng.gamma(shape, scale, CHUNK), horizon_s)


@dataclass(frozen=True, slots=True)
class State:
    """A state of an Mmpp: the rate [tasks/s] while in it, >= 0, and its mean sojourn [s], > 0."""

    rate: float
    sojourn_s: float


@dataclass(frozen=True, slots=True)
class Mmpp:
    """A Markov-modulated Poisson process: Poisson arrivals whose rate jumps between states.

    Sojourn in state i ~ Exp(mean sojourn_s[i]); then the next state in the order written, and after the last the first again.
    Mean rate = sum_i rate_i sojourn_i / sum_i sojourn_i  [tasks/s]. The first state is drawn in proportion to sojourn_s, so the
    process is stationary from t = 0. A state of rate 0 gives an on-off source.

        rate  40 |      ┌──┐            ┌─┐       ┌──┐
               5 |──────┘  └────────────┘ └───────┘  └──   mmpp:5@8s,40@2s
    """

    states: tuple[State, ...]

    def __post_init__(self) -> None:
        if len(self.states) < 2:
            raise SpecError("mmpp: one state is a Poisson process; give two or more, e.g. mmpp:5@8s,40@2s")
        _rates("mmpp", [state.rate for state in self.states])
        for state in self.states:
            _positive("mmpp", "sojourn", state.sojourn_s)

    def __str__(self) -> str:
        return "mmpp:" + ",".join(f"{_text(state.rate)}@{_text(state.sojourn_s)}s" for state in self.states)

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess."""
        arrivals = _child(rng)
        sojourns = np.array([state.sojourn_s for state in self.states])
        position = int(rng.choice(len(sojourns), p=sojourns / sojourns.sum()))
        starts, rates, now = [], [], 0.0
        while now <= horizon_s:
            starts.append(now)
            rates.append(self.states[position].rate)
            now += float(rng.exponential(sojourns[position]))
            position = (position + 1) % len(sojourns)
        return _piecewise(arrivals, starts, rates, horizon_s)


@dataclass(frozen=True, slots=True)
class Step:
    """Poisson arrivals at a rate that is constant on each piece; the last rate holds for ever.

    pieces  (duration [s] > 0, rate [tasks/s] >= 0) in order.

        rate  30 |        ┌───────┐
              10 |────────┘       └────────   step:10@20s,30@20s,10@20s
                 0       20      40      60 s
    """

    pieces: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.pieces:
            raise SpecError("step: no piece; write e.g. step:10@20s,30@20s")
        _rates("step", [rate for _, rate in self.pieces])
        for duration_s, _ in self.pieces:
            _positive("step", "duration", duration_s)

    def __str__(self) -> str:
        return "step:" + ",".join(f"{_text(rate)}@{_text(duration_s)}s" for duration_s, rate in self.pieces)

    @property
    def duration_s(self) -> float:
        """Sum of the pieces [s]."""
        return math.fsum(duration_s for duration_s, _ in self.pieces)

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess."""
        starts = [0.0, *itertools.accumulate(duration_s for duration_s, _ in self.pieces)]
        return _piecewise(rng, starts[:-1], [rate for _, rate in self.pieces], horizon_s)


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson arrivals under a sine, a day and night of any length.

    rate(t) = rate (1 + amplitude sin(2 pi t / period_s))  [tasks/s]
    rate  mean [tasks/s], > 0;  amplitude  share of the mean, in [0, 1];  period_s  [s], > 0.

        rate (1 + a) |   .·'·.               .·'·.
        rate         |·'       '·         ·'       '·
        rate (1 - a) |            '·.·'               '·.·'
                     0        P/2        P                  2P

    Drawn by thinning: candidates at the peak rate, each kept with probability rate(t) / peak. Source: Lewis and Shedler 1979.
    """

    rate: float
    amplitude: float
    period_s: float

    def __post_init__(self) -> None:
        _positive("diurnal", "rate", self.rate)
        _positive("diurnal", "period", self.period_s)
        if not 0 <= self.amplitude <= 1:
            raise SpecError(f"diurnal: amplitude is {self.amplitude:g}; it is a share of the mean rate, between 0 and 1")

    def __str__(self) -> str:
        return f"diurnal:{_text(self.rate)},amplitude={_text(self.amplitude)},period={_text(self.period_s)}s"

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess."""
        peak = self.rate * (1 + self.amplitude)
        coins = _child(rng)
        candidates = _unit_poisson(rng, peak * horizon_s) / peak
        rates = self.rate * (1 + self.amplitude * np.sin(2 * np.pi * candidates / self.period_s))
        return candidates[coins.random(len(candidates)) * peak < rates]


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded arrival times, replayed.

    t = (recorded - start) / scale  [s], those before 0 left out.
    offsets  recorded times [s], ascending;  start  where in the recording to begin [s], an epoch time perhaps;
    scale  > 0: 2 replays twice as fast, at twice the rate;  pipeline  takes only these lines of a JSON-lines file;
    path  where the times came from, for the specification.
    """

    path: str
    offsets: tuple[float, ...]
    scale: float = 1.0
    start: float = 0.0
    pipeline: str | None = None

    def __post_init__(self) -> None:
        _positive("trace", "scale", self.scale)

    def __str__(self) -> str:
        options = "" if self.scale == 1 else f",scale={_text(self.scale)}"
        options += "" if self.start == 0 else f",start={_text(self.start)}"
        options += "" if self.pipeline is None else f",pipeline={self.pipeline}"
        return f"trace:{self.path}{options}"

    @property
    def duration_s(self) -> float:
        """A moment after the last arrival [s], so that a horizon of this length takes them all in; 0 when there is none."""
        last = (self.offsets[-1] - self.start) / self.scale if self.offsets else -1.0
        return math.nextafter(last, math.inf) if last >= 0 else 0.0

    def times(self, rng: np.random.Generator, horizon_s: float) -> Times:
        """See ArrivalProcess; draws nothing."""
        shifted = (np.array(self.offsets, dtype=np.float64) - self.start) / self.scale
        return _before(shifted[shifted >= 0], horizon_s)


def scaled(process: ArrivalProcess, factor: float) -> ArrivalProcess:
    """The same law at `factor` times the rate, which is above 0. A trace is replayed that much faster, since it has no rate."""
    match process:
        case Poisson() | Constant() | Gamma() | Diurnal():
            return replace(process, rate=process.rate * factor)
        case Mmpp():
            return Mmpp(tuple(State(state.rate * factor, state.sojourn_s) for state in process.states))
        case Step():
            return Step(tuple((duration_s, rate * factor) for duration_s, rate in process.pieces))
        case Trace():
            return replace(process, scale=process.scale * factor)
    raise TypeError(f"{process!r} cannot be scaled")


def natural_s(process: ArrivalProcess) -> float | None:
    """How long a process lasts by itself [s]: the sum of a step load's pieces, the length of a trace, None for the others."""
    return process.duration_s if isinstance(process, Step | Trace) else None


def stream(seed: int, pipeline: str, purpose: Literal["arrivals", "warmup", "payloads"]) -> np.random.Generator:
    """The random stream of one pipeline for one purpose.

    The key is what `SeedSequence.spawn` would hand out, but made of the names instead of a count, so that adding, removing or
    reordering pipelines, or changing the warm-up, leaves every other stream as it was.
    """
    digest = hashlib.sha256(f"{purpose}/{pipeline}".encode()).digest()
    key = tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# --- drawing --------------------------------------------------------------------------------------------------------------


def _unit_poisson(rng: np.random.Generator, end: float) -> Times:
    """A Poisson process of rate 1 on [0, end)."""
    return _renewal(lambda: rng.standard_exponential(CHUNK), end)


def _renewal(draw_gaps: Callable[[], Times], end: float) -> Times:
    chunks, last = [], 0.0
    while last < end:
        chunk = last + np.cumsum(draw_gaps())
        chunks.append(chunk)
        last = float(chunk[-1])
    return _before(np.concatenate(chunks), end) if chunks else np.empty(0)


def _piecewise(rng: np.random.Generator, starts: Sequence[float], rates: Sequence[float], horizon_s: float) -> Times:
    """Poisson arrivals of rate `rates[i]` from `starts[i]` [s] on, by the time change; the last rate holds for ever.

    If u is a Poisson process of rate 1 and R(t) = integral of the rate up to t, then R^-1(u) has that rate (Çinlar 1975, 4.7).
    R is piecewise linear, so its inverse needs only the piece that u falls into.
    """
    start, rate = np.array(starts), np.array(rates)
    passed = np.concatenate(([0.0], np.cumsum(np.diff(start) * rate[:-1])))
    last = int(np.searchsorted(start, horizon_s, side="right")) - 1
    units = _unit_poisson(rng, float(passed[last] + rate[last] * (horizon_s - start[last])))
    # side="right": of pieces that begin at the same R, the earlier ones have rate 0 and hold no arrival.
    piece = np.searchsorted(passed, units, side="right") - 1
    return _before(start[piece] + (units - passed[piece]) / rate[piece], horizon_s)


def _child(rng: np.random.Generator) -> np.random.Generator:
    """A second stream, for a process that draws two things of which each must be free to go on for longer."""
    return np.random.default_rng(int(rng.integers(2**63)))


def _before(times: Times, horizon_s: float) -> Times:
    return times[times < horizon_s]


# --- the textual form -----------------------------------------------------------------------------------------------------

EXAMPLES: Mapping[str, str] = {
    "poisson": "poisson:20",
    "constant": "constant:10",
    "gamma": "gamma:20,cv2=4",
    "mmpp": "mmpp:5@8s,40@2s",
    "step": "step:10@20s,30@20s,10@20s",
    "diurnal": "diurnal:20,amplitude=0.8,period=60s",
    "trace": "trace:FILE,scale=2",
}
"""One specification of each kind, as error messages and the command's help show it."""

_UNITS: Mapping[str, float] = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse(spec: str) -> ArrivalProcess:
    """The process that a specification names: `KIND:VALUES`, with rates in tasks/s and durations as `500ms`, `20s`, `2m`, `1h`.

        poisson:20                 constant:10                gamma:20,cv2=4
        mmpp:5@8s,40@2s            step:10@20s,30@20s         diurnal:20,amplitude=0.8,period=60s
        trace:FILE,scale=2         (also start=SECONDS, pipeline=NAME)

    A trace file holds one time [s] a line, or JSON lines with `scheduled_s` or `t`: the records of a run replay that run.

    Raises:
        SpecError: unknown kind, missing or impossible value, unreadable trace; the message says what to write instead.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in EXAMPLES:
        close = difflib.get_close_matches(kind, EXAMPLES, n=1)
        hint = f"did you mean {EXAMPLES[close[0]]!r}?" if close else f"kinds: {', '.join(EXAMPLES)}"
        raise SpecError(f"{spec!r}: no arrival process is called {kind!r}; {hint}")
    if not colon or not rest:
        raise SpecError(f"{spec!r}: nothing follows {kind!r}; write e.g. {EXAMPLES[kind]!r}")
    try:
        return _READERS[kind](rest)
    except SpecError as error:
        raise SpecError(f"{spec!r}: {error}") from None


def _read_poisson(rest: str) -> Poisson:
    (rate,) = _values("poisson", rest, 1, {})[0]
    return Poisson(rate)


def _read_constant(rest: str) -> Constant:
    (rate,) = _values("constant", rest, 1, {})[0]
    return Constant(rate)


def _read_gamma(rest: str) -> Gamma:
    (rate,), options = _values("gamma", rest, 1, {"cv2": _number})
    return Gamma(rate, options["cv2"])


def _read_diurnal(rest: str) -> Diurnal:
    (rate,), options = _values("diurnal", rest, 1, {"amplitude": _number, "period": _duration})
    return Diurnal(rate, options["amplitude"], options["period"])


def _read_mmpp(rest: str) -> Mmpp:
    return Mmpp(tuple(State(rate, duration_s) for rate, duration_s in _stays("mmpp", rest)))


def _read_step(rest: str) -> Step:
    return Step(tuple((duration_s, rate) for rate, duration_s in _stays("step", rest)))


def _read_trace(rest: str) -> Trace:
    path, *parts = rest.split(",")
    options = _options("trace", parts)
    unknown = options.keys() - {"scale", "start", "pipeline"}
    if unknown:
        raise SpecError(f"trace takes scale=, start= and pipeline=, not {', '.join(sorted(unknown))}=")
    pipeline = options.get("pipeline")
    return Trace(
        path=path,
        offsets=tuple(sorted(_recorded(Path(path), pipeline))),
        scale=_number(options.get("scale", "1"), "scale"),
        start=_number(options.get("start", "0"), "start"),
        pipeline=pipeline,
    )


_READERS: Mapping[str, Callable[[str], ArrivalProcess]] = {
    "poisson": _read_poisson,
    "constant": _read_constant,
    "gamma": _read_gamma,
    "mmpp": _read_mmpp,
    "step": _read_step,
    "diurnal": _read_diurnal,
    "trace": _read_trace,
}


def _values(
    kind: str, rest: str, count: int, readers: Mapping[str, Callable[[str, str], float]]
) -> tuple[list[float], dict[str, float]]:
    """`20,cv2=4` as numbers and options, each option that `readers` names exactly once."""
    parts = rest.split(",")
    plain, options = parts[:count], _options(kind, parts[count:])
    if options.keys() != readers.keys() or any("=" in part for part in plain):
        raise SpecError(f"{kind} is written like {EXAMPLES[kind]!r}")
    return [_number(part, "rate") for part in plain], {key: read(options[key], key) for key, read in readers.items()}


def _options(kind: str, parts: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not value or key in options:
            raise SpecError(f"{part!r} is not one KEY=VALUE; {kind} is written like {EXAMPLES[kind]!r}")
        options[key] = value
    return options


def _stays(kind: str, rest: str) -> Iterator[tuple[float, float]]:
    """(rate, duration [s]) of each part of `10@20s,30@20s`."""
    for part in rest.split(","):
        rate, at, duration = part.partition("@")
        if not at:
            raise SpecError(f"{part!r} is not RATE@DURATION; {kind} is written like {EXAMPLES[kind]!r}")
        yield _number(rate, "rate"), _duration(duration, "duration")


def _text(value: float) -> str:
    """A number as short as it can be without losing a bit: 20, 0.1, 1e-06."""
    return repr(float(value)).removesuffix(".0")


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SpecError(f"{what} {text!r} is not a number")
    return value


def _duration(text: str, what: str) -> float:
    digits = text.rstrip(string.ascii_lowercase)
    unit = text[len(digits) :] or "s"
    if unit not in _UNITS:
        raise SpecError(f"{what} {text!r}: the unit is one of {', '.join(_UNITS)}, e.g. 20s")
    return _number(digits, what) * _UNITS[unit]


def _recorded(path: Path, pipeline: str | None) -> Iterator[float]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"cannot read the trace {str(path)!r}: {reason}") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            time = _recorded_time(text, f"{path}:{number}", pipeline)
            if time is not None:
                yield time


def _recorded_time(text: str, where: str, pipeline: str | None) -> float | None:
    """The time on one line, or None where the line belongs to another pipeline."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        if pipeline is not None and value.get("pipeline") != pipeline:
            return None
        value = value.get("scheduled_s", value.get("t"))
    elif pipeline is not None:
        raise SpecError(f"{where}: pipeline= needs JSON lines with a 'pipeline' each")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{where}: {text[:40]!r} is no time; write seconds, or JSON with 'scheduled_s' or 't'")
    return float(value)


def _positive(kind: str, what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise SpecError(f"{kind}: {what} is {value:g}; it must be above 0, as in {EXAMPLES[kind]!r}")


def _rates(kind: str, rates: Sequence[float]) -> None:
    if any(not (rate >= 0 and math.isfinite(rate)) for rate in rates) or not any(rate > 0 for rate in rates):
        raise SpecError(f"{kind}: rates must be 0 or more and one of them above 0, as in {EXAMPLES[kind]!r}")
