from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.arrivals import (
    ArrivalProcess,
    Constant,
    Diurnal,
    Gamma,
    Mmpp,
    Poisson,
    SpecError,
    State,
    Step,
    Trace,
    natural_s,
    parse,
    scaled,
    stream,
)

rates = st.floats(0.1, 200)
durations = st.floats(0.05, 30)
processes: st.SearchStrategy[ArrivalProcess] = st.one_of(
    st.builds(Poisson, rates),
    st.builds(Constant, rates),
    st.builds(Gamma, rates, st.floats(0.1, 10)),
    st.builds(lambda states: Mmpp(tuple(states)), st.lists(st.builds(State, rates, durations), min_size=2, max_size=4)),
    st.builds(lambda pieces: Step(tuple(pieces)), st.lists(st.tuples(durations, rates), min_size=1, max_size=4)),
    st.builds(Diurnal, rates, st.floats(0, 1), durations),
)
seeds = st.integers(0, 2**31)
horizons = st.floats(0, 20)


@given(processes, seeds, horizons)
def test_times_ascend_within_the_horizon(process: ArrivalProcess, seed: int, horizon_s: float) -> None:
    times = process.times(np.random.default_rng(seed), horizon_s)
    assert np.all(np.diff(times) >= 0)
    assert np.all((times >= 0) & (times < horizon_s))


@given(processes, seeds, horizons)
def test_the_same_seed_gives_the_same_times(process: ArrivalProcess, seed: int, horizon_s: float) -> None:
    first, again = (process.times(np.random.default_rng(seed), horizon_s) for _ in range(2))
    assert np.array_equal(first, again)


@given(processes, seeds, horizons, st.floats(0, 20))
def test_a_longer_horizon_only_adds_times_at_the_end(
    process: ArrivalProcess, seed: int, horizon_s: float, more_s: float
) -> None:
    short = process.times(np.random.default_rng(seed), horizon_s)
    long = process.times(np.random.default_rng(seed), horizon_s + more_s)
    assert np.array_equal(short, long[: len(short)])
    assert np.all(long[len(short) :] >= horizon_s)


@pytest.mark.parametrize(
    ("spec", "doubled"),
    [
        ("poisson:20", "poisson:40"),
        ("constant:10", "constant:20"),
        ("gamma:20,cv2=4", "gamma:40,cv2=4"),
        ("mmpp:5@8s,40@2s", "mmpp:10@8s,80@2s"),
        ("step:10@20s,30@20s", "step:20@20s,60@20s"),
        ("diurnal:20,amplitude=0.8,period=60s", "diurnal:40,amplitude=0.8,period=60s"),
    ],
)
def test_a_scaled_process_has_other_rates_and_nothing_else(spec: str, doubled: str) -> None:
    assert scaled(parse(spec), 2.0) == parse(doubled)


def test_a_scaled_trace_is_replayed_faster() -> None:
    assert scaled(Trace("-", (1.0, 2.0), scale=3.0), 2.0) == Trace("-", (1.0, 2.0), scale=6.0)


@given(processes)
def test_the_textual_form_is_the_process(process: ArrivalProcess) -> None:
    assert parse(str(process)) == process


HORIZON_S = 2000.0


@pytest.mark.parametrize(
    ("spec", "rate"),
    [
        ("poisson:20", 20),
        ("constant:10", 10),
        ("gamma:20,cv2=4", 20),
        ("gamma:20,cv2=0.25", 20),
        ("mmpp:5@0.8s,40@200ms", (5 * 0.8 + 40 * 0.2) / 1),
        ("mmpp:0@1s,20@1s,40@2s", (20 + 80) / 4),
        ("step:10@500s,30@500s,20@500s", (5000 + 15000 + 20000) / 2000),
        ("diurnal:20,amplitude=0.8,period=10s", 20),
    ],
)
def test_the_mean_rate_is_the_one_asked_for(spec: str, rate: float) -> None:
    # Index of dispersion below 8 in every row, so four standard errors of the count are under 4 sqrt(8 n).
    count = len(parse(spec).times(stream(7, "p", "arrivals"), HORIZON_S))
    expected = rate * HORIZON_S
    assert abs(count - expected) < 4 * math.sqrt(8 * expected)


@pytest.mark.parametrize("cv2", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_asked_for_variation(cv2: float) -> None:
    gaps = np.diff(Gamma(20, cv2).times(stream(3, "p", "arrivals"), HORIZON_S))
    assert np.var(gaps) / np.mean(gaps) ** 2 == pytest.approx(cv2, rel=0.08)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.sort(np.diff(Poisson(20).times(stream(5, "p", "arrivals"), HORIZON_S)))
    n = len(gaps)
    distance = np.max(np.abs(np.arange(1, n + 1) / n - (1 - np.exp(-20 * gaps))))
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %


def test_constant_arrivals_start_at_0_and_keep_their_distance() -> None:
    assert Constant(4).times(np.random.default_rng(), 1.0).tolist() == [0.0, 0.25, 0.5, 0.75]


def test_step_follows_its_pieces_and_then_keeps_the_last_rate() -> None:
    times = parse("step:10@100s,0@100s,40@100s").times(stream(1, "p", "arrivals"), 400)
    counts, _ = np.histogram(times, bins=[0, 100, 200, 300, 400])
    assert counts[1] == 0
    for count, expected in zip(counts[[0, 2, 3]], (1000, 4000, 4000), strict=True):
        assert abs(count - expected) < 4 * math.sqrt(expected)


def test_diurnal_peaks_in_the_first_half_of_its_period() -> None:
    times = Diurnal(50, 1.0, 10.0).times(stream(1, "p", "arrivals"), 1000)
    day = np.count_nonzero(times % 10 < 5)
    # Half a period of 1 + sin holds 1/2 + 1/pi of the arrivals.
    assert day / len(times) == pytest.approx(0.5 + 1 / math.pi, abs=0.01)


def test_mmpp_is_burstier_than_poisson() -> None:
    times = parse("mmpp:5@8s,40@2s").times(stream(1, "p", "arrivals"), 5000)
    counts, _ = np.histogram(times, bins=np.arange(0, 5001, 10))
    assert np.var(counts) / np.mean(counts) > 5


def test_a_trace_of_plain_times_is_sorted_shifted_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("# epoch seconds\n1003\n1001\n\n1005.5\n999\n")
    trace = parse(f"trace:{path},start=1000,scale=2")
    assert trace.times(np.random.default_rng(), 10).tolist() == [0.5, 1.5, 2.75]
    assert trace.times(np.random.default_rng(), 2.75).tolist() == [0.5, 1.5]
    assert parse(str(trace)) == trace


def test_the_records_of_a_run_replay_one_pipeline_without_its_warmup(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = [("embed", -1.0), ("embed", 0.5), ("classify", 0.7), ("embed", 2.0)]
    path.write_text("\n".join(json.dumps({"pipeline": name, "scheduled_s": t}) for name, t in records))
    trace = parse(f"trace:{path},pipeline=embed")
    assert trace.times(np.random.default_rng(), 100).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [("poisson:20", None), ("step:10@20s,30@1m,10@500ms", 80.5), ("mmpp:1@1s,2@1h", None)],
)
def test_only_steps_and_traces_have_a_length_of_their_own(spec: str, seconds: float | None) -> None:
    assert natural_s(parse(spec)) == seconds


def test_a_trace_lasts_until_just_after_its_last_arrival() -> None:
    trace = Trace("-", (1.0, 4.0))
    length = natural_s(trace)
    assert length is not None
    assert len(trace.times(np.random.default_rng(), length)) == 2
    assert natural_s(Trace("-", ())) == 0


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("poison:20", "did you mean 'poisson:20'"),
        ("x", "kinds: poisson, constant"),
        ("poisson", "write e.g. 'poisson:20'"),
        ("poisson:", "write e.g. 'poisson:20'"),
        ("poisson:-1", "must be above 0"),
        ("poisson:nan", "not a number"),
        ("poisson:fast", "rate 'fast' is not a number"),
        ("poisson:1,2", "not one KEY=VALUE"),
        ("constant:cv2=1", "written like 'constant:10'"),
        ("gamma:20", "written like 'gamma:20,cv2=4'"),
        ("gamma:20,cv2=4,cv2=5", "not one KEY=VALUE"),
        ("gamma:20,cv2=0", "must be above 0"),
        ("mmpp:5@8s", "two or more"),
        ("mmpp:5@8s,40", "'40' is not RATE@DURATION"),
        ("mmpp:0@8s,0@2s", "one of them above 0"),
        ("step:10@0s", "must be above 0"),
        ("step:10@2d", "the unit is one of ms, s, m, h"),
        ("diurnal:20,amplitude=2,period=60s", "between 0 and 1"),
        ("diurnal:20,amplitude=0.5", "written like 'diurnal:"),
        ("trace:/no/such/file", "No such file"),
        ("trace:/no/such/file,speed=2", "not speed="),
    ],
)
def test_an_impossible_specification_says_what_to_write(spec: str, says: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(spec)
    assert says in str(error.value)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"1\nsoon\n", "", "times:2: 'soon' is no time"),
        (b'{"at": 3}\n', "", "times:1"),
        (b"true\n", "", "is no time"),
        (b"1\n", ",pipeline=embed", "needs JSON lines"),
        (b"1\n", ",scale=0", "must be above 0"),
        (b"\xff\xfe", "", "not UTF-8"),
    ],
)
def test_a_trace_that_cannot_be_read_names_the_line(tmp_path: Path, content: bytes, options: str, says: str) -> None:
    path = tmp_path / "times"
    path.write_bytes(content)
    with pytest.raises(SpecError, match="trace") as error:
        parse(f"trace:{path}{options}")
    assert says in str(error.value)


def test_a_process_cannot_be_made_without_pieces() -> None:
    with pytest.raises(SpecError, match="no piece"):
        Step(())


def test_streams_depend_on_seed_pipeline_and_purpose_and_on_nothing_else() -> None:
    def first(seed: int, pipeline: str, purpose: str) -> float:
        return float(stream(seed, pipeline, purpose).random())  # type: ignore[arg-type]  # the literals below

    keys = [(s, p, w) for s in (1, 2) for p in ("embed", "classify") for w in ("arrivals", "warmup", "payloads")]
    assert len({first(*key) for key in keys}) == len(keys)
    assert first(*keys[0]) == first(*keys[0])
