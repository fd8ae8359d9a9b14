"""Command line of this folder: `python -m models export | verify | profile`; `espalier` hands its commands of these names on.

Progress and tables go to stderr; with `-o json` the result goes to stdout as JSON. Exit status: 0 ok, 1 an objective was missed
(verify over its tolerance), 2 bad usage (no such checkpoint, no such export), 3 set-up failed (disk, exporter, measuring
process), 130 interrupted. Commands import what they need when they run, so that an export that is up to date says so at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.errors import CheckpointError, ModelsError
from models.manifest import MANIFEST_NAME, SHORT_PRECISIONS, ManifestError, Precision

if TYPE_CHECKING:
    from models.manifest import Manifest, StageProfile, StageSpec, Weights
    from models.verification.figures import Verdict

OK, MISSED, BAD_USAGE, SETUP_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
MODELS = Path("out/models")
DETERMINISTIC = 0.01
"""Squared coefficient of variation below which a service time is called near deterministic: it strays by less than 10 %."""
ENOUGH = 4
"""Undisturbed runs beyond the first at each size before anything is said of how they vary: five rounds of one long run."""

_stderr = Console(stderr=True, highlight=False)
_models_dir = click.option(
    "--models-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=MODELS,
    show_default=True,
    help="Where exported models lie, one directory each.",
)
_output = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="What goes to stdout."
)


class _Precision(click.ParamType[Precision]):
    """A precision by its own name or its short one."""

    name = "precision"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        del param, ctx
        return "[" + "|".join(SHORT_PRECISIONS) + "]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Precision:
        found: Precision = SHORT_PRECISIONS.get(value, value)
        if found not in get_args(Precision):
            self.fail(f"{value!r} is not one of {', '.join(SHORT_PRECISIONS)}", param, ctx)
        return found


class _Threads(click.ParamType[tuple[int, ...]]):
    """Numbers of threads, separated by commas."""

    name = "threads"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        del param, ctx
        return "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is not one or several numbers of threads, as in 1,2", param, ctx)
        return tuple(dict.fromkeys(int(word) for word in words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Quantising loads ONNX Runtime by a door that is not ours; see `models.session`.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        status: int = _commands.main(arguments, prog_name="python -m models", standalone_mode=False) or OK
    except click.exceptions.Abort:
        _stderr.print("interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return BAD_USAGE
    except (ManifestError, ModelsError) as error:
        _stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return BAD_USAGE if isinstance(error, ManifestError | CheckpointError) else SETUP_FAILED
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
def _commands() -> None:
    """Cut a Hugging Face model into ONNX stages, verify them against the whole model, and profile them on this machine."""


@_commands.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Directory to write [default: MODELS_DIR/NAME].")
@_models_dir
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=_Precision(),
    default=["float32"],
    show_default="fp32",
    help="Once per precision wanted.",
)
@click.option(
    "--cut",
    "parts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Cut each core encoder and decoder at layer boundaries into so many parts of about equal work.",
)
@click.option(
    "--opset", type=click.IntRange(20, 23), default=23, show_default=True, help="ONNX operator set; 20 for old runtimes."
)
@click.option(
    "--weights",
    type=click.Choice(["trained", "seeded"]),
    help="Say `seeded` of a directory whose weights are random  [default: what the checkpoint says, else trained].",
)
@click.option("--force", is_flag=True, help="Export even where nothing has changed.")
@_output
def export(
    *,
    source: str,
    out: Path | None,
    models_dir: Path,
    precisions: tuple[Precision, ...],
    parts: int,
    opset: int,
    weights: Weights | None,
    force: bool,
    output: str,
) -> int:
    """Export SOURCE as stages with a manifest.

    SOURCE is a name of the catalogue (minilm, clip-tiny), a directory written by save_pretrained, or a hub id. An export that
    is up to date is left as it is.
    """
    from models import export as exporting  # noqa: PLC0415
    from models.checkpoint import name_of  # noqa: PLC0415

    began = time.perf_counter()
    out = out or models_dir / name_of(source)
    wanted = exporting.Wanted(precisions=precisions, opset=opset, weights=weights, parts=parts, force=force)
    with _progress(f"looking at {source}") as (report, made):
        result = exporting.export(source, out, wanted, report, made)
    seconds = time.perf_counter() - began
    manifest = result.manifest
    state = f"exported in {seconds:.1f} s" if result.written else "up to date"
    _stderr.print(
        f"{out}: {manifest.model} from {manifest.source}, {manifest.weights} weights: {state}", markup=False, soft_wrap=True
    )
    _stderr.print(_stages_table(manifest))
    if output == "json":
        _print_json({"directory": str(out), "written": result.written, "seconds": seconds, "manifest": _dump(manifest)})
    return OK


@_commands.command()
@click.argument("model")
@click.argument("source", required=False)
@_models_dir
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@_output
def verify(*, model: str, source: str | None, models_dir: Path, seed: int, output: str) -> int:
    """Compare the stages of MODEL with the whole PyTorch model of SOURCE; exit status 1 if they differ by too much.

    MODEL is the directory of an export, or its name below the models' directory. SOURCE is what it was exported from; it can be
    left out where that was a name of the catalogue or a hub id.
    """
    from models import verification  # noqa: PLC0415

    directory = _directory(model, models_dir)
    with _stderr.status(f"looking at {directory}") as status:
        verdict = verification.verify(directory, source or _source(directory), seed, status.update)
    if verdict.reference != verdict.manifest.source:
        _stderr.print(f"note: exported from {verdict.manifest.source}, compared with {verdict.reference}", soft_wrap=True)
    _stderr.print(_verdict_table(verdict))
    if output == "json":
        figures = [{**dataclasses.asdict(figure), "ok": figure.ok} for figure in verdict.figures]
        _print_json(
            {
                "model": verdict.manifest.model,
                "family": verdict.manifest.family,
                "source": verdict.manifest.source,
                "reference": verdict.reference,
                "ok": verdict.ok,
                "seed": seed,
                "figures": figures,
            }
        )
    return OK if verdict.ok else MISSED


@contextmanager
def _progress(doing: str) -> Iterator[tuple[Callable[[str], object], Callable[[int, int], object]]]:
    """A line that says what is being done, with a bar over the files to be made once their number is known."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as progress:
        task = progress.add_task(doing, total=None)
        yield (
            lambda text: progress.update(task, description=text),
            lambda done, total: progress.update(task, completed=done, total=total),
        )


def _directory(model: str, models_dir: Path) -> Path:
    """Where an export named on the command line lies: the directory of that path, or the one of that name."""
    named = models_dir / model
    return named if (named / MANIFEST_NAME).is_file() and not (Path(model) / MANIFEST_NAME).is_file() else Path(model)


def _source(directory: Path) -> str:
    """What an export was made from, by its manifest.

    Raises:
        UsageError: it was a directory, which manifests do not name.
    """
    from models.checkpoint import catalogue  # noqa: PLC0415
    from models.manifest import load  # noqa: PLC0415

    manifest = load(directory)
    if manifest.model in catalogue():
        return manifest.model
    named = manifest.source.partition("@")[0]
    if "/" not in named:
        raise click.UsageError(f"{manifest.model} was exported from a directory, {named}: name it, verify {directory} SOURCE")
    return named


@_commands.command()
@click.argument("model")
@_models_dir
@click.option(
    "--threads", type=_Threads(), default="1", show_default=True, help="Intra-op threads of the replica; several: 1,2,4."
)
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds over all points; 5, or 3 with --quick.")
@click.option("--quick", is_flag=True, help="Fewer batch sizes, lengths and tasks.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the profile into this PNG or SVG [default: profile.svg beside the manifest, where matplotlib is installed].",
)
@_output
def profile(
    *,
    model: str,
    models_dir: Path,
    threads: tuple[int, ...],
    repeats: int | None,
    quick: bool,
    plot: Path | None,
    output: str,
) -> int:
    """Measure service time, memory and load time of the stages of MODEL, and write them into its manifest.

    MODEL is the directory of an export, or its name below the models' directory. Of core stages the law of their service time
    is fitted, of light ones its distribution over tasks of every usual size.
    """
    from models import plot as plotting  # noqa: PLC0415
    from models import profile as profiling  # noqa: PLC0415

    if plot is not None and not plotting.available():
        raise click.UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    directory = _directory(model, models_dir)
    grid = profiling.QUICK if quick else profiling.Grid()
    grid = dataclasses.replace(grid, threads=threads, rounds=repeats or grid.rounds)
    left_out: list[str] = []
    with _stderr.status(f"looking at {directory}") as status:
        manifest = profiling.profile(directory, grid, status.update, left_out.append)
    for line in left_out:
        _stderr.print(f"not measured: {line}", markup=False, soft_wrap=True)
    for table in _profile_tables(manifest):
        _stderr.print(table)
    if plotting.available():
        plot = plot or directory / "profile.svg"
        plotting.draw(manifest, plot)
        _stderr.print(f"drawn: {plot}", markup=False, soft_wrap=True)
    if output == "json":
        profiles = {stage.name: _dump(stage)["profile"] for stage in manifest.stages if stage.profile}
        _print_json({"model": manifest.model, "stages": profiles})
    return OK


def _dump(document: Any) -> Any:
    return document.model_dump(mode="json")


def _print_json(document: Any) -> None:
    """One JSON document on stdout; orjson writes NaN and infinity as null, which is JSON."""
    click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


def _stages_table(manifest: Manifest) -> Table:
    table = Table("stage", "tier", "processor", "inputs", "outputs", "files [MB]")
    for stage in manifest.stages:
        sizes = [f"{p} {sum(f.size_bytes for f in files) / 1e6:.1f}" for p, files in stage.files.items() if files]
        names = [", ".join(tensor.name for tensor in side) for side in (stage.inputs, stage.outputs)]
        table.add_row(stage.name, stage.tier, stage.processor, *names, ", ".join(sizes) or "none")
    return table


def _verdict_table(verdict: Verdict) -> Table:
    table = Table("precision", "what", "compared", "worst", "mean", "tolerance", "")
    for figure in verdict.figures:
        numbers = (f"{figure.value:.3g}", f"{figure.mean:.3g}", f"{figure.tolerance:.3g}")
        table.add_row(figure.precision, figure.what, str(figure.count), *numbers, "ok" if figure.ok else "[red]missed")
    return table


def _profile_tables(manifest: Manifest) -> list[Table]:
    """A table for each core stage, precision and number of threads; one for all light stages."""
    tables = [
        _core_table(stage, precision, one)
        for stage in manifest.stages
        if stage.tier == "core"
        for precision, found in stage.profile.items()
        for one in (found, *found.other_threads)
    ]
    light = Table("stage", "tasks", "mean [ms]", "p50 [ms]", "p95 [ms]", "cv²", "KS", "at 1 %", "Gamma")
    light.title = "light stages, one task at a time, of every usual size"
    for stage in manifest.stages:
        gamma = next((found.gamma for found in stage.profile.values()), None)
        if gamma is not None:
            median_s, tail_s = gamma.quantiles_s[len(gamma.quantiles_s) // 2], gamma.quantiles_s[-1]
            times = (f"{t * 1e3:.3f}" for t in (gamma.mean_s, median_s, tail_s))
            fit = (f"{gamma.cv2:.3f}", f"{gamma.distance:.3f}", f"{gamma.critical:.3f}")
            verdict = "[yellow]rejected" if gamma.rejected else "not rejected"
            light.add_row(stage.name, str(gamma.samples), *times, *fit, verdict)
    return [*tables, *([light] if light.row_count else [])]


def _core_table(stage: StageSpec, precision: Precision, found: StageProfile) -> Table:
    table = Table("batch", "length", "mean [ms]", "p50 [ms]", "p95 [ms]", "p99 [ms]", "law [ms]", "cv²", "samples")
    table.title = f"{stage.name} {precision}, {found.threads} thread(s), {found.cpu}"
    for point in found.points:
        predicted = found.law.mean_s(stage.units(stage.inputs[0].sized(point.batch, point.length)))
        times = (f"{t * 1e3:.2f}" for t in (point.mean_s, point.p50_s, point.p95_s, point.p99_s, predicted))
        spread = f"{(point.std_s / point.mean_s) ** 2:.4f}" if point.samples > 1 else "-"
        table.add_row(str(point.batch), str(point.length), *times, spread, str(point.samples))
    law = found.law
    lines = [f"t(u) = {law.base_s * 1e3:.3f} ms + {law.per_unit_s * 1e6:.1f} µs u, tail ×{law.tail_ratio:.2f}"]
    if found.generation is not None:
        read, step = found.generation.prefill, found.generation.step
        lines += [
            f"answers of {found.generation.tokens} tokens",
            f"reading {read.base_s * 1e3:.2f} ms + {read.per_unit_s * 1e6:.1f} µs a token of the prompt",
            f"each further token {step.base_s * 1e3:.2f} ms + {step.per_unit_s * 1e6:.2f} µs a token so far",
        ]
    lines.append(f"{_steadiness(found)}; resident {found.resident_bytes / 1e6:.0f} MB, load {found.load_s:.2f} s")
    if found.disturbed_runs:
        lines.append(f"{found.disturbed_runs} disturbed runs left out")
    table.caption = "\n".join(lines)
    return table


def _steadiness(found: StageProfile) -> str:
    """How much the service time at one size varies; single runs say nothing about it."""
    again = sum(point.samples - 1 for point in found.points)
    if again < ENOUGH:
        return "cv² unknown, too few undisturbed runs (--repeats asks for more)"
    return f"cv² {found.cv2:.4f}, {'near' if found.cv2 < DETERMINISTIC else 'not'} deterministic"


if __name__ == "__main__":
    sys.exit(main())
