from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interv.errors import SpecError
from interv.models import locate
from interv.spec import load_spec
from interv.task.pairs import LeftOut, Pair, read_pairs
from tests.conftest import PROMPT, SpecWriter

OTHER = "The Old Bridge is in downtown"
PAIR = {
    "clean": PROMPT,
    "corrupted": OTHER,
    "answer": "Seattle",
    "wrong": "Mostar",
    "spans": {"place": "Space Needle"},
}


def read(
    write_spec: SpecWriter, data: dict[str, Any], **sections: object
) -> tuple[list[Pair], list[LeftOut]]:
    patch = {"kind": "patch", "corrupt": None, "grid": {"component": "block_output"}}
    loaded = load_spec(write_spec(**{**patch, "data": data, **sections}))
    tokenizer = locate(loaded.spec.model, loaded.spec.seed).tokenizer
    assert tokenizer is not None
    pairs, left_out, problems = read_pairs(loaded, tokenizer)
    if problems:
        raise SpecError(problems)
    return pairs, left_out


def pair_of(write_spec: SpecWriter, pair: dict[str, Any], **data: object) -> Pair:
    [found], _ = read(write_spec, {"pairs": [pair], **data})
    return found


def save_words(folder: Path, words: str) -> str:
    """A tokenizer of whole words; all others are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_pair_is_tokens_spans_and_answers(write_spec: SpecWriter) -> None:
    pair = pair_of(write_spec, PAIR)
    assert pair.tokens == ("The", " Space", " Needle", " is", " in", " downtown")
    assert pair.corrupted_tokens == ("The", " Old", " Bridge", " is", " in", " downtown")
    assert (pair.answers, pair.wrong) == ((" Seattle",), (" Mostar",))
    assert [len(ids) for ids in pair.all_ids] == [1, 1]
    assert pair.spans == {"place": (1, 2), "END": (5,)}
    assert (pair.read, pair.first_changed, pair.tails) == (5, 1, ((),))


def test_which_occurrence_a_span_is(write_spec: SpecWriter) -> None:
    spans = {"first": "Paris@1", "second": "Paris@2", "all of it": "Paris is in Paris"}
    pair = {**PAIR, "clean": "Paris is in Paris", "corrupted": "Paris is in Rome", "spans": spans}
    found = pair_of(write_spec, pair).spans
    n = len(pair_of(write_spec, pair).ids)
    assert found["second"] == (n - 1,)
    assert found["first"] == tuple(range(n - 3))
    assert found["all of it"] == tuple(range(n))


def test_an_at_sign_in_the_text_is_text(write_spec: SpecWriter) -> None:
    clean, corrupted = "Rome @x is in Paris", "Rome @x is in London"
    pair = {**PAIR, "clean": clean, "corrupted": corrupted, "spans": {"s": "@x"}}
    found = pair_of(write_spec, pair)
    assert "".join(found.tokens[i] for i in found.span("s")) == "@x"
    twice = {**pair, "clean": "a@b a@b", "corrupted": "a@b a@c", "spans": {"s": "a@b"}}
    with pytest.raises(SpecError, match=r"'a@b' is in the prompt 2 times\n(.*\n)*.*'a@b@1' to"):
        pair_of(write_spec, twice)
    again = pair_of(write_spec, {**twice, "spans": {"s": "a@b@2"}})
    assert again.span("s")[-1] == len(again.ids) - 1


def test_answers_of_several_tokens_have_tails(write_spec: SpecWriter) -> None:
    pair = pair_of(
        write_spec, {**PAIR, "answer": ["Rome Berlin", "London"], "wrong": ["Rome Paris"]}
    )
    rome = pair.answer_ids[0][0]
    assert [len(ids) for ids in pair.all_ids] == [2, 1, 2]
    assert pair.tails == ((rome,), ())


def test_answers_are_joined_as_the_spec_has_it(write_spec: SpecWriter) -> None:
    bare = pair_of(write_spec, PAIR)
    assert pair_of(write_spec, {**PAIR, "answer": " Seattle"}).answer_ids == bare.answer_ids
    assert pair_of(write_spec, PAIR, join=" in ").answers == (" in Seattle",)
    glued = pair_of(write_spec, PAIR, join="")
    assert glued.answers == ("Seattle",) and glued.answer_ids != bare.answer_ids


def test_the_first_token_may_be_begin_of_text(write_spec: SpecWriter, gpt2_folder: Path) -> None:
    model = {"path": str(gpt2_folder), "prepend_bos": True}
    [pair], _ = read(write_spec, {"pairs": [PAIR]}, model=model)
    assert pair.tokens[0] == pair.corrupted_tokens[0] == "<s>"
    assert pair.span("place") == (2, 3)
    assert (pair.read, pair.first_changed) == (6, 2)


CHAT = "{% for m in messages %}User: {{ m.content }}\n{% endfor %}Answer:{{ '\\n' }}"


def chat_model(tmp_path: Path, gpt2_folder: Path, template: str = CHAT) -> dict[str, object]:
    folder = tmp_path / "chat"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((gpt2_folder / name).read_text())
    (folder / "chat_template.jinja").write_text(template)
    return {"path": str(gpt2_folder), "tokenizer": str(folder), "chat_template": True}


def test_a_chat_template_stands_around_both_prompts(
    write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path
) -> None:
    model = chat_model(tmp_path, gpt2_folder)
    [pair], _ = read(write_spec, {"pairs": [PAIR]}, model=model)
    assert pair.text == f"User: {PROMPT}\nAnswer:\n"
    assert pair.corrupted_text == f"User: {OTHER}\nAnswer:\n"
    assert [pair.tokens[i] for i in pair.span("place")] == [" Space", " Needle"]
    assert pair.answers == ("Seattle",)
    assert pair.span("END") == (len(pair.ids) - 1,)


def test_a_prompt_that_is_in_the_chat_template_too(
    write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path
) -> None:
    model = chat_model(tmp_path, gpt2_folder)
    pair = {**PAIR, "clean": "Answer", "corrupted": "User", "spans": {}}
    with pytest.raises(SpecError, match="holds the prompt not exactly once"):
        read(write_spec, {"pairs": [pair]}, model=model)


def test_where_the_answer_is_read(write_spec: SpecWriter) -> None:
    assert pair_of(write_spec, PAIR, at=-2).read == 4
    assert pair_of(write_spec, PAIR, at=0).read == 0
    assert pair_of(write_spec, PAIR, at="place").read == 2
    assert pair_of(write_spec, PAIR, at="END").read == 5


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_every_kind_of_file_says_the_same(
    write_spec: SpecWriter, tmp_path: Path, kind: str
) -> None:
    record = {
        "prompt": PROMPT,
        "counter": OTHER,
        "label": "Seattle",
        "foil": "Mostar",
        "place": "Space Needle",
        "group": "needle",
    }
    other = {**record, "label": "Rome"}
    text = {
        "json": json.dumps([record, other], indent=1),
        "jsonl": "\n".join(map(json.dumps, (record, other))),
        "csv": "\n".join(
            [",".join(record), *[",".join(each.values()) for each in (record, other)]]
        ),
    }
    (tmp_path / f"pairs.{kind}").write_text(text[kind])
    columns = {
        "clean": "prompt",
        "corrupted": "counter",
        "answer": "label",
        "wrong": "foil",
        "template": "group",
        "spans": ["place"],
    }
    data = {"file": f"pairs.{kind}", "columns": columns}
    mean = {"intervention": {"type": "mean", "over": "clean"}}
    pairs, _ = read(write_spec, data, **mean)
    [written], _ = read(write_spec, {"pairs": [{**PAIR, "template": "needle"}]}, **mean)
    assert pairs[0] == written
    assert [pair.index for pair in pairs] == [0, 1]
    assert len(read(write_spec, {**data, "limit": 1}, **mean)[0]) == 1


def test_a_record_may_hold_spans_and_lists_of_answers(
    write_spec: SpecWriter, tmp_path: Path
) -> None:
    pair = {**PAIR, "answer": ["Seattle", "Rome"], "wrong": ["Mostar", "Paris"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    [found], _ = read(write_spec, {"file": "pairs.jsonl"})
    assert found == pair_of(write_spec, pair)
    assert len(found.answers) == len(found.wrong) == 2


SHORT = {**PAIR, "corrupted": "The Bridge is in downtown"}


def test_pairs_of_unequal_length_may_be_left_out(write_spec: SpecWriter) -> None:
    pairs, left_out = read(write_spec, {"pairs": [SHORT, PAIR], "unequal": "leave_out"})
    assert [pair.index for pair in pairs] == [1]
    [left] = left_out
    assert (left.index, left.text) == (0, PROMPT)
    assert left.reason == "the clean prompt has 6 tokens, the corrupted one 5"
    with pytest.raises(SpecError, match="no pair is left: pair 0: the clean prompt has 6 tokens"):
        read(write_spec, {"pairs": [SHORT], "unequal": "leave_out"})


def test_prompts_are_alike_by_template_and_length(write_spec: SpecWriter) -> None:
    longer = {
        **PAIR,
        "clean": PROMPT + " Paris",
        "corrupted": OTHER + " Paris",
        "template": "t",
    }
    other = {**PAIR, "answer": "Rome"}
    of_t = {**PAIR, "answer": "London", "template": "t"}
    pairs, _ = read(write_spec, {"pairs": [PAIR, other, of_t, longer]})
    groups = [pair.group for pair in pairs]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3


@pytest.mark.parametrize("ablation", ["zero", {"type": "mean", "over": "clean"}])
def test_some_ablations_need_no_corrupted_prompt(write_spec: SpecWriter, ablation: object) -> None:
    alone = {k: v for k, v in PAIR.items() if k != "corrupted"}
    [pair], _ = read(write_spec, {"pairs": [alone]}, intervention=ablation)
    assert pair.corrupted_ids is None and pair.corrupted_tokens == ()
    for other in ("denoise", "noise", "mean", "resample"):
        with pytest.raises(SpecError, match="pair 0: this pair has no corrupted prompt"):
            read(write_spec, {"pairs": [alone]}, intervention=other)


WRONG = [
    ({"corrupted": "The Bridge is in downtown"}, "has 6 tokens, the corrupted one 5", "leave_out"),
    ({"corrupted": PROMPT}, "the corrupted prompt is the clean one", "another prompt"),
    ({"wrong": "Seattle"}, "the wrong answer ' Seattle' is the right one too", "another answer"),
    ({"answer": []}, "there is no answer", "one, or a list"),
    ({"answer": ""}, "the answer '' is not in the model's vocabulary", "tokens for"),
    ({"clean": PROMPT + " ", "corrupted": OTHER + " "}, "prompt ends in a space", "data.join"),
    ({"spans": {"s": "Neddle"}}, "span s: 'Neddle' is in the prompt 0 time", "mean 'Needle'"),
    ({"spans": {"s": "Needle@2"}}, "'Needle' is in the prompt 1 time(s), not 2", "expected"),
    ({"spans": {"s": "Needle@0"}}, "'Needle' is in the prompt 1 time(s), not 0", "expected"),
    ({"spans": {"s": "n"}}, "'n' is in the prompt 3 times", "'n@1' to 'n@3'"),
    ({"spans": {"s": ""}}, "'' is in the prompt 0 time(s)", "expected text of"),
    ({"spans": {"END": "in"}}, "a span cannot be named 'END'", "another name"),
    ({"spans": {"whole": "in"}}, "a span cannot be named 'whole'", "another name"),
]


@pytest.mark.parametrize(("change", "message", "expected"), WRONG, ids=lambda v: str(v)[:40])
def test_pairs_that_cannot_be_used(
    write_spec: SpecWriter, change: dict[str, Any], message: str, expected: str
) -> None:
    with pytest.raises(SpecError) as caught:
        read(write_spec, {"pairs": [PAIR, {**PAIR, **change}]})
    [problem] = caught.value.problems
    told = str(problem)
    assert f"pair 1: {message}" in told or (message in told and "pair 1: " in told)
    assert expected in told
    assert problem.mark is not None
    # The place is the field itself, in the second pair.
    field = next(iter(change))
    written = Path(problem.mark.source).read_text().splitlines()
    seconds = [i for i, line in enumerate(written, 1) if line.startswith("  - clean")]
    assert problem.mark.line >= seconds[1]
    if field in ("wrong", "answer", "corrupted") and "clean" not in change:
        assert written[problem.mark.line - 1].strip().startswith(f"{field}:")


def test_the_same_in_a_file_is_told_with_its_line(write_spec: SpecWriter, tmp_path: Path) -> None:
    records = [PAIR, SHORT, {**PAIR, "spans": {"s": "Neddle"}}, {**PAIR, "answer": 3}]
    records.append({**PAIR, "spans": "Needle"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(SpecError) as caught:
        read(write_spec, {"file": "pairs.jsonl"})
    places = {p.mark.line: p.message for p in caught.value.problems if p.mark}
    assert sorted(places) == [2, 3, 4, 5]
    assert "pair 1: the clean prompt has 6 tokens" in places[2]
    assert "span s" in places[3]
    assert places[4].startswith("answer")
    assert places[5].startswith("spans")


@pytest.mark.parametrize(
    ("columns", "message", "near"),
    [
        ({"answer": "anser"}, "no column 'anser' for the answer", "'answer'"),
        ({"spans": ["palce"]}, "no column 'palce' for the span palce", "'place'"),
    ],
)
def test_columns_that_a_file_lacks(
    write_spec: SpecWriter, tmp_path: Path, columns: dict[str, Any], message: str, near: str
) -> None:
    (tmp_path / "pairs.csv").write_text(f"clean,corrupted,answer,place\n{PROMPT},{OTHER},a,b\n")
    with pytest.raises(SpecError) as caught:
        read(write_spec, {"file": "pairs.csv", "columns": columns})
    [problem] = caught.value.problems
    assert problem.mark is not None and problem.mark.line == 2
    assert message in str(problem) and f"did you mean {near}" in str(problem)


def test_a_file_that_is_not_there(write_spec: SpecWriter, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("x")
    with pytest.raises(SpecError, match=r"is not a file\n(.*\n)*.*mean 'pairs.csv'"):
        read(write_spec, {"file": "piars.csv"})


def test_where_the_answer_is_read_is_wrong_once(write_spec: SpecWriter) -> None:
    for at, message in ((6, "position 6 is out of range"), ("plcae", "no span 'plcae'")):
        with pytest.raises(SpecError) as caught:
            read(write_spec, {"pairs": [PAIR] * 3, "at": at})
        [problem] = caught.value.problems
        assert message in problem.message
        assert problem.mark is not None
        assert problem.mark.text.strip() == f"at: {at}"
    assert problem.near == "place"


def test_what_the_vocabulary_does_not_have(
    write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path
) -> None:
    folder = save_words(tmp_path / "words", "The Tower is in Paris Rome Bridge")
    model = {"path": str(gpt2_folder), "tokenizer": folder}
    pair = {"clean": "The Tower is in", "corrupted": "The Bridge is in", "answer": "Paris"}
    assert len(read(write_spec, {"pairs": [pair]}, model=model)[0]) == 1
    for change, message in (
        ({"answer": "London"}, "the answer ' London' is not in the model's vocabulary"),
        ({"wrong": "London"}, "the answer ' London' is not in the model's vocabulary"),
        ({"corrupted": "The Gate is in"}, "what differs at position 1 is not in the model's"),
    ):
        with pytest.raises(SpecError, match=message):
            read(write_spec, {"pairs": [{**pair, **change}]}, model=model)


def task_model(tmp_path: Path, gpt2_folder: Path) -> dict[str, object]:
    """A tokenizer that knows the names and objects of IOI, each with its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from interv.task.ioi import _TEMPLATES
    from interv.task.words import NAMES, OBJECTS, PLACES

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = [*NAMES[:12], *OBJECTS[:6], *PLACES[:6]]
    corpus = [f" {word}" for word in words] + list(_TEMPLATES)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus * 10, trainer)
    folder = tmp_path / "names"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return {"path": str(gpt2_folder), "tokenizer": str(folder)}


def test_pairs_of_a_task(write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path) -> None:
    model = task_model(tmp_path, gpt2_folder)
    pairs, _ = read(write_spec, {"task": "ioi", "n": 6}, model=model)
    assert len(pairs) == 6
    for pair in pairs:
        assert set(pair.spans) == {"IO", "S1", "S1+1", "S2", "END"}
        assert pair.tokens[pair.span("IO")[0]] == pair.answers[0]
        assert pair.tokens[pair.span("S2")[0]] == pair.wrong[0]
        assert [len(ids) for ids in pair.all_ids] == [1, 1]
    assert read(write_spec, {"task": "ioi", "n": 3}, model=model)[0] == pairs[:3]
    assert read(write_spec, {"task": "ioi", "n": 6}, model=model, seed=1)[0] != pairs


@pytest.mark.parametrize(
    ("data", "message", "expected"),
    [
        ({"templates": ["Then {IO} and {A} met. {A} saw"]}, "unknown placeholder {A}", "{S}"),
        ({"templates": ["Then {IO} came. He saw"]}, "has no {S}", "{S} twice"),
        ({"counterfactual": "swaped"}, "unknown counterfactual of ioi 'swaped'", "mean 'swapped'"),
    ],
)
def test_a_task_that_cannot_be_made(
    write_spec: SpecWriter,
    tmp_path: Path,
    gpt2_folder: Path,
    data: dict[str, Any],
    message: str,
    expected: str,
) -> None:
    model = task_model(tmp_path, gpt2_folder)
    with pytest.raises(SpecError) as caught:
        read(write_spec, {"task": "ioi", **data}, model=model)
    [problem] = caught.value.problems
    assert message in str(problem) and expected in str(problem)
    assert problem.mark is not None


def test_in_a_chat_a_tasks_answers_begin_with_no_space(
    write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path
) -> None:
    model = task_model(tmp_path, gpt2_folder)
    folder = Path(str(model["tokenizer"]))
    (folder / "chat_template.jinja").write_text(CHAT)
    data = {"task": "ioi", "n": 2}
    pairs, _ = read(write_spec, data, model={**model, "chat_template": True})
    for pair in pairs:
        assert pair.text.endswith("Answer:\n")
        assert not pair.answers[0].startswith(" ")
        assert pair.text.count(f" {pair.answers[0]}") == 1
