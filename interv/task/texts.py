"""Plain prompts, tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from interv.errors import ModelError, Problem, nearest
from interv.models import PromptTokenizer
from interv.spec import LoadedSpec
from interv.spec.collect import CollectSpec
from interv.task.encoder import Encoder
from interv.task.files import missing_file, read_records


@dataclass(frozen=True)
class Text:
    """A prompt: its row in the data, its token ids, their texts, and the places with names."""

    index: int
    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    marks: Mapping[str, tuple[int, ...]]


def read_texts(
    loaded: LoadedSpec[CollectSpec], tokenizer: PromptTokenizer
) -> tuple[list[Text], list[Problem]]:
    """Tokenise every prompt of a spec; a problem for each that cannot be used.

    Raises:
        SpecError: the data file cannot be read at all.
    """
    encoder = Encoder(tokenizer, loaded.spec.model)
    texts, problems = _texts(loaded)
    found = []
    try:
        for index, text in enumerate(texts[: loaded.spec.data.limit]):
            tokens = encoder.encode(encoder.wrap(text)[0])
            words = tuple(tokenizer.decode(i) for i in tokens.ids)
            found.append(Text(index, text, tokens.ids, words, encoder.marks(tokens)))
    except ModelError as error:
        problems.append(loaded.problem(("model",), str(error)))
    return found, problems


def _texts(loaded: LoadedSpec[CollectSpec]) -> tuple[list[str], list[Problem]]:
    data = loaded.spec.data
    if data.prompts is not None:
        return data.prompts, []
    assert data.file is not None
    if missing := missing_file(loaded, data.file):
        return [], [missing]
    texts: list[str] = []
    for record, mark in read_records(Path(data.file)):
        value = record.get(data.column)
        if data.column not in record:
            have = [str(key) for key in record]
            expected = f"one of its columns ({', '.join(have)}) under data.column"
            near = nearest(data.column, have)
            return [], [Problem(f"no column '{data.column}'", mark, expected, near)]
        if not isinstance(value, str) or not value:
            return [], [Problem(f"column '{data.column}' is {value!r}", mark, "text")]
        texts.append(value)
    return texts, []
