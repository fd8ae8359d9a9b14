"""`espalier probe`: the links of a running testbed, measured by the stages that run at either end, and written into its file.

Which replica measures, and how a testbed file gets other links, is pure. One pair is measured at a time, and one direction
after the other, so that no measurement meets another on its link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import yaml

from orchestrator.core import Replica
from orchestrator.errors import Conflict, RunFailed
from orchestrator.testbed import Testbed
from services.dataplane.document import Document
from services.dataplane.routes import Link

ANSWER_S = 20.0
"""Longest wait for one direction [s]; a stage gives up before."""


class Direction(Document):
    """What a stage has measured on the way to another."""

    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A link, measured in both directions."""

    there: Direction
    back: Direction

    @property
    def link(self) -> Link:
        """As a testbed file has it, the same in both directions: the mean latency, and the bandwidth of the narrower one."""
        return Link(
            latency_s=(self.there.latency_s + self.back.latency_s) / 2,
            bandwidth_bytes_per_s=min(self.there.bandwidth_bytes_per_s, self.back.bandwidth_bytes_per_s),
        )


def place(node: str, replicas: Sequence[Replica], tiers: Mapping[str, str]) -> str:
    """Address of the replica of a node that is disturbed least: an idle one, else one of a light service.

    Raises:
        Conflict: none is loaded there.
    """
    there = [replica for replica in replicas if replica.node == node and replica.state in ("standby", "ready")]
    if not there:
        raise Conflict(f"no replica is loaded on {node}, so nothing can be measured from there")
    return min(there, key=lambda replica: (replica.state != "standby", tiers[replica.service] == "core", replica.id)).url


async def measure(client: httpx.AsyncClient, here: str, there: str) -> Pair:
    """Measure between the stages at two addresses.

    Raises:
        RunFailed: one of them does not answer, or cannot reach the other.
    """
    return Pair(await _one_way(client, here, there), await _one_way(client, there, here))


async def _one_way(client: httpx.AsyncClient, here: str, there: str) -> Direction:
    try:
        answer = await client.post(f"{here}/v2/probe", json={"url": there, "own": here}, timeout=ANSWER_S)
        if answer.status_code == 200:
            return Direction.model_validate_json(answer.content)
        raise RunFailed(f"{here} could not measure the way to {there}: HTTP {answer.status_code}: {answer.text[:200]}")
    except (httpx.HTTPError, ValueError) as error:
        raise RunFailed(f"{here} could not measure the way to {there}: {error}") from None


def links(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Link]:
    """What the answers of `POST /v1/probe` say; those with a problem say nothing."""
    fields = ("latency_s", "bandwidth_bytes_per_s")
    return {
        (row["between"][0], row["between"][1]): Link(**{field: row[field] for field in fields})
        for row in rows
        if "problem" not in row
    }


def with_links(text: str, testbed: Testbed, measured: Mapping[tuple[str, str], Link]) -> str:
    """The text of a testbed file with these links; of pairs that were not measured it keeps what it has, and the rest as it is.

    Args:
        text: of a valid testbed file.
        testbed: its content.
        measured: (node, node) -> link, each pair once.
    """
    pairs = {frozenset(pair): (pair, link) for pair, link in measured.items()}
    for section in testbed.links:
        given = Link(latency_s=section.latency, bandwidth_bytes_per_s=section.bandwidth)
        pairs.setdefault(frozenset(section.between), (section.between, given))
    lines = ["links:", *(_line(pair, link) for pair, link in sorted(pairs.values(), key=lambda each: sorted(each[0])))]
    rows = text.splitlines()
    if (block := _block(text, rows, "links")) is not None:
        first, last = block
        return "\n".join([*rows[:first], *lines, *rows[last:]]) + "\n"
    after = (_block(text, rows, "nodes") or (0, 0))[1]
    return "\n".join([*rows[:after], "", *lines, *rows[after:]]) + "\n"


def _line(pair: tuple[str, str], link: Link) -> str:
    a, b = sorted(pair)
    return f"  - {{between: [{a}, {b}], latency: {link.latency_s * 1e3:.3g}ms, bandwidth: {_rate(link)}}}"


def _rate(link: Link) -> str:
    return f"{_plain(link.bandwidth_bytes_per_s * 8e-6)}Mb/s"


def _plain(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):g}" if value < 1e5 else f"{float(f'{value:.3g}'):.0f}"


def _block(text: str, rows: Sequence[str], key: str) -> tuple[int, int] | None:
    """First line of a top-level section and the one after its last; comments that follow belong to what comes next."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for name, value in root.value if root is not None else ():
        if name.value == key:
            last = value.end_mark.line + (1 if value.end_mark.column else 0)
            while last > name.start_mark.line + 1 and (not rows[last - 1].strip() or rows[last - 1].startswith("#")):
                last -= 1
            return name.start_mark.line, last
    return None
