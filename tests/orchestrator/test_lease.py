from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.lease import Claim, FileStore, Lease, Over, Watch

LIMIT_S = 10.0
A, B = Claim(holder="a", term=1), Claim(holder="b", term=2)


def lease(store: FileStore, holder: str, lasts_s: float = 1.0) -> Lease:
    return Lease(store, holder, lasts_s=lasts_s, beat_s=0.02)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "lease.json")


def test_a_lease_that_changes_is_never_taken_and_one_that_does_not_is() -> None:
    watch = Watch(5.0)
    assert not any(watch.may_take(A.model_copy(update={"beat": beat}), 4.9 * beat) for beat in range(10))
    last = A.model_copy(update={"beat": 9})
    assert not watch.may_take(last, 4.9 * 9 + 4.9)
    assert watch.may_take(last, 4.9 * 9 + 5.0)


def test_nobody_s_lease_may_be_taken_at_once() -> None:
    assert Watch(5.0).may_take(None, 0.0)
    assert Watch(5.0).may_take(Claim(holder=""), 0.0)


@given(gaps=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=30), lasts_s=st.floats(0.1, 10.0))
def test_who_waits_takes_nothing_before_it_has_been_the_same_for_so_long(gaps: list[float], lasts_s: float) -> None:
    """The holder renews after each gap; whoever waits looks at that moment and in the middle before."""
    watch, t = Watch(lasts_s), 0.0
    watch.may_take(A, t)
    for beat, gap in enumerate(gaps, start=1):
        claim = A.model_copy(update={"beat": beat - 1})
        assert watch.may_take(claim, t + gap / 2) == (gap / 2 >= lasts_s)
        t += gap
        watch.may_take(A.model_copy(update={"beat": beat}), t)


async def test_a_swap_needs_what_was_there(store: FileStore) -> None:
    assert await store.read() is None
    assert await store.write(A, None)
    assert not await store.write(B, None)
    assert await store.write(B, A)
    assert await store.read() == B


async def test_of_many_that_take_it_at_once_one_gets_it(store: FileStore) -> None:
    assert await store.write(Claim(holder=""), None)
    before = await store.read()
    won = await asyncio.gather(*(store.write(Claim(holder=f"o{i}", term=1), before) for i in range(20)))
    assert sum(won) == 1


async def test_while_one_renews_the_other_waits_and_takes_over_when_it_stops(store: FileStore) -> None:
    first, second = lease(store, "a"), lease(store, "b")
    await first.take()
    holding, waiting = asyncio.ensure_future(first.hold()), asyncio.ensure_future(second.take())
    await asyncio.sleep(1.3)
    assert not waiting.done()
    holding.cancel()
    await asyncio.wait_for(waiting, LIMIT_S)
    claim = await store.read()
    assert claim is not None
    assert (claim.holder, claim.term) == ("b", 2)


async def test_who_has_lost_it_learns_so(store: FileStore) -> None:
    first = lease(store, "a")
    await first.take()
    holding = asyncio.ensure_future(first.hold())
    await asyncio.sleep(0.05)
    assert await store.write(B, await store.read())
    await asyncio.wait_for(holding, LIMIT_S)


async def test_who_was_asleep_for_too_long_writes_nothing_any_more(store: FileStore) -> None:
    t = 0.0
    first = Lease(store, "a", lasts_s=5.0, beat_s=0.01, clock=lambda: t)
    await first.take()
    before = await store.read()
    t = 4.5
    await asyncio.wait_for(first.hold(), LIMIT_S)
    assert await store.read() == before


async def test_a_released_lease_is_taken_at_once_but_not_after_the_end(store: FileStore) -> None:
    first, second, third = lease(store, "a", 60.0), lease(store, "b", 60.0), lease(store, "c", 60.0)
    await first.take()
    waiting = asyncio.ensure_future(second.take())
    await asyncio.sleep(0.05)
    await first.release(over=False)
    await asyncio.wait_for(waiting, LIMIT_S)
    late = asyncio.ensure_future(third.take())
    await asyncio.sleep(0.05)
    await second.release(over=True)
    with pytest.raises(Over):
        await asyncio.wait_for(late, LIMIT_S)
    # One that is started afterwards brings the testbed up again.
    await asyncio.wait_for(lease(store, "d", 60.0).take(), LIMIT_S)


async def test_a_store_that_cannot_be_written_is_no_lease(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    t = 0.0

    async def fail(claim: Claim, before: Claim | None) -> bool:
        nonlocal t
        t += 1.0
        raise OSError("no space left")

    first = Lease(store, "a", lasts_s=5.0, beat_s=0.01, clock=lambda: t)
    await first.take()
    monkeypatch.setattr(store, "write", fail)
    await asyncio.wait_for(first.hold(), LIMIT_S)
    assert t > 4.0
