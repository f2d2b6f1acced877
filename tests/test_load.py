from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from interv.cli.schema import json_schema
from interv.errors import SpecError, UsageError
from interv.spec import load_spec
from interv.spec.schema import ROLES
from tests.conftest import CONFIGS, SPECS, SpecWriter


def test_resolved_is_a_spec_that_reads_back_the_same(
    write_spec: SpecWriter, tmp_path: Path
) -> None:
    loaded = load_spec(write_spec())
    again = tmp_path / "resolved.yaml"
    again.write_text(loaded.resolved_yaml())
    assert load_spec(again).spec == loaded.spec
    assert list(loaded.resolved())[:4] == ["kind", "name", "model", "seed"]


def test_the_name_is_the_files_own(write_spec: SpecWriter) -> None:
    assert load_spec(write_spec("mine.yaml")).spec.name == "mine"


def test_overrides_replace_values_and_reach_into_every_grid_entry(write_spec: SpecWriter) -> None:
    path = write_spec()
    spec = load_spec(
        path, ["grid.layers=0-1", "grid.1.window=3", "model.dtype=float64", "run.threads=1"]
    ).spec
    assert [g.layers for g in spec.grid] == ["0-1", "0-1"]
    assert [g.window for g in spec.grid] == [1, 3]
    assert spec.model.dtype == "float64"
    assert spec.run.threads == 1


def test_an_override_reaches_into_a_model_written_as_a_word(write_spec: SpecWriter) -> None:
    spec = load_spec(write_spec(model="gpt2"), ["model.dtype=bfloat16"]).spec
    assert (spec.model.name, spec.model.dtype) == ("gpt2", "bfloat16")


@pytest.mark.parametrize(
    "argument", ["nonsense", "=1", "grid.9.window=2", "kind.deep=1", "seed=[1"]
)
def test_a_bad_override_is_named(write_spec: SpecWriter, argument: str) -> None:
    with pytest.raises(UsageError, match="argument") as caught:
        load_spec(write_spec(), [argument])
    assert repr(argument) in str(caught.value)


def test_extends_merges_mappings_and_replaces_lists(write_spec: SpecWriter) -> None:
    base = write_spec("base.yaml")
    child = base.with_name("child.yaml")
    child.write_text(
        "extends: base.yaml\nmodel: {dtype: float64}\ngrid:\n- {component: mlp_input}\n"
    )
    spec = load_spec(child).spec
    assert spec.model.dtype == "float64"
    assert spec.model.path == load_spec(base).spec.model.path
    assert [g.component for g in spec.grid] == [["mlp_input"]]
    assert spec.name == "child"


def test_extends_replaces_a_mapping_of_another_type(write_spec: SpecWriter) -> None:
    base = write_spec("base.yaml")
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\ncorrupt: {type: prompt}\n")
    assert load_spec(child).spec.corrupt.type == "prompt"


def test_a_problem_in_the_extended_file_is_shown_there(write_spec: SpecWriter) -> None:
    base = write_spec("base.yaml", seed="x")
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\nmetric: probabilty\n")
    with pytest.raises(SpecError) as caught:
        load_spec(child)
    places = {Path(p.mark.source).name for p in caught.value.problems}
    assert places == {"base.yaml", "child.yaml"}


def test_paths_are_relative_to_the_file_that_says_them(
    write_spec: SpecWriter, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    base = write_spec("deep/base.yaml", data={"file": "facts.jsonl"})
    child = tmp_path / "child.yaml"
    child.write_text("extends: deep/base.yaml\n")
    assert load_spec(child).spec.data.file == str(tmp_path.resolve() / "deep" / "facts.jsonl")
    assert load_spec(base).spec.data.file == load_spec(child).spec.data.file


def test_all_problems_are_told_at_once(write_spec: SpecWriter) -> None:
    path = write_spec(seed=-1, metric=["probabilty"], corrupt={"type": "noise", "smaples": 3})
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "did you mean 'samples'" in text
    assert "did you mean 'probability'" in text


@pytest.mark.parametrize("path", SPECS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_configs_fit_the_schema_and_name_it(path: Path) -> None:
    first = path.read_text().partition("\n")[0]
    up = "../" * (len(path.relative_to(CONFIGS).parts) - 1)
    assert first == f"# yaml-language-server: $schema={up}schema.json"
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


def test_the_committed_schema_is_fresh(cli: Callable[..., object]) -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == json_schema()
    assert cli("schema").out == (CONFIGS / "schema.json").read_text()


VALIDATOR = jsonschema.Draft202012Validator(json_schema())
layers = st.one_of(
    st.just("all"),
    st.integers(0, 99),
    st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda t: f"{min(t)}-{max(t)}"),
)
grids = st.fixed_dictionaries(
    {"component": st.sampled_from(["block_output", "mlp_output"])},
    optional={
        "layers": layers | st.lists(layers, min_size=1, max_size=3),
        "positions": st.sampled_from(ROLES) | st.integers(-9, 9) | st.just("all"),
        "window": st.integers(1, 12),
    },
)


@given(st.lists(grids, min_size=1, max_size=3))
def test_what_the_models_accept_the_json_schema_accepts(
    tmp_path_factory: pytest.TempPathFactory, grid: list[object]
) -> None:
    document = {
        "kind": "trace",
        "model": "gpt2",
        "data": {"facts": [{"prompt": "a b", "subject": "a", "answer": "c"}]},
        "corrupt": {"type": "prompt"},
        "grid": grid,
    }
    path = tmp_path_factory.getbasetemp() / "hypothesis.yaml"
    path.write_text(yaml.safe_dump(document))
    assert len(load_spec(path).spec.grid) == len(grid)
    VALIDATOR.validate(document)
