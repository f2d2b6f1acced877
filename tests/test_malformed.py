"""What a user may get wrong: each gives exit code 2, the place, what was expected, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Result

GOOD = """\
kind: trace
model:
  path: MODEL
data:
  facts:
    - prompt: The Space Needle is in downtown
      subject: The Space Needle
      answer: Seattle
corrupt:
  type: noise
  level: 1.0
grid:
  - component: block_output
    layers: all
"""


@dataclass(frozen=True)
class Case:
    """`old` gives way to `new` in the good spec; `line` and `texts` are in the message."""

    name: str
    old: str = ""
    new: str = ""
    line: int | None = None
    texts: tuple[str, ...] = ()
    whole: bytes | None = None
    files: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


FACT = "    - prompt: The Space Needle is in downtown\n"
FACTS = GOOD[GOOD.index("  facts:") : GOOD.index("corrupt:")]
CASES = [
    Case("wrong key", "layers: all", "layer: all", 14, ("unknown key 'layer'", "mean 'layers'")),
    Case("wrong top key", "grid:", "gird:", 12, ("unknown key 'gird'", "mean 'grid'")),
    Case("tokens of one fact", "kind: trace", "kind: trace\naverage: tokens", 2,
         ("average: tokens of one fact", "several facts")),
    Case("no role to average", "kind: trace", "kind: trace\naverage: tokens", 2,
         ("no fact has several tokens of a role",),
         arguments=("data.facts=[{prompt: The Space Needle, subject: The Space, answer: a}, "
                    "{prompt: The Old Bridge, subject: The Old, answer: a}]",)),
    Case("wrong type", "level: 1.0", "level: [1]", 11, ("corrupt", "expected")),
    Case("number as string", "level: 1.0", "level: '1.0'", 11, ("'1.0'", "a multiple like 3s")),
    Case("noise below zero", "level: 1.0", "level: -2s", 11, ("-2s", "above 0")),
    Case("string as seed", "kind: trace", "kind: trace\nseed: '1'", 2, ("seed", "integer")),
    Case("boolean as seed", "kind: trace", "kind: trace\nseed: true", 2, ("seed", "integer")),
    Case("layer out of range", "layers: all", "layers: 3", 14, ("has 3 layers", "0 to 2")),
    Case("range out of range", "layers: all", "layers: 1-9", 14, ("has 3 layers", "0 to 2")),
    Case("backward range", "layers: all", "layers: 2-1", 14, ("runs backwards", "8-11")),
    Case("negative layer", "layers: all", "layers: -1", 14, ("negative", "expected")),
    Case("empty list", "layers: all", "layers: []", 14, ("empty", "expected")),
    Case("negative window", "layers: all", "window: -1", 14, ("window", "greater than or equal to 1")),
    Case("position out of range", "layers: all", "positions: 40", 14, ("out of range", "0 to")),
    Case("unknown position", "layers: all", "positions: last_subjct", 14, ("last_subject",)),
    Case("unknown component", "block_output", "block_ouput", 13, ("mean 'block_output'",)),
    Case("severed itself", "layers: all", "sever: block_output", 14, ("both restored and held",)),
    Case("unknown kind", "kind: trace", "kind: tarce", 1, ("unknown kind", "mean 'trace'")),
    Case("no kind", "kind: trace\n", "", 1, ("'kind' is missing", "kind: trace")),
    Case("kind is a list", "kind: trace", "kind: [trace]", 1, ("unknown kind",)),
    Case("no grid", GOOD[GOOD.index("grid:") :], "", None, ("'grid' is missing",)),
    Case("no corrupt type", "  type: noise\n", "", None, ("'type' is missing", "noise")),
    Case("wrong corrupt type", "type: noise", "type: nose", None, ("'nose'", "mean 'noise'")),
    Case("unknown metric", "grid:", "metric: lgit\ngrid:", 12, ("mean 'logit'",)),
    Case("duplicate key", "grid:", "kind: trace\ngrid:", 12, ("written twice (first on line 1)",)),
    Case("tab indentation", "  type: noise", "\ttype: noise", 10, ("tab", "spaces")),
    Case("a tag", "level: 1.0", "level: !!python/name:os.system", 11, ("tag",)),
    Case("broken YAML", "level: 1.0", "level: [1.0", None, ("not YAML",)),
    Case("name with a slash", "kind: trace", "kind: trace\nname: a/b", 2, ("name", "pattern")),
    Case("subject not in prompt", "subject: The Space Needle", "subject: Space Neddle", 7,
         ("not in the prompt", "'Space Needle', perhaps")),
    Case("subject twice", FACT, "    - prompt: The Space Needle and The Space Needle in downtown\n",
         7, ("2 times: which one", "occurrence: 1 to 2")),
    Case("wrong occurrence", "answer: Seattle", "answer: Seattle\n      occurrence: 2", 9,
         ("1 time(s), not 2",)),
    Case("empty subject", "subject: The Space Needle", "subject: ''", 7, ("at least 1 character",)),
    Case("fact without answer", "      answer: Seattle\n", "", 6, ("'answer' is missing",)),
    Case("logit of several tokens", "answer: Seattle\n", "answer: Zanzibar\nmetric: logit\n", None,
         ("needs an answer of one token",)),
    Case("no corrupted subject", "  type: noise\n  level: 1.0", "  type: prompt", None,
         ("no corrupted_subject",)),
    Case("corrupted subject of another length", GOOD[GOOD.index("corrupt:") : GOOD.index("grid:")],
         "      corrupted_subject: The Old\ncorrupt: {type: prompt}\n", 9, ("tokens, with",)),
    Case("both facts and file", "  facts:", "  file: x.json\n  facts:", None, ("exactly one of",)),
    Case("missing data file", FACTS, "  file: fcats.json\n", 5, ("is not a file", "'facts.json'"),
         files={"facts.json": "[]"}),
    Case("data file of unknown kind", FACTS, "  file: facts.txt\n", None, (".jsonl or .csv",),
         files={"facts.txt": "x"}),
    Case("CSV without the column", FACTS, "  file: facts.csv\n", 2,
         ("facts.csv:2", "no column 'answer'", "attribut"),
         files={"facts.csv": "prompt,subject,attribut\na b,a,c\n"}),
    Case("CSV row too short", FACTS, "  file: facts.csv\n", 3, ("number of cells",),
         files={"facts.csv": "prompt,subject,attribute\nx y,x,z\na b\n"}),
    Case("broken JSON", FACTS, "  file: facts.json\n", 2, ("facts.json:2", "not JSON"),
         files={"facts.json": '[{"prompt": "a b",\n "subject": }]'}),
    Case("JSON that is no list", FACTS, "  file: facts.json\n", 1, ("not a list",),
         files={"facts.json": '{"prompt": 1}'}),
    Case("broken JSONL", FACTS, "  file: facts.jsonl\n", 2, ("facts.jsonl:2", "not JSON"),
         files={"facts.jsonl": '{"prompt": "a b", "subject": "a", "attribute": "c"}\n{"a\n'}),
    Case("fact in a file without its subject", FACTS, "  file: facts.jsonl\n", 1,
         ("facts.jsonl:1", "not in the prompt"),
         files={"facts.jsonl": '{"prompt": "a b", "subject": "z", "attribute": "c"}\n'}),
    Case("data file without records", FACTS, "  file: facts.json\n", 1, ("has no records",),
         files={"facts.json": "[]"}),
    Case("unknown model", "  path: MODEL", "  name: smolm2-135m", 3, ("unknown model", "smollm2-135m")),
    Case("missing model folder", "  path: MODEL", "  path: ./nowhere", 3, ("neither a folder",)),
    Case("folder without a model", "  path: MODEL", "  path: .", 3, ("has no config.json",)),
    Case("two origins", "  path: MODEL", "  path: MODEL\n  name: gpt2", 3, ("exactly one of",)),
    Case("unknown dtype", "  path: MODEL", "  path: MODEL\n  dtype: float23", 4, ("mean 'float32'",)),
    Case("not a GGUF file", "  path: MODEL", "  path: ./model.gguf", 3, ("is not a GGUF file",),
         files={"model.gguf": "nothing of the kind"}),
    Case("broken config", "  path: MODEL", "  path: ./model", 3, ("config.json: is not JSON",),
         files={"model/config.json": "{"}),
    Case("extends nothing", "kind: trace", "extends: other.yaml\nkind: trace", 1, ("not a file",)),
    Case("extends a list", "kind: trace", "extends: [a]\nkind: trace", 1, ("not a file name",)),
    Case("extends itself", "kind: trace", "extends: spec.yaml\nkind: trace", 1, ("in a circle",)),
    Case("extends in a circle", "kind: trace", "extends: b.yaml\nkind: trace", None,
         ("in a circle", "spec.yaml -> b.yaml -> spec.yaml"), files={"b.yaml": "extends: spec.yaml\n"}),
    Case("empty file", whole=b"", line=1, texts=("is empty", "a spec")),
    Case("only a comment", whole=b"# nothing\n", line=1, texts=("is empty",)),
    Case("a list", whole=b"- 1\n- 2\n", line=1, texts=("is not a mapping",)),
    Case("a word", whole=b"trace\n", line=1, texts=("is not a mapping",)),
    Case("binary file", whole=b"\x00\xff\xfe\x01kind", line=1, texts=("not UTF-8",)),
    Case("nul bytes", whole=b"kind: \x00\x00", line=1, texts=("not allowed in YAML",)),
    Case("override without =", arguments=("seed",), texts=("argument 'seed'", "key=value")),
    Case("override of an unknown key", arguments=("sede=3",), texts=("unknown key 'sede'", "'seed'")),
    Case("override of a wrong value", arguments=("seed=x",), texts=("command line:1:6", "seed=x")),
    Case("claim without a form", "grid:", "reference: [{claim: c, source: s}]\ngrid:", 12,
         ("value with tolerance",)),
    Case("unknown device", "grid:", "run: {device: gpu}\ngrid:", 12, ("run.device", "pattern")),
    Case("claim between backwards", "grid:",
         "reference: [{claim: c, source: s, between: [1, 0]}]\ngrid:", 12, ("holds nothing",)),
    Case("claim about no layer", "grid:",
         "reference: [{claim: c, source: s, between: [0, 1], where: {layer: 1-x}}]\ngrid:", 12,
         ("where.layer",)),
    Case("tokens outside the model", "  path: MODEL",
         "  config: {model_type: gpt2, n_layer: 1, n_head: 1, n_embd: 8, n_positions: 64, "
         "vocab_size: 100}\n  tokenizer: MODEL", 3, ("the model 100 tokens",)),
    Case("no layers", "  path: MODEL",
         "  config: {model_type: gpt2, n_layer: 0, n_head: 1, n_embd: 8, n_positions: 64, "
         "vocab_size: 100}\n  tokenizer: MODEL", 3, ("n_layers is 0",)),
    Case("tokenizer that is not there", "  path: MODEL", "  path: MODEL\n  tokenizer: ./typo", 4,
         ("has no tokenizer.json",), files={"vocab.json": "{}", "merges.txt": ""}),
    Case("a pointer in place of weights", "  path: MODEL", "  path: ./model", 3,
         ("not a safetensors file",),
         files={"model/config.json": json.dumps({"model_type": "gpt2"}),
                "model/model.safetensors": "version https://git-lfs.github.com/spec/v1\noid"}),
    Case("a config that is a list", "  path: MODEL", "  path: ./model", 3, ("is not an object",),
         files={"model/config.json": "[]"}),
    Case("a path that is too long", "  path: MODEL", "  path: ./" + 300 * "x", 3, ("is no path",)),
    Case("a name with a zero byte", "  path: MODEL", '  path: "./a\\0b"', 3, ("is no path",)),
    Case("a fact of the wrong type", FACTS, "  file: facts.jsonl\n", 1,
         ("facts.jsonl:1", "corrupted_subject"),
         files={"facts.jsonl": '{"prompt": "a b", "subject": "a", "attribute": "c", '
                '"corrupted_subject": 5}\n'}),
    Case("half a character", FACTS, "  file: facts.jsonl\n", 1, ("facts.jsonl:1",),
         files={"facts.jsonl": '{"prompt": "a \\ud83d", "subject": "a", "attribute": "c"}\n'}),
    Case("an unclosed quote", FACTS, "  file: facts.csv\n", 1, ("cannot be read",),
         files={"facts.csv": 'prompt,subject,attribute\na b,a,"c\nd e,d,f\n'}),
    Case("a column twice", FACTS, "  file: facts.csv\n", 1, ("'subject' is there twice",),
         files={"facts.csv": "prompt,subject,subject\na b,a,c\n"}),
    Case("a number without end", FACTS, "  file: facts.json\n", 1, ("cannot be read",),
         files={"facts.json": '[{"prompt": ' + 5000 * "9" + "}]"}),
    Case("a metric twice", "grid:", "metric: [rank, rank]\ngrid:", 12, ("rank is there twice",)),
    Case("a window wider than the model", "layers: all", "window: 4", 14, ("the model has 3",)),
    Case("a space at both ends", "prompt: The Space Needle is in downtown",
         "prompt: 'The Space Needle is in downtown '", 6, ("ends in a space",)),
    Case("a folder's name instead of its path", "model:\n  path: MODEL", "model: models/llama", 2,
         ("there is a folder of the name 'models/llama'", "did you mean ./models/llama?"),
         files={"models/llama/config.json": "{}"}),
    Case("a path of Windows", "model:\n  path: MODEL", r"model: 'C:\models\llama'", 2,
         ("model.path", r"C:\models\llama is neither a folder nor a file")),
    Case("a date without a chat template", "path: MODEL", "path: MODEL\n  chat_date: 2025-01-02",
         4, ("model.chat_date: nothing that is asked for reads it", "only with chat_template")),
    Case("a date that is none", "path: MODEL",
         "path: MODEL\n  chat_template: true\n  chat_date: tomorrow", 5,
         ("'tomorrow' is no date", "YYYY-MM-DD")),
    Case("a chat template that is a number", "path: MODEL", "path: MODEL\n  chat_template: 3", 4,
         ("chat_template", "3")),
    Case("a subject composed otherwise", FACTS,
         "  facts:\n    - {prompt: 'Cafe\u0301 Flore is', subject: 'Caf\u00e9 Flore', answer: Seattle}\n",
         6, ("looks the same", "U+00E9", "U+0065", "U+0301", "the same characters in both")),
    Case("a subject with another space", FACTS,
         "  facts:\n    - {prompt: 'The\u00a0Old is', subject: The Old, answer: Seattle}\n",
         6, ("looks the same", "the prompt U+00A0 (NO-BREAK SPACE)")),
]  # fmt: skip


def test_there_are_at_least_forty() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(
    case: Case, tmp_path: Path, gpt2_folder: Path, cli: Callable[..., Result]
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name, text in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    path = folder / "spec.yaml"
    if case.whole is not None:
        path.write_bytes(case.whole)
    else:
        assert case.old in GOOD
        text = GOOD.replace(case.old, case.new, 1) if case.old else GOOD
        path.write_text(text.replace("MODEL", str(gpt2_folder)))
    before = sorted(p.name for p in folder.rglob("*"))
    for command in ("trace", "plan"):
        result = cli(command, path, *case.arguments, "--outputs", folder / "outputs")
        assert result.code == 2, result
        assert result.out == ""
        for text in case.texts:
            assert text in result.err, result.err
        assert "Traceback" not in result.err
        if case.line is not None:
            assert f":{case.line}:" in result.err, result.err
        if not case.arguments:
            assert "spec.yaml" in result.err or any(n in result.err for n in case.files)
    assert sorted(p.name for p in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("trace", "nowhere.yaml"), ("nowhere.yaml: no such file",)),
        (("trace", "."), ("is a folder",)),
        (("validate", "nowhere.yaml", "--json"), ("no such file",)),
        (("trace",), ("Missing argument",)),
        (("tarce",), ("No such command", "trace")),
        (("trace", "x.yaml", "--quite"), ("No such option", "--quiet")),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...], texts: tuple[str, ...], cli: Callable[..., Result]
) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err


def test_validate_reports_every_file_and_its_problems_as_json(
    tmp_path: Path, gpt2_folder: Path, cli: Callable[..., Result]
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(GOOD.replace("MODEL", str(gpt2_folder)))
    bad.write_text(GOOD.replace("MODEL", str(gpt2_folder)).replace("layers: all", "layers: 7"))
    result = cli("validate", good, bad, "--json")
    assert result.code == 2
    first, second = json.loads(result.out)
    assert (first["valid"], second["valid"]) == (True, False)
    assert second["problems"][0]["line"] == 14
    assert "1 of 2 specs are not valid" in result.err
