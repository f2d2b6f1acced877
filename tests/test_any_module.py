"""`interv.executor` on any module, against plain hooks; what is wrapped, and what is mistaken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import interv
from interv.engine import Edit, Inputs, ReferenceExecutor, Run, Site, SuffixExecutor, Vanilla, Zero
from interv.errors import EngineError, IntervError, ModelError, UsageError
from tests import zoo

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
EYES: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 60, "max_position_embeddings": 20}
T5: dict[str, Any] = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 59}


class Block(nn.Module):
    """Of a ResNet."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.other = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.short = nn.Conv2d(into, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.one(x)))
        return torch.relu(self.norms[1](self.other(inner)) + self.short(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class Recurrent(nn.Module):
    """A GRU whose rows are its second dimension, unless `batch_first`."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.gru = nn.GRU(8, 12, 2, batch_first=batch_first)
        self.head = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.embed(ids))[0])
        return out


class Learned(nn.Module):
    """Positions as nanoGPT has them: a table `[pos, width]` that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(60, 8), nn.Embedding(20, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        at = torch.arange(input_ids.shape[1])
        out: Tensor = self.head(torch.tanh(self.words(input_ids) + self.places(at)))
        return out


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stack(x[:, 0])
        return out


def auto(kind: str, **fields: Any) -> nn.Module:
    config = getattr(transformers, f"{kind.partition('For')[0].removesuffix('Model')}Config")
    model: nn.Module = getattr(transformers, kind)(config(**fields))
    return model


def clip() -> nn.Module:
    text, eyes = {**TEXT, **ENDS, "projection_dim": 16}, {**EYES, "projection_dim": 16}
    return auto("CLIPModel", text_config=text, vision_config=eyes, projection_dim=16)


def drawn(variant: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(variant)
    return {
        "image": torch.randn(3, 16, 16, generator=generator),
        "ids": torch.randint(5, 50, (6,), generator=generator),
    }


def image(v: int) -> Inputs:
    return Inputs(drawn(v)["image"])


def pixels(v: int) -> Inputs:
    return Inputs(pixel_values=drawn(v)["image"])


def numbers(v: int) -> Inputs:
    return Inputs(drawn(v)["ids"])


def words(v: int) -> Inputs:
    return Inputs(input_ids=drawn(v)["ids"])


def tokens(v: int) -> tuple[int, ...]:
    return tuple(drawn(v)["ids"].tolist())


def both(v: int) -> Inputs:
    return Inputs(input_ids=drawn(v)["ids"], pixel_values=drawn(v)["image"])


def two(v: int) -> Inputs:
    return Inputs(input_ids=drawn(v)["ids"], decoder_input_ids=drawn(v)["ids"][:3])


Case = tuple[Callable[[], nn.Module], Callable[[int], Any], str, tuple[int, ...] | None, str]
CASES: dict[str, Case] = {
    "resnet block": (ResNet, image, "blocks.0", (3, 7), ""),
    "resnet convolution": (ResNet, image, "blocks.1.one", None, ""),
    "gru": (Recurrent, numbers, "gru", (2, 4), ""),
    "gru embedding": (Recurrent, numbers, "embed", (2,), ""),
    "transformer": (Attending, image, "stack.layers.0", (1,), ""),
    "vit": (lambda: auto("ViTForImageClassification", **EYES, num_labels=5), pixels,
            "vit.layers.0", (2,), "logits"),
    "vit model": (lambda: auto("ViTModel", **EYES), pixels, "layers.0", (2,), "last_hidden_state"),
    "clip image": (clip, both, "vision_model.encoder.layers.0", (2,), "logits_per_image"),
    "clip text": (clip, both, "text_model.encoder.layers.0.mlp", None, "logits_per_image"),
    "t5 encoder": (lambda: auto("T5ForConditionalGeneration", **T5), two, "encoder.block.0", (2,),
                   "logits"),
    "t5 decoder": (lambda: auto("T5ForConditionalGeneration", **T5), two, "decoder.block.1", (1,),
                   "logits"),
    "classifier": (lambda: auto("BertForSequenceClassification", **TEXT, num_labels=3), tokens,
                   "bert.encoder.layer.0", (2,), "logits"),
    "causal classifier": (lambda: auto("LlamaForSequenceClassification", **TEXT, num_labels=3,
                                       pad_token_id=0), words, "model.layers.0", (5,), "logits"),
    "positions": (Learned, tokens, "places", (2,), ""),
}  # fmt: skip


def plain(model: nn.Module, given: Any, name: str) -> Tensor:
    """The module's own forward of one row, without the row's dimension."""
    if isinstance(given, tuple):
        given = Inputs(input_ids=torch.tensor(given))
    args = [tensor[None] for tensor in given.args]
    kwargs: Mapping[str, Tensor] = {key: tensor[None] for key, tensor in given.kwargs.items()}
    with torch.no_grad():
        out = model(*args, **kwargs)
    found: Tensor = getattr(out, name) if name else out
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_a_swap_by_path_is_what_a_plain_hook_gives(case: str) -> None:
    make, inputs, path, positions, name = CASES[case]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on nested tensors
        torch.manual_seed(0)
        model = make().eval()
    executor = interv.executor(model)
    assert isinstance(executor, ReferenceExecutor)
    edit = Edit(Site(f"{path}.output", 0, positions), Vanilla(), Run(inputs(1)))
    found = executor.logits([Run(inputs(0), (edit,)), Run(inputs(0)), Run(inputs(1))], at=None)

    module, seen = model.get_submodule(path), []

    def look(_module: nn.Module, _args: object, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).clone())

    def swap(_module: nn.Module, _args: object, out: Any) -> Any:
        new = (out[0] if isinstance(out, tuple) else out).clone()
        if positions is None:
            new[:] = seen[0]
        elif new.dim() == 4:
            new.flatten(2)[:, :, list(positions)] = seen[0].flatten(2)[:, :, list(positions)]
        elif new.dim() == 3:
            new[:, list(positions)] = seen[0][:, list(positions)]
        else:
            new[list(positions)] = 0 * new[list(positions)] + seen[0][list(positions)]
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module.register_forward_hook(look)
    other = plain(model, inputs(1), name)
    handle.remove()
    handle = module.register_forward_hook(swap)
    patched = plain(model, inputs(0), name)
    handle.remove()
    base = plain(model, inputs(0), name)
    for row, expected in zip(found, (patched, base, other), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    if path != "places":  # the same for every prompt
        assert (patched - base).abs().max() > 1e-5


def test_a_table_that_rows_share_is_edited_in_each_by_itself() -> None:
    """`[pos, width]` of 6 positions is not 2 positions of each of 3 rows."""
    model = Learned().eval()
    executor = interv.executor(model)
    edits = [(), (Edit(Site("places.output", 0, (4,)), Zero()),), ()]
    found = executor.logits([Run(tokens(v), e) for v, e in enumerate(edits)], at=None)
    with torch.no_grad():
        ids = torch.tensor([tokens(v) for v in range(3)])
        expected = model(ids)
        expected[1, 4] = model.head(torch.tanh(model.words(ids[1, 4])))
    torch.testing.assert_close(found, expected)
    with pytest.raises(EngineError, match="two ways; ask for one run at a time"):
        executor.logits([Run(words(v), edits[1]) for v in range(3)], at=None)


def test_rows_along_the_second_dimension() -> None:
    model = Recurrent(batch_first=False).eval()
    executor = interv.executor(model, batch_dim=1)
    edit = Edit(Site("gru.output", 0, (2,)), Vanilla(), Run(numbers(1)))
    found = executor.logits([Run(numbers(0), (edit,)), Run(numbers(1))])
    with torch.no_grad():
        one, other = (model.gru(model.embed(drawn(v)["ids"]))[0] for v in (0, 1))
        one[2] = other[2]
        expected = torch.stack([model.head(one), model.head(other)])
    torch.testing.assert_close(found, expected)
    with pytest.raises(EngineError, match="expected a row for each, along dimension batch_dim"):
        interv.executor(nn.Flatten(0)).logits([Run(numbers(0)), Run(numbers(1))])


def test_what_a_classifier_is_not_asked_for() -> None:
    model = auto("BertForSequenceClassification", **TEXT, num_labels=3).eval()
    executor = interv.executor(model)
    with pytest.raises(EngineError, match=r"one output for a run.*at=None"):
        executor.logits([Run(tokens(0))])
    [[state]] = executor.states([Run(tokens(0))], [Site("block_output", 1)])
    assert state.shape == (6, 32)
    with pytest.raises(ModelError, match="none of vocab_size"):
        interv.executor(auto("ViTModel", **EYES), "suffix")
    encoder = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    zero = Edit(Site("shared.output"), Zero())
    with pytest.raises(EngineError, match="fired 0 times"):
        interv.executor(encoder).logits([Run(words(0), (zero,))])


# Wrappers.


def swaps() -> list[Run]:
    source = Run(tuple(zoo.ids(1)))
    return [
        Run(tuple(zoo.ids(0)), (Edit(Site("block_output", layer, (3,)), Vanilla(), source),))
        for layer in range(zoo.LAYERS)
    ]


@pytest.fixture
def distributed() -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["DataParallel", "DistributedDataParallel", "compile", "both"])
def test_the_model_in_a_wrapper(wrapper: str, request: pytest.FixtureRequest) -> None:
    model = zoo.make("llama").requires_grad_(True)
    wrap: Callable[[nn.Module], Any] = {
        "DataParallel": nn.DataParallel,
        "compile": partial(torch.compile, backend="eager"),
        "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    }.get(wrapper) or request.getfixturevalue("distributed")
    executor = interv.executor(wrap(model))
    assert isinstance(executor, SuffixExecutor)
    expected = interv.executor(model, "reference").logits(swaps())
    torch.testing.assert_close(executor.logits(swaps()), expected, rtol=0, atol=1e-10)


# peft and torch.jit are behind what transformers and torch say of them.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_adapter_of_peft_is_in_the_model_inside() -> None:
    peft = pytest.importorskip("peft")
    model = zoo.make("llama")
    bare = ReferenceExecutor(model, interv.engine.anatomy_of(model)).logits(swaps())
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config).double().eval()
    executor = interv.executor(adapted)
    assert isinstance(executor, SuffixExecutor)
    ids = torch.tensor([zoo.ids(0)])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits[0, -1]
    found = executor.logits([Run(tuple(zoo.ids(0)))])[0, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    reference = interv.executor(adapted, "reference").logits(swaps())
    torch.testing.assert_close(executor.logits(swaps()), reference, rtol=0, atol=1e-10)
    assert (reference - bare).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_wrappers_that_compute_something_else_are_refused_in_a_sentence() -> None:
    peft = pytest.importorskip("peft")
    accelerate = pytest.importorskip("accelerate")
    virtual = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    inside = zoo.make("llama")
    inside.get_submodule("model.layers.1.mlp").compile(backend="eager")
    part = nn.Sequential(nn.Linear(2, 2))
    part[0] = torch.compile(part[0], backend="eager")
    offloaded = accelerate.cpu_offload(zoo.make("llama"), torch.device("cpu"))
    for model, message in (
        (peft.get_peft_model(zoo.make("llama"), virtual), "puts virtual tokens before the prompt"),
        (inside, r"model\.layers\.1\.mlp is compiled"),
        (part, "0 is compiled"),
        (offloaded, "offloaded by accelerate"),
        (torch.jit.script(nn.Linear(2, 2)), "ScriptModule is compiled by TorchScript"),
        ("gpt2", "a str is not a torch.nn.Module"),
    ):
        with pytest.raises(UsageError, match=message):
            interv.executor(model)  # type: ignore[arg-type]


def test_a_model_dispatched_by_accelerate_gives_the_same_numbers() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = interv.executor(zoo.make("llama"), "reference").logits(swaps())
    model = accelerate.dispatch_model(
        zoo.make("llama"), {"": "cpu"}, main_device="cpu", force_hooks=True
    )
    own = {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
    assert own, "accelerate put its forwards in"
    for kind in ("auto", "reference"):
        found = interv.executor(model, kind).logits(swaps())  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    now = {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
    assert now == own


# What is mistaken.


def test_lists_arrays_and_tensors_are_the_tokens_that_they_list() -> None:
    run = Run((7, 8, 9))
    for ids in ([7, 8, 9], np.array([7, 8, 9]), torch.tensor([7, 8, 9]), range(7, 10)):
        assert Run(ids) == run  # type: ignore[arg-type]
        assert hash(Run(ids)) == hash(run)  # type: ignore[arg-type]
    edit = Edit(Site("block_output", 0, [1]), Zero())  # type: ignore[arg-type]
    assert edit.site == Site("block_output", 0, (1,))
    assert Run((7, 8), [edit]) == Run((7, 8), (edit,))  # type: ignore[arg-type]


def executed(**asked: Any) -> Any:
    runs = asked.pop("runs", [Run((7, 8, 9))])
    model = zoo.make("gpt2")
    for kind in (SuffixExecutor, ReferenceExecutor):
        yield lambda kind=kind: kind(model, interv.engine.anatomy_of(model)).logits(runs, **asked)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: Run("Paris"), "token ids: a tuple of whole numbers, not 'Paris'"),
    "floats": (lambda: Run((7.5, 8)), "token ids: whole numbers, not 7.5"),
    "booleans": (lambda: Run((True, False)), "token ids: whole numbers, not True"),
    "a batch": (lambda: Run(torch.zeros(1, 3, dtype=torch.long)), r"not the shape \(1, 3\)"),
    "one edit": (lambda: Run((7,), Edit(Site("logits"), Zero())), "edits are a tuple of Edit"),
    "edits of sites": (lambda: Run((7,), (Site("logits"),)), "a tuple of Edit, not of Site"),
    "from the end": (
        lambda: Site("block_output", 0, (-1,)),
        r"positions \(-1,\): .*counted from 0",
    ),
    "a position": (
        lambda: Site("block_output", 0, 2),
        "positions: a tuple of whole numbers, not 2",
    ),
    "a class": (
        lambda: Edit(Site("logits"), Zero),
        "intervention is a Intervention, not the class",
    ),
    "a source's ids": (
        lambda: Edit(Site("logits"), Vanilla(), (7, 8)),
        "source is a Run, not tuple",
    ),
    "a name": (lambda: Edit("logits", Zero()), "site is a Site, not str"),
    "a list": (lambda: Inputs([1.0]), "inputs are tensors, not list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_a_sentence(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(EngineError, match=message):
        make()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"runs": Run((7, 8))}, "runs are asked for in a list, not as Run"),
        ({"runs": [(7, 8)]}, "a list of Run is expected, not of tuple"),
        ({"at": -1}, "at: a tuple of whole numbers, not -1"),
        ({"tokens": 5}, "tokens: a tuple of whole numbers, not 5"),
        ({"tokens": [-1]}, r"tokens \[-1\]: at least one, each counted from 0"),
        ({"tokens": [10**6]}, "of a vocabulary of"),
        ({"runs": [Run(())]}, "0 tokens"),
        ({"runs": [Run((7, -1))]}, "token ids -1"),
        ({"runs": [Run((7, 10**6))]}, "token ids 1000000"),
        ({"at": [5]}, r"positions \[5\] of a run of 3 tokens"),
    ],
)
def test_what_an_executor_is_asked_for_never_means_something_else(
    asked: dict[str, Any], message: str
) -> None:
    for ask in executed(**asked):
        with pytest.raises(IntervError, match=message):
            ask()
