"""Chat templates, rendered as `apply_chat_template` of transformers renders them, without it.

Templates come with model files and are untrusted: they run in jinja2's sandbox, and a template
that does not come to an end is stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date as day
from typing import TYPE_CHECKING, Any

from interv.errors import ModelError, nearest

if TYPE_CHECKING:
    from jinja2 import Template

CHAT_DATE = "2024-07-26"
"""Today, for a template that asks for the date and has no default: Llama 3's own default."""

_MOST_LINES = 500_000  # of a template's compiled code; a long chat template runs a few hundred
_LARGEST = 1_000_000  # characters, or an integer's bits, that one product or power may make


class _StoppedError(Exception):
    """A template that runs too long or makes too much."""


@dataclass(frozen=True)
class ChatTemplates:
    """A model's chat templates by name; a single one is called `default`."""

    templates: Mapping[str, str]

    def asks_for_date(self, name: str | None = None) -> bool:
        """Whether a template calls `strftime_now` and has no date of its own."""
        source = self._source(name)
        return "strftime_now" in source and not _has_own_date(source)

    def render(
        self, prompt: str, special: Mapping[str, str], name: str | None, date: str | None
    ) -> str:
        """Return `prompt` as a user's turn with the assistant's header behind it.

        Args:
            prompt: what the user says.
            special: special tokens by role, which templates name.
            name: of the template; None: the default one.
            date: today, as YYYY-MM-DD; None: the template's own default where it has one, else
                `CHAT_DATE`.

        Raises:
            ModelError: there is no such template, or it cannot be rendered.
        """
        source = self._source(name)
        if date is not None and "strftime_now" not in source:
            raise ModelError("model.chat_date: the chat template prints no date; leave it out")
        try:
            template = _compiled(source, date)
            with _bounded():
                return template.render(
                    messages=[{"role": "user", "content": prompt}],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **special,
                )
        except Exception as error:  # a template may raise anything
            raise ModelError(f"model.chat_template: cannot be rendered: {error}") from None

    def _source(self, name: str | None) -> str:
        wanted = name or "default"
        if wanted in self.templates:
            return self.templates[wanted]
        have = ", ".join(sorted(self.templates))
        near = nearest(wanted, sorted(self.templates))
        what = f"this model has no chat template '{name}'" if name else "no template is the default"
        raise ModelError(
            f"model.chat_template: {what}; expected one of: {have}"
            + (f"; did you mean '{near}'?" if near else "")
        )


def _has_own_date(source: str) -> bool:
    """Whether a template tests for `strftime_now`, so that it has a date without it."""
    from jinja2 import TemplateError, nodes

    try:
        tests = _environment().parse(source).find_all(nodes.Test)
        named = [
            t.node.name for t in tests if t.name == "defined" and isinstance(t.node, nodes.Name)
        ]
    except TemplateError:
        return False  # rendering says what is wrong with it
    return "strftime_now" in named


def _compiled(source: str, date: str | None) -> Template:
    environment = _environment()
    if date is not None or not _has_own_date(source):
        today = day.fromisoformat(date or CHAT_DATE)
        environment.globals["strftime_now"] = today.strftime
    template: Template = environment.from_string(source)
    return template


def _environment() -> Any:
    """The sandbox that chat templates are written for: settings, tags and names of transformers."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, and changes no text."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 reads it from the class

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        @staticmethod
        def _said(caller: Any) -> Any:
            return caller()

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size(left, operator, right) > _LARGEST:
                raise _StoppedError(f"it makes more than {_LARGEST} characters or bits at once")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # jinja2's own filter escapes HTML.
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


def _size(left: Any, operator: str, right: Any) -> int:
    """About how large a product or a power is: characters of a sequence, bits of an integer."""
    if operator == "**":
        both = isinstance(left, int) and isinstance(right, int)
        return left.bit_length() * abs(right) if both else 0
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    return 0


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop what runs more than `_MOST_LINES` lines: a loop, or macros that call macros."""
    left = _MOST_LINES
    before = sys.gettrace()

    def count(*_event: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _StoppedError("it does not come to an end")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
