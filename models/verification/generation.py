"""The exported decoder, run step by step over the tokens that PyTorch's `generate()` made, and how both compare.

The chain is given the reference's tokens rather than its own. As long as its likeliest token is the reference's next one at
every step, its own greedy answer is the reference's, token for token; and where it is not, in a coarser precision, the steps
after it can still be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import Checkpoint
from models.manifest import GENERATE, Manifest, Precision, StageSpec, check_files
from models.session import Array, Session
from models.verification.chain import refuse_other_width
from models.verification.figures import Figure, counted, measure, worst

NEW_TOKENS = 32
LENGTHS = (1, 2, 5, 9, 17, 31, 40)
"""Of the prompts [tokens]."""
LONG = 400
"""Of one more, which shows whether positions far from the beginning are right; shorter where there is no room for it."""
ALIKE = 0.3
"""Share of tokens that a coarser precision may choose otherwise. A seeded model's logits lie close together: a trained one's
would not be told apart from the reference at this share."""

_FORBID = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class Answer:
    """What the whole model makes of a batch of prompts."""

    embeds: Array
    """The prompts' embeddings, float32 [batch, seq, hidden]; shorter prompts are padded at the left."""
    mask: Array
    """1 for a token of the prompt, int64 [batch, seq]."""
    tokens: Array
    """The greedy answers, int64 [batch, new]."""
    logits: Array
    """Behind each of those tokens, float32 [batch, new, vocabulary]."""
    heard: Array | None = None
    """What cross-attention attends to, float32 [batch, positions, hidden]."""


class Decoder:
    """The parts of `generate`, each with its cache, as a replica would run them."""

    def __init__(self, manifest: Manifest, directory: Path, precision: Precision) -> None:
        stages = manifest.parts(GENERATE)
        self._parts = [_Part(stage, directory, precision) for stage in stages]
        first, tables = stages[0], self._parts[0].files
        self.embedding: Array = np.load(tables[f"{first.name}-embedding.npy"], mmap_mode="r")
        positions = tables.get(f"{first.name}-positions.npy")
        self.positions: Array | None = None if positions is None else np.load(positions, mmap_mode="r")
        self.parameters = first.parameters

    def logits(self, answer: Answer, chunk: int | None = None) -> Array:
        """The chain's logits where the reference has its own, float32 [batch, new, vocabulary].

        Args:
            answer: Whose tokens are given.
            chunk: Positions of the prompt taken at once; None takes all.
        """
        for part in self._parts:
            part.begin(len(answer.mask), answer.heard)
        mask, seq = answer.mask, answer.mask.shape[1]
        places = np.maximum(mask.cumsum(axis=1) - 1, 0)
        for start in range(0, seq, chunk or seq):
            stop = min(start + (chunk or seq), seq)
            last = self._run(answer.embeds[:, start:stop], mask[:, :stop], places[:, start:stop])
        given = [last]
        place = places[:, -1:]
        for token in answer.tokens[:, :-1].T:
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
            place = place + 1
            given.append(self._run(self.embed(token[:, None], place), mask, place))
        return np.stack(given, axis=1)

    def embed(self, ids: Array, places: Array) -> Array:
        """Embeddings of tokens, float32 [batch, seq, hidden], their places added where the model has a table of those."""
        found: Array = self.embedding[ids]
        return found if self.positions is None else found + self.positions[places]

    def _run(self, hidden: Array, mask: Array, places: Array) -> Array:
        for part in self._parts:
            hidden = part.run(hidden, mask, places)
        return hidden


class _Part:
    def __init__(self, stage: StageSpec, directory: Path, precision: Precision) -> None:
        self.files = {path.name: path for path in check_files(stage, precision, directory)}
        self._step = Session(self.files[f"{stage.name}.{precision}.onnx"])
        cross = self.files.get(f"{stage.name}-cross.{precision}.onnx")
        self._cross = None if cross is None else Session(cross)
        self._entering = "inputs_embeds" if stage.parameters["part"] == 1 else "hidden"
        self._parameters = stage.parameters
        self._past: dict[str, Array] = {}
        self._heard: dict[str, Array] = {}

    def begin(self, batch: int, heard: Array | None) -> None:
        """Forget what was seen, and take in what is heard."""
        empty = np.zeros((batch, self._parameters["kv_heads"], 0, self._parameters["head_dim"]), np.float32)
        self._past = dict.fromkeys(self._cached("past"), empty)
        if self._cross is not None and heard is not None:
            self._heard = dict(zip(self._cached("cross"), self._cross.run({"last_hidden_state": heard}), strict=True))

    def run(self, hidden: Array, mask: Array, places: Array) -> Array:
        """What leaves the part."""
        entering = {self._entering: np.ascontiguousarray(hidden), "attention_mask": mask}
        if not self._parameters["encoder"]:
            entering["position_ids"] = places
        leaving, *present = self._step.run({**entering, **self._past, **self._heard})
        self._past = dict(zip(self._past, present, strict=True))
        return leaving

    def _cached(self, when: str) -> list[str]:
        return [f"{when}_{i}_{kind}" for i in range(self._parameters["layers"]) for kind in ("key", "value")]


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Array, Array]:
    """Token ids and mask of a batch, int64 [batch, seq], the end of every prompt in the last column."""
    longest = max(map(len, prompts))
    ids = np.array([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], np.int64)
    return ids, np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)


def greedy(model: Any, new: int = NEW_TOKENS) -> Any:
    """Make `model.generate()` answer with the likeliest tokens, exactly `new` of them, and return it.

    What the checkpoint prefers (penalties, temperature, several beams) is a matter of the request; what it forbids stays.
    """
    from transformers import GenerationConfig  # noqa: PLC0415

    its = model.generation_config
    settings = {name: getattr(its, name) for name in _FORBID if getattr(its, name, None) is not None}
    pad = its.pad_token_id if its.pad_token_id is not None else 0
    # Without an end an answer does not stop early, so that every token of it is compared.
    model.generation_config = GenerationConfig(max_new_tokens=new, pad_token_id=pad, **settings)  # type: ignore[no-untyped-call]
    return model.generate


def check_width(checkpoint: Checkpoint, manifest: Manifest, width: int) -> None:
    """Raise CheckpointError where the checkpoint's decoder has another width than the exported one."""
    refuse_other_width(checkpoint, manifest, width, manifest.parts(GENERATE)[0].parameters["hidden"])


def compare(decoder: Decoder, precision: Precision, answers: Sequence[Answer], tolerance: float) -> list[Figure]:
    """Tokens and logits of the chain against those of the whole model; the prompt of every other batch is taken in chunks."""
    distance, called = measure(precision)
    differ, apart = [], []
    for i, answer in enumerate(answers):
        logits = decoder.logits(answer, chunk=None if i % 2 == 0 else 3)
        allowed = logits.copy()
        allowed[:, :, list(decoder.parameters["suppress"])] = -np.inf
        allowed[:, 0, list(decoder.parameters["begin_suppress"])] = -np.inf
        differ += list((allowed.argmax(axis=2) != answer.tokens).ravel())
        apart += list(distance(logits.reshape(-1, logits.shape[2]), answer.logits.reshape(-1, logits.shape[2])))
    tokens = counted(precision, "greedy tokens that differ", differ)
    if precision != "float32":
        tokens = replace(tokens, tolerance=ALIKE * len(differ))
    return [tokens, worst(precision, f"logits, {called}", apart, tolerance)]
