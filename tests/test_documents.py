"""The documents: their links lead somewhere, their commands and options are there, and the README asks the demo's pipelines."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from orchestrator import testbed as testbeds
from orchestrator.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"espalier ([a-z]+)((?:\\\||[^`|#&;\n])*)")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as they are made where the page is shown."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text()):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_they_are_shown_with(page: Path) -> None:
    context = click.Context(main)
    wrong = []
    for name, rest in _COMMAND.findall(page.read_text()):
        command = main.get_command(context, name)
        if command is not None and not isinstance(command, click.Group):
            options = command.get_params(click.Context(command))
            known = {option for each in options for option in (*each.opts, *each.secondary_opts)}
            wrong += [f"{name} {option}" for option in _OPTION.findall(rest) if option not in known]
    assert wrong == []


def test_the_readme_asks_the_pipelines_of_the_demo() -> None:
    text = (ROOT / "README.md").read_text()
    asked = set(re.findall(r'/v2/models/([\w-]+)/|model="([\w-]+)"|client\.infer\("([\w-]+)"', text))
    names = {name for groups in asked for name in groups if name}
    assert len(names) >= 4  # else the pattern has gone stale
    assert names <= set(testbeds.load(ROOT / "deploy" / "testbeds" / "demo.yaml").testbed.pipelines)
