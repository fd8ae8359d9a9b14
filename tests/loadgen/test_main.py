"""The command line as a user meets it: a process of its own against a real server."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import orjson
import pytest

from tests.loadgen.server import Server, lines, serve

ROOT = Path(__file__).resolve().parents[2]


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "loadgen", *arguments, stdout=PIPE, stderr=PIPE, cwd=ROOT)


async def loadgen(*arguments: str) -> tuple[int, bytes, str]:
    """Exit status, stdout and stderr."""
    process = await start(*arguments)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out, err.decode()


async def test_a_run_prints_tables_and_writes_report_and_records(server: Server, tmp_path: Path) -> None:
    code, out, err = await loadgen(
        server.url, "--pipeline", "embed=poisson:40", "--pipeline", "classify=constant:20", "--duration", "0.5",
        "--warmup", "0.2", "--seed", "3", "--objective", "1", "--records", str(tmp_path / "r.jsonl"),
        "--report", str(tmp_path / "r.json"), "--header", "X-Key: secret",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "Tasks on time" in out.decode()
    assert "objective: 1 on time, met" in out.decode()
    report = orjson.loads((tmp_path / "r.json").read_bytes())
    records = lines((tmp_path / "r.jsonl").read_bytes())
    assert report["on_time_ratio"] == 1.0
    assert report["pipelines"]["classify"]["sent"] == 10
    assert report["pipelines"]["embed"]["deadline_s"] == 30.0
    assert report["pipelines"]["embed"]["promise"]["epsilon"] == 0.05
    assert report["seed"] == 3
    assert report["generator"]["wire"] == "binary"
    assert report["sent"] + report["warmup"]["tasks"] == len(records) == len(server.requests)
    assert all(headers["X-Key"] == "secret" for _, headers, _ in server.requests)
    assert b"secret" not in (tmp_path / "r.json").read_bytes()


async def test_json_on_stdout_is_the_report_and_nothing_else(server: Server) -> None:
    code, out, _ = await loadgen(server.url, "--pipeline", "embed=step:30@200ms,60@100ms", "--warmup", "0", "-o", "json")
    assert code == 0
    report = orjson.loads(out)
    assert report["duration_s"] == pytest.approx(0.3)
    assert report["pipelines"]["embed"]["arrivals"] == "step:30@0.2s,60@0.1s"


async def test_the_same_seed_gives_the_same_run(server: Server, tmp_path: Path) -> None:
    for name in ("a", "b"):
        await loadgen(
            server.url, "--pipeline", "embed=gamma:40,cv2=4", "--duration", "0.5", "--warmup", "0",
            "--records", str(tmp_path / name), "--quiet",
        )  # fmt: skip
    first, second = (lines((tmp_path / name).read_bytes()) for name in ("a", "b"))
    assert [task["scheduled_s"] for task in first] == [task["scheduled_s"] for task in second]
    sent = [message.tensors[0].array.tolist() for _, _, message in server.requests]
    half = len(sent) // 2
    assert sorted(sent[:half]) == sorted(sent[half:])


async def test_a_run_s_records_replay_it(server: Server, tmp_path: Path) -> None:
    await loadgen(
        server.url, "--pipeline", "embed=poisson:30", "--duration", "0.4", "--warmup", "0.2", "--records", str(tmp_path / "r")
    )
    code, out, _ = await loadgen(
        server.url, "--pipeline", f"embed=trace:{tmp_path / 'r'},pipeline=embed", "--warmup", "0", "-o", "json"
    )
    assert code == 0
    measured = [task for task in lines((tmp_path / "r").read_bytes()) if task["scheduled_s"] >= 0]
    assert orjson.loads(out)["sent"] == len(measured)


async def test_a_missed_objective_exits_1(server: Server) -> None:
    code, out, _ = await loadgen(
        server.url,
        "--pipeline",
        "full=constant:20",
        "--duration",
        "0.2",
        "--warmup",
        "0",
        "--objective",
        "0.5",
        "--deadline",
        "30",
    )
    assert code == 1
    assert "MISSED" in out.decode()


async def test_lag_over_its_bound_exits_4_whatever_the_objective(server: Server) -> None:
    # 5 % of a microsecond: no generator holds that.
    code, out, _ = await loadgen(
        server.url, "--pipeline", "embed=constant:20", "--duration", "0.2", "--warmup", "0", "--deadline", "embed=1e-6",
        "--objective", "0.5",
    )  # fmt: skip
    assert code == 4
    assert "INVALID" in out.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_writes_its_report_and_exits_130(
    server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    process = await start(
        server.url, "--pipeline", "held=constant:5", "--duration", "60", "--warmup", "0", "--report", str(tmp_path / "r.json")
    )
    await server.arrived.wait()
    process.send_signal(number)
    await process.communicate()
    assert process.returncode == 130
    report = orjson.loads((tmp_path / "r.json").read_bytes())
    assert not report["complete"]
    assert report["outcomes"]["cancelled"] == report["sent"] == 300


async def test_a_server_that_is_not_there_exits_3() -> None:
    async with serve() as gone:
        url = gone.url
    code, _, err = await loadgen(url, "--pipeline", "embed=poisson:1")
    assert code == 3
    assert "is the server up" in err


async def test_an_unknown_pipeline_exits_3(server: Server) -> None:
    code, _, err = await loadgen(server.url, "--pipeline", "nobody=poisson:1")
    assert code == 3
    assert "no metadata for 'nobody'" in err
    assert not server.requests


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--pipeline", "embed=poison:1"), "did you mean"),
        (("--pipeline", "embed"), "--pipeline 'embed': write it like --pipeline 'embed=poisson:20'"),
        (("--pipeline", "embed=poisson:1", "--pipeline", "embed=poisson:2"), "names 'embed' twice"),
        (("--pipeline", "embed=poisson:1", "--deadline", "other=1"), "no --pipeline is called other"),
        (("--pipeline", "embed=poisson:1", "--deadline", "1", "--deadline", "2"), "more than one value"),
        (("--pipeline", "embed=poisson:1", "--deadline", "soon"), "write seconds above 0"),
        (("--pipeline", "embed=poisson:1", "--header", "Key"), "--header 'Key'"),
        (("--pipeline", "embed=poisson:1", "--report", "no/such/folder/r.json"), "create it first"),
        (("--pipeline", "embed=constant:1", "--duration", "0"), "duration"),
        ((), "Missing option '--pipeline'"),
    ],
)
async def test_wrong_usage_exits_2_and_says_what_to_write(arguments: tuple[str, ...], says: str) -> None:
    code, _, err = await loadgen("http://127.0.0.1:1", *arguments)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


async def test_a_run_without_a_task_exits_2(server: Server, tmp_path: Path) -> None:
    (tmp_path / "times").write_text("50\n")
    code, _, err = await loadgen(server.url, "--pipeline", f"embed=trace:{tmp_path / 'times'}", "--duration", "1")
    assert code == 2
    assert "no task falls into the run" in err


async def test_an_address_without_scheme_exits_2() -> None:
    code, _, err = await loadgen("localhost:8080", "--pipeline", "embed=poisson:1")
    assert code == 2
    assert "http://127.0.0.1:8080" in err


async def test_help_lists_the_arrival_processes() -> None:
    code, out, _ = await loadgen("--help")
    assert code == 0
    assert "mmpp:5@8s,40@2s" in out.decode()
