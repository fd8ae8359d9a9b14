"""Token ids to text with the checkpoint's own tokenizer.

Special tokens (the end of a text, say) and a speech model's timestamps are left out, as transformers leaves them out under
`skip_special_tokens`. A stream asks again and again with more tokens: the text then only grows, but for a run of U+FFFD at its
end, which stands for characters whose last byte is still to come. transformers' `clean_up_tokenization_spaces` would rewrite
text; it skips the byte-pair vocabularies that decoders have, and is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import StageSpec
from services.dataplane.errors import BadRequest
from services.dataplane.wire import Array
from services.stage.processors.tokenise import open_tokenizer

_LARGEST_ID = 2**32 - 1


class Detokenise:
    """`output_ids` INT64 [batch, new], `output_count` INT64 [batch] -> `text` BYTES [batch]: of each row its first ids."""

    inline = True

    def __init__(self, tokenizer: Any, timestamp_begin: int | None) -> None:
        self._tokenizer = tokenizer
        self._timestamp_begin = _LARGEST_ID + 1 if timestamp_begin is None else timestamp_begin

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Detokenise; raises BadRequest for a count that the row does not have or a number that is no id."""
        rows, counts = inputs["output_ids"], inputs["output_count"]
        if counts.min() < 0 or counts.max() > rows.shape[1]:
            raise BadRequest(f"output_count must be between 0 and {rows.shape[1]}, the length of a row of output_ids")
        texts = [self._decode(row[:count].tolist()).encode() for row, count in zip(rows, counts, strict=True)]
        return {"text": np.array(texts, dtype=object)}

    def _decode(self, ids: Sequence[int]) -> str:
        if ids and not 0 <= min(ids) <= max(ids) <= _LARGEST_ID:
            raise BadRequest(f"output_ids must be token ids, 0 or more, not {min(ids) if min(ids) < 0 else max(ids)}")
        text: str = self._tokenizer.decode([number for number in ids if number < self._timestamp_begin])
        return text

    def describe(self) -> dict[str, Any]:
        """Size of the vocabulary."""
        return {"vocabulary": self._tokenizer.get_vocab_size()}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Detokenise:
    """Open tokenizer.json; parameter `timestamp_begin`: ids from there on are left out. See `services.stage.processors`."""
    del threads
    return Detokenise(open_tokenizer(spec, files), spec.parameters.get("timestamp_begin"))
