"""Chat templates against transformers' `apply_chat_template`, over the kinds of templates that checkpoints come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from models.manifest import ManifestError, ModelFile, StageSpec, TensorSpec
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.wire import Array
from services.stage.processors import Exemplary, Processor, open_processor
from tests.services.stage.processors.theirs import transformers

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{%- set system_message = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message != false %}
        {%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{%- set ns = namespace(last=0, names=[]) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{{ bos_token }}{{ message.role }}: {{ message.content | default('nothing') | trim }}{% if loop.index0 == ns.last %}!{% endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- call | tojson }}
        {%- endfor %}
    {%- endif %}
    {%- if message.content is none %}{% break %}{% endif %}
    {%- generation %}{{ message.name }}{% endgeneration %}
{% endfor %}{{ dict(a=1) | tojson(indent=2) }}"""
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BOTH = (
    "{{ bos_token }}{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}\n"
    "{% endfor %}"
)
INDENTED = """{{ bos_token }}
    {% for message in messages %}
  {{ message.content }}
    {% endfor %}
    {# a remark #}
end"""
DATED = "{{ strftime_now('%Y') }} {{ messages[0].content }}"


def open_with(directory: Path, template: str | None = CHATML, **parameters: Any) -> Processor:
    files: tuple[Path, ...] = ()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
        files = (directory / "chat_template.jinja",)
    spec = StageSpec(
        name="chat",
        tier="light",
        processor="chat",
        inputs=(TensorSpec(name="messages", datatype="BYTES", shape=("batch",)),),
        outputs=(
            TensorSpec(name="text", datatype="BYTES", shape=("batch",)),
            TensorSpec(name="add_special_tokens", datatype="INT64", shape=("batch",)),
        ),
        files={"float32": tuple(ModelFile(path=each.name, sha256="0" * 64, size_bytes=0) for each in files)},
        parameters={"special_tokens": SPECIAL} | parameters,
    )
    return open_processor(spec, files, 1)


def run(processor: Processor, *conversations: Any) -> dict[str, Array]:
    messages = np.empty(len(conversations), dtype=object)
    messages[:] = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in conversations]
    return processor.run({"messages": messages})


def rendered(processor: Processor, conversation: Any) -> str:
    text: bytes = run(processor, conversation)["text"][0]
    return text.decode()


def reference(template: str, conversation: Any, *, add_generation_prompt: bool = True) -> str:
    """The text transformers makes."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    text: str = tokenizer.apply_chat_template(
        conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


IMAGE = {"type": "image"}
TALK = [
    says("system", "Be brief."),
    says("user", "Was ist ein Spalier?"),
    says("assistant", " Ein Gitter. "),
    says("user", "Und?"),
]
CONVERSATIONS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "one question": (CHATML, [says("user", "What is an espalier?")]),
    "a talk": (CHATML, TALK),
    "emoji, right to left, and what looks like markup": (
        CHATML,
        [says("user", "🌳👩‍🌾 שלום <b>&amp;</b> {{ bos_token }} {% if %}")],
    ),
    "nothing said": (CHATML, [says("user", "")]),
    "a talk in turns": (LLAMA2, TALK),
    "no system message": (LLAMA2, TALK[1:]),
    "tools": (
        TOOLS,
        [
            says("user", " How warm is it? "),
            says("assistant", None, tool_calls=[{"function": {"name": "warmth", "arguments": {"where": "<Bonn> & Köln"}}}]),
            says("tool", "12", name="warmth"),
        ],
    ),
    "an image and a question": (LLAVA, [says("user", [IMAGE, {"type": "text", "text": "What is this?"}])]),
    "two parts of text": (LLAVA, [says("user", [{"type": "text", "text": "What"}, {"type": "text", "text": "is this?"}])]),
    "a template that takes both": (BOTH, [says("user", "text"), says("user", [IMAGE, {"type": "text", "text": "part"}])]),
    "indented blocks": (INDENTED, TALK),
    "the year": (DATED, [says("user", "now")]),
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_texts_are_those_of_transformers(name: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    template, conversation = CONVERSATIONS[name]
    chat = open_with(tmp_path, template, add_generation_prompt=add_generation_prompt)
    text = rendered(chat, conversation)
    assert text == reference(template, conversation, add_generation_prompt=add_generation_prompt)
    assert text


@settings(max_examples=100, deadline=None)
@given(
    conversation=st.lists(
        st.builds(says, st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=20)), min_size=1, max_size=5
    )
)
def test_any_talk_equals_transformers(tmp_path_factory: pytest.TempPathFactory, conversation: list[dict[str, Any]]) -> None:
    chat = open_with(tmp_path_factory.getbasetemp(), TOOLS)
    assert rendered(chat, conversation) == reference(TOOLS, conversation)


def test_the_template_says_which_special_tokens_are_still_to_be_added(tmp_path: Path) -> None:
    plain = [says("user", "text")]
    assert run(open_with(tmp_path, LLAMA2), plain)["add_special_tokens"].tolist() == [0]
    assert run(open_with(tmp_path, CHATML), plain)["add_special_tokens"].tolist() == [0]
    unless = open_with(tmp_path, "{{ messages[0].content }}", special_tokens_rule="unless_bos")
    outputs = run(unless, [says("user", "<s>text")], [says("user", "text")])
    assert outputs["add_special_tokens"].tolist() == [0, 1]
    assert outputs["add_special_tokens"].dtype == np.int64
    without = open_with(tmp_path, "{{ messages[0].content }}", special_tokens_rule="unless_bos", special_tokens={})
    assert run(without, plain)["add_special_tokens"].tolist() == [1]


def test_text_is_wrapped_for_a_template_of_parts_which_would_drop_it(tmp_path: Path) -> None:
    chat = open_with(tmp_path, LLAVA)
    assert "What is this?" not in reference(LLAVA, [says("user", "What is this?")])
    assert rendered(chat, [says("user", "What is this?")]) == "USER: What is this? ASSISTANT:"
    assert chat.describe() == {"content": ["parts"]}


def test_parts_are_joined_for_a_template_of_text_which_would_print_them(tmp_path: Path) -> None:
    chat = open_with(tmp_path)
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": "is this?"}]
    assert rendered(chat, [says("user", parts)]) == reference(CHATML, [says("user", "What\nis this?")])
    assert chat.describe() == {"content": ["text"]}
    assert open_with(tmp_path, BOTH).describe() == {"content": ["text", "parts"]}


def test_an_images_bytes_or_address_do_not_reach_the_template(tmp_path: Path) -> None:
    openai = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for part in (openai, IMAGE | {"image": "AAAA"}, IMAGE | {"url": "AAAA"}):
        assert rendered(open_with(tmp_path, BOTH), [says("user", [part])]) == "<s><image>"


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "sent", "message"),
    [
        ("plain text", b"hello there", r"not JSON \(.*\); send a list of objects with role and content"),
        ("half a list", b'[{"role": "user"', "not JSON"),
        ("bytes", b'[{"role": "user", "content": "\xff"}]', "not JSON"),
        ("half a character", b'[{"role": "user", "content": "\\ud800"}]', "not JSON"),
        ("one message alone", says("user", "hi"), "must be a list with at least one message, not an object"),
        ("an empty list", [], "must be a list with at least one message, not a list"),
        ("a list of texts", ["hi"], r"\[0\]: must be an object with role and content, not 'hi'"),
        ("no role", [{"content": "hi"}], r"\[0\]: role must be one of system, user, assistant, tool, not None"),
        ("a role of their own", [says("user", "hi"), says("wizard", "hi")], r"\[1\]: role must be one of .*, not 'wizard'"),
        ("a role that is no text", [says(["user"], "hi")], r"\[0\]: role must be one of .*, not a list"),  # type: ignore[arg-type]
        ("no content", [{"role": "user"}], r"\[0\]: content must be text or a list of parts, not None"),
        ("content that is a number", [says("user", 3)], r"\[0\]: content must be text or a list of parts, not 3"),
        (
            "a part of another kind",
            [says("user", [{"type": "video"}])],
            r'\[0\]: content\[0\]: must be \{"type": "text".*\'video\'',
        ),
        ("a part without its text", [says("user", [{"type": "text"}])], r"\[0\]: content\[0\]: must be"),
        ("a part that is a text", [says("user", ["hi"])], r"\[0\]: content\[0\]: must be .*, not 'hi'"),
        ("an image for a model of text", [says("user", [IMAGE])], r"\[0\]: this model takes no images"),
        ("deep nesting", b"[" * 5000 + b"]" * 5000, "not JSON|must be an object"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\\" not in value else "",
)
def test_bad_messages_are_refused_with_their_place_and_what_to_change(
    sentence: str, sent: Any, message: str, tmp_path: Path
) -> None:
    del sentence
    with pytest.raises(BadRequest, match=f"messages 1:? ?{message}"):
        run(open_with(tmp_path), TALK, sent)


def test_what_the_template_itself_refuses_comes_back_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match="messages 0: the model's chat template refuses them: Conversation roles must alternate"
    ):
        run(open_with(tmp_path, LLAMA2), [says("user", "a"), says("user", "b")])


def test_many_long_conversations_are_too_many_at_once(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match=r"the messages have 10[0-9]* bytes together; the limit is 1048576: send fewer at once"):
        run(open_with(tmp_path), *[[says("user", "a" * 210_000)]] * 5)


def test_a_conversation_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="messages 0: 300000 bytes; the limit is 262144: shorten the conversation"):
        run(open_with(tmp_path), b"x" * 300_000)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_a_template_gets_no_further_than_its_sandbox(attack: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="the model's chat template refuses them"):
        run(open_with(tmp_path, attack), TALK)


# --- the stage ------------------------------------------------------------------------------------------------------------


def test_a_stage_without_a_template_that_compiles_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="needs its chat template"):
        open_with(tmp_path, None)
    with pytest.raises(ManifestError, match=r"chat_template\.jinja: no chat template \(.*\); copy or export it again"):
        open_with(tmp_path, "{% for message in messages %}")
    with pytest.raises(ManifestError, match="special_tokens_rule 'sometimes' is not one of never, unless_bos"):
        open_with(tmp_path, special_tokens_rule="sometimes")


def test_it_brings_its_own_example(tmp_path: Path) -> None:
    chat = open_with(tmp_path)
    assert chat.inline
    assert isinstance(chat, Exemplary)
    assert chat.run(chat.example(3))["text"].shape == (3,)
