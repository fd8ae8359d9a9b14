from __future__ import annotations

import pytest

from orchestrator.telemetry.scrape import Scrape
from tests.orchestrator.telemetry.pages import Clock, Page, stage_page


async def test_a_page_becomes_a_sample_of_this_moment(pages: list[Page]) -> None:
    scrape = Scrape(Clock())
    pages[0].text = stage_page(10, 2, 0.5)
    sample = await scrape.read(pages[0].url)
    assert sample is not None
    assert sample.t == 100.0
    assert sample.values["stage_queue_length", (("node", "a"), ("stage", "pool"))] == 2
    assert pages[0].asked == ["/metrics"]
    await scrape.close()


@pytest.mark.parametrize("text", [None, "espalier_stage_queue_length nonsense\n"])
async def test_an_error_and_a_page_that_is_no_exposition_count_as_silence(pages: list[Page], text: str | None) -> None:
    scrape = Scrape()
    pages[0].text = text
    assert await scrape.read(pages[0].url) is None
    await scrape.close()
