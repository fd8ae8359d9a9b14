from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.orchestrator.socket_proxy.example import POLICY
from tests.orchestrator.socket_proxy.process import command, proxy_process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_at_once_even_with_an_open_stream(tmp_path: Path, number: signal.Signals) -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await reader.read()

    path = tmp_path / "engine.sock"
    async with await asyncio.start_unix_server(stream, path):
        with proxy_process(POLICY, str(path)) as (process, address):
            filters = {"filters": '{"label": ["espalier.scope=edge"], "type": ["container"]}'}
            async with (
                httpx.AsyncClient() as client,
                client.stream("GET", f"http://{address}/events", params=filters) as events,
            ):
                assert events.status_code == 200
                process.send_signal(number)
                assert await asyncio.to_thread(process.wait, 5) == 0


def test_it_says_what_it_refuses(tmp_path: Path) -> None:
    with proxy_process(POLICY, str(tmp_path / "none.sock")) as (process, address):
        assert httpx.post(f"http://{address}/containers/a/exec").status_code == 403
        process.terminate()
        assert process.stderr is not None
        assert "refused POST /containers/a/exec: this call is not among those that are allowed" in process.stderr.read()


def test_a_policy_that_cannot_be_is_bad_usage() -> None:
    bad = [word.replace("edge_default", "host") for word in command(POLICY)]
    done = subprocess.run(bad, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        2, "socket proxy: network 'host': give the name of a network that was created for the stages\n",
    )  # fmt: skip


@pytest.mark.parametrize("listen", ["2375", ":2375", "0.0.0.0:x", "0.0.0.0:65536"])
def test_an_address_that_is_none_is_bad_usage(listen: str) -> None:
    done = subprocess.run(command(POLICY, listen=listen), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--listen" in done.stderr


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(command(POLICY, listen=listen), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(f"socket proxy: cannot listen on {listen}: ")
