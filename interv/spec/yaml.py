"""YAML to plain data, with the place of every key and value.

YAML 1.1's traps are closed: `1e-3` is a number, `on` and `no` are strings, `10:20` is
not 620, a date is a string, a key written twice is an error, and so is any tag. PyYAML
parses; the scalars follow the core schema of YAML 1.2 (section 10.3.2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from interv.errors import Mark, Problem, SpecError, UsageError

Path_ = tuple[str | int, ...]
MAX_BYTES = 10_000_000
MAX_NODES = 200_000  # aliases may be shared, but not multiplied without end

_INT = re.compile(r"[-+]?[0-9]+")
_OCT_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_IMPLICIT = {
    f"tag:yaml.org,2002:{t}"
    for t in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
_CONSTANTS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}


@dataclass
class Document:
    """Plain data, and for each path in it the place of its key and of its value."""

    data: object
    text: str = ""
    values: dict[Path_, Mark] = field(default_factory=dict)
    keys: dict[Path_, Mark] = field(default_factory=dict)

    def mark(self, path: Path_, *, key: bool = False) -> Mark | None:
        """The place of `path`, or of the nearest thing around it."""
        if key and path in self.keys:
            return self.keys[path]
        while path not in self.values:
            if not path:
                return None
            path = path[:-1]
        return self.values[path]


def read_file(path: Path) -> Document:
    """Parse one file.

    Raises:
        UsageError: there is no such file, it is a folder, or it is not text.
        SpecError: it is not YAML, or uses what is not allowed in a spec.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; expected a YAML file in it")
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except FileNotFoundError:
        siblings = (
            sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        )
        have = f"; {path.parent} has {', '.join(siblings[:12])}" if siblings else ""
        raise UsageError(f"{path}: no such file{have}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if raw is None:
        raise UsageError(f"{path}: larger than {MAX_BYTES:,} bytes; expected a spec")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path}:{line}:1: byte {raw[error.start]:#04x} is not UTF-8 text; expected a YAML file"
        ) from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """Parse YAML text; `source` names it in every message."""
    return _Parser(text, source).document()


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.lines = text.splitlines()
        self.source = source
        self.problems: list[Problem] = []
        self.result = Document(None, text)
        self.count = 0

    def document(self) -> Document:
        try:
            node = yaml.compose(self.text, Loader=yaml.SafeLoader)
            if node is not None:
                self.result.data = self.convert(node, ())
        except RecursionError:
            self.fail("is nested too deeply", None)
        except yaml.reader.ReaderError as error:
            line = self.text[: error.position].count("\n")
            column = error.position - (self.text.rfind("\n", 0, error.position) + 1)
            self.fail(f"character {error.character!r} is not allowed in YAML", (line, column))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            context = f"{error.context}: " if error.context else ""
            at = (mark.line, mark.column) if mark else None
            if at and at[0] < len(self.lines) and "\t" in self.lines[at[0]][: at[1] + 1]:
                self.fail("a tab is used to indent", at, "spaces")
            else:
                self.fail(f"not YAML: {context}{error.problem}", at)
        if self.problems:
            raise SpecError(self.problems)
        return self.result

    def mark_at(self, at: tuple[int, int]) -> Mark:
        line, column = at
        text = self.lines[line] if line < len(self.lines) else ""
        return Mark(self.source, line + 1, column + 1, text)

    def fail(self, message: str, at: tuple[int, int] | None, expected: str | None = None) -> None:
        mark = self.mark_at(at) if at else Mark(self.source, 1, 1)
        self.problems.append(Problem(message, mark, expected))

    def convert(self, node: yaml.Node, path: Path_) -> object:
        at = (node.start_mark.line, node.start_mark.column)
        self.count += 1
        if self.count > MAX_NODES:
            if self.count == MAX_NODES + 1:
                self.fail("has too many values (aliases of aliases?)", at)
            return None
        self.result.values[path] = self.mark_at(at)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self.check_tag(node, "tag:yaml.org,2002:seq", at)
            return [self.convert(child, (*path, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, at)

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, object]:
        self.check_tag(
            node, "tag:yaml.org,2002:map", (node.start_mark.line, node.start_mark.column)
        )
        out: dict[str, object] = {}
        for key_node, value_node in node.value:
            at = (key_node.start_mark.line, key_node.start_mark.column)
            if not isinstance(key_node, yaml.ScalarNode):
                self.fail("a key is a list or a mapping", at, "a word")
                continue
            key = key_node.value
            if key in out:
                first = self.result.keys[(*path, key)]
                self.fail(f"key '{key}' is written twice (first on line {first.line})", at)
                continue
            self.result.keys[(*path, key)] = self.mark_at(at)
            out[key] = self.convert(value_node, (*path, key))
        return out

    def check_tag(self, node: yaml.Node, plain: str, at: tuple[int, int]) -> None:
        if node.tag != plain:
            self.fail(f"tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed", at)

    def scalar(self, node: yaml.ScalarNode, at: tuple[int, int]) -> object:
        value: str = node.value
        written = self.text[node.start_mark.index : node.start_mark.index + 1]
        if written == "!" or node.tag not in _IMPLICIT:
            self.fail("a tag is not allowed", at, "a plain value, or quotes for a string")
            return None
        if node.style is not None:
            return value
        if value in _CONSTANTS:
            return _CONSTANTS[value]
        if _INT.fullmatch(value):
            return int(value) if len(value) < 4000 else value
        if _OCT_HEX.fullmatch(value):
            return int(value, 0) if len(value) < 1000 else value
        if _FLOAT.fullmatch(value):
            return float(value)
        return value
