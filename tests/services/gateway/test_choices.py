"""Deltas of texts that come as far as they go, with stop strings and characters in the making."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dataplane.wire import Tensor
from services.gateway.choices import Choice, Choices


def told(choice: Choice, *states: tuple[str, str]) -> list[str]:
    deltas = []
    for whole, finish in states:
        choice.take(whole, finish)
        deltas.append(choice.delta())
    return deltas


def test_only_what_is_new_is_told() -> None:
    choice = Choice(())
    assert told(choice, ("a", ""), ("abc", ""), ("abc", ""), ("abcd", "length"), ("abcdX", "")) == ["a", "bc", "", "d", ""]
    assert choice.finish == "length"


def test_a_character_in_the_making_is_held_back_and_sent_at_the_end() -> None:
    assert told(Choice(()), ("a\ufffd\ufffd", ""), ("aé", ""), ("aé\ufffd", "length")) == ["a", "é", "\ufffd"]


def test_a_text_that_changes_behind_what_was_sent_is_cut_by_length() -> None:
    """Bytes that turn out to be no character break the ones before them."""
    assert told(Choice(()), ("木", ""), ("\ufffd\ufffd\ufffd\ufffd", ""), ("木を", "stop")) == ["木", "", "を"]


@pytest.mark.parametrize(
    ("stops", "states", "deltas", "finish"),
    [
        (("END",), (("aEN", ""), ("aEND b", "")), ["a", ""], "stop"),
        (("END",), (("aEN", ""), ("aENx", "")), ["a", "ENx"], None),
        (("END",), (("aEN", ""), ("aEN", "length")), ["a", "EN"], "length"),
        (("b", "ab"), (("xa", ""), ("xab", "")), ["x", ""], "stop"),
        (("c", "b"), (("abcd", ""),), ["a"], "stop"),
        (("é",), (("a\ufffd", ""), ("aé", "")), ["a", ""], "stop"),
    ],
)
def test_a_stop_string_is_never_sent_nor_any_of_it(
    stops: tuple[str, ...], states: tuple[tuple[str, str], ...], deltas: list[str], finish: str | None
) -> None:
    choice = Choice(stops)
    assert told(choice, *states) == deltas
    assert choice.finish == finish


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_deltas_add_up_to_the_text_before_the_first_stop(text: str, stops: list[str], data: st.DataObject) -> None:
    choice, sent, size = Choice(stops), "", 0
    while choice.finish is None:
        size = min(len(text), size + data.draw(st.integers(1, 4)))
        choice.take(text[:size], "length" if size == len(text) else "")
        sent += choice.delta()
    places = [text.find(stop) for stop in stops if stop in text]
    # A stop that is seen first is the one that counts: a longer one that begins before it may only be complete later.
    assert text.startswith(sent)
    assert len(sent) >= min(places, default=len(text))
    assert not any(stop in sent for stop in stops)


def outputs(*texts: str, finish: str = "", counts: int = 1) -> dict[str, Tensor]:
    def tensor(name: str, values: list[str]) -> Tensor:
        array = np.empty(len(values), dtype=object)
        array[:] = [value.encode() for value in values]
        return Tensor(name, "BYTES", array)

    made = {"text": tensor("text", list(texts)), "finish_reason": tensor("finish_reason", [finish] * len(texts))}
    return {**made, "output_count": Tensor("output_count", "INT64", np.full(len(texts), counts))}


def test_stop_strings_end_an_answer_when_all_of_its_texts_have_ended() -> None:
    choices = Choices(2, ["!"])
    assert not choices.take(outputs("a!", "b"))
    assert choices.take(outputs("a!x", "b!", counts=3))
    assert choices.tokens == 6
    assert [choice.delta() for choice in choices.each] == ["a", "b"]
    natural = Choices(1, ["!"])
    assert not natural.take(outputs("a", finish="stop")), "it has ended by itself"


def test_a_pipeline_that_gives_no_reason_has_stopped() -> None:
    choices = Choices(1, [])
    only = {"text": outputs("ab\ufffd")["text"]}
    assert not choices.take(only)
    choices.end(only)
    assert (choices.each[0].delta(), choices.each[0].finish) == ("ab\ufffd", "stop")
