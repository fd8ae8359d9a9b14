"""A plan as a picture: nodes with what stands on them, links, and the load on its way, as an SVG document without scripts.

Nodes stand on an ellipse, so that hardly a link passes under a third one. What would not be legible has a tooltip. Flows are
those of `flows.route`, the cheapest ones, with nothing lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from xml.etree import ElementTree

import numpy as np

from orchestrator.core import Node, Placement, Service
from orchestrator.placement import flows
from orchestrator.placement.explain import Plan
from orchestrator.placement.problem import MIB, Problem

LABELS, FAINT = 14, 0.05
"""Most links that are labelled, and the least rate of an arrow with a label, as a share of the largest."""
WIDTH, ROW, PAD, GAP, HEAD, LEAST = 230.0, 17.0, 10.0, 170.0, 70.0, 820.0
"""Of a node's card, a line in it, its margin, between cards, the heading over all, and the least width of all [px]."""
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9",
    "#8c6d31", "#7b4ab0", "#a2b000", "#5f6b7a", "#b03060", "#2f9d9d",
)  # fmt: skip
"""Of services, in order; the first of them told apart by people who see few colours (Okabe and Ito)."""
INK, MUTED, LINE, PAPER, FLOW = "#1f2933", "#66727f", "#c9d1d9", "#ffffff", "#33475b"
Point = tuple[float, float]


def picture(plan: Plan) -> str:
    """The SVG document."""
    return ElementTree.tostring(_Drawing.of(plan).svg(), encoding="unicode", xml_declaration=True) + "\n"


@dataclass(frozen=True, slots=True)
class _Drawing:
    plan: Plan
    services: tuple[Service, ...]
    colours: Mapping[str, str]
    height: float
    """Of a card [px]."""
    at: tuple[Point, ...]
    """Middle of each node's card."""

    @classmethod
    def of(cls, plan: Plan) -> _Drawing:
        placed = [s for s in (*(h.service for h in plan.problem.services), *plan.light) if _count(plan.placement, s.name)]
        most = max((len(_rows(plan.placement, placed, node)) for node in plan.problem.nodes), default=0)
        height = 2 * PAD + ROW * (3.4 + most)
        colours = {service.name: COLOURS[i % len(COLOURS)] for i, service in enumerate(placed)}
        return cls(plan, tuple(placed), colours, height, _layout(len(plan.problem.nodes), height))

    def svg(self) -> ElementTree.Element:
        wide = max(LEAST, max((x for x, _ in self.at), default=0.0) + WIDTH / 2 + PAD * 3)
        high = max((y for _, y in self.at), default=0.0) + self.height / 2 + PAD * 3
        size = {"width": f"{wide:.0f}", "height": f"{high:.0f}", "viewBox": f"0 0 {wide:.0f} {high:.0f}"}
        root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": "sans-serif"})
        _put(root, "rect", width="100%", height="100%", fill=PAPER)
        self._heading(root)
        labels = self._ways(root)
        for node, middle in zip(self.plan.problem.nodes, self.at, strict=True):
            self._card(root, node, middle)
        root.extend(labels)
        return root

    def _heading(self, root: ElementTree.Element) -> None:
        solution, problem = self.plan.solution, self.plan.problem
        gap = "" if solution.gap is None else f", at most {solution.gap:.1%} above the best possible"
        load = ", ".join(f"{d.name} {d.rate:.3g}/s" for d in problem.demands) or "no load"
        _text(root, PAD * 3, 28, f"cost {solution.cost:.4g} per second ({solution.status}{gap})", 17, weight="bold")
        said = f"{load}. Bars: cores and memory reserved; arrows: tasks/s on their way, and how full the link is"
        _text(root, PAD * 3, 48, said, 12, MUTED)

    # --- links and flows --------------------------------------------------------------------------------------------------

    def _ways(self, root: ElementTree.Element) -> list[ElementTree.Element]:
        """Lines for links and arrows for flows; returns their labels, which belong above the cards."""
        problem = self.plan.problem
        routed = flows.route(problem, problem.arrays.counts(self.plan.solution.placement))
        tasks = np.zeros_like(problem.arrays.latency) if routed is None else routed.tasks
        labels: list[ElementTree.Element] = []
        number = len(problem.nodes)
        linked = {frozenset(pair) for pair in (*problem.latencies_s, *problem.bandwidths)}
        names = [node.name for node in problem.nodes]
        pairs = [(u, v) for u in range(number) for v in range(u + 1, number)]
        most = float(np.max(tasks - np.diag(np.diag(tasks)), initial=0.0))
        busy = {(u, v) for u, v in pairs if max(tasks[u, v], tasks[v, u]) > 1e-6}
        told = set(pairs) if len(linked) <= LABELS else busy if len(busy) <= LABELS else set()
        for u, v in pairs:
            if frozenset((names[u], names[v])) in linked:
                a, b, said = self._border(u, v), self._border(v, u), _link(problem, names[u], names[v])
                line = _put(root, "line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], stroke=LINE, **{"stroke-width": 1.5})
                _put(line, "title").text = f"{names[u]} and {names[v]}: {said}"
                if (u, v) in told:
                    labels.append(_label(_between(a, b, 0.5), said, MUTED))
        for u, v in [*pairs, *((v, u) for u, v in pairs)]:
            if tasks[u, v] > 1e-6:
                share = 0.0 if routed is None else float(routed.links[u, v] / problem.arrays.bandwidth[u, v])
                label = self._flow(root, u, v, float(tasks[u, v]), float(tasks[u, v]) / most, share)
                labels += [label] if tasks[u, v] >= FAINT * most else []
        return labels

    def _flow(self, root: ElementTree.Element, u: int, v: int, rate: float, part: float, share: float) -> ElementTree.Element:
        """An arrow bowed to its left, as thick as its rate is large; returns its label."""
        a, b = self._border(u, v), self._border(v, u)
        length = math.dist(a, b) or 1.0
        bow = min(44.0, 0.3 * length)
        bent = ((a[0] + b[0]) / 2 + (b[1] - a[1]) / length * bow, (a[1] + b[1]) / 2 - (b[0] - a[0]) / length * bow)
        names = [self.plan.problem.nodes[n].name for n in (u, v)]
        along = ((b[0] - bent[0]) / math.dist(bent, b), (b[1] - bent[1]) / math.dist(bent, b))
        tip, half = 9 + 4 * part, 3.5 + 2.5 * part
        neck = (b[0] - along[0] * tip, b[1] - along[1] * tip)
        wings = [(neck[0] - along[1] * half, neck[1] + along[0] * half), (neck[0] + along[1] * half, neck[1] - along[0] * half)]
        _put(root, "polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in (b, *wings)), fill=FLOW)
        curve = f"M{a[0]:.1f},{a[1]:.1f} Q{bent[0]:.1f},{bent[1]:.1f} {neck[0]:.1f},{neck[1]:.1f}"
        looks = {"fill": "none", "stroke": FLOW, "stroke-opacity": "0.55", "stroke-width": f"{1 + 5 * part:.1f}"}
        path = _put(root, "path", d=curve, **looks)
        _put(path, "title").text = f"{names[0]} to {names[1]}: {rate:.3g} tasks/s, {share:.1%} of the link"
        # A quarter of the way from its beginning, so that the labels of the two directions stand apart.
        full = f", {share:.0%}" if share >= 0.005 else ""
        return _label(_between(_between(a, bent, 0.3), _between(bent, b, 0.3), 0.3), f"{rate:.3g}/s{full}", FLOW)

    def _border(self, u: int, v: int) -> Point:
        """Where the line from card u to card v leaves card u."""
        (x, y), (other_x, other_y) = self.at[u], self.at[v]
        dx, dy = other_x - x, other_y - y
        scale = min((WIDTH / 2 + 3) / abs(dx) if dx else math.inf, (self.height / 2 + 3) / abs(dy) if dy else math.inf)
        return (x + dx * scale, y + dy * scale)

    # --- a node -----------------------------------------------------------------------------------------------------------

    def _card(self, root: ElementTree.Element, node: Node, middle: Point) -> None:
        left, top = middle[0] - WIDTH / 2, middle[1] - self.height / 2
        card = _put(root, "g", id=f"node-{node.name}")
        _put(card, "rect", x=left, y=top, width=WIDTH, height=self.height, rx=6, fill=PAPER, stroke=MUTED)
        _text(card, left + PAD, top + PAD + 9, node.name, 14, weight="bold")
        entering = sum(d.rate * d.entry.get(node.name, 0.0) for d in self.plan.problem.demands)
        if entering:
            _text(card, left + WIDTH - PAD, top + PAD + 9, f"{entering:.3g} tasks/s enter", 11, FLOW, anchor="end")
        placement, services = self.plan.placement, self.services
        work = [(s.name, s.cpus * placement.ready_on(s.name, node.name)) for s in services]
        held = [(s.name, s.memory_bytes * _count(placement, s.name, node.name)) for s in services]
        self._bar(card, (left + PAD, top + PAD + ROW), work, node.cpus, f"{_sum(work):g} of {node.cpus:g} cores")
        memory = f"{_gib(_sum(held))} of {_gib(node.memory_bytes)} GiB"
        self._bar(card, (left + PAD, top + PAD + 2.1 * ROW), held, node.memory_bytes, memory)
        for i, (service, ready, idle) in enumerate(_rows(placement, services, node)):
            y = top + PAD + ROW * (3.9 + i)
            for j in range(min(ready + idle, 8)):
                fill = self.colours[service] if j < ready else "none"
                _put(card, "rect", x=left + PAD + 12 * j, y=y - 9, width=9, height=9, fill=fill, stroke=self.colours[service])
            said = f"{service} × {ready}" + (f" + {idle} standby" if idle else "")
            _text(card, left + PAD + 12 * min(ready + idle, 8) + 6, y, said, 12)

    def _bar(self, card: ElementTree.Element, at: Point, parts: Sequence[tuple[str, float]], whole: float, said: str) -> None:
        wide, (x, y) = 100.0, at
        _put(card, "rect", x=x, y=y, width=wide, height=11, fill="#eef1f4")
        ends = list(accumulate((size for _, size in parts), initial=0.0))
        for (service, size), begin in zip(parts, ends, strict=False):
            if size:
                left, length = x + wide * begin / whole, wide * size / whole
                part = _put(card, "rect", x=left, y=y, width=length, height=11, fill=self.colours[service])
                _put(part, "title").text = f"{service}: {size / whole:.0%}"
        _text(card, x + wide + 8, y + 9.5, said, 11, MUTED)


def _layout(number: int, height: float) -> tuple[Point, ...]:
    """Middles of the cards, around an ellipse so wide that neighbours do not touch; one or two in a row."""
    across, down = WIDTH + 1.5 * GAP, height + GAP
    if number <= 2:
        return tuple((PAD * 3 + WIDTH / 2 + across * i, HEAD + height / 2) for i in range(number))
    step = math.pi / number
    wide, high = across / 2 / math.sin(step), down / 2 / math.sin(step)
    angles = [2 * step * i - math.pi / 2 for i in range(number)]
    points = [(wide * math.cos(angle), high * math.sin(angle)) for angle in angles]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    return tuple((PAD * 3 + WIDTH / 2 + x - left, HEAD + height / 2 + y - top) for x, y in points)


def _link(problem: Problem, a: str, b: str) -> str:
    """`2 ms, 1 Gb/s`."""
    parts = [f"{problem.latencies_s[a, b] * 1e3:.3g} ms"] if (a, b) in problem.latencies_s else []
    bits = problem.bandwidths.get((a, b), math.inf) * 8
    if bits < math.inf:
        parts.append(f"{bits / 1e9:.3g} Gb/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mb/s")
    return ", ".join(parts)


def _rows(placement: Placement, services: Sequence[Service], node: Node) -> list[tuple[str, int, int]]:
    """(service, at work, on standby) of those that stand on a node."""
    counts = [(s.name, placement.ready_on(s.name, node.name), placement.standby_on(s.name, node.name)) for s in services]
    return [(name, ready, idle) for name, ready, idle in counts if ready or idle]


def _count(placement: Placement, service: str, node: str | None = None) -> int:
    """Replicas of a service, of either kind, on a node or on all."""
    rows = (placement.ready.get(service, {}), placement.standby.get(service, {}))
    return sum(count for row in rows for name, count in row.items() if node in (None, name))


def _sum(parts: Sequence[tuple[str, float]]) -> float:
    return round(sum(size for _, size in parts), 6)


def _gib(size: float) -> str:
    return f"{size / MIB / 1024:.3g}"


def _between(a: Point, b: Point, part: float) -> Point:
    return (a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part)


def _label(at: Point, said: str, fill: str) -> ElementTree.Element:
    """Small text on a paper-coloured rim, so that it can be read over lines."""
    label = ElementTree.Element("g", {"font-size": "11", "text-anchor": "middle"})
    for looks in ({"stroke": PAPER, "stroke-width": "4", "fill": PAPER}, {"fill": fill}):
        _put(label, "text", x=at[0], y=at[1] + 4, **looks).text = said
    return label


def _text(
    parent: ElementTree.Element,
    x: float,
    y: float,
    said: str,
    size: int,
    fill: str = INK,
    *,
    weight: str = "normal",
    anchor: str = "start",
) -> None:
    looks = {"font-size": str(size), "font-weight": weight, "text-anchor": anchor, "fill": fill}
    _put(parent, "text", x=x, y=y, **looks).text = said


def _put(parent: ElementTree.Element, tag: str, **attributes: str | float) -> ElementTree.Element:
    said = {key: value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0") for key, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, said)
