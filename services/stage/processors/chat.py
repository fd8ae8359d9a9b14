"""Chat messages to the text a decoder continues, by the checkpoint's own template: transformers' `apply_chat_template`.

A template is a program from whoever made the checkpoint, so it runs in Jinja's immutable sandbox and sees nothing but plain
values. Content may be a string or a list of parts; which of the two a template can take is found out when it is opened, and
the other is turned into it, since templates drop what they do not expect without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import numpy as np
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.manifest import ManifestError, StageSpec
from services.dataplane.errors import BadRequest, TooLarge, shown
from services.dataplane.wire import Array

ROLES = ("system", "user", "assistant", "tool")
MAX_BYTES = 1 << 18
"""Longest conversation; a template's time grows with it, and it runs in the event loop."""
MAX_BYTES_TOGETHER = 1 << 20
"""Of all conversations of a request, for the same reason."""
RULES = ("never", "unless_bos")
_PROBE = "espalier probe"
_TEXT, _IMAGE = "text", "image"


class Chat:
    """`messages` BYTES [batch] -> `text` BYTES [batch], `add_special_tokens` INT64 [batch].

    An item of `messages` is a JSON list of objects with `role` and `content`. `add_special_tokens` tells
    `tokenise` whether the tokenizer is to add its own: a template mostly writes them itself.
    """

    inline = True

    def __init__(self, template: Template, *, add_generation_prompt: bool, rule: str) -> None:
        self._template = template
        self._add_generation_prompt = add_generation_prompt
        self._rule = rule
        self._takes_text = _PROBE in self._try(_PROBE)
        rendered = self._try([{"type": _TEXT, _TEXT: _PROBE}])
        # A template that expects text prints a list as Python does, with its keys.
        self._takes_parts = _PROBE in rendered and f"'{_TEXT}'" not in rendered

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Render; raises BadRequest for what is no conversation, or none that the template knows."""
        size = sum(map(len, inputs["messages"]))
        if size > MAX_BYTES_TOGETHER:
            raise TooLarge(f"the messages have {size} bytes together; the limit is {MAX_BYTES_TOGETHER}: send fewer at once")
        texts = [self._render(index, raw) for index, raw in enumerate(inputs["messages"])]
        text = np.array([each.encode() for each in texts], dtype=object)
        add = [self._rule == "unless_bos" and not self._template.begins(each) for each in texts]
        return {"text": text, "add_special_tokens": np.array(add, dtype=np.int64)}

    def example(self, items: int) -> dict[str, Array]:
        """One short question each."""
        messages = orjson.dumps([{"role": "user", "content": "What is an espalier?"}])
        return {"messages": np.array([messages] * items, dtype=object)}

    def describe(self) -> dict[str, Any]:
        """What the template takes as content."""
        return {"content": [kind for kind, takes in (("text", self._takes_text), ("parts", self._takes_parts)) if takes]}

    def _render(self, index: int, raw: bytes) -> str:
        where = f"messages {index}"
        if len(raw) > MAX_BYTES:
            raise TooLarge(f"{where}: {len(raw)} bytes; the limit is {MAX_BYTES}: shorten the conversation")
        try:
            conversation = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"{where}: not JSON ({error}); send a list of objects with role and content") from None
        if not isinstance(conversation, list) or not conversation:
            raise BadRequest(f"{where}: must be a list with at least one message, not {shown(conversation)}")
        messages = [self._message(f"{where}[{place}]", message) for place, message in enumerate(conversation)]
        try:
            return self._template.render(messages, add_generation_prompt=self._add_generation_prompt)
        except Exception as error:  # a template is a program: it raises what it likes, its own complaint among it
            raise BadRequest(f"{where}: the model's chat template refuses them: {error}") from None

    def _message(self, where: str, message: Any) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise BadRequest(f"{where}: must be an object with role and content, not {shown(message)}")
        if message.get("role") not in ROLES:
            raise BadRequest(f"{where}: role must be one of {', '.join(ROLES)}, not {shown(message.get('role'))}")
        content = message.get("content")
        if isinstance(content, list):
            content = self._parts(where, content)
        elif isinstance(content, str):
            content = content if self._takes_text else [{"type": _TEXT, _TEXT: content}]
        elif content is not None or not message.get("tool_calls"):
            raise BadRequest(f"{where}: content must be text or a list of parts, not {shown(content)}")
        # A key without a value is as good as no key, and templates print it as "None".
        return {key: value for key, value in (message | {"content": content}).items() if value is not None}

    def _parts(self, where: str, parts: Sequence[Any]) -> str | list[dict[str, str]]:
        plain = [_part(f"{where}: content[{place}]", part) for place, part in enumerate(parts)]
        if self._takes_parts:
            return plain
        if any(part["type"] == _IMAGE for part in plain):
            raise BadRequest(f"{where}: this model takes no images: leave out the parts that are none of text")
        return "\n".join(part[_TEXT] for part in plain)

    def _try(self, content: Any) -> str:
        try:
            return self._template.render([{"role": "user", "content": content}], add_generation_prompt=True)
        except Exception:  # as in `_render`; here it only means that the template does not take this
            return ""


def _part(where: str, part: Any) -> dict[str, str]:
    """A part as templates know it: an image's place is marked, its bytes travel in a tensor of their own."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == _TEXT and isinstance(part.get(_TEXT), str):
        return {"type": _TEXT, _TEXT: part[_TEXT]}
    if kind in (_IMAGE, "image_url"):
        return {"type": _IMAGE}
    raise BadRequest(f'{where}: must be {{"type": "text", "text": ...}} or {{"type": "image"}}, not {shown(kind or part)}')


class Template:
    """A checkpoint's chat template, compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.globals["namespace"] = _Namespace
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation; raises whatever the template raises."""
        return self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def begins(self, text: str) -> bool:
        """Whether a text begins with the token that begins texts; False where the checkpoint has none."""
        bos = self._special_tokens.get("bos_token")
        return bos is not None and text.startswith(bos)


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, with which training marks what the assistant said. Here its content is simply printed."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, but for names that would reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape what HTML minds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Chat:
    """Compile the template; see `services.stage.processors`.

    Parameters: `special_tokens` {bos_token: ...} as the template names them, `add_generation_prompt`, `special_tokens_rule`:
    `never`, or `unless_bos` where the tokenizer adds its own to a text that does not begin with `bos_token` (transformers'
    multi-modal processors).
    """
    del threads
    if not files:
        raise ManifestError(f"stage {spec.name!r} needs its chat template; export the model again (espalier export)")
    given = spec.parameters
    special, rule = given.get("special_tokens", {}), given.get("special_tokens_rule", "never")
    if rule not in RULES:
        raise ManifestError(f"stage {spec.name!r}: special_tokens_rule {rule!r} is not one of {', '.join(RULES)}")
    try:
        template = Template(files[0].read_text(encoding="utf-8"), special)
    except (jinja2.exceptions.TemplateError, UnicodeDecodeError) as error:
        raise ManifestError(f"{files[0].name}: no chat template ({error}); copy or export it again") from None
    return Chat(template, add_generation_prompt=bool(given.get("add_generation_prompt", True)), rule=rule)
