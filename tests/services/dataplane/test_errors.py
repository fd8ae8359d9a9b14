"""Every way a task ends without an answer: status, reason and JSON, and that it survives the hop to the next caller."""

from __future__ import annotations

from typing import Any

import pytest

from services.dataplane import errors
from services.dataplane.errors import Overloaded, QueueFull, TaskError, UpstreamFailed, from_answer, shown

KINDS = [kind for kind in TaskError.__subclasses__() if kind.__module__ == errors.__name__]


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        (errors.BadRequest, 400, "bad_request"),
        (errors.NotFound, 404, "not_found"),
        (errors.TooLarge, 413, "too_large"),
        (errors.QueueFull, 429, "queue_full"),
        (errors.Overloaded, 429, "overloaded"),
        (errors.InternalFailure, 500, "internal"),
        (errors.UpstreamFailed, 502, "upstream_error"),
        (errors.NoReplica, 503, "no_replica"),
        (errors.Expired, 504, "expired"),
    ],
)
def test_statuses_and_reasons(kind: type[TaskError], status: int, reason: str) -> None:
    assert (kind.status, kind("why").reason) == (status, reason)


def test_the_module_docstring_shows_the_whole_tree() -> None:
    lines = (errors.__doc__ or "").splitlines()
    drawn = {line.split()[1]: int(line.split()[2]) for line in lines if line.strip().startswith(("├──", "└──"))}
    assert drawn == {kind.__name__: kind.status for kind in KINDS}


def test_body_of_a_bare_error_has_only_error_and_reason() -> None:
    assert errors.BadRequest("no such dtype").body() == {"error": "no such dtype", "reason": "bad_request"}


def test_body_tells_all_that_is_known_in_milliseconds() -> None:
    hops = [{"step": "encode"}]
    error = errors.Expired("late", stage="encode", reason="would_expire", budget_s=0.2, elapsed_s=0.1234567, hops=hops)
    assert error.body() == {
        "error": "late",
        "reason": "would_expire",
        "stage": "encode",
        "budget_ms": 200.0,
        "elapsed_ms": 123.457,
        "hops": hops,
    }


@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        (None, []),
        (0.0, [(b"retry-after", b"1")]),
        (0.02, [(b"retry-after", b"1")]),
        (1.0, [(b"retry-after", b"1")]),
        (1.2, [(b"retry-after", b"2")]),
    ],
)
def test_retry_after_is_whole_seconds_and_never_too_early(seconds: float | None, header: list[tuple[bytes, bytes]]) -> None:
    assert QueueFull("full", retry_after_s=seconds).headers() == header


def test_a_reason_given_to_one_error_does_not_stick_to_its_class() -> None:
    assert errors.Expired("late", reason="would_expire").reason == "would_expire"
    assert errors.Expired("late").reason == "expired"


def test_hops_are_not_shared_between_errors() -> None:
    first, second = errors.Expired("a"), errors.Expired("b")
    first.hops.append({})
    assert second.hops == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_rebuilt_from_its_answer_reads_the_same(kind: type[TaskError]) -> None:
    said = kind("why", stage="pool", reason="particular", hops=[{"step": "pool"}])
    rebuilt = from_answer(said.status, said.body(), stage="asked", retry_after_s=3.0)
    assert (rebuilt.status, rebuilt.body()) == (said.status, said.body())
    assert rebuilt.retry_after_s == 3.0


def test_overloaded_keeps_its_reason_although_two_errors_share_its_status() -> None:
    assert from_answer(429, Overloaded("wait").body(), stage="encode").reason == "overloaded"


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (418, {"error": "teapot"}, "upstream_error"),
        (500, {}, "internal"),
        (503, {"error": None, "hops": "none"}, "no_replica"),
        (404, {"error": {"message": "an OpenAI error"}}, "not_found"),
    ],
    ids=["an unknown status counts as upstream's", "no error text", "fields of odd types", "another house's error shape"],
)
def test_answers_that_are_not_ours_still_become_errors(status: int, body: dict[str, Any], reason: str) -> None:
    error = from_answer(status, body, stage="encode")
    assert (error.reason, error.stage, error.hops) == (reason, "encode", [])
    assert str(error)


def test_an_answer_without_text_says_who_answered_what() -> None:
    assert str(from_answer(500, {}, stage="encode")) == "stage 'encode' answered HTTP 500"
    assert isinstance(from_answer(599, {}, stage="encode"), UpstreamFailed)


def test_values_are_shown_short() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "a list"
    assert shown({"a": deep}) == "an object"
    assert shown(None) == "None"
    assert shown("FP33") == "'FP33'"
    assert len(shown("x" * 10**6)) <= 80
