"""`espalier`: the command line. Results go to stdout (as JSON with `-o json`), everything else to stderr.

Exit status: 0 ok, 1 an objective was missed, 2 wrong usage or configuration, 3 set-up failed, 4 the run failed or is partial,
130 interrupted.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.live import Live

from models.manifest import ManifestError
from models.manifest import load as load_manifest
from orchestrator import bench as benches
from orchestrator import bundle as bundles
from orchestrator import client as clients
from orchestrator import display, facts, lifecycle, units
from orchestrator import probe as probes
from orchestrator import render as renders
from orchestrator import replay as replays
from orchestrator import testbed as testbeds
from orchestrator.errors import EspalierError, RunFailed, TestbedInvalid, UsageError
from orchestrator.runtimes import child as children
from orchestrator.state_dir import StateDir

DEFAULT_TESTBED = Path("deploy/testbeds/demo.yaml")
STATES, MODELS, SIMULATED = Path("out/run"), Path("out/models"), Path("out/simulate")
SCENARIOS = lifecycle.ROOT / "deploy" / "scenarios"
INTERRUPTED = 130


class _Commands(click.Group):
    """Turns our errors into exit codes, for every command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EspalierError as error:
            click.echo(str(error) if isinstance(error, TestbedInvalid) else f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


_testbed_file = click.argument("testbed", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_TESTBED)
_what = click.argument("what", metavar="MODEL|TESTBED", default=str(DEFAULT_TESTBED))
_models_dir = click.option(
    "--models-dir", type=click.Path(path_type=Path, file_okay=False), default=MODELS, show_default=True,
    help="Where exported models lie, one directory each.",
)  # fmt: skip
_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False),
    help="Records and logs of a running testbed [default: out/run/NAME].",
)  # fmt: skip


def _is_testbed(what: str) -> bool:
    return Path(what).suffix in (".yaml", ".yml")


def _running(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The name of a running testbed: as it was given, or as the file says that was given instead."""
    return testbeds.load(Path(value)).testbed.name if _is_testbed(value) else value


_url = click.option(
    "--url", envvar="ESPALIER_URL", help="Control plane of the orchestrator [default: that of the state directory]."
)
_name = click.option(
    "--testbed", "name", default="demo", show_default=True, callback=_running, help="A running testbed: its name or its file."
)
_output = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="What goes to stdout."
)


def _orchestrator(command: Callable[..., None]) -> Callable[..., None]:
    """Options that tell which orchestrator is meant; the command gets a client of it first."""

    @functools.wraps(command)
    def connected(*arguments: Any, name: str, state_dir: Path | None, url: str | None, **options: Any) -> None:
        with _client(url, state_dir, name) as client:
            command(client, *arguments, **options)

    return _name(_state_dir(_url(connected)))


def _client(url: str | None, state_dir: Path | None, name: str) -> clients.Client:
    return clients.Client(url) if url else clients.connect(StateDir(state_dir or STATES / name))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="espalier")
def main() -> None:
    """Serve foundation models at the edge as split stages: export, bring up, scale and measure a testbed."""


# --- models ---------------------------------------------------------------------------------------------------------------


@main.command()
@_testbed_file
@_models_dir
@_output
def validate(testbed: Path, models_dir: Path, output: str) -> None:
    """Check a testbed file; every mistake is listed as file:line: field: problem."""
    try:
        loaded = testbeds.load(testbed)
        exported = _check_models(loaded, models_dir)
    except TestbedInvalid as error:
        if output == "json":
            click.echo(json.dumps({"valid": False, "problems": error.problems}, indent=2))
        raise
    missing = [name for name in loaded.testbed.models if name not in exported]
    if output == "json":
        click.echo(json.dumps({"valid": True, "problems": [], "models_not_exported": missing}, indent=2))
        return
    sizes = ", ".join(f"{len(getattr(loaded.testbed, part))} {part}" for part in ("nodes", "services", "pipelines"))
    click.echo(f"{testbed}: ok: {sizes}")
    if missing:
        click.echo(f"not exported yet, so tensors, tiers and policy were not checked: {', '.join(missing)} (espalier export)")


def _check_models(loaded: testbeds.Loaded, models_dir: Path) -> list[str]:
    """Check edges, tiers and policy if all models are there; returns those that are."""
    from orchestrator import plan as plans  # noqa: PLC0415  with all policies, which other commands do not need

    exported = []
    for name in loaded.testbed.models:
        try:
            load_manifest(models_dir / name)
        except ManifestError:
            continue
        exported.append(name)
    if len(exported) == len(loaded.testbed.models):
        plans.make(loaded, models_dir)
    return exported


@main.command()
@_what
@_models_dir
@click.option("--out", help="Directory to write [default: MODELS_DIR/NAME].")
@click.option("--precision", multiple=True, metavar="[fp32|fp16|int8]", help="Once per precision wanted [default: fp32].")
@click.option("--cut", type=click.IntRange(min=1), help="Parts that each core encoder and decoder is cut into [default: 1].")
@click.option("--weights", type=click.Choice(["trained", "seeded"]), help="Of a directory that does not say so itself.")
@click.option("--opset", type=click.IntRange(20, 23), help="ONNX operator set [default: 23]; 20 for old runtimes.")
@click.option("--force", is_flag=True, help="Export again what is up to date.")
def export(what: str, models_dir: Path, opset: int | None, force: bool, **own: Any) -> None:
    """Export a model, or every model of a testbed, as stages.

    MODEL is a name of the catalogue (minilm, clip-tiny), a directory written by save_pretrained, or a hub id. A TESTBED says
    itself in which precisions and how many parts.
    """
    both = _words(opset=opset, force=force)
    if not _is_testbed(what):
        _models("export", what, "--models-dir", str(models_dir), *_words(**own), *both)
        return
    if words := _words(**own):
        raise click.UsageError(f"{what} says of each model how it is exported; {words[0]} is for one MODEL")
    for name, model in testbeds.load(Path(what)).testbed.models.items():
        _models("export", *export_words(model, models_dir / name), *both)


def _words(**options: Any) -> list[str]:
    """Options as a command of the models folder takes them; those that were not given are left to it."""
    words = []
    for name, value in sorted(options.items()):
        if value is True:
            words.append(f"--{name}")
        elif value:
            words += [word for each in (value if isinstance(value, tuple) else (value,)) for word in (f"--{name}", str(each))]
    return words


def export_words(model: testbeds.ModelSection, out: Path) -> list[str]:
    """A model of a testbed, as the command of the models folder takes it."""
    precisions = [word for precision in model.precisions for word in ("--precision", precision)]
    return [model.source, "--out", str(out), *precisions, *(["--cut", str(model.cut)] if model.cut > 1 else [])]


@main.command()
@_what
@click.argument("source", required=False)
@_models_dir
def verify(what: str, source: str | None, models_dir: Path) -> None:
    """Compare the exported stages of a model, or of every model of a testbed, chained, with the whole model.

    MODEL is the directory of an export, or its name below the models' directory. SOURCE is what it was exported from, and is
    needed only where that was a directory.
    """
    if not _is_testbed(what):
        _models("verify", what, *([source] if source else []), "--models-dir", str(models_dir))
        return
    for name, model in testbeds.load(Path(what)).testbed.models.items():
        _models("verify", str(models_dir / name), model.source)


@main.command()
@_what
@_models_dir
@click.option("--quick", is_flag=True, help="Fewer samples.")
@click.option("--threads", metavar="N[,N...]", help="Threads of a replica of a core stage [default: 1].")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds over all points [default: 5, or 3 with --quick].")
@click.option("--plot", help="Draw the profile of one MODEL into this file [default: profile.svg beside its manifest].")
def profile(what: str, models_dir: Path, plot: str | None, **options: Any) -> None:
    """Measure service times and memory of the exported stages of a model, or of every model of a testbed, on this machine.

    MODEL is the directory of an export, or its name below the models' directory.
    """
    if not _is_testbed(what):
        _models("profile", what, "--models-dir", str(models_dir), *_words(plot=plot, **options))
        return
    if plot:
        raise click.UsageError(f"{what} has a picture for each of its models; --plot is for one MODEL")
    for name in testbeds.load(Path(what)).testbed.models:
        _models("profile", str(models_dir / name), *_words(**options))


def _models(*arguments: str) -> None:
    """Run a command of the models folder, the only place that knows torch, in a process of its own."""
    code = subprocess.run(
        [sys.executable, "-m", "models", *arguments], check=False, env=children.environment(lifecycle.ROOT)
    ).returncode
    if code:
        sys.exit(code)


# --- a running testbed ----------------------------------------------------------------------------------------------------


@main.command()
@_testbed_file
@_models_dir
@_state_dir
@_url
@click.option("--detach/--foreground", default=True, help="Leave the orchestrator running, or stay with it.  [default: detach]")
@click.option("--limit", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Longest wait for ready [s].")
@click.option(
    "--runtime",
    type=click.Choice(["processes", "engine", "swarm"]),
    default="processes",
    show_default=True,
    help="Replicas as processes of this machine, as containers of its Docker engine, or as tasks of a Swarm.",
)
@click.option("--engine-network", help="Network of the containers: under swarm an overlay that this machine is attached to.")
@click.option("--engine-models", help="Volume or directory with the models on every box [default: that of this machine].")
@click.option(
    "--orchestrators",
    type=click.IntRange(1, 5),
    default=1,
    show_default=True,
    help="More than one: the others wait, and one takes over when the one that leads is gone.",
)
@click.option("--engine-image", help="Image of the stages' containers [default: espalier/stage of this version].")
@click.option("--stage-module", hidden=True, envvar="ESPALIER_STAGE_MODULE")
@click.option("--gateway-module", hidden=True, envvar="ESPALIER_GATEWAY_MODULE")
@_output
def up(
    testbed: Path,
    models_dir: Path,
    state_dir: Path | None,
    url: str | None,
    detach: bool,
    limit: float,
    orchestrators: int,
    output: str,
    **daemon: str | None,
) -> None:
    """Start the testbed's stages and gateway, and the orchestrator that keeps them; wait until all are ready.

    Where they run already, they are updated: replicas that are not as the testbed, its models or its images now say are
    replaced one at a time, and all is put back if the new ones do not become ready.
    """
    loaded = testbeds.load(testbed)
    state = StateDir(state_dir or STATES / loaded.testbed.name)
    began = time.monotonic()
    if url:
        with clients.Client(url) as client:
            status = _with_progress(lambda show: lifecycle.update(client, loaded, limit, show))
    else:
        words = [word for name, value in daemon.items() if value for word in (f"--{name.replace('_', '-')}", value)]
        start = lifecycle.Start(testbed, models_dir, tuple(words), orchestrators)
        if not detach:
            if orchestrators > 1:
                raise click.UsageError("--foreground stays with one orchestrator; leave it out, or leave out --orchestrators")
            os.execve(sys.executable, start.argv(state), children.environment(lifecycle.ROOT))
        status = _with_progress(lambda show: lifecycle.bring_up(start, loaded, state, limit, show))
    gateway = status["gateway"]["url"]
    if output == "json":
        click.echo(json.dumps({"gateway": gateway, "state_dir": str(state.root), "status": status}, indent=2))
    else:
        click.echo(f"{loaded.testbed.name} is ready after {time.monotonic() - began:.1f} s; gateway: {gateway}", err=True)
        click.echo(gateway)


def _with_progress(work: Any) -> Any:
    """Run work that shows statuses: a live line on a terminal, nothing otherwise."""
    console = display.console(stderr=True)
    if not console.is_terminal:
        return work(lambda _: None)
    with Live("starting the orchestrator", console=console, transient=True) as live:
        return work(lambda status: live.update(display.progress(status)))


@main.command()
@_name
@_state_dir
def down(name: str, state_dir: Path | None) -> None:
    """Drain and stop everything, and leave nothing running."""
    state = StateDir(state_dir or STATES / name)
    swept = lifecycle.take_down(state)
    what = name if state_dir is None else state_dir
    click.echo(
        f"{what} is down" + (f"; {swept} replicas and gateways without an orchestrator were stopped" if swept else ""), err=True
    )


@main.command()
@_orchestrator
@click.option("--watch", is_flag=True, help="Again every second, until interrupted.")
@_output
def status(client: clients.Client, watch: bool, output: str) -> None:
    """What runs, how it does, and what was decided last."""
    if output == "json":
        while True:
            click.echo(json.dumps(client.status(), indent=None if watch else 2))
            if not watch:
                return
            time.sleep(1)
    console = display.console()
    if not watch:
        console.print(display.status(client.status()))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(display.status(client.status()), refresh=True)
            time.sleep(1)


class _Replicas(click.ParamType[int | str]):
    """A number of replicas, or `auto`."""

    name = "replicas"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return "auto" if value == "auto" else int(click.IntRange(min=0).convert(value, param, ctx))
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}; give a number of replicas, or auto", param, ctx)


@main.command()
@_orchestrator
@click.argument("service")
@click.argument("replicas", metavar="N|auto", type=_Replicas())
@click.option("--standby", type=click.IntRange(min=0), help="Replicas that are loaded and idle; left as it is by default.")
@click.option("--wait", is_flag=True, help="Until it is so.")
@click.option("--limit", type=click.FloatRange(min=0), default=120.0, show_default=True, help="Longest wait [s].")
def scale(client: clients.Client, service: str, replicas: int | str, standby: int | None, wait: bool, limit: float) -> None:
    """Set the number of replicas of SERVICE, whatever the policy says; `auto` leaves it to the policy again."""
    if wait and replicas == "auto":
        raise click.UsageError("auto has no number to wait for; leave out --wait")
    client.scale(service, None if isinstance(replicas, str) else replicas, standby)
    if wait:
        _wait_until_settled(client, [service], limit)


@main.command()
@_orchestrator
@click.argument("service", required=False)
@click.option("--all", "everything", is_flag=True, help="Every service.")
@click.option("--wait", is_flag=True, help="Until all are replaced.")
@click.option("--limit", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Longest wait [s].")
def restart(client: clients.Client, service: str | None, everything: bool, wait: bool, limit: float) -> None:
    """Replace every replica of SERVICE, one at a time: the new one is ready before the old one drains."""
    if (service is None) == (not everything):
        raise click.UsageError("name one SERVICE, or give --all")
    client.restart(None if service is None else [service])
    if wait:
        _wait_until_settled(client, [service] if service else list(client.status()["services"]), limit)


@main.command()
@_orchestrator
@click.argument("node")
@click.option("--wait", is_flag=True, help="Until nothing is left on it.")
@click.option("--limit", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Longest wait [s].")
def drain(client: clients.Client, node: str, wait: bool, limit: float) -> None:
    """Empty NODE: what runs there is started elsewhere first, and no task is lost. It stays empty until `undrain`."""
    client.drain(node)
    if wait:
        _with_progress(lambda show: [show(s) for s in client.watch(limit, lambda s: not s["nodes"][node]["replicas"])])


@main.command()
@_orchestrator
@click.argument("node")
def undrain(client: clients.Client, node: str) -> None:
    """Use NODE again, as far as it is worth a move."""
    client.undrain(node)


def _wait_until_settled(client: clients.Client, services: list[str], limit_s: float) -> None:
    def settled(status: dict[str, Any]) -> bool:
        return all(status["services"][service]["settled"] for service in services)

    def run(show: Any) -> None:
        for status in client.watch(limit_s, settled):
            show(status)

    _with_progress(run)


@main.command()
@_testbed_file
@_state_dir
@_url
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Longest wait for ready [s].")
@click.option("--gateway", metavar="URL", help="Send to this address [default: the one the orchestrator knows].")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as JSON.")
@click.option("--records", type=click.Path(path_type=Path, dir_okay=False), help="Write one JSON line per task.")
@click.option("--warmup", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Load that is not measured [s].")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), help="Measured part [s]; default: the workload's own.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of all arrivals and payloads.")
@click.option("--objective", type=click.FloatRange(0, 1), help="Least on-time ratio of every pipeline; below it, exit 1.")
@_output
def bench(
    testbed: Path,
    state_dir: Path | None,
    url: str | None,
    wait: float,
    gateway: str | None,
    report: Path | None,
    records: Path | None,
    warmup: float,
    duration: float | None,
    seed: int,
    objective: float | None,
    output: str,
) -> None:
    """Send the testbed's workload to its gateway; print what was on time, where time went, and what it cost."""
    loaded = testbeds.load(testbed).testbed
    if not loaded.workload:
        raise click.UsageError(f"{testbed} has no workload; add one, or use python -m loadgen")
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
    options = benches.Options(warmup, seed, objective, duration, records, output == "json", gateway)
    with _client(url, state_dir, loaded.name) as client:
        if wait:
            _with_progress(lambda show: lifecycle.wait_until_up(client, wait, show))
        result = benches.run(loaded, client, options)
    if result.report is not None:
        if report is not None:
            report.write_text(json.dumps(result.report, indent=2) + "\n")
        if output == "json":
            click.echo(json.dumps(result.report, indent=2))
        else:
            if result.report["shared"]:
                display.console().print(display.shared(result.report["shared"]))
            display.console().print(display.costs(result.report, result.spent))
    sys.exit(result.exit_code)


@main.command()
@_testbed_file
@_state_dir
@_url
@click.option("--between", nargs=2, metavar="NODE NODE", help="Only this link  [default: every pair of nodes].")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write TESTBED with the links as measured.")
@_output
def probe(
    testbed: Path, state_dir: Path | None, url: str | None, between: tuple[str, str] | None, save: Path | None, output: str
) -> None:
    """Measure latency and bandwidth between the nodes of a running testbed; exit 4 where a pair could not be measured.

    Replicas that run there measure, one link at a time, 1 to 16 s for each. Placement and routing follow what is saved once
    `espalier up` is given that file.
    """
    loaded = testbeds.load(testbed)
    pairs = [between] if between else list(itertools.combinations(loaded.testbed.nodes, 2))
    if not pairs:
        raise click.UsageError(f"{testbed} has one node, so there is no link to measure")
    rows: list[dict[str, Any]] = []
    with _client(url, state_dir, loaded.testbed.name) as client:
        for a, b in pairs:
            try:
                rows.append(client.probe(a, b))
            except (RunFailed, UsageError) as error:
                if between:
                    raise
                rows.append({"between": [a, b], "problem": str(error)})
    if save is not None:
        _write(save, probes.with_links(loaded.text, loaded.testbed, probes.links(rows)))
    if output == "json":
        click.echo(json.dumps({"links": rows}, indent=2))
    else:
        display.console().print(display.links(rows))
    sys.exit(4 if any("problem" in row for row in rows) else 0)


@main.command()
@_models_dir
@_output
def info(models_dir: Path, output: str) -> None:
    """Versions, processors, execution providers, models with trained or seeded weights, and running testbeds."""
    found = facts.gather(STATES, models_dir)
    if output == "json":
        click.echo(json.dumps(found, indent=2))
    else:
        display.console().print(display.pairs(found))


# --- placement ------------------------------------------------------------------------------------------------------------


class _Duration(click.ParamType[float]):
    """A duration with its unit, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return units.duration_s(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@main.command()
@_testbed_file
@_models_dir
@click.option("--explain", "explained", is_flag=True, help="Say why, what is tight, what each loss leaves and each cut costs.")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan as JSON.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A saved plan that runs now: moves are charged for.",
)
@click.option("--demand", "demands", metavar="PIPELINE=RATE", multiple=True, help="Tasks/s [default: the workload's means].")
@click.option("--gamma", type=click.FloatRange(0, 1), help="Share of the load carried after any loss [default: 0.5].")
@click.option("--kappa", type=click.IntRange(min=1), help="Least number of nodes of each core service [default: 2].")
@click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Of the solver [s]."
)
@click.option(
    "--hop", type=_Duration(), help="Time of a hop beside links, waits and work, for the cost of every cut  [default: 1ms]."
)
@click.option("--check-losses", is_flag=True, help="Simulate the loss of every node; ask for more where it leaves too little.")
@click.option(
    "--picture",
    "drawn",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the plan as SVG [default: beside --save].",
)
@_output
def plan(
    testbed: Path,
    models_dir: Path,
    explained: bool,
    save: Path | None,
    keep: Path | None,
    demands: tuple[str, ...],
    gamma: float | None,
    kappa: int | None,
    time_limit: float,
    hop: float | None,
    check_losses: bool,
    drawn: Path | None,
    output: str,
) -> None:
    """Where the services of a testbed should run, by the integer program; exit 2 where nothing keeps every rule."""
    from orchestrator import planning  # noqa: PLC0415  the solver takes a second and more to import

    asked = planning.Asked(demands, gamma, kappa, time_limit, keep, hop, check_losses)
    found = planning.plan(testbeds.load(testbed), models_dir, asked)
    told = json.dumps(planning.document(found), indent=2)
    if save is not None:
        _write(save, told + "\n")
        drawn = drawn or save.with_suffix(".svg")
    if drawn is not None:
        _write(drawn, planning.picture(found))
    if output == "json":
        click.echo(told)
    else:
        for line in planning.lines(found, explain=explained):
            click.echo(line)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@main.group()
def render() -> None:
    """Files for other tools, made from a testbed."""


@render.command("stack")
@_testbed_file
@click.option("--name", help="Of the stack [default: the testbed's].")
@click.option("--tag", help="Of the images [default: this version].")
@click.option("--models", help="Directory with exported models, the same on every box [default: volume NAME_models of each].")
@click.option(
    "--orchestrators", type=click.IntRange(1, 5), default=1, show_default=True, help="Each on a manager of its own; one leads."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write [default: stdout].")
def render_stack(
    testbed: Path, name: str | None, tag: str | None, models: str | None, orchestrators: int, out: Path | None
) -> None:
    """A stack file for `docker stack deploy`: what stays of TESTBED on a Docker Swarm; its orchestrator makes the stages."""
    loaded = testbeds.load(testbed)
    # The client looks for the testbed from where the stack file lies; on stdin, from where it is called.
    beside = os.path.relpath(testbed, out.parent if out is not None else Path())
    options = renders.Options(
        name or loaded.testbed.name,
        beside if beside.startswith("..") else f"./{beside}",
        tag or renders.VERSION,
        models,
        orchestrators,
    )
    text = renders.stack(loaded, options)
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text)


# --- simulation -----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("scenario", metavar="SCENARIO|TESTBED")
@_models_dir
@click.option("--policies", "names", multiple=True, help="Only these of the scenario's policies; commas or once for each.")
@click.option("--seeds", type=click.IntRange(min=1), help="Runs with seeds 1 to N  [default: the scenario's].")
@click.option("--duration", type=click.FloatRange(min=0, min_open=True), help="Simulated [s]  [default: the scenario's].")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Processes.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="For the report  [default: out/simulate/NAME].")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw the scenario's plots beside the report.")
@click.option("--check", is_flag=True, help="Exit 1 where a claim of the scenario does not hold.")
@_output
def simulate(
    scenario: str,
    models_dir: Path,
    names: tuple[str, ...],
    seeds: int | None,
    duration: float | None,
    jobs: int,
    out: Path | None,
    plots: bool,
    check: bool,
    output: str,
) -> None:
    """Run an experiment in virtual time: a SCENARIO of deploy/scenarios by name, one in a file, or a TESTBED's own workload.

    Writes report.json, and plots. What is done when it is interrupted is in the report, marked incomplete.
    """
    from orchestrator.simulator import command as simulation  # noqa: PLC0415  all policies, and scipy

    policies = tuple(part for name in names for part in name.split(",") if part)
    asked = simulation.Asked(policies, seeds, duration)
    loaded, made = simulation.narrowed(*simulation.read(scenario, SCENARIOS, models_dir, policies), asked)
    directory = out or SIMULATED / loaded.scenario.name
    click.echo(f"{loaded.scenario.name}: {simulation.estimate(made, jobs)}", err=True)
    outcome, document = simulation.Outcome(), dict[str, Any]()
    try:
        with simulation.bar() as progress:
            simulation.simulate(made, jobs, outcome, progress)
    finally:
        if outcome.rows:
            document = simulation.write(loaded, outcome, directory, draw=plots)
            click.echo("\n".join([*outcome.notes, f"report: {directory / 'report.json'}"]), err=True)
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        display.console().print(simulation.table(document))
    sys.exit(1 if check and any(verdict["holds"] is False for verdict in document["verdicts"]) else 0)


# --- decision logs and bundles --------------------------------------------------------------------------------------------


@main.command()
@click.argument("log", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_output
def replay(log: Path, output: str) -> None:
    """Decide every slot of the decision log LOG again; exit 1 where something comes out otherwise."""
    result = replays.replay(log)
    if output == "json":
        click.echo(json.dumps({"log": str(log), **result.document()}, indent=2))
    else:
        for line in replays.lines(log, result):
            click.echo(line)
    sys.exit(1 if result.different else 0)


@main.group()
def bundle() -> None:
    """Images and wheels in one archive, for a box with no network."""


@bundle.command("save")
@click.argument("archive", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--images/--no-images", default=True, show_default=True, help="Images of docker-compose.yml, those that exist.")
@click.option("--compress/--no-compress", default=True, show_default=True, help="Compress images: less than half as large.")
@click.option(
    "--wheels", multiple=True, type=click.Choice(bundles.REQUIREMENTS), default=bundles.DEFAULT_WHEELS, show_default=True,
    help="Requirement files whose wheels go in; once for each. dev holds everything.",
)  # fmt: skip
@click.option("--no-wheels", is_flag=True, help="No wheels: the box runs containers only.")
@click.option("--models", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Exported models to put in.")
@_output
def bundle_save(
    archive: Path, images: bool, compress: bool, wheels: tuple[str, ...], no_wheels: bool, models: Path | None, output: str
) -> None:
    """Write what a box with no network needs to FILE."""
    contents = bundles.Contents(images, compress, () if no_wheels else wheels, models)
    with bundles.bar() as progress:
        manifest = bundles.save(archive, lifecycle.ROOT, contents, progress)
    if output == "json":
        click.echo(json.dumps({"file": str(archive), "size_bytes": archive.stat().st_size, **manifest.model_dump()}, indent=2))
    else:
        for line in bundles.described(archive, manifest):
            click.echo(line)


@bundle.command("load")
@click.argument("archive", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), default=Path("espalier"), show_default=True)
@click.option("--force", is_flag=True, help="Replace files there that differ from the bundle's.")
@_output
def bundle_load(archive: Path, into: Path, force: bool, output: str) -> None:
    """Verify FILE, unpack it and load its images; exit 4 where no engine answers and images are left out."""
    with bundles.bar() as progress:
        result = bundles.load(archive, into, progress, replace=force)
    if output == "json":
        click.echo(json.dumps(result.document(), indent=2))
    else:
        for line in result.lines():
            click.echo(line)
    sys.exit(4 if result.no_engine else 0)


if __name__ == "__main__":
    main()
