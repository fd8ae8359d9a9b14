"""What a pipeline can serve beside inference, told by its inputs and outputs. Pure.

| route | inputs without a default | outputs among others |
|---|---|---|
| embeddings | one BYTES [batch] | `embedding` |
| completions | one BYTES [batch] named `text` or `prompt` | `text` BYTES [batch] |
| chat/completions | `messages` BYTES [batch], perhaps `image` BYTES [batch] | `text` BYTES [batch] |
| audio/transcriptions | `audio` BYTES [batch] | `text` BYTES [batch] |
"""

from __future__ import annotations

from models.manifest import BATCH_AXIS, TensorSpec
from services.gateway.table import Plan

EMBEDDING, TEXT, FINISH, TOKEN_COUNT, TOKENS_MADE = "embedding", "text", "finish_reason", "token_count", "output_count"
MESSAGES, IMAGE, AUDIO = "messages", "image", "audio"
_PROMPTS = ("text", "prompt")


def embedded_input(plan: Plan) -> str | None:
    """The input of texts of a pipeline that makes embeddings; None of any other."""
    needed = _needed(plan)
    return needed[0] if EMBEDDING in plan.outputs and len(needed) == 1 and _is_bytes(plan.inputs[needed[0]]) else None


def prompt_input(plan: Plan) -> str | None:
    """The input of prompts of a pipeline that continues them; None of any other."""
    needed = _needed(plan)
    return needed[0] if _makes_text(plan) and len(needed) == 1 and needed[0] in _PROMPTS else None


def chats(plan: Plan) -> bool:
    """Whether the pipeline answers chat messages, perhaps about an image."""
    return _makes_text(plan) and _needed(plan) in ([MESSAGES], [IMAGE, MESSAGES])


def transcribes(plan: Plan) -> bool:
    """Whether the pipeline writes down what is said."""
    return _makes_text(plan) and _needed(plan) == [AUDIO]


def routes(plan: Plan) -> list[str]:
    """Paths under /v1/ that serve the pipeline."""
    served = {
        "embeddings": embedded_input(plan) is not None,
        "completions": prompt_input(plan) is not None,
        "chat/completions": chats(plan),
        "audio/transcriptions": transcribes(plan),
    }
    return [path for path, serves in served.items() if serves]


def _needed(plan: Plan) -> list[str]:
    return sorted(name for name in plan.inputs if name not in plan.optional)


def _makes_text(plan: Plan) -> bool:
    text = plan.outputs.get(TEXT)
    return text is not None and _is_bytes(text) and all(_is_bytes(plan.inputs[name]) for name in _needed(plan))


def _is_bytes(spec: TensorSpec) -> bool:
    return spec.datatype == "BYTES" and spec.shape == (BATCH_AXIS,)
