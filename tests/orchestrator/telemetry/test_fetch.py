from __future__ import annotations

import pytest

from orchestrator.telemetry import fetch
from orchestrator.telemetry.fetch import NoAnswer
from tests.orchestrator.telemetry.pages import Page


async def test_an_answer_is_bounded_in_time_and_size(pages: list[Page]) -> None:
    hangs, large, good = pages
    hangs.go_on.clear()
    large.text, good.text = "x" * (fetch.ANSWER_BYTES + 1), "fine"
    async with fetch.client() as client:
        assert await fetch.get(client, good.url, {"query": "a b"}) == b"fine"
        assert good.asked == ["/?query=a+b"]
        with pytest.raises(NoAnswer, match=r"within 0\.4 s"):
            await fetch.get(client, hangs.url)
        with pytest.raises(NoAnswer, match="more than"):
            await fetch.get(client, large.url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "", "nonsense", "http://[", "ftp://host/"])
async def test_whatever_goes_wrong_is_no_answer(url: str) -> None:
    async with fetch.client() as client:
        with pytest.raises(NoAnswer):
            await fetch.get(client, url)


async def test_a_status_that_is_no_success_is_no_answer(pages: list[Page]) -> None:
    pages[0].text = None
    async with fetch.client() as client:
        with pytest.raises(NoAnswer, match="500"):
            await fetch.get(client, pages[0].url)
