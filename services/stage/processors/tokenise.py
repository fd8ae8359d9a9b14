"""Text to token ids with the checkpoint's own tokenizer, padded to the longest text of the task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array

# One task's texts are few and short; threads would cost more than they save, and the stage's quota is a fraction of a core.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer

_LONGEST_TOKEN = 64
"""Characters per token beyond which no tokenizer's text can fit: a text longer than this many times the limit is refused
unread, so that a huge one does not hold the event loop."""
_BYTES_TOGETHER = 1 << 20
"""Most bytes of all texts of a request, or as many as one may have; a quarter of a second's work, for the same reason."""


@dataclass(frozen=True, slots=True)
class ImageToken:
    """The token that stands for an image in a text, and how many of them the decoder wants, one for each patch."""

    id: int
    count: int


class Tokenise:
    """`text` BYTES [batch] -> `input_ids`, `attention_mask` INT64 [batch, seq] and `token_count` INT64 [batch].

    Where the manifest gives it the input `add_special_tokens` INT64 [batch], a text with 0 gets none of the tokenizer's own
    special tokens: a chat template has written them already.
    """

    inline = True

    def __init__(self, tokenizer: Any, max_tokens: int, pad_id: int, truncate: bool, image: ImageToken | None) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._pad_id = pad_id
        self._truncate = truncate
        self._image = image

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Tokenise; raises BadRequest for a text that is not UTF-8, or has more or fewer tokens than the model takes."""
        self._check(inputs["text"])
        texts = [self._decode(i, raw) for i, raw in enumerate(inputs["text"])]
        ids = self._encode(texts, inputs.get("add_special_tokens"))
        for i, tokens in enumerate(ids):
            if not tokens:
                raise BadRequest(f"text {i} has no tokens; the model takes at least one: write something")
            if len(tokens) > self._max_tokens and not self._truncate:
                raise BadRequest(f"text {i} has {len(tokens)} tokens; the model takes {self._max_tokens}: shorten or split it")
        count = np.fromiter((len(tokens) for tokens in ids), dtype=np.int64, count=len(ids))
        input_ids = np.full((len(ids), max(count, default=0)), self._pad_id, dtype=np.int64)
        for row, tokens in zip(input_ids, ids, strict=True):
            row[: len(tokens)] = tokens
        mask = (np.arange(input_ids.shape[1]) < count[:, None]).astype(np.int64)
        return {"input_ids": input_ids, "attention_mask": mask, "token_count": count}

    def _encode(self, texts: Sequence[str], special: Array | None) -> list[list[int]]:
        wanted = np.ones(len(texts), bool) if special is None else special != 0
        ids: list[list[int]] = [[] for _ in texts]
        for add in (True, False):
            rows = np.flatnonzero(wanted == add).tolist()
            encodings = self._tokenizer.encode_batch_fast([texts[row] for row in rows], add_special_tokens=add)
            for row, encoding in zip(rows, encodings, strict=True):
                ids[row] = encoding.ids if self._image is None else self._expanded(row, encoding.ids, self._image)
        return ids

    def _expanded(self, index: int, ids: list[int], image: ImageToken) -> list[int]:
        """With as many tokens as the image has patches in the place of the one that stands for it."""
        times = ids.count(image.id)
        if times > 1:
            raise BadRequest(f"text {index} names {times} images; the model takes one with each text: name it once")
        if not times:
            return ids
        place = ids.index(image.id)
        return [*ids[:place], *[image.id] * image.count, *ids[place + 1 :]]

    def describe(self) -> dict[str, Any]:
        """Longest text and what happens to a longer one."""
        return {"max_tokens": self._max_tokens, "truncate": self._truncate}

    def _check(self, texts: Array) -> None:
        limit = max(self._max_tokens * _LONGEST_TOKEN, _BYTES_TOGETHER)
        if (size := sum(map(len, texts))) > limit and len(texts) > 1:
            raise TooLarge(f"the texts have {size} bytes together; the limit is {limit}: send fewer at once")

    def _decode(self, index: int, raw: bytes) -> str:
        limit = self._max_tokens * _LONGEST_TOKEN
        if len(raw) > limit and not self._truncate:
            raise TooLarge(f"text {index} has {len(raw)} bytes; the model takes {self._max_tokens} tokens: shorten or split it")
        try:
            return raw.decode()[:limit]
        except UnicodeDecodeError:
            raise BadRequest(f"text {index} is not UTF-8") from None


def open_tokenizer(spec: StageSpec, files: tuple[Path, ...]) -> Any:
    """The tokenizer of a stage's tokenizer.json; raises ManifestError where there is none or it cannot be read."""
    if not files:
        raise ManifestError(f"stage {spec.name!r} needs its tokenizer.json; export the model again (espalier export)")
    try:
        return Tokenizer.from_file(str(files[0]))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ManifestError(f"{files[0].name}: no tokenizer ({error}); export the model again (espalier export)") from None


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Tokenise:
    """Open tokenizer.json; see `services.stage.processors`.

    Parameters: `max_tokens`, `pad_id`, `truncate`, and where texts may name an image `image_token` {id, count}.
    """
    del threads
    tokenizer = open_tokenizer(spec, files)
    max_tokens, truncate = int(spec.parameters["max_tokens"]), bool(spec.parameters.get("truncate", False))
    # Checkpoints ship with padding and truncation set for training; both are ours to decide.
    tokenizer.no_padding()
    if truncate:
        tokenizer.enable_truncation(max_tokens)
    else:
        tokenizer.no_truncation()
    image = spec.parameters.get("image_token")
    token = ImageToken(int(image["id"]), int(image["count"])) if image else None
    return Tokenise(tokenizer, max_tokens, int(spec.parameters["pad_id"]), truncate, token)
