"""Models made on the spot: trained on a causal model's own labels, kept in the cache."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interv.engine.mlp import Mlp, equality_mlp
from interv.errors import ModelError
from interv.models import ModelFiles
from interv.models.anatomy import Anatomy
from interv.models.cache import cached
from interv.models.checkpoint import find_weights
from interv.models.made import MlpShape, class_indices, classes_of, made_identity, mlp_shape
from interv.spec.made import MlpSection, TransformerSection
from interv.task.causal_model import CausalModel
from interv.task.causal_pairs import samples
from interv.task.causal_text import answer_text, render
from interv.task.causal_vectors import encode, input_width

_MADE = "made.json"
_FRESH = 65_536
"""Examples that an MLP's accuracy is counted on; it has not seen them."""
_FRESH_PROMPTS = 2048
"""The same for a transformer."""

Draw = Callable[[int, int], tuple[NDArray[Any], NDArray[Any]]]
"""So many examples from a seed: inputs `[n, width]`, and the logit `[n]` that is right."""
DrawTexts = Callable[[int, int], tuple[Sequence[str], Sequence[str]]]
"""So many prompts from a seed, and what follows each."""


@dataclass(frozen=True)
class MadeMlp:
    """An MLP made on the spot.

    Attributes:
        module: in evaluation mode, frozen.
        anatomy: where its components stand.
        accuracy: on fresh examples, by the causal model's labels.
        identity: hash of all that decides its weights.
    """

    module: Mlp
    anatomy: Anatomy
    accuracy: float
    identity: str


def make_mlp(section: MlpSection, model: CausalModel, seed: int, task: str) -> MadeMlp:
    """The MLP of a section that answers as a causal model does; see `mlp_from`.

    Its logits stand for `classes_of(model.variables[model.output].values, model.output)`.

    Args:
        section: of the spec.
        model: whose inputs are vectors.
        seed: of the spec, where the section has none.
        task: identity of the causal model: a hash of its declaration.

    Raises:
        CausalError: the model has prompts.
        ModelError: as `mlp_from`; or the section does not fit the causal model.
        StorageError: the cache cannot be written.
    """
    classes = classes_of(model.variables[model.output].values, model.output)
    shape = mlp_shape(section, input_width(model), len(classes))

    def draw(n: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
        values, _ = samples(model, n, seed)
        return encode(model, values), class_indices(classes, values[model.output])

    return mlp_from(section, shape, draw, seed, task)


def mlp_from(section: MlpSection, shape: MlpShape, draw: Draw, seed: int, task: str) -> MadeMlp:
    """The MLP of a section, from the cache if it was made before.

    Args:
        section: of the spec.
        shape: its widths, all filled in.
        draw: examples of the task.
        seed: of the spec, where the section has none.
        task: identity of what `draw` draws.

    Raises:
        ModelError: its accuracy is below `min_accuracy`, or its training diverged.
        StorageError: the cache cannot be written.
    """
    identity = made_identity(section, shape, seed, task)
    own = seed if section.train.seed is None else section.train.seed
    dtype: torch.dtype = getattr(torch, section.dtype)

    def build(folder: Path) -> None:
        made = _made(section, shape, draw, own, dtype)
        accuracy = _accuracy(made, *_tensors(draw, _FRESH, _derived(own, 1), dtype))
        save_file(made.state_dict(), folder / "model.safetensors")
        (folder / _MADE).write_text(json.dumps({"accuracy": accuracy}))

    folder = cached(f"made/mlp-{identity[:16]}", build)
    with torch.device("meta"):
        module = Mlp(shape.inputs, shape.hidden, shape.outputs, section.activation)
    module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    module.eval().requires_grad_(False)
    accuracy = _known_accuracy(folder)
    if section.weights != "random" and accuracy < section.train.min_accuracy:
        raise ModelError(
            f"the {section.weights} MLP answers {accuracy:.1%} of {_FRESH:,} fresh examples as the "
            f"causal model does, and model.train.min_accuracy asks for "
            f"{section.train.min_accuracy:.1%}; raise model.train.epochs or examples, make "
            "model.hidden wider, try another model.train.seed, or lower min_accuracy"
        )
    return MadeMlp(module, shape.anatomy, accuracy, identity)


def _made(section: MlpSection, shape: MlpShape, draw: Draw, seed: int, dtype: torch.dtype) -> Mlp:
    if section.weights == "equality":
        return equality_mlp(shape.inputs // 4, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Mlp(shape.inputs, shape.hidden, shape.outputs, section.activation).to(dtype)
    if section.weights == "trained":
        _train(module, section, draw, seed, dtype)
    return module


def _train(module: Mlp, section: MlpSection, draw: Draw, seed: int, dtype: torch.dtype) -> None:
    train = section.train
    inputs, labels = _tensors(draw, train.examples, _derived(seed, 0), dtype)
    generator = torch.Generator().manual_seed(seed)
    # One kernel for all parameters: these are so small that calls take most of the time.
    optimiser = torch.optim.Adam(module.parameters(), lr=train.lr, fused=True)
    with torch.enable_grad(), _one_thread():
        for epoch in range(train.epochs):
            order = torch.randperm(len(labels), generator=generator)
            shuffled, right = inputs[order], labels[order]
            for at in range(0, len(order), train.batch):
                here = slice(at, at + train.batch)
                loss = nn.functional.cross_entropy(module(shuffled[here]), right[here])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            if not math.isfinite(loss.item()):
                raise ModelError(
                    f"the MLP's training diverged: the loss is {loss.item()} after epoch "
                    f"{epoch + 1}; lower model.train.lr ({train.lr:g})"
                )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: so small a model gains nothing from more, and its sums stay the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tensors(draw: Draw, n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs, labels = draw(n, seed)
    return torch.from_numpy(inputs).to(dtype), torch.from_numpy(labels).long()


def _accuracy(module: Mlp, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        right = module(inputs).argmax(-1) == labels
    return float(right.double().mean())


def _known_accuracy(folder: Path) -> float:
    return float(json.loads((folder / _MADE).read_text())["accuracy"])


def _derived(seed: int, purpose: int) -> int:
    """A seed that shares nothing with the same seed's other uses."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


@dataclass(frozen=True)
class MadeTransformer:
    """A small transformer made on the spot, as an ordinary folder.

    Attributes:
        files: as they were, their folder now one with weights.
        accuracy: share of fresh prompts after which the right answer is on top.
    """

    files: ModelFiles
    accuracy: float


def make_transformer(
    section: TransformerSection, files: ModelFiles, model: CausalModel, seed: int
) -> MadeTransformer:
    """The transformer of a section, trained on a causal model's prompts; see `transformer_from`.

    Args:
        section: of the spec.
        files: from `interv.models.made.made_files`.
        model: whose inputs stand in prompts.
        seed: of the spec, where the section has none.

    Raises:
        CausalError: the model has no prompts.
        ModelError, StorageError: as `transformer_from`.
    """

    def draw(n: int, seed: int) -> tuple[list[str], list[str]]:
        values, templates = samples(model, n, seed)
        prompts = [filled.text for filled in render(model, values, templates)]
        return prompts, [answer_text(model, value) for value in values[model.output].tolist()]

    return transformer_from(section, files, draw, seed)


def transformer_from(
    section: TransformerSection, files: ModelFiles, draw: DrawTexts, seed: int
) -> MadeTransformer:
    """The transformer of a section, from the cache if it was made before.

    It is trained without dropout to give the answer's token after the prompt's last one.

    Args:
        section: of the spec.
        files: with its config and tokenizer.
        draw: prompts and answers of the task.
        seed: of the spec, where the section has none.

    Raises:
        ModelError: its accuracy is below `min_accuracy`, its training diverged, an answer is no
            single token, or transformers cannot make such a model.
        StorageError: the cache cannot be written.
    """
    assert files.identity is not None and files.folder is not None
    words = files.folder
    own = seed if section.train.seed is None else section.train.seed

    def build(folder: Path) -> None:
        module = _random(files, own)
        examples = _Prompts.read(files, *draw(section.train.examples, _derived(own, 0)))
        _train_transformer(module, section, examples, own)
        fresh = _Prompts.read(files, *draw(_FRESH_PROMPTS, _derived(own, 1)))
        accuracy = _answered(module, fresh)
        tied = set(module._tied_weights_keys or ()) if module.config.tie_word_embeddings else set()
        state = {k: v.contiguous() for k, v in module.state_dict().items() if k not in tied}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(words / name, folder / name)
        config = {**module.config.to_dict(), "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        (folder / _MADE).write_text(json.dumps({"accuracy": accuracy}))

    folder = cached(f"made/transformer-{files.identity[:16]}", build)
    accuracy = _known_accuracy(folder)
    if accuracy < section.train.min_accuracy:
        raise ModelError(
            f"the {files.label} gives the right answer to {accuracy:.1%} of {_FRESH_PROMPTS:,} "
            f"fresh prompts, and model.train.min_accuracy asks for "
            f"{section.train.min_accuracy:.1%}; raise model.train.steps or examples, give "
            "model.config more layers or wider ones, try another model.train.seed, or lower "
            "min_accuracy"
        )
    weights = find_weights(folder, files.config or {})
    return MadeTransformer(replace(files, folder=folder, weights=weights), accuracy)


@dataclass(frozen=True)
class _Prompts:
    """Tokens `[n, pos]`, filled up behind each prompt; its last position and its answer `[n]`."""

    ids: Tensor
    last: Tensor
    answers: Tensor

    @classmethod
    def read(cls, files: ModelFiles, prompts: Sequence[str], answers: Sequence[str]) -> _Prompts:
        rows = [_tokens(files, prompt) for prompt in prompts]
        right = {answer: _tokens(files, answer) for answer in dict.fromkeys(answers)}
        if several := [answer for answer, ids in right.items() if len(ids) != 1]:
            raise ModelError(
                f"the answer {several[0]!r} is {len(right[several[0]])} tokens of the "
                f"{files.label}; each of its answers is one word"
            )
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for row, known in zip(ids, rows, strict=True):
            row[: len(known)] = torch.tensor(known)
        return cls(ids, torch.tensor(lengths) - 1, torch.tensor([right[a][0] for a in answers]))

    def take(self, rows: Tensor) -> _Prompts:
        """Some of them, without columns that none of them has."""
        last = self.last[rows]
        return _Prompts(self.ids[rows, : int(last.max()) + 1], last, self.answers[rows])


def _tokens(files: ModelFiles, text: str) -> tuple[int, ...]:
    tokenizer = files.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(text)
    if tokenizer.unk_id in tokens.ids:
        start, end = tokens.offsets[tokens.ids.index(tokenizer.unk_id)]
        raise ModelError(
            f"the {files.label} has no token for {text[start:end]!r} in {text!r}: the texts that "
            "its tokens were made from do not have it"
        )
    return tokens.ids


def _random(files: ModelFiles, seed: int) -> Any:
    fields = dict(files.config or {})
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
            module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        # A config may be wrong in any way, and each raises something else; the message names the
        # cause and the traceback is kept as its cause.
        kind = type(error).__name__
        raise ModelError(f"model.config: no such model can be made: {kind}: {error}") from error
    return module.eval()


def _train_transformer(
    module: Any, section: TransformerSection, prompts: _Prompts, seed: int
) -> None:
    train = section.train
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        module.parameters(),
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        weight_decay=train.weight_decay,
    )

    def rate(step: int) -> float:
        if step < train.warmup:
            return (step + 1) / train.warmup
        return (train.steps - step) / max(1, train.steps - train.warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    left = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for step in range(train.steps):
            while len(left) < train.batch:
                order = torch.randperm(len(prompts.ids), generator=generator)
                left = torch.cat([left, order])
            some, left = prompts.take(left[: train.batch]), left[train.batch :]
            loss = nn.functional.cross_entropy(_last_logits(module, some), some.answers)
            if not math.isfinite(loss.item()):
                raise ModelError(
                    f"the {section.config['model_type']}'s training diverged: the loss is "
                    f"{loss.item()} in step {step + 1}; lower model.train.lr ({train.lr:g})"
                )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()


def _last_logits(module: Any, prompts: _Prompts) -> Tensor:
    """Logits `[n, vocab]` at each prompt's last token; what is behind it, it does not see."""
    logits: Tensor = module(input_ids=prompts.ids, use_cache=False).logits
    return logits[torch.arange(len(logits)), prompts.last]


def _answered(module: Any, prompts: _Prompts) -> float:
    right = []
    with torch.no_grad():
        for rows in torch.arange(len(prompts.ids)).split(256):  # type: ignore[no-untyped-call]
            some = prompts.take(rows)
            right.append(_last_logits(module, some).argmax(-1) == some.answers)
    return float(torch.cat(right).double().mean())
