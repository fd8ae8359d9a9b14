"""The decoder's arithmetic on a real ONNX graph: against a reference without a cache, alone and in batches that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import ManifestError
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Array
from services.stage.processors import open_processor
from services.stage.processors.generate import Batch, Generate, Row
from services.stage.processors.generate_cache import attention_mask
from services.stage.processors.generate_sampling import choose
from tests.services import decoder

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 11, 12, 13], [20], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Generate:
    return opened(tmp_path_factory.mktemp("tiny"))


def opened(directory: Path, **options: Any) -> Generate:
    processor = open_processor(*decoder.write(directory, **options), 1)
    assert isinstance(processor, Generate)
    return processor


def asked(*prompts: list[int], **options: Any) -> dict[str, Array]:
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    mask = (np.arange(longest) < np.array([len(prompt) for prompt in prompts])[:, None]).astype(np.int64)
    further = {name: np.full(len(prompts), value) for name, value in options.items()}
    return {"input_ids": ids, "attention_mask": mask, **further}


def answers(made: dict[str, Array]) -> list[list[int]]:
    return [list(ids[:count]) for ids, count in zip(made["output_ids"], made["output_count"], strict=True)]


def test_greedy_tokens_are_those_computed_without_a_cache(tiny: Generate) -> None:
    made = tiny.run(asked(*PROMPTS, max_tokens=12))
    expected = [decoder.reference(prompt, 12) for prompt in PROMPTS]
    assert answers(made) == expected
    assert len({token for row in expected for token in row}) > 8, "a degenerate decoder would prove nothing"
    assert list(made["finish_reason"]) == [b"stop" if decoder.EOS in row else b"length" for row in expected]


def test_rows_of_unequal_length_are_padded_in_the_answer(tiny: Generate) -> None:
    rows = tiny.rows(asked([3], [4], max_tokens=4))
    rows[0].tokens, rows[1].tokens = [7, 8], [9]
    made = tiny.outputs([row.tokens for row in rows], ["length", ""])
    assert made["output_ids"].tolist() == [[7, 8], [9, decoder.PAD]]
    assert made["output_count"].tolist() == [2, 1]
    assert made["finish_reason"].tolist() == [b"length", b""]


def test_an_answer_ends_with_the_end_token_and_counts_it(tiny: Generate) -> None:
    ends = next(p for a in range(3, 48) for p in ([a, 3], [a, 4]) if decoder.EOS in decoder.reference(p, 20))
    made = tiny.run(asked(ends, max_tokens=20))
    assert answers(made)[0] == decoder.reference(ends, 20)
    assert answers(made)[0][-1] == decoder.EOS
    assert made["finish_reason"][0] == b"stop"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whoever_joins_and_leaves_a_row_gets_the_tokens_it_would_get_alone(tiny: Generate, data: st.DataObject) -> None:
    """A film of a running batch: at every boundary some may join and some may be dropped."""
    left = [
        (prompt, data.draw(st.integers(1, 10)))
        for prompt in data.draw(st.lists(st.lists(st.integers(3, 47), min_size=1, max_size=9), min_size=2, max_size=6))
    ]
    done: list[tuple[Row, list[int]]] = []
    running: Batch | None = None
    expected: dict[int, list[int]] = {}
    while left or running is not None:
        if left and (running is None or data.draw(st.booleans())):
            prompt, count = left.pop()
            rows = tiny.rows(asked(prompt, max_tokens=count))
            expected[id(rows[0])] = decoder.reference(prompt, count)
            done += [(rows[0], expected[id(rows[0])])]
            fresh = tiny.prefill(rows)
            running = fresh if running is None else tiny.joined([running, fresh])
        assert running is not None
        running = tiny.without(running, [row for row in running.rows if row.finish])
        if running is not None and len(running) > 1 and data.draw(st.integers(0, 4)) == 0:
            dropped = running.rows[data.draw(st.integers(0, len(running) - 1))]
            done = [(row, tokens) for row, tokens in done if row is not dropped]
            running = tiny.without(running, [dropped])
        if running is not None:
            running = tiny.step(running)
            longest = int(running.cache.lengths.max())
            assert running.cache.past[0].shape[2] == longest, "no column is kept that nobody needs"
    for row, tokens in done:
        assert row.tokens == tokens


def test_an_image_stands_in_for_its_tokens(tmp_path: Path) -> None:
    tiny = opened(tmp_path, image=True)
    images = np.random.default_rng(1).normal(size=(2, decoder.IMAGE_TOKENS, decoder.WIDTH)).astype(np.float32)
    prompts = [[3, 2, 2, 2, 4], [2, 2, 2, 9, 10, 11]]
    made = tiny.run({**asked(*prompts, max_tokens=9), "image_embedding": images})
    assert answers(made) == [decoder.reference(p, 9, image=image) for p, image in zip(prompts, images, strict=True)]
    with pytest.raises(BadRequest, match="prompt 0 has 1 image tokens, and the image has 3"):
        tiny.run({**asked([3, 2]), "image_embedding": images[:1]})


def test_a_decoder_attends_to_the_states_of_an_encoder(tmp_path: Path) -> None:
    tiny = opened(tmp_path, encoder=True, suppress=[40], begin_suppress=[11])
    states = np.random.default_rng(1).normal(size=(3, decoder.POSITIONS, decoder.WIDTH)).astype(np.float32)
    free = opened(tmp_path / "free", encoder=True)
    made = answers(free.run({"last_hidden_state": states, "max_tokens": np.full(3, 9)}))
    assert made == [decoder.reference([5, 6], 9, states=each) for each in states]
    first = made[0][0]
    spec, files = decoder.write(tmp_path / "held", encoder=True, begin_suppress=[first])
    held = open_processor(spec, files, 1)
    assert answers(held.run({"last_hidden_state": states[:1]}))[0][0] != first
    made = answers(tiny.run({"last_hidden_state": states, "max_tokens": np.full(3, 9)}))
    assert all(40 not in row for row in made)
    assert all(row[0] != 11 for row in made)


def test_a_seed_makes_sampling_reproducible_whoever_is_in_the_batch(tiny: Generate) -> None:
    def sampled(seed: int, *beside: list[int]) -> list[int]:
        rows = tiny.rows(asked([3, 4, 5], *beside, max_tokens=10, temperature=5.0, seed=seed))
        batch: Batch | None = tiny.prefill(rows)
        while batch is not None and not rows[0].finish:
            batch = tiny.without(batch, [row for row in batch.rows if row.finish])
            batch = tiny.step(batch) if batch is not None else None
        return rows[0].tokens

    alone = sampled(11)
    assert sampled(11) == sampled(11, [9, 9, 9, 9], [7]) == alone
    assert len({tuple(sampled(seed)) for seed in range(5)}) > 1
    assert alone != decoder.reference([3, 4, 5], 10)


def test_sampling_draws_by_the_probabilities_of_the_nucleus() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(3)
    drawn = np.bincount([choose(logits, 1.0, 0.75, rng) for _ in range(4000)], minlength=4) / 4000
    assert drawn[2] == drawn[3] == 0
    assert drawn[0] == pytest.approx(0.625, abs=0.03)
    assert {choose(logits, 1.0, 0.01, rng) for _ in range(50)} == {0}
    assert {choose(logits, 3.0, 1.0, rng) for _ in range(500)} == {0, 1, 2, 3}
    assert choose(np.array([1.0, 1.0, -np.inf], np.float32), 0.0, 1.0, rng) == 0
    assert {choose(np.array([1.0, 1.0, -np.inf], np.float32), 9.0, 1.0, rng) for _ in range(50)} == {0, 1}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (asked([3, 99]), "outside the vocabulary of 48"),
        (asked([-1]), "outside the vocabulary"),
        (asked([3] * 64), "has 64 tokens; the model takes 64 with the answer"),
        (asked([3] * 60, max_tokens=5), "leaves 4 of the model's 64 for the answer, not max_tokens = 5"),
        (asked([3], max_tokens=0), "max_tokens must be at least 1"),
        (asked([3], temperature=-1.0), "temperature must be 0 or more"),
        (asked([3], temperature=np.nan), "temperature must be 0 or more"),
        (asked([3], top_p=0.0), "top_p must be over 0"),
        (asked([3], top_p=1.5), "top_p must be over 0"),
        ({"input_ids": np.array([[3]]), "attention_mask": np.array([[0]])}, "prompt 0 has no tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny: Generate, inputs: dict[str, Array], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        tiny.rows(inputs)


def test_the_default_length_is_cut_to_what_the_context_leaves(tiny: Generate) -> None:
    made = tiny.run(asked([3] * 60))
    assert made["output_count"][0] <= 4
    assert made["finish_reason"][0] in (b"length", b"stop")


def test_a_seed_may_be_negative(tiny: Generate) -> None:
    assert tiny.rows(asked([3], seed=-5))[0].rng.random() == np.random.default_rng(2**64 - 5).random()


def test_a_mask_pads_on_the_left() -> None:
    assert attention_mask(np.array([1, 3]), 4).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_files_that_are_missing_or_nonsense_are_named(tmp_path: Path) -> None:
    spec, files = decoder.write(tmp_path)
    with pytest.raises(ManifestError, match="lacks its graph or its embedding"):
        open_processor(spec, files[:1], 1)
    files[1].write_bytes(b"nonsense")
    with pytest.raises(ManifestError, match="not a table of numbers"):
        open_processor(spec, files, 1)
    files[0].write_bytes(b"nonsense")
    with pytest.raises(ManifestError, match="ONNX Runtime cannot open it"):
        open_processor(spec, files, 1)
