"""Chat templates, beside transformers' `apply_chat_template`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from interv.errors import ModelError
from interv.models.chat import CHAT_DATE, ChatTemplates
from interv.models.tokenizer_files import read_tokenizer
from interv.spec.schema import ModelSection
from interv.task.encoder import Encoder
from tests import tokenizers_zoo as zoo_t
from tests import zoo

_TURN = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
_ANSWER = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES: dict[str, Any] = {
    "turns": _TURN + _ANSWER,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    "{%- generation %}{{ 'x' }}{%- endgeneration %}" + _ANSWER,
    "dated": "{% set today = strftime_now('%d %b %Y') %}Today is {{ today }}.\n" + _TURN + _ANSWER,
    "own date": "{{- bos_token }}\n{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    "{{- 'Today Date: ' + date_string + '\n\n' }}" + _TURN + _ANSWER,
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% elif documents is none %}none"
    "{% endif %}{{ messages | tojson(indent=2) }}{{ {'é<&': \"'\"} | tojson }}" + _ANSWER,
    "strict": "{{ bos_token or '' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}"
    "{% continue %}never{% endfor %}" + _ANSWER,
    "state": "{% set ns = namespace(n=0) %}{% macro say(m) %}{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ say(m) }} {{ eos_token }}"
    "{% endfor %}{{ dict(a=1).a }}" + _ANSWER,
}
PROMPT = "Is 'é <b>' text?"


def saved(folder: Path, family: str, template: Any) -> Path:
    zoo_t.save(folder, dict(zoo.CONFIGS[family]), zoo_t.FAMILIES[family])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    return folder


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers' clock stand at the date that is used here."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, *_: object) -> Clock:  # type: ignore[override]
            return cls.fromisoformat(CHAT_DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def same(folder: Path, name: str | None = None) -> None:
    """Render and tokenise a prompt on both sides."""
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder)
    assert ours is not None
    said = [{"role": "user", "content": PROMPT}]
    options = {"add_generation_prompt": True, "chat_template": name}
    text = theirs.apply_chat_template(said, tokenize=False, **options)
    assert ours.chat(PROMPT, name) == text
    ids = theirs.apply_chat_template(said, tokenize=True, return_dict=False, **options)
    wrapped = Encoder(ours, ModelSection(path=str(folder), chat_template=name or True))
    assert list(wrapped.encode(wrapped.wrap(PROMPT)[0]).ids) == ids


@pytest.mark.usefixtures("today")
@pytest.mark.parametrize("family", [name for name in zoo_t.FAMILIES if name not in zoo.ENCODERS])
@pytest.mark.parametrize("template", ["own date", "strict"])
def test_every_family_renders_as_transformers(family: str, template: str, tmp_path: Path) -> None:
    same(saved(tmp_path, family, TEMPLATES[template]))


@pytest.mark.usefixtures("today")
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_renders_as_transformers(template: str, tmp_path: Path) -> None:
    same(saved(tmp_path, "llama", TEMPLATES[template]))


@pytest.mark.parametrize("where", ["list", "files", "one file", "file and list"])
@pytest.mark.parametrize("name", [None, "other"])
def test_named_templates_wherever_they_are(where: str, name: str | None, tmp_path: Path) -> None:
    two = [
        {"name": "default", "template": "[{{ messages[0].content }}]"},
        {"name": "other", "template": "<{{ messages[0].content }}>"},
    ]
    folder = saved(tmp_path, "llama", two if "list" in where else None)
    if "file" in where:
        (folder / "chat_template.jinja").write_text("({{ messages[0].content }})")
    if where == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "other.jinja").write_text("{{ bos_token }}!")
    ours = read_tokenizer(folder)
    assert ours is not None and ours.chats is not None
    if name in (None, *ours.chats.templates):
        same(folder, name)
    else:
        with pytest.raises(ModelError, match="no chat template 'other'; expected one of: default"):
            ours.chat(PROMPT, name)


def test_several_templates_without_a_default_are_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", [{"name": "rag", "template": "x"}])
    ours = read_tokenizer(folder)
    assert ours is not None and ours.chat(PROMPT, "rag") == "x"
    with pytest.raises(ModelError, match="no template is the default; expected one of: rag"):
        ours.chat(PROMPT)


def test_a_date_is_the_same_every_day(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", TEMPLATES["dated"])
    ours = read_tokenizer(folder)
    assert ours is not None
    assert ours.chat("x").startswith("Today is 26 Jul 2024.")
    assert ours.chat("x", date="2025-01-02").startswith("Today is 02 Jan 2025.")
    for given, told in ((None, CHAT_DATE), ("2025-01-02", "2025-01-02")):
        section = ModelSection(path=str(folder), chat_template=True, chat_date=given)
        assert Encoder(ours, section).record["chat_date"] == told


def test_a_template_with_a_date_of_its_own_keeps_it() -> None:
    own = TEMPLATES["own date"].replace("26 Jul 2024", "the day of the template")
    chats = ChatTemplates({"default": own})
    assert "the day of the template" in chats.render("x", {"bos_token": ""}, None, None)
    assert "02 Jan 2025" in chats.render("x", {"bos_token": ""}, None, "2025-01-02")


def test_a_date_that_no_template_prints_is_an_error() -> None:
    chats = ChatTemplates({"default": TEMPLATES["turns"]})
    with pytest.raises(ModelError, match=r"model\.chat_date: the chat template prints no date"):
        chats.render("x", {}, None, "2025-01-02")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no user turns') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' + 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error(template: str) -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template: cannot be rendered"):
        ChatTemplates({"default": template}).render("x", {}, None, None)


def test_no_template_is_an_error(tmp_path: Path) -> None:
    ours = read_tokenizer(zoo_t.save(tmp_path, {}, zoo_t.FAMILIES["gpt2"]))
    assert ours is not None
    with pytest.raises(ModelError, match="has no chat template"):
        ours.chat("x")
