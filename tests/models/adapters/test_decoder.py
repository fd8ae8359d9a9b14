"""What decoders share: who sees whom, which layer's cache is which, and how sequences end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.adapters import decoder


@given(
    masks=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    data=st.data(),
)
def test_a_position_sees_itself_and_what_came_before_but_no_padding(masks: list[list[int]], data: st.DataObject) -> None:
    total = len(masks[0])
    seq = data.draw(st.integers(1, total))
    bias = decoder.causal_bias(torch.tensor(masks), seq)
    assert bias.shape == (len(masks), 1, seq, total)
    for row, mask in enumerate(masks):
        for query in range(seq):
            for key in range(total):
                seen = key <= total - seq + query and mask[key] == 1
                assert bias[row, 0, query, key] == (0.0 if seen else decoder.MASKED)


def test_what_is_masked_gets_no_weight_and_fits_half_precision() -> None:
    scores = torch.tensor([50.0, decoder.MASKED - 50.0])
    assert torch.softmax(scores, 0)[1] == 0
    assert torch.isfinite(scores.half()).all()


def test_a_parts_cache_counts_its_own_layers() -> None:
    pairs = [torch.full((1, 1, 2, 1), float(i)) for i in range(4)]  # two layers, the model's numbers 5 and 6
    past = decoder.Past(pairs, first=5)
    key, value = past.update(torch.full((1, 1, 1, 1), 8.0), torch.full((1, 1, 1, 1), 9.0), 6)
    assert key.flatten().tolist() == [2.0, 2.0, 8.0]
    assert value.flatten().tolist() == [3.0, 3.0, 9.0]
    assert [tensor.shape[2] for tensor in past.present] == [3, 3]


@pytest.mark.parametrize(
    ("stated", "eos", "pad"),
    [
        ({"eos_token_id": 2, "pad_token_id": 0}, (2,), 0),
        ({"eos_token_id": [7, 9], "pad_token_id": None}, (7, 9), 7),
        ({"eos_token_id": None, "pad_token_id": None}, (), 0),
        ({"eos_token_id": [3], "pad_token_id": 3}, (3,), 3),
    ],
    ids=["both", "several ends, no padding", "neither", "the end pads"],
)
def test_how_sequences_end(stated: dict[str, Any], eos: tuple[int, ...], pad: int) -> None:
    settings = SimpleNamespace(**stated, suppress_tokens=None, begin_suppress_tokens=[4])
    found = decoder.Sequences.of(SimpleNamespace(generation_config=settings), 100)
    assert (found.eos, found.pad, found.context) == (eos, pad, 100)
    assert (found.prefix, found.suppress, found.begin_suppress) == ((), (), (4,))
