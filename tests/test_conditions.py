"""Options that nothing reads are errors at their line: every kind, every field."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import interv
from interv.cli.schema import json_schema
from interv.errors import SpecError
from interv.spec import load_spec
from interv.spec.claims import Claim, Source
from interv.spec.conditions import in_words, read_only, unread, ways_of
from interv.spec.kinds import KINDS
from tests.conftest import Result

TRACE: dict[str, Any] = {
    "kind": "trace",
    "model": "smollm2-135m",
    "data": {"facts": [{"prompt": "a b", "subject": "a", "answer": "c"}]},
    "corrupt": {"type": "noise", "level": 1.0},
    "grid": [{"component": "block_output"}],
}
PATCH: dict[str, Any] = {
    "kind": "patch",
    "model": "smollm2-135m",
    "data": {"pairs": [{"clean": "a", "corrupted": "b", "answer": "c"}]},
    "grid": [{"component": "block_output"}],
}
TASK = {"data": {"task": "ioi"}}
FILE = {"data": {"file": "x.csv"}}
SET = {"grid": [{"name": "s", "set": [{"component": "mlp_output"}]}]}
COLLECT: dict[str, Any] = {
    "kind": "collect",
    "model": "smollm2-135m",
    "data": {"prompts": ["a"]},
    "grid": [{"component": "block_output"}],
}
TRAIN: dict[str, Any] = {
    "kind": "train-das",
    "model": {"kind": "mlp"},
    "causal_model": "hierarchical_equality",
    "variables": ["WX"],
    "intervention": {"type": ["vanilla"]},
    "grid": [{"component": "block_output"}],
}
MODEL = {"train": {"what": "model"}}
LOW_RANK = {"intervention": {"type": ["low_rank_rotated_space"]}}
BOUNDLESS = {"intervention": {"type": ["lora", "boundless_rotated_space"]}}
AUTOENCODER = {"intervention": {"type": ["autoencoder"]}}
GIVEN = {"intervention": {"type": ["autoencoder"], "dictionary": {"path": "x.safetensors"}}}
MASK = {"intervention": {"type": ["sigmoid_mask"]}}
NEURON = {"grid": [{"name": "s", "set": [{"component": "block_output", "layer": 0}]}]}
TOGETHER = {"grid": [{"component": "block_output", "name": "s", "together": True}]}
BLOCKS = {"grid": [{"component": "block_output", "name": "s"}]}
SENDERS = {"senders": [{"component": ["mlp_output"]}]}
QUERIES = {"component": "head_query_output", "layers": 1}
JOINT = {"paths": [{**SENDERS, "receivers": [{"name": "s", "set": [QUERIES]}]}]}
SINGLE = {"paths": [{**SENDERS, "receivers": [QUERIES]}]}
DECLARED = {"output": "o", "templates": ["{a}"]}


def variable(**fields: Any) -> dict[str, Any]:
    return {"causal_model": {**DECLARED, "variables": {"a": fields, "o": "a"}}}


Changes = dict[str, Any]
# Of each field that has a condition: the spec, where it is, a value, and what makes it be read.
# (None: another kind).
CASES: list[tuple[dict[str, Any], Changes, str, Any, Changes | None]] = [
    (TRACE, {"model": {"path": "x"}}, "model.revision", "main", {"model": {"name": "gpt2"}}),
    (TRACE, {"model": {"name": "gpt2"}}, "model.chat_date", "2024-01-31",
     {"model": {"name": "gpt2", "chat_template": True}}),
    (TRACE, {}, "data.columns", {"prompt": "p"}, FILE),
    (TRACE, FILE, "data.columns.corrupted_subject", "c", {"corrupt": {"type": "prompt"}}),
    (TRACE, {}, "corrupt.sigma_over", "vocabulary", {"corrupt": {"type": "noise", "level": "3s"}}),
    (TRACE, {"model": {"name": "gpt2", "device_map": "auto"}}, "run.device", "cpu",
     {"model": {"name": "gpt2"}}),
    (TRACE, {"run": {"max_tokens": 9}}, "run.memory", "1GiB", {"run": {}}),
    (TRACE, {"run": {"executor": "reference"}}, "run.on_uncertified", "reference", {"run": {}}),
    (TRAIN, LOW_RANK, "run.max_tokens", 9, None),
    (COLLECT, {}, "run.executor", "reference", None),
    (TRAIN, MODEL, "run.executor", "reference", {"train": {}} | LOW_RANK),
    (COLLECT, {}, "data.column", "text", FILE),
    (COLLECT, {}, "seed", 1, {"model": {"config": {"model_type": "gpt2"}}}),
    (PATCH, {}, "data.n", 9, TASK),
    (PATCH, {}, "data.counterfactual", "names", TASK),
    (PATCH, {}, "data.templates", ["{S}"], TASK),
    (PATCH, {}, "data.columns", {"clean": "x"}, FILE),
    (PATCH, FILE, "data.columns.template", "t", {"intervention": {"type": "mean"}}),
    (PATCH, {}, "data.limit", 9, FILE),
    (PATCH, {"intervention": {"type": "denoise"}}, "intervention.over", "clean",
     {"intervention": {"type": "mean"}}),
    (PATCH, {"intervention": {"type": "mean"}}, "intervention.samples", 2,
     {"intervention": {"type": "resample"}}),
    (PATCH, {"intervention": {"type": "zero"}}, "intervention.least", 9,
     {"intervention": {"type": "mean"}}),
    *((PATCH, JOINT, f"paths.0.receivers.0.{name}", value, SINGLE)
      for name, value in {"component": "mlp_input", "layers": 1, "positions": 0}.items()),
    (PATCH, JOINT, "paths.0.receivers.0.heads", 0, SINGLE),
    (PATCH, {"intervention": {"type": "zero"}}, "intervention.trained", "x",
     {"intervention": {"type": "noise"}}),
    *((PATCH, SET, f"grid.0.{name}", value, {"grid": [{"component": "mlp_output"}]})
      for name, value in {"layers": 0, "window": 2, "positions": 1, "heads": 0, "neurons": 0,
                          "dims": 0}.items()),
    (PATCH, {"attribution": {"method": "gradient"}}, "attribution.steps", 3,
     {"attribution": {"method": "integrated_inputs"}}),
    *((PATCH, {"circuit": {"method": "eap"}}, f"circuit.{name}", value, {"circuit": {}})
      for name, value in {"steps": 3, "quadrature": "midpoint"}.items()),
    (PATCH, {}, "statistics.permutations", 999, {"statistics": {"test": True}}),
    (PATCH, {"grid": [], "decompose": {}}, "intervention", "noise",
     {"grid": [{"component": "mlp_output"}]}),
    (TRAIN, AUTOENCODER, "intervention.train_dictionary", True, GIVEN),
    (TRAIN, GIVEN, "intervention.dictionary.latents", 9, AUTOENCODER),
    (TRAIN, LOW_RANK, "intervention.dictionary", {"error_term": False}, AUTOENCODER),
    (TRAIN, BOUNDLESS | {"intervention": {"type": ["boundless_rotated_space"]}},
     "intervention.rank", [4], LOW_RANK),
    (TRAIN, LOW_RANK, "intervention.temperature", [9.0, 1.0], MASK),
    (TRAIN, LOW_RANK, "intervention.penalty", 1.0, MASK),
    (TRAIN, {"intervention": {"type": ["pca_rotated_space"]}}, "intervention.start", "pca",
     LOW_RANK),
    (TRAIN, LOW_RANK, "intervention.by_head", True, MASK),
    (TRAIN, LOW_RANK, "intervention.alpha", 2.0, BOUNDLESS),
    *((TRAIN, NEURON, f"grid.0.{name}", value, BLOCKS)
      for name, value in {"layers": 0, "positions": 1, "heads": 0, "dims": 0,
                          "together": True}.items()),
    (TRAIN, {}, "grid.0.linked", True, TOGETHER),
    (TRAIN, LOW_RANK, "train.boundary_lr", 0.1, BOUNDLESS),
    (TRAIN, LOW_RANK, "train.task_weight", 1.0, MODEL | {"intervention": "vanilla"}),
    (TRAIN, LOW_RANK, "train.exchange", ["WX"], MODEL | {"intervention": "vanilla"}),
    (TRAIN, LOW_RANK | {"run": {"device": "cpu"}}, "train.autocast", "bfloat16",
     {"run": {"device": "cuda"}}),
    (TRAIN, {}, "train", {"epochs": 9}, LOW_RANK),
    (TRAIN, GIVEN, "train", {"epochs": 9}, AUTOENCODER),
    (TRAIN, {}, "controls.random", False, LOW_RANK),
    (TRAIN, {}, "controls.shuffled", False, LOW_RANK),
    (TRAIN, MODEL, "controls", {"full": False}, {"train": {}} | LOW_RANK),
    *((TRAIN, {"model": {"kind": "mlp", "weights": "random"}}, f"model.train.{name}", value,
       {"model": {"kind": "mlp"}})
      for name, value in {"examples": 9, "batch": 9, "epochs": 9, "lr": 0.1,
                          "min_accuracy": 0.1}.items()),
    (TRAIN, variable(values=[1, 2]), "causal_model.variables.a.step", 1, variable(range=[1, 3])),
    *((TRAIN, variable(values=[1, 2]), f"causal_model.variables.a.{name}", value,
       variable(vector=2, equal="b"))
      for name, value in {"equal": "b", "share": 0.1, "entities": 9,
                          "distribution": "normal"}.items()),
    (TRAIN, variable(vector=2), "causal_model.variables.a.share", 0.1,
     variable(vector=2, equal="b")),
    (TRAIN, variable(values=[1, 2]), "causal_model.variables.a.of", ["b"],
     variable(function="f", of=["b"])),
    (TRAIN, variable(vector=2), "causal_model.variables.a.decimals", 1, variable(range=[1, 3])),
    *((TRAIN, {}, f"causal_model.{name}", value, variable(values=[1, 2]))
      for name, value in {"output": "o", "where": ["a > 1"], "about": "it"}.items()),
    *((TRACE, {"reference": [{"claim": "c", "source": "s", "between": [0.0, 1.0]}]},
       f"reference.0.{name}", value, {"reference": [{"claim": "c", "source": "s", **other}]})
      for name, value, other in (
          ("tolerance", 0.1, {"value": 1.0, "tolerance": 1.0}),
          ("share", 0.5, {"cells": [{"layer": 1, "value": 1.0}], "tolerance": 1.0}),
          ("magnitude", True, {"order": [{"layer": 1}]}),
          ("by", 0.1, {"exceeds": {"layer": 2}}),
      )),
]  # fmt: skip


def laid(base: dict[str, Any], changes: Changes) -> dict[str, Any]:
    out = json.loads(json.dumps(base))
    for key, value in json.loads(json.dumps(changes)).items():
        out[key] = value
    return out


def put(document: Any, at: str, value: Any) -> None:
    *outer, last = [int(part) if part.isdecimal() else part for part in at.split(".")]
    for part in outer:
        if isinstance(document, dict) and not isinstance(document.get(part), dict | list):
            word = document.get(part)
            document[part] = {} if word is None else {"task" if "causal" in part else "type": word}
        document = document[part]
    if isinstance(document.get(last), dict) and isinstance(value, dict):
        document[last] |= value
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("base", "changes", "at", "value", "read"),
    CASES,
    ids=[f"{base['kind']} {at} {number}" for number, (base, _, at, *_) in enumerate(CASES)],
)
def test_an_option_that_nothing_reads_is_an_error_at_its_line(
    base: dict[str, Any],
    changes: Changes,
    at: str,
    value: Any,
    read: Changes | None,
    tmp_path: Path,
) -> None:
    path = tmp_path / "spec.yaml"
    document = laid(base, changes)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    load_spec(path)
    put(document, at, value)
    text = yaml.safe_dump(document, sort_keys=False)
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    [problem] = caught.value.problems
    assert problem.message == f"{at}: nothing that is asked for reads it"
    assert problem.expected is not None and problem.expected.startswith("it only with ")
    assert problem.mark is not None
    assert text.splitlines()[problem.mark.line - 1].strip(" -").startswith(at.split(".")[-1])
    if read is None:
        return
    document = laid(laid(base, changes), read)
    put(document, at, value)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    load_spec(path)


def sections(of: Any, seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """Every section below an annotation."""
    if isinstance(of, type) and issubclass(of, BaseModel) and of not in seen:
        seen.add(of)
        yield of
        for field in of.model_fields.values():
            yield from sections(field.annotation, seen)
    for part in get_args(of):
        yield from sections(part, seen)


def every_field() -> dict[tuple[str, str], Any]:
    seen: set[type[BaseModel]] = set()
    return {
        (section.__name__, name): field
        for kind in KINDS.values()
        for section in sections(kind, seen)
        for name, field in section.model_fields.items()
    }


def test_every_condition_is_in_the_table() -> None:
    conditioned = {key for key, field in every_field().items() if ways_of(field)}
    tested = set()
    for base, changes, at, value, read in CASES:
        document = laid(laid(base, changes), read or {})
        put(document, at, value)
        here: Any = KINDS[base["kind"]].model_validate(laid_names(document))
        *outer, last = [int(part) if part.isdecimal() else part for part in at.split(".")]
        for part in outer:
            here = (
                getattr(here, part) if isinstance(part, str) and hasattr(here, part) else here[part]
            )
        tested.add((type(here).__name__, last))
    assert conditioned == tested


def laid_names(document: dict[str, Any]) -> dict[str, Any]:
    word = document["model"]
    return {**document, "name": "x", "model": {"name": word} if isinstance(word, str) else word}


def test_every_field_is_read_somewhere() -> None:
    """By its name, outside of the specs' sections: an attribute, or a word given to getattr."""
    read: set[str] = set()
    for path in Path(interv.__file__).parent.rglob("*.py"):
        if path.parent.name == "spec":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    # Through a property of their section, or as all fields of it.
    read |= {"memory", *Source.model_fields, *Claim.model_fields}
    assert not {key for key in every_field() if key[1] not in read}


def test_editors_are_told_what_an_option_goes_with() -> None:
    text = json.dumps(json_schema())
    assert '"goes_with"' not in text
    for key, field in every_field().items():
        if ways_of(field):
            assert f"only with {in_words(field)}"[:60] in text, key


def test_what_is_resolved_has_what_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**TRAIN, **LOW_RANK}))
    loaded = load_spec(path)
    resolved = loaded.resolved()
    assert "rank" in resolved["intervention"]
    assert not {"temperature", "penalty", "dictionary", "alpha"} & set(resolved["intervention"])
    path.write_text(loaded.resolved_yaml())
    assert load_spec(path).spec == loaded.spec
    assert not list(unread(load_spec(path).spec))
    assert read_only(loaded.spec, loaded.spec.data, {"a": 1}.get("b")) is None


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (TRAIN, {"data": {"same_template": False}}, "same_template: base and sources have no"),
        (TRAIN, {"data": {"among": "answers"}}, "among: a network of vectors"),
        (TRAIN, {"data": {"mixture": {"WX": 1.0}}}, "mixture: WX alone is exchanged"),
        (TRAIN, {"run": {"device": "cuda"}}, "cuda for an MLP, which is computed on the CPU"),
        (PATCH, {"grid": [{"component": "final_norm", "layers": 0}]}, "layers of final_norm"),
        (COLLECT, {"grid": [{"component": ["logits"], "layers": 0}]}, "layers of logits"),
        (
            PATCH,
            {"grid": [{"name": "s", "set": [{"component": "token_embedding", "layers": 0}]}]},
            "layers of token_embedding",
        ),
        (COLLECT, {"model": {"name": "smollm2-135m", "revision": "x"}}, "has one revision"),
    ],
)
@pytest.mark.model
def test_options_that_the_model_leaves_without_effect(
    base: dict[str, Any],
    changes: Changes,
    message: str,
    tmp_path: Path,
    cli: Callable[..., Result],
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(laid(base, changes)))
    done = cli("validate", path)
    assert done.code == 2
    assert message in done.err
