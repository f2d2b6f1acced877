from __future__ import annotations

import json
from pathlib import Path

import pytest

from interv.plan import make_plan
from interv.spec import load_spec
from interv.task import Prompt
from tests.conftest import PROMPT, SpecWriter

FACT = {"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"}


def prompt_of(write_spec: SpecWriter, fact: dict[str, object], **sections: object) -> Prompt:
    path = write_spec(data={"facts": [fact], "keep": "all", **sections})
    return make_plan(load_spec(path)).prompts[0]


def test_roles_are_those_of_figure_2(write_spec: SpecWriter) -> None:
    prompt = prompt_of(write_spec, FACT)
    assert [t.strip() for t in prompt.tokens] == ["The", "Space", "Needle", "is", "in", "downtown"]
    roles = {r: prompt.role(r) for r in ("first_subject", "middle_subject", "last_subject")}
    assert roles == {"first_subject": (0,), "middle_subject": (1,), "last_subject": (2,)}
    assert prompt.role("first_subsequent") == (3,)
    assert prompt.role("further") == (4,)
    assert prompt.role("last") == (5,)
    assert prompt.role("subject") == (0, 1, 2)


def test_a_subject_of_one_token_is_first_and_last(write_spec: SpecWriter) -> None:
    prompt = prompt_of(write_spec, {**FACT, "subject": "downtown"})
    assert prompt.subject == (5, 6)
    assert prompt.role("first_subject") == prompt.role("last_subject") == prompt.role("last")
    assert prompt.role("first_subsequent") == prompt.role("further") == ()


def test_an_answer_is_joined_by_a_space_unless_it_has_one(write_spec: SpecWriter) -> None:
    bare = prompt_of(write_spec, FACT)
    spaced = prompt_of(write_spec, {**FACT, "answer": " Seattle"})
    assert bare.answer == " Seattle"
    assert bare.answer_ids == spaced.answer_ids
    assert len(bare.answer_ids) == 1


def test_an_answer_that_runs_into_the_prompt_is_an_error(write_spec: SpecWriter) -> None:
    from interv.errors import SpecError

    fact = {**FACT, "prompt": "The Space Need", "subject": "Space", "answer": "le"}
    with pytest.raises(SpecError, match="runs together"):
        prompt_of(write_spec, fact, join="")


def test_which_occurrence_of_the_subject_is_meant(write_spec: SpecWriter) -> None:
    fact = {"prompt": "Paris is in Paris", "subject": "Paris", "answer": "Rome", "occurrence": 2}
    assert prompt_of(write_spec, fact).subject[1] == len(prompt_of(write_spec, fact).ids)


def test_the_first_changed_token_under_another_prompt(write_spec: SpecWriter) -> None:
    fact = {**FACT, "corrupted_subject": "The Old Bridge"}
    path = write_spec(data={"facts": [fact], "keep": "all"}, corrupt={"type": "prompt"})
    prompt = make_plan(load_spec(path)).prompts[0]
    assert prompt.first_changed == 1
    assert prompt.corrupted_ids is not None
    assert len(prompt.corrupted_ids) == len(prompt.ids)


def test_a_begin_of_text_token_moves_every_position_by_one(
    write_spec: SpecWriter, gpt2_folder: Path
) -> None:
    path = write_spec(model={"path": str(gpt2_folder), "prepend_bos": True})
    prompt = make_plan(load_spec(path)).prompts[0]
    assert prompt.tokens[0] == "<s>"
    assert prompt.role("subject") == (1, 2, 3)


def test_json_jsonl_and_csv_say_the_same(write_spec: SpecWriter, tmp_path: Path) -> None:
    records = [
        {"prompt": PROMPT, "subject": "The Space Needle", "attribute": "Seattle"},
        {"prompt": 'The "Old" Bridge, is in', "subject": '"Old" Bridge', "attribute": "Mostar"},
    ]
    (tmp_path / "f.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "\n")
    lines = ["prompt,subject,attribute"]
    lines += [",".join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in records]
    (tmp_path / "f.csv").write_text("\n".join(lines))
    found = [
        make_plan(load_spec(write_spec(data={"file": f"f.{kind}", "keep": "all"}))).prompts
        for kind in ("json", "jsonl", "csv")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][1].answer == " Mostar"


def test_the_answer_may_be_called_answer(write_spec: SpecWriter, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("prompt,subject,answer\nin downtown,in,Paris\n")
    path = write_spec(data={"file": "f.csv", "keep": "all"})
    assert make_plan(load_spec(path)).prompts[0].answer == " Paris"


def test_columns_can_be_renamed_and_records_limited(write_spec: SpecWriter, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("p,s,a\nin downtown,in,Paris\nin downtown,xxx,Paris\n")
    columns = {"prompt": "p", "subject": "s", "answer": "a"}
    path = write_spec(data={"file": "f.csv", "columns": columns, "limit": 1, "keep": "all"})
    assert list(make_plan(load_spec(path)).prompts) == [0]


def test_what_the_vocabulary_does_not_have_is_an_error(
    write_spec: SpecWriter, tmp_path: Path, gpt2_folder: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from interv.errors import SpecError

    words = ["[UNK]", "The", "Tower", "is", "in", "Paris"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    model = {"path": str(gpt2_folder), "tokenizer": str(folder)}
    good = {"prompt": "The Tower is in", "subject": "The Tower", "answer": "Paris"}
    path = write_spec(model=model, data={"facts": [good], "keep": "all"})
    assert make_plan(load_spec(path)).prompts[0].subject == (0, 2)
    bad_answer = {**good, "answer": "Rome"}
    bad_subject = {**good, "prompt": "Zanzibar is in", "subject": "Zanzibar"}
    for fact, message in ((bad_answer, "answer ' Rome'"), (bad_subject, "subject 'Zanzibar'")):
        path = write_spec(model=model, data={"facts": [fact], "keep": "all"})
        with pytest.raises(SpecError, match=f"{message} is not in the model's vocabulary"):
            make_plan(load_spec(path))


def test_a_corrupted_subject_that_nothing_uses_does_nothing(write_spec: SpecWriter) -> None:
    plain = prompt_of(write_spec, FACT)
    assert prompt_of(write_spec, {**FACT, "corrupted_subject": "The Old"}) == plain


def test_occurrence_may_stand_in_a_file(write_spec: SpecWriter, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(
        "prompt,subject,attribute,occurrence\nParis is in Paris,Paris,Rome,2\n"
    )
    path = write_spec(data={"file": "f.csv", "keep": "all"})
    prompt = make_plan(load_spec(path)).prompts[0]
    assert prompt.subject[1] == len(prompt.ids)
