from __future__ import annotations

import contextlib
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from interv.errors import SpecError
from interv.spec.load import _Dumper
from interv.spec.yaml import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-7", -7),
        ("010", 10),
        ("0o10", 8),
        ("0x1f", 31),
        ("10:20", "10:20"),
        ("1_000", "1_000"),
        ("on", "on"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("3s", "3s"),
        ("8-11", "8-11"),
        ("~", None),
        ("'1'", "1"),
        (".inf", math.inf),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    data = parse(f"x: {text}", "f").data
    assert data == {"x": value}
    assert type(data["x"]) is type(value)


def test_every_key_and_value_knows_its_place() -> None:
    document = parse("a: 1\nb:\n  - c: 2\n    d: [3, 4]\n", "f")
    mark = document.mark(("b", 0, "d", 1))
    assert (mark.line, mark.column, mark.text) == (4, 12, "    d: [3, 4]")
    assert document.mark(("b", 0, "d"), key=True).column == 5
    assert document.mark(("b", 0, "missing")).line == 3


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\na: 2", "written twice (first on line 1)", 2),
        ("a:\n\tb: 1", "tab", 2),
        ("a: !!python/object/apply:os.system [ls]", "tag", 1),
        ("a: !!python/name:os.system", "tag", 1),
        ("a: !mine 3", "tag", 1),
        ("? [1, 2]\n: 3", "key", 1),
        ("a: [1, 2", "not YAML", 1),
        ("a: b: c", "not YAML", 1),
        ("a: \x07", "not allowed", 1),
        ("a: 1\n---\nb: 2", "not YAML", 2),
    ],
)
def test_what_is_not_allowed_is_named_with_its_line(text: str, message: str, line: int) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text, "f.yaml")
    problem = caught.value.problems[0]
    assert message in str(problem)
    assert problem.mark.source == "f.yaml"
    assert problem.mark.line in (line, line + 1)


def test_aliases_cannot_multiply_without_end() -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(SpecError, match="too many values"):
        parse("\n".join(levels), "f")


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(SpecError, match="nested too deeply"):
        parse("[" * 5000 + "]" * 5000, "f")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(categories=["L"]), min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), plain))
def test_what_is_dumped_is_read_back(data: dict[str, object]) -> None:
    text = yaml.dump(data, Dumper=_Dumper, allow_unicode=True)
    assert parse(text, "f").data == (data or {})


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(SpecError):
        parse(text, "f")
