from __future__ import annotations

from pathlib import Path

from orchestrator.runtimes.pins import Pins

NAME = "espalier/stage:1"


def test_what_is_pinned_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "images.json"
    assert Pins(path).image(NAME) is None
    Pins(path).set(NAME, "one")
    assert Pins(path).image(NAME) == "one"


def test_what_is_tried_out_lasts_until_it_is_kept_or_given_up(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    pins = Pins(path)
    pins.set(NAME, "one")
    pins.try_out(NAME, "two")
    assert (pins.image(NAME), Pins(path).image(NAME)) == ("two", "one"), "a successor does not go on with a trial"
    pins.give_up()
    assert pins.image(NAME) == "one"
    pins.try_out(NAME, "three")
    pins.keep()
    assert (pins.image(NAME), Pins(path).image(NAME)) == ("three", "three")


def test_what_was_given_up_is_no_news(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "images.json")
    assert not pins.is_news(NAME, "one"), "nothing is known of it"
    pins.set(NAME, "one")
    pins.try_out(NAME, "two")
    pins.give_up()
    found = Pins(tmp_path / "images.json")
    assert [found.is_news(NAME, image) for image in ("one", "two", "three")] == [False, False, True]


def test_giving_up_what_changed_nothing_gives_up_no_image(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "images.json")
    pins.set(NAME, "one")
    pins.try_out(NAME, "one")
    pins.give_up()
    assert pins.image(NAME) == "one"
    assert pins.is_news(NAME, "two")


def test_a_file_that_cannot_be_read_or_written_is_as_none(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    path.write_text("{")
    assert Pins(path).image(NAME) is None
    blocked = Pins(path / "below")
    blocked.set(NAME, "one")
    assert blocked.image(NAME) == "one"
