"""transformers, which the light stages are held against. Untyped: its annotations say less than mypy's strict mode asks for."""

from __future__ import annotations

from typing import Any

import transformers as _transformers
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector as _Projector

transformers: Any = _transformers
LlavaMultiModalProjector: Any = _Projector
