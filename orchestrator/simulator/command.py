"""`espalier simulate`: a scenario's runs, over several processes, and its report.

What comes out does not hang on how many processes there are: every run is a pure function of the scenario and its setting, and
rows are put into the scenario's order.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator import display
from orchestrator import plan as plans
from orchestrator import testbed as testbeds
from orchestrator.errors import SetupFailed, UsageError
from orchestrator.simulator import plots, report, scenario, study
from orchestrator.simulator.initial import Method, Start
from orchestrator.simulator.report import table
from orchestrator.simulator.scenario import Entry, Loaded
from orchestrator.simulator.study import Setting, Study
from orchestrator.testbed import did_you_mean

__all__ = ["Asked", "Outcome", "bar", "estimate", "narrowed", "read", "simulate", "table", "write"]

U = TypeVar("U")

TASK_STAGES_PER_S = 25_000.0
"""What one process simulates, for the estimate: task-stages, each a few events, with all that stands around them."""
SLOT_S = 0.01
"""What a decision takes beside that, for ten nodes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says beside the scenario; None: as it says."""

    policies: tuple[str, ...] = ()
    seeds: int | None = None
    duration_s: float | None = None


@dataclass(slots=True)
class Outcome:
    """Rows so far, in the order of the scenario; `complete` tells whether these are all."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: int = 0
    notes: list[str] = field(default_factory=list)
    """What went otherwise than asked, without being an error."""

    @property
    def complete(self) -> bool:
        """Whether every run was done."""
        return len(self.rows) == self.runs


def read(name: str, directory: Path, models_dir: Path, policies: Sequence[str]) -> tuple[Loaded, Study]:
    """The scenario of that name or file, or a testbed file's own workload; and what no seed changes of it.

    Raises:
        UsageError: there is no such scenario, or a mistake in it.
        SetupFailed: a model of its testbed is not exported or not profiled.
    """
    path = scenario.find(name, directory)
    text = scenario.read(path)
    if scenario.is_scenario(text):
        loaded = scenario.parse(text, path)
        testbed = loaded.scenario.world.testbed
        plan = None if testbed is None else plans.make(testbeds.load(path.parent / testbed), models_dir)
    else:
        plan = plans.make(testbeds.parse(text, str(path)), models_dir)
        own = scenario.of_testbed(plan.testbed, path, policies or ("manual",))
        loaded = Loaded(own, path, plan.loaded.sha256)
    return loaded, study.study_of(loaded.scenario, plan)


def narrowed(loaded: Loaded, made: Study, asked: Asked) -> tuple[Loaded, Study]:
    """The scenario with what the user asked for in place of what it says.

    Raises:
        UsageError: a policy is not among the scenario's, or the duration leaves nothing to measure.
    """
    said = loaded.scenario
    update: dict[str, Any] = {}
    if asked.policies:
        known = dict.fromkeys(name for entry in said.policies for name in (entry.policy, entry.label) if name)
        for name in asked.policies:
            if name not in known:
                raise UsageError(
                    f"the scenario has no policy {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}"
                )  # fmt: skip
        update["policies"] = tuple(p for p in said.policies if {p.policy, p.label} & set(asked.policies))
    if asked.seeds is not None:
        update["seeds"] = asked.seeds
    if asked.duration_s is not None:
        update["duration"] = asked.duration_s
    changed = said.model_copy(update=update)
    if problems := scenario.check(changed):
        raise UsageError("; ".join(f"{testbeds.dotted(problem.path)}: {problem.message}" for problem in problems))
    return replace(loaded, scenario=changed), replace(made, scenario=changed)


def estimate(made: Study, jobs: int) -> str:
    """How much there is to do, in words."""
    said = made.scenario
    settings, runs = study.settings(said), len(scenario.entries(said))
    stages = slots = 0.0
    for setting in settings:
        stages += study.task_stages(made, setting) * runs
        slots += said.duration / said.slot * runs
    minutes = (stages / TASK_STAGES_PER_S + slots * SLOT_S) / jobs / 60
    size = f"{len(settings) * runs} runs, {stages / 1e6:.1f} million task-stages"
    return f"{size}: about {max(minutes, 0.1):.1f} min with {jobs} jobs"


def simulate(made: Study, jobs: int, outcome: Outcome, progress: Progress) -> None:
    """All runs of a study. Rows are in `outcome` as far as they go, also when it is interrupted.

    Raises:
        UsageError: a policy does not take its options, or the core tier has no place.
    """
    said = made.scenario
    entries, settings, methods = scenario.entries(said), study.settings(said), study.methods(said)
    outcome.runs = len(settings) * len(entries)
    found: dict[int, dict[str, Any]] = {}
    try:
        with _pool(jobs) as over:
            asked = [(setting, method) for setting in settings for method in methods]
            placing = progress.add_task("placing the core tier", total=len(asked), visible=bool(asked))
            starts: dict[tuple[int, Method], Start] = {}
            for index, start in over(functools.partial(_place, made), asked):
                starts[index // len(methods), asked[index][1]] = start
                progress.advance(placing)
            running = progress.add_task("simulating", total=outcome.runs)
            todo = [
                (setting, entry, _start(made, starts, number, entry))
                for number, setting in enumerate(settings)
                for entry in entries
            ]
            for index, row in over(functools.partial(_row, made), todo):
                found[index] = row
                progress.advance(running)
    finally:
        outcome.rows = [found[index] for index in sorted(found)]


def _start(made: Study, starts: dict[tuple[int, Method], Start], number: int, entry: Entry) -> Start:
    if made.scenario.placement is None:
        assert made.start is not None
        return made.start
    return starts[number, entry.placement or made.scenario.placement.core]


def _place(made: Study, job: tuple[int, tuple[Setting, Method]]) -> tuple[int, Start]:
    index, (setting, method) = job
    return index, study.place(made, setting, method)


def _row(made: Study, job: tuple[int, tuple[Setting, Entry, Start]]) -> tuple[int, dict[str, Any]]:
    index, (setting, entry, start) = job
    try:
        return index, study.row(made, setting, entry, start)
    except ValueError as error:
        raise UsageError(f"policy {entry.label}: {error}") from None


_Map = Callable[[Callable[[tuple[int, Any]], tuple[int, U]], Sequence[Any]], Iterator[tuple[int, U]]]


@contextmanager
def _pool(jobs: int) -> Iterator[_Map[Any]]:
    """A way to do numbered jobs: one after the other here, or in any order in processes, which end with the block."""
    if jobs == 1:
        yield lambda function, items: map(function, enumerate(items))
        return
    # Fresh processes: a forked one would have the progress bar's thread half copied.
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_ignore_interrupts) as pool:
        yield lambda function, items: pool.imap_unordered(function, enumerate(items))


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the one that writes the report ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write(loaded: Loaded, outcome: Outcome, directory: Path, *, draw: bool) -> dict[str, Any]:
    """Write `report.json` and, where matplotlib is installed, the plots beside it; the report."""
    directory.mkdir(parents=True, exist_ok=True)
    document = report.document(loaded, outcome.rows, runs=outcome.runs)
    target = directory / "report.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    if draw and loaded.scenario.plots:
        try:
            document["plots"] = [path.name for path in plots.draw(loaded.scenario, outcome.rows, directory)]
        except SetupFailed as error:
            outcome.notes.append(f"no plots: {error}")
        target.write_text(json.dumps(document, indent=1) + "\n")
    return document


def bar() -> Progress:
    """A progress bar on a terminal; nothing where stderr is none."""
    console = display.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
