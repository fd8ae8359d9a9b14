"""`python -m loadgen`: reads the command line, runs one load, writes what came of it, and says by its exit status how it went.

    0  ok                                   3  set-up failed: server not there, or pipeline unknown; nothing was sent
    1  the objective was missed             4  the run failed, or is invalid: the generator lagged behind its schedule
    2  wrong usage                        130  interrupted; what was measured is written all the same

An invalid run exits 4 even where the objective was missed: its numbers are not the server's.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import orjson
import uvloop
from rich.console import Console

from loadgen import arrivals, report, table
from loadgen.arrivals import ArrivalProcess
from loadgen.client import Client
from loadgen.errors import LoadgenError, RunFailed, SetupFailed, SpecError
from loadgen.outcome import TaskRecord
from loadgen.run import Load, ScheduledTask, Sender, patience_s, plan

OK, MISSED, USAGE, SETUP, FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130

DEADLINE_S = 1.0
"""Where neither the command line nor the server names one."""

DURATION_S = 60.0
"""Where neither the command line nor an arrival process names one."""

FILE_WIDTH = 120
"""Columns of the tables where stdout is no terminal."""

SPARE_FILES = 64
"""Open files beside the connections: standard streams, the event loop's own, the outputs."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    url: str
    processes: Mapping[str, ArrivalProcess]
    deadlines: Mapping[str, float]
    duration_s: float
    warmup_s: float
    seed: int
    objective: float | None
    max_in_flight: int
    headers: Mapping[str, str]


def main() -> None:
    """Entry point of `python -m loadgen`; never returns."""
    # Not standalone: click would turn Ctrl-C into exit 1.
    try:
        code = command.main(prog_name="python -m loadgen", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = USAGE
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except LoadgenError as error:
        click.echo(f"error: {error}", err=True)
        code = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    sys.exit(code)


_STATUS: Mapping[type[LoadgenError], int] = {SpecError: USAGE, SetupFailed: SETUP, RunFailed: FAILED}


def _epilog() -> str:
    examples = "\n".join(f"  {example}" for example in arrivals.EXAMPLES.values())
    return f"\b\nArrivals (rates in tasks/s, durations as 500ms, 20s, 2m):\n{examples}"


@click.command(epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("url")
@click.option(
    "--pipeline", "pipelines", multiple=True, required=True, metavar="NAME=ARRIVALS", help="Load on one pipeline; repeat."
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    help="Measured part [s]; default: that of a step or trace, else 60.",
)
@click.option(
    "--warmup", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Same load before it, not measured [s]."
)
@click.option(
    "--deadline",
    "deadlines",
    multiple=True,
    metavar="[NAME=]SECONDS",
    help="Default: the server's own for the pipeline, else 1.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of all arrivals and payloads.")
@click.option("--objective", type=click.FloatRange(0, 1), help="Least on-time ratio of every pipeline; below it, exit 1.")
@click.option(
    "--max-in-flight", type=click.IntRange(min=1), default=2048, show_default=True, help="Tasks out at once; more fail unsent."
)
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent with every request, an API key say.")
@click.option("--records", type=click.Path(dir_okay=False, path_type=Path), help="Write one JSON line per task.")
@click.option("--report", "report_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as JSON.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="What goes to stdout."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def command(
    url: str,
    pipelines: tuple[str, ...],
    duration: float | None,
    warmup: float,
    deadlines: tuple[str, ...],
    seed: int,
    objective: float | None,
    max_in_flight: int,
    headers: tuple[str, ...],
    records: Path | None,
    report_path: Path | None,
    output: str,
    quiet: bool,
) -> int:
    """Send open-loop load to the Open Inference Protocol server at URL and report how many tasks were on time."""
    processes = {name: arrivals.parse(spec) for name, spec in _pairs(pipelines, "--pipeline", "embed=poisson:20").items()}
    options = Options(
        url=url,
        processes=processes,
        deadlines=_deadlines(deadlines, processes),
        duration_s=duration or max(filter(None, map(arrivals.natural_s, processes.values())), default=DURATION_S),
        warmup_s=warmup,
        seed=seed,
        objective=objective,
        max_in_flight=max_in_flight,
        headers=_pairs(headers, "--header", "Authorization: Bearer KEY", separator=":"),
    )
    for path in filter(None, (records, report_path)):
        _writable(path)
    _allow_open_files(max_in_flight + SPARE_FILES)
    done, asked = uvloop.run(_execute(options, None if quiet else Console(stderr=True)))
    summary = report.build(done, asked)
    _write(records, report_path, done, summary)
    if output == "json":
        click.echo(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    else:
        table.print_report(Console(width=None if sys.stdout.isatty() else FILE_WIDTH), summary)
    return _status(summary)


async def _execute(options: Options, console: Console | None) -> tuple[list[TaskRecord], report.Plan]:
    async with Client(options.url, connections=options.max_in_flight, headers=options.headers) as client:
        binary = await client.takes_binary()
        loads = [await _load(client, options, name, process) for name, process in options.processes.items()]
        schedule = plan(
            loads, client, seed=options.seed, duration_s=options.duration_s, warmup_s=options.warmup_s, binary=binary
        )
        if not schedule:
            raise SpecError("no task falls into the run; lengthen --duration, raise a rate, or start= the trace later")
        sender = Sender(client, max_in_flight=options.max_in_flight)
        with _interrupting(sender):
            records = await _watched(sender, schedule, console)
    return records, _report_plan(options, loads, binary=binary, interrupted=sender.interrupted)


async def _load(client: Client, options: Options, name: str, process: ArrivalProcess) -> Load:
    metadata = await client.metadata(name)
    return Load(metadata, process, options.deadlines.get(name) or metadata.deadline_s or DEADLINE_S)


async def _watched(sender: Sender, schedule: Sequence[ScheduledTask], console: Console | None) -> list[TaskRecord]:
    """Run the schedule, with a progress bar where a person is watching."""
    if console is None or not console.is_terminal:
        return await sender.run(schedule)
    drawing = asyncio.create_task(table.show_progress(console, len(schedule), lambda: sender.outcomes))
    try:
        return await sender.run(schedule)
    finally:
        drawing.cancel()
        with suppress(asyncio.CancelledError):
            await drawing


@contextmanager
def _interrupting(sender: Sender) -> Iterator[None]:
    """Ctrl-C and a polite kill end the run, not the program: what was measured is still worth a report."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, sender.interrupt)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _report_plan(options: Options, loads: Sequence[Load], *, binary: bool, interrupted: bool) -> report.Plan:
    pipelines = tuple(
        report.PipelinePlan(load.metadata.name, str(load.arrivals), load.deadline_s, load.metadata.epsilon) for load in loads
    )
    facts = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "wire": "binary" if binary else "json",
        "max_in_flight": options.max_in_flight,
        "patience_s": {load.metadata.name: patience_s(load.deadline_s) for load in loads},
    }
    return report.Plan(
        pipelines=pipelines,
        seed=options.seed,
        duration_s=options.duration_s,
        warmup_s=options.warmup_s,
        url=options.url,
        objective=options.objective,
        interrupted=interrupted,
        facts=facts,
    )


def _status(summary: Mapping[str, Any]) -> int:
    """The exit status of a run that ended with this report."""
    if not summary["complete"]:
        return INTERRUPTED
    if not summary["valid"]:
        return FAILED
    return MISSED if summary["objective"] is not None and not summary["objective"]["met"] else OK


# --- reading options, writing files ---------------------------------------------------------------------------------------


def _pairs(values: Sequence[str], option: str, example: str, separator: str = "=") -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in values:
        name, found, rest = (part.strip() for part in value.partition(separator))
        if not name or not found or not rest:
            raise SpecError(f"{option} {value!r}: write it like {option} '{example}'")
        if name in pairs:
            raise SpecError(f"{option} names {name!r} twice; give it once")
        pairs[name] = rest
    return pairs


def _deadlines(values: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    """Deadline [s] per pipeline; `0.3` alone means every pipeline that no other value names."""
    general = [value for value in values if "=" not in value]
    named = _pairs([value for value in values if "=" in value], "--deadline", "embed=0.3")
    unknown = named.keys() - set(names)
    if unknown or len(general) > 1:
        what = f"no --pipeline is called {', '.join(sorted(unknown))}" if unknown else "more than one value for all pipelines"
        raise SpecError(f"--deadline: {what}")
    merged = {**dict.fromkeys(names, *general), **named} if general else named
    return {name: _seconds(value) for name, value in merged.items()}


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SpecError(f"--deadline {text!r}: write seconds above 0, e.g. 0.3")
    return value


def _writable(path: Path) -> None:
    """Find out before the run, not after it."""
    if not path.parent.is_dir():
        raise SpecError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}; create it first")


def _allow_open_files(needed: int) -> None:
    """Raise the soft limit on open files, since every task that is out may hold a connection.

    Raises:
        SpecError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (resource.RLIM_INFINITY,) and hard < needed:
        raise SpecError(
            f"only {hard} files may be open here; lower --max-in-flight to {hard - SPARE_FILES} or raise ulimit -Hn"
        )
    if soft not in (resource.RLIM_INFINITY,) and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _write(
    records_path: Path | None, report_path: Path | None, records: Sequence[TaskRecord], summary: Mapping[str, Any]
) -> None:
    if records_path is not None:
        with records_path.open("wb") as stream:
            stream.writelines(orjson.dumps(record.as_dict(), option=orjson.OPT_APPEND_NEWLINE) for record in records)
    if report_path is not None:
        report_path.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
