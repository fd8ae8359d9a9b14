"""A decoder that makes tokens: prompts in, tokens out, one step of one graph at a time for all sequences of a batch.

What a step does is here; when a task joins the batch is `services.stage.generation`'s business, which calls `rows`, `prefill`,
`step` and `outputs`. `run` makes whole answers without it, for whoever has no such loop (a fused service, say).

    rows ──prefill──► Batch ──step──► Batch ──step──► ...        a row leaves when it has `finish`; batches join between steps

Sources: the interface of the graph is that of `models.adapters`; positions and masks are those of transformers' `generate()`
for left-padded batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Array
from services.stage.processors import generate_cache
from services.stage.processors.generate_cache import Cache, attention_mask
from services.stage.processors.generate_part import Part
from services.stage.processors.generate_pass import RunsGraph, cache_names, forward, positions
from services.stage.processors.generate_sampling import choose

STOP, LENGTH = "stop", "length"
MAX_TOKENS, TEMPERATURE, TOP_P, SEED = "max_tokens", "temperature", "top_p", "seed"
INPUT_IDS, MASK, STATES, IMAGE = "input_ids", "attention_mask", "last_hidden_state", "image_embedding"
_GREATEST_SEED = 2**64
_NAMES = itertools.count()


@dataclass(slots=True, eq=False)
class Row:
    """One sequence: what it is to be made from, and what has been made."""

    prompt: Array
    """(tokens,) int64."""
    max_tokens: int
    temperature: float
    top_p: float
    rng: np.random.Generator
    states: Array | None = None
    """(positions, d): the encoder's states, for a decoder that attends to them."""
    image: Array | None = None
    """(image tokens, d): what stands for the image tokens of the prompt."""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    """`stop` or `length` once the last token has been made."""
    name: int = field(default_factory=lambda: next(_NAMES))
    """What the further parts of a cut decoder know it by."""


@dataclass(slots=True)
class Batch:
    """The sequences that are being continued, and what the decoder keeps of them, in the same order."""

    rows: list[Row]
    cache: Cache

    def __len__(self) -> int:
        """Sequences in it."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a cut decoder, on its way from one part to the next."""

    hidden: Array
    """(batch, new, d)."""
    attention_mask: Array
    """(batch, total)."""
    position_ids: Array
    """(batch, new)."""
    rows: tuple[int, ...]
    """Names of the sequences, in the order of the batch."""
    past: tuple[int, ...]
    """Tokens that each had before."""


class Generate:
    """See the module. Stateless: what a batch needs lies in the batch, so several may be worked on at once."""

    inline = False

    def __init__(
        self,
        spec: StageSpec,
        graph: RunsGraph,
        embedding: Array,
        cross: RunsGraph | None = None,
        positions: Array | None = None,
    ) -> None:
        """Put the pieces together.

        Args:
            spec: of the stage.
            graph: one forward pass over new tokens.
            embedding: (vocabulary, d) float32.
            cross: makes the keys and values of the encoder's states; None without an encoder.
            positions: (context, d) learned positions that are added to the embedding; None where the graph takes positions.
        """
        parameters = spec.parameters
        self.spec = spec
        self.context = int(parameters["context"])
        self._graph = graph
        self._cross = cross
        self._embedding = embedding
        self._positions = positions
        self._takes = {tensor.name for tensor in spec.inputs}
        self._shape = (int(parameters["kv_heads"]), int(parameters["head_dim"]))
        self._eos = frozenset(int(token) for token in parameters["eos"])
        self._pad = int(parameters["pad"])
        self._default_tokens = int(parameters["max_tokens"])
        self._prefix = np.array(parameters.get("prefix") or [], dtype=np.int64)
        self._suppress = np.array(parameters.get("suppress") or [], dtype=np.int64)
        self._begin_suppress = np.array(parameters.get("begin_suppress") or [], dtype=np.int64)
        self.parts = int(parameters.get("parts", 1))
        self.rest: Callable[[Pass], Array] | None = None
        """Logits of the last position from the further parts; without it (while warming up) there are none, and all are 0."""
        image_token = parameters.get("image_token")
        self._image_token = None if image_token is None else int(image_token)
        self._cache_names = cache_names(spec)
        self._dtype = graph.inputs[f"past_{self._cache_names[0]}"]

    # --- a task's rows --------------------------------------------------------------------------------------------------

    def rows(self, inputs: Mapping[str, Array]) -> list[Row]:
        """The sequences of a task, checked.

        Args:
            inputs: of the stage, by name; those with a default may be missing.

        Raises:
            BadRequest: a token outside the vocabulary, a prompt or answer longer than the context, an image without its place,
                or sampling parameters that make no sense.
        """
        count = len(next(iter(inputs.values())))
        return [self._row(inputs, i) for i in range(count)]

    def _row(self, inputs: Mapping[str, Array], i: int) -> Row:
        prompt = self._prompt(inputs, i)
        temperature = float(self._option(inputs, TEMPERATURE, i, 0.0))
        top_p = float(self._option(inputs, TOP_P, i, 1.0))
        if not 0.0 <= temperature < float("inf"):
            raise BadRequest(f"{TEMPERATURE} must be 0 or more, not {temperature:g}")
        if not 0.0 < top_p <= 1.0:
            raise BadRequest(f"{TOP_P} must be over 0 and at most 1, not {top_p:g}")
        seed = int(self._option(inputs, SEED, i, 0)) % _GREATEST_SEED
        return Row(
            prompt=prompt,
            max_tokens=self._max_tokens(len(prompt), int(self._option(inputs, MAX_TOKENS, i, self._default_tokens)), i),
            temperature=temperature,
            top_p=top_p,
            rng=np.random.default_rng(seed),
            states=inputs[STATES][i] if STATES in self._takes else None,
            image=inputs[IMAGE][i] if IMAGE in self._takes else None,
        )

    def _prompt(self, inputs: Mapping[str, Array], i: int) -> Array:
        if INPUT_IDS not in self._takes:
            return self._prefix
        ids = inputs[INPUT_IDS][i]
        if MASK in inputs:
            ids = ids[inputs[MASK][i] != 0]
        if not len(ids):
            raise BadRequest(f"prompt {i} has no tokens")
        if ids.min() < 0 or ids.max() >= len(self._embedding):
            raise BadRequest(f"prompt {i} has a token outside the vocabulary of {len(self._embedding)}")
        if self._image_token is not None and IMAGE in self._takes:
            places, there = int((ids == self._image_token).sum()), inputs[IMAGE].shape[1]
            if places != there:
                raise BadRequest(f"prompt {i} has {places} image tokens, and the image has {there}")
        return np.concatenate([self._prefix, ids])

    def _max_tokens(self, prompt: int, asked: int, i: int) -> int:
        left = self.context - prompt
        if left < 1:
            raise BadRequest(f"prompt {i} has {prompt} tokens; the model takes {self.context} with the answer: shorten it")
        if asked < 1:
            raise BadRequest(f"{MAX_TOKENS} must be at least 1, not {asked}")
        # Nobody asked for the default in so many words: an answer that fills the context is what it means then.
        if asked > left and asked != self._default_tokens:
            raise BadRequest(
                f"prompt {i} has {prompt} tokens, which leaves {left} of the model's {self.context} for the answer, "
                f"not {MAX_TOKENS} = {asked}"
            )
        return min(asked, left)

    def made_up(self, length: int, typical_length: Mapping[str, int]) -> Row:
        """A row to warm up with, of about so many tokens and no end of its own."""
        room = max(1, min(length, self.context // 2))
        prompt = np.zeros(room, np.int64) if INPUT_IDS in self._takes else self._prefix
        states = None
        for tensor in self.spec.inputs:
            if tensor.name == STATES:
                states = np.zeros(
                    [typical_length.get(str(n), 1) if isinstance(n, str) else n for n in tensor.shape[1:]], np.float32
                )
        return Row(prompt, self.context - len(prompt), 0.0, 1.0, np.random.default_rng(0), states)

    @staticmethod
    def _option(inputs: Mapping[str, Array], name: str, i: int, default: float) -> Any:
        return inputs[name][i] if name in inputs else default

    # --- steps ----------------------------------------------------------------------------------------------------------

    def prefill(self, rows: Sequence[Row]) -> Batch:
        """Read the prompts and make the first token of each."""
        lengths = np.array([len(row.prompt) for row in rows], dtype=np.int64)
        longest = int(lengths.max())
        x = np.zeros((len(rows), longest, self._embedding.shape[1]), np.float32)
        for i, row in enumerate(rows):
            x[i, longest - len(row.prompt) :] = self._embed(row)
        heads, width = self._shape
        empty = np.zeros((len(rows), heads, 0, width), self._dtype)
        past = Cache(np.zeros_like(lengths), (empty,) * len(self._cache_names), self._cross_of(rows))
        logits, cache = self._forward(x, lengths, past, rows)
        batch = Batch(list(rows), cache)
        self._choose(batch, logits)
        return batch

    def step(self, batch: Batch) -> Batch:
        """Make one more token of every sequence."""
        last = np.array([row.tokens[-1] for row in batch.rows], dtype=np.int64)
        x = self._embedding[last][:, None].astype(np.float32, copy=False)
        if self._positions is not None:
            x = x + self._positions[batch.cache.lengths][:, None]
        logits, cache = self._forward(x, np.ones(len(batch), np.int64), batch.cache, batch.rows)
        stepped = Batch(batch.rows, cache)
        self._choose(stepped, logits)
        return stepped

    def joined(self, batches: Sequence[Batch]) -> Batch:
        """One batch of several."""
        return Batch([row for batch in batches for row in batch.rows], generate_cache.join([batch.cache for batch in batches]))

    def without(self, batch: Batch, gone: Sequence[Row]) -> Batch | None:
        """The batch without these rows; None where nobody is left."""
        leaving = {id(row) for row in gone}
        stay = [i for i, row in enumerate(batch.rows) if id(row) not in leaving]
        if not stay:
            return None
        return Batch([batch.rows[i] for i in stay], generate_cache.keep(batch.cache, stay))

    def _forward(self, x: Array, counts: Array, cache: Cache, rows: Sequence[Row]) -> tuple[Array, Cache]:
        """One pass over `x` (batch, new, d), of whose columns the last `counts` are tokens of each sequence."""
        lengths = cache.lengths + counts
        mask = attention_mask(lengths, cache.past[0].shape[2] + x.shape[1])
        made, cache = forward(self._graph, self._cache_names, {"inputs_embeds": x}, mask, lengths, cache)
        if self.parts == 1:
            return made, cache
        if self.rest is None:
            return np.zeros((len(x), len(self._embedding)), np.float32), cache
        past = tuple(int(n) for n in lengths - counts)
        return self.rest(Pass(made, mask, positions(mask, x.shape[1]), tuple(row.name for row in rows), past)), cache

    def _embed(self, row: Row) -> Array:
        x = np.array(self._embedding[row.prompt], dtype=np.float32)
        if self._positions is not None:
            x += self._positions[: len(row.prompt)]
        if row.image is not None and self._image_token is not None:
            x[row.prompt == self._image_token] = row.image
        return x

    def _cross_of(self, rows: Sequence[Row]) -> tuple[Array, ...]:
        if self._cross is None:
            return ()
        states = np.stack([row.states for row in rows if row.states is not None])
        made = self._cross.run({STATES: states})
        return tuple(made[f"cross_{name}"] for name in self._cache_names)

    def _choose(self, batch: Batch, logits: Array) -> None:
        for row, scores in zip(batch.rows, logits, strict=True):
            allowed = scores
            if len(self._suppress) or (len(self._begin_suppress) and not row.tokens):
                allowed = scores.copy()
                allowed[self._suppress] = -np.inf
                if not row.tokens:
                    allowed[self._begin_suppress] = -np.inf
            token = choose(allowed, row.temperature, row.top_p, row.rng)
            row.tokens.append(token)
            if token in self._eos:
                row.finish = STOP
            elif len(row.tokens) >= row.max_tokens:
                row.finish = LENGTH

    # --- answers --------------------------------------------------------------------------------------------------------

    def outputs(self, tokens: Sequence[Sequence[int]], finish: Sequence[str]) -> dict[str, Array]:
        """The stage's outputs for a task with these new tokens and reasons for having stopped ("" for a row that goes on)."""
        count = np.array([len(row) for row in tokens], dtype=np.int64)
        ids = np.full((len(tokens), int(count.max())), self._pad, dtype=np.int64)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = row
        reasons = np.array([reason.encode() for reason in finish], dtype=object)
        made = {"output_ids": ids, "output_count": count, "finish_reason": reasons}
        return {tensor.name: made[tensor.name] for tensor in self.spec.outputs}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Whole answers for a task, computed by themselves."""
        if self.parts > 1 and self.rest is None:
            raise BadRequest(f"stage {self.spec.name!r} is a part of a decoder; its other parts are found by a pipeline only")
        rows = self.rows(inputs)
        batch: Batch | None = self.prefill(rows)
        while batch is not None:
            batch = self.without(batch, [row for row in batch.rows if row.finish])
            if batch is not None:
                batch = self.step(batch)
        return self.outputs([row.tokens for row in rows], [row.finish for row in rows])

    def describe(self) -> dict[str, Any]:
        """Providers, threads and the model's limits."""
        return {**self._graph.describe(), "context": self.context, MAX_TOKENS: self._default_tokens}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Generate | Part:
    """Open the graphs and map the tables; see `services.stage.processors`.

    A file's role is told by its name: `STAGE.PRECISION.onnx` is the graph of a step, `STAGE-cross.PRECISION.onnx` makes the
    encoder's keys and values, `STAGE-embedding.npy` and `STAGE-positions.npy` are tables.
    """
    from services.stage.session import open_graph  # noqa: PLC0415 - tests of the arithmetic need no ONNX Runtime

    if int(spec.parameters.get("parts", 1)) > 1 and spec.parameters.get("encoder"):
        raise ManifestError(
            f"stage {spec.name!r} is a part of a decoder with an encoder, which only runs whole; export it uncut"
        )
    found = {path.name.removeprefix(spec.name).split(".")[0] + path.suffix: path for path in files if path.suffix != ".data"}
    if int(spec.parameters.get("part", 1)) > 1:
        if ".onnx" not in found:
            raise ManifestError(f"stage {spec.name!r} lacks its graph; export the model again (espalier export)")
        return Part(spec, open_graph(found[".onnx"], threads))
    if not {".onnx", "-embedding.npy"} <= found.keys():
        raise ManifestError(f"stage {spec.name!r} lacks its graph or its embedding; export the model again (espalier export)")
    positions = found.get("-positions.npy")
    cross = found.get("-cross.onnx")
    return Generate(
        spec,
        open_graph(found[".onnx"], threads),
        _table(found["-embedding.npy"]),
        open_graph(cross, threads) if cross is not None else None,
        _table(positions) if positions is not None else None,
    )


def _table(path: Path) -> Array:
    """Mapped, not read: of a vocabulary only the tokens in use are touched."""
    try:
        table: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ManifestError(f"{path.name}: not a table of numbers ({error}); export the model again") from None
    return table
