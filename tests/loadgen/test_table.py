from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

from rich.console import Console

from loadgen.outcome import Hop, Outcome, TaskRecord
from loadgen.report import PipelinePlan, Plan, build
from loadgen.table import print_report, show_progress


def record(pipeline: str, outcome: Outcome, **changes: object) -> TaskRecord:
    fields: dict[str, object] = {
        "pipeline": pipeline, "index": 0, "scheduled_s": 1.0, "sent_s": 1.0, "finished_s": 1.05, "deadline_s": 0.2,
        "status": 200, "reason": None, "outcome": outcome, "hops": (Hop("e", "encode-a", "", "", 0.01, 0.02, 0.0, 3),),
    }  # fmt: skip
    return TaskRecord(**{**fields, **changes})  # type: ignore[arg-type]  # fields of one dataclass, by name


def printed(*records: TaskRecord, width: int = 80, **changes: object) -> str:
    pipelines = (PipelinePlan("embed", "poisson:20", 0.2, epsilon=0.5), PipelinePlan("classify", "poisson:5", 0.2))
    plan = Plan(pipelines, seed=1, duration_s=10.0, warmup_s=2.0, **changes)  # type: ignore[arg-type]  # as above
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        print_report(console, build(records, plan))
    return capture.get()


def test_a_row_per_pipeline_one_for_all_and_the_stages_fit_80_columns() -> None:
    text = printed(record("embed", "on_time"), record("classify", "late"))
    assert max(map(len, text.splitlines())) <= 80
    for word in ("embed", "classify", "all", "0.500", "50.0", "encode-a", "10.0 (10.0)", "60%", "elsewhere", "40%"):
        assert word in text
    assert "…" not in text


def test_remarks_say_what_the_tables_cannot() -> None:
    text = printed(
        record("embed", "on_time", scheduled_s=-1.0),
        record("embed", "on_time", sent_s=1.04),
        record("embed", "rejected", reason="queue_full"),
        record("classify", "cancelled", reason="interrupted", sent_s=None),
        width=200,
        objective=0.9,
        interrupted=True,
    )
    for remark in (
        "warm-up excluded: 1 tasks in 2 s",
        "too few answers for a p99 of embed;",
        "embed, not on time: 1 rejected",
        "embed: promised at most 0.5 not on time, measured 0.5000",
        "reasons: 1 interrupted, 1 queue_full",
        "interrupted: the tasks left count as cancelled",
        "INVALID: embed: p99 send lag 40.0 ms",
        "objective: 0.9 on time, MISSED",
    ):
        assert remark in text


def test_an_empty_report_prints_dashes() -> None:
    assert "-" in printed()


async def test_the_bar_counts_what_has_ended() -> None:
    console = Console(force_terminal=True, width=120, no_color=True)
    seen = asyncio.Event()

    def counts() -> Counter[Outcome]:
        seen.set()
        return Counter[Outcome]({"on_time": 3, "late": 1})

    with console.capture() as capture:
        drawing = asyncio.create_task(show_progress(console, 10, counts))
        await seen.wait()
        await asyncio.sleep(0)
        drawing.cancel()
        with suppress(asyncio.CancelledError):
            await drawing
    assert "4/10 tasks" in capture.get()
    assert "3 on_time, 1 late" in capture.get()
