"""YAML that remembers where everything was written, so that a complaint can name the line.

`read` returns plain data plus the line of every key and item by its path (`("services", "encode", "cpus")`). Duplicate keys,
which YAML forbids and PyYAML swallows, come back as problems instead of the later one winning in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a path of the file."""

    path: Path
    message: str
    line: int | None = None
    """Where the path does not tell it (a key that is there twice)."""


@dataclass(slots=True)
class Marked:
    """The content of a file with the lines it stood on."""

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    inside: list[yaml.Node] = field(default_factory=list)
    """Nodes being read, outermost first."""

    def line(self, path: Path) -> int:
        """Line of a path, or of the nearest thing around it that was written down; lines count from 1."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 1


def read(text: str) -> Marked:
    """Parse one YAML document. A syntax error becomes the only problem."""
    marked = Marked()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        marked.data = None if root is None else _plain(root, (), marked)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        marked.problems.append(
            Problem((), f"not valid YAML: {error.problem or error.context}", 1 if mark is None else mark.line + 1)
        )
    except yaml.YAMLError as error:
        marked.problems.append(Problem((), f"not valid YAML: {error}", 1))
    return marked


def _plain(node: yaml.Node, path: Path, marked: Marked) -> Any:
    if node in marked.inside:
        marked.problems.append(Problem(path, "an anchor that contains itself"))
        return None
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        marked.inside.append(node)
        try:
            return _mapping(node, path, marked) if isinstance(node, yaml.MappingNode) else _sequence(node, path, marked)
        finally:
            marked.inside.pop()
    if node.tag not in PLAIN_TAGS:
        # Dates and the like: keep what was written, since no field of a testbed wants anything but text and numbers.
        return str(node.value)
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _mapping(node: yaml.MappingNode, path: Path, marked: Marked) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in found:
            first = marked.lines[(*path, key)]
            marked.problems.append(Problem((*path, key), f"written twice; the first is on line {first}", line))
            continue
        marked.lines[(*path, key)] = line
        found[key] = _plain(value_node, (*path, key), marked)
    return found


def _sequence(node: yaml.SequenceNode, path: Path, marked: Marked) -> list[Any]:
    found = []
    for i, child in enumerate(node.value):
        marked.lines[(*path, i)] = child.start_mark.line + 1
        found.append(_plain(child, (*path, i), marked))
    return found
