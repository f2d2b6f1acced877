"""Saved interventions come back to the last bit, and what is wrong with a folder is said."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from interv.engine.adapters import Adapter, Lora
from interv.engine.constants import Constant, Mean, ProjectOut, Replace
from interv.engine.dictionaries import (
    Autoencoder,
    EditLatents,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    ReluDictionary,
)
from interv.engine.functions import BaseLambda, Lambda
from interv.engine.interventions import (
    Addition,
    Clamp,
    Collect,
    Intervention,
    Noise,
    Scale,
    Skip,
    Subtraction,
    Vanilla,
    Zero,
)
from interv.engine.masks import (
    Boundary,
    BoundlessRotatedSpace,
    Mask,
    SigmoidMask,
    SigmoidMaskRotatedSpace,
)
from interv.engine.registry import BY_NAME
from interv.engine.rotations import (
    LowRankRotatedSpace,
    PCARotatedSpace,
    RotatedSpace,
    Rotation,
)
from interv.engine.runs import Site
from interv.errors import EngineError, StorageError, UsageError
from interv.keep import Part, Trained, read, write
from interv.keep.card import card
from interv.keep.format import JSON, TENSORS

WIDTH = 6


def moved(module: nn.Module, seed: int) -> Any:
    """The module after a step of training: its parameters are no longer what they began as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def relu(seed: int) -> ReluDictionary:
    return moved(ReluDictionary.seeded(WIDTH, 9, seed), seed)


def jump(seed: int) -> JumpReluDictionary:
    d = relu(seed)
    threshold = torch.linspace(0, 0.4, 9)
    threshold[3] = math.inf
    return JumpReluDictionary(d.encoder, d.encoder_bias, d.decoder, d.decoder_bias, threshold)


def pca(seed: int) -> PCARotatedSpace:
    generator = torch.Generator().manual_seed(seed)
    return PCARotatedSpace.fit(
        torch.randn(20, WIDTH, generator=generator), 4, standardise=bool(seed % 2), dims=(2, 0)
    )


def rotation(rank: int, seed: int) -> Rotation:
    return moved(Rotation.seeded(WIDTH, rank, seed), seed)


MAKE: dict[str, Callable[[int], Intervention]] = {
    "vanilla": lambda _: Vanilla(),
    "addition": lambda _: Addition(),
    "subtraction": lambda _: Subtraction(),
    "zero": lambda _: Zero(),
    "collect": lambda _: Collect(),
    "skip": lambda _: Skip(),
    "noise": lambda seed: Noise(0.1 * seed, seed, 2),
    "scale": lambda seed: Scale(seed / 3),
    "clamp": lambda seed: Clamp(-seed / 7, math.inf),
    "mean": lambda _: Mean(torch.arange(WIDTH) / 3),
    "replace": lambda _: Replace(torch.ones(2, WIDTH, dtype=torch.bfloat16)),
    "constant": lambda seed: Constant(Addition(), torch.arange(WIDTH) + seed / 3),
    "project_out": lambda _: ProjectOut(torch.eye(3, WIDTH) + 1),
    "rotated_space": lambda seed: RotatedSpace(rotation(WIDTH, seed), (4, 1, 2)),
    "low_rank_rotated_space": lambda seed: LowRankRotatedSpace(rotation(2, seed)),
    "boundless_rotated_space": lambda seed: BoundlessRotatedSpace(
        rotation(WIDTH, seed), moved(Boundary(WIDTH, temperature=0.7), seed)
    ),
    "sigmoid_mask": lambda seed: SigmoidMask(moved(Mask(WIDTH, temperature=0.3), seed)),
    "sigmoid_mask_rotated_space": lambda seed: SigmoidMaskRotatedSpace(
        rotation(3, seed), moved(Mask(3, temperature=2), seed)
    ),
    "pca_rotated_space": pca,
    "autoencoder": lambda seed: Autoencoder(relu(seed), (3, 8, 0), error_term=False),
    "jump_relu_autoencoder": lambda seed: JumpReLUAutoencoder(jump(seed)),
    "edit_latents": lambda seed: EditLatents(relu(seed), Clamp(0.5, 0.5), (7,)),
    "lora": lambda seed: Lora(
        moved(Adapter.seeded(WIDTH, 2, alpha=8 if seed % 2 else 1.5, seed=seed), seed)
    ),
}
FUNCTIONS = ("lambda", "base_lambda")

units = st.one_of(st.none(), st.integers(-4, 9), st.sampled_from(["END", "S2", "é"]))
some = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True).map(tuple)
sites = st.builds(
    Site,
    st.sampled_from(["block_output", "head_query_output", "encoder.0.output"]),
    st.integers(0, 30),
    st.none(),
    st.none() | some,
    st.none() | some,
)
facts = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@st.composite
def trained(draw: st.DrawFn) -> Trained:
    """Parts of any type; some hold the intervention of another, or its modules."""
    made: list[Intervention] = [
        MAKE[draw(st.sampled_from(sorted(MAKE)))](seed)
        for seed in range(1, draw(st.integers(1, 4)) + 1)
    ]
    if draw(st.booleans()):
        basis = rotation(WIDTH, 5)
        made += [RotatedSpace(basis, (0, 1)), RotatedSpace(basis, (2,))]
        made.append(BoundlessRotatedSpace(basis, Boundary(WIDTH)))
    if draw(st.booleans()):
        # Two modules of one parameter: an encoder that is trained in both.
        one, other = relu(1), relu(2)
        other.encoder = one.encoder
        made += [Autoencoder(one), Autoencoder(other)]
    chosen = draw(st.lists(st.sampled_from(made), min_size=1, max_size=6))
    parts = tuple(Part(draw(sites), draw(units), draw(st.text(max_size=4)), i) for i in chosen)
    return Trained(parts, draw(st.dictionaries(st.text(max_size=3), facts, max_size=3)))


def contents(intervention: Intervention) -> dict[str, Any]:
    """Everything that an intervention holds, flat: tensors, modules and plain values."""
    found: dict[str, Any] = {"": type(intervention)}
    for field in fields(intervention):  # type: ignore[arg-type]
        value = getattr(intervention, field.name)
        found[field.name] = value
        if isinstance(value, Intervention):
            found |= {f"{field.name}.{k}": v for k, v in contents(value).items()}
            found[field.name] = type(value)
        if isinstance(value, nn.Module):
            found |= {f"{field.name}.{k}": v for k, v in value.named_parameters()}
            found |= {f"{field.name}.{k}": v for k, v in value.named_buffers()}
            others = ("width", "alpha")
            found |= {f"{field.name}.{k}": getattr(value, k, None) for k in others}
    return found


def assert_equal(one: Trained, other: Trained) -> None:
    """The same in all that can be seen, and the same objects held in the same places."""
    assert one.about == other.about
    assert len(one.parts) == len(other.parts)
    same: dict[int, object] = {}
    reverse: dict[int, object] = {}
    for a, b in zip(one.parts, other.parts, strict=True):
        assert (a.site, a.unit, a.variable) == (b.site, b.unit, b.variable)
        ours, theirs = contents(a.intervention), contents(b.intervention)
        ours["itself"], theirs["itself"] = a.intervention, b.intervention
        assert ours.keys() == theirs.keys()
        for key, mine in ours.items():
            value = theirs[key]
            assert type(mine) is type(value), key
            if isinstance(mine, Tensor | nn.Module | Intervention):
                if key != "basis":  # of project_out: it is computed
                    assert same.setdefault(id(mine), value) is value, key
                    assert reverse.setdefault(id(value), mine) is mine, key
                if isinstance(mine, Tensor):
                    assert mine.dtype == value.dtype and torch.equal(mine, value), key
                    assert mine.requires_grad == value.requires_grad
            else:
                assert mine == value, key


@given(trained())
def test_what_is_written_is_read(before: Trained) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kept"
        write(folder, before)
        assert sorted(p.name for p in folder.iterdir()) == [JSON, TENSORS]
        assert_equal(before, read(folder))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_type(name: str, tmp_path: Path) -> None:
    """All that the registry has, or an error; what is read does the same and can be trained."""
    if name in FUNCTIONS:
        function = Lambda(torch.add) if name == "lambda" else BaseLambda(torch.neg)
        kept = Trained((Part(Site("block_output"), 0, "x", function),), {})
        with pytest.raises(UsageError, match=f"'{name}' cannot be saved"):
            write(tmp_path, kept)
        assert not list(tmp_path.iterdir())
        return
    made = MAKE[name](3)
    write(tmp_path, Trained((Part(Site("block_output", 2), "END", "x", made),), {}))
    found = read(tmp_path).parts[0].intervention
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 4, 2, WIDTH, generator=generator)
    # Not to the last bit: a matrix may lie in memory the other way round.
    torch.testing.assert_close(found.apply(base, source), made.apply(base, source))
    assert [p.shape for p in found.parameters()] == [p.shape for p in made.parameters()]
    if found.parameters():
        found.apply(base, source).square().sum().backward()
        assert all(p.grad is not None for p in found.parameters())


def test_half_precision_modules_stay_so(tmp_path: Path) -> None:
    mask = Mask(WIDTH).to(torch.bfloat16)
    write(tmp_path, Trained((Part(Site("block_output"), 0, "x", SigmoidMask(mask)),), {}))
    found = read(tmp_path).parts[0].intervention
    assert isinstance(found, SigmoidMask)
    assert found.mask.mask.dtype == found.mask.temperature.dtype == torch.bfloat16


def test_writing_again_replaces(tmp_path: Path) -> None:
    for seed in (1, 2):
        after = Trained((Part(Site("mlp_output"), None, "x", MAKE["lora"](seed)),), {"seed": seed})
        write(tmp_path, after)
    assert_equal(after, read(tmp_path))


def test_positions_are_the_units() -> None:
    with pytest.raises(EngineError, match=r"positions \(3,\); those of a part are its unit's"):
        Part(Site("block_output", 0, (3,)), 3, "x", Vanilla())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    mask = Mask(WIDTH)
    with torch.no_grad():
        mask.mask[2] = math.nan
    site = Site("block_output")
    with pytest.raises(UsageError, match="mask: some of the numbers are not finite"):
        write(tmp_path, Trained((Part(site, 0, "x", SigmoidMask(mask)),), {}))
    for about in ({"loss": math.nan}, {"path": Path("x")}):
        with pytest.raises(UsageError, match="what is said about the intervention"):
            write(tmp_path, Trained((), about))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write(tmp_path / "file", Trained((), {}))


# Damaged folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = Site("block_output", 1)
    parts = [Part(site, 0, "x", MAKE[n](2)) for n in ("rotated_space", "sigmoid_mask", "clamp")]
    parts.append(Part(site, 0, "x", EditLatents(relu(1), Scale(0.0))))
    parts.append(Part(site, 0, "x", MAKE["lora"](2)))
    write(tmp_path, Trained(tuple(parts), {}))
    return tmp_path


def change(folder: Path, *keys: Any, to: object) -> None:
    """Set one value of the JSON; `...` removes it."""
    document = json.loads((folder / JSON).read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    (folder / JSON).write_text(json.dumps(document))


DAMAGE: list[tuple[tuple[Any, ...], object, str]] = [
    (("format",), "other", "the format is 'other'; expected 'interv.intervention'"),
    (("version",), 2, "format version 2; expected version 1"),
    (("version",), "1", "'version' is \"1\"; expected a whole number"),
    (("version",), True, "'version' is true; expected a whole number"),
    (("modules",), ..., "'modules' is missing; expected an object"),
    (("about",), [], "'about' is []; expected an object"),
    (("extra",), 1, "'extra' is not known"),
    (("parts", 0), 3, "part 0: is 3; expected an object"),
    (("parts", 0, "layer"), -1.5, "part 0: 'layer' is -1.5; expected a whole number"),
    (("parts", 0, "unit"), 1.5, "part 0: 'unit' is 1.5; expected a span's name"),
    (("parts", 0, "unit"), ..., "part 0: 'unit' is"),
    (("parts", 0, "heads"), [1, 1], "heads (1, 1): at least one, each once"),
    (("parts", 0, "heads"), "all", "'heads' is \"all\"; expected a list of whole numbers or null"),
    (("parts", 0, "compnent"), "x", "(did you mean 'component'?)"),
    (("parts", 0, "intervention"), "x", "'x' is not among the interventions"),
    (("interventions", "intervention_0", "type"), "rotated", "the type 'rotated' is not known"),
    (("interventions", "intervention_0", "type"), "lambda", "'rotation' is not known"),
    (("interventions", "intervention_0", "type"), "sigmoid_mask", "'rotation' is not known"),
    (("interventions", "intervention_0", "dims"), [9], "dims 9 is not among the 6"),
    (("interventions", "intervention_0", "rotation"), "mask_1", "'rotation' is a Mask; expected a"),
    (("interventions", "intervention_0", "rotation"), ..., "'rotation' is missing"),
    (("interventions", "intervention_2", "low"), "a", "'low' is \"a\"; expected a number"),
    (("interventions", "intervention_3", "error_term"), 1, "'error_term' is 1; expected true or"),
    (("interventions", "intervention_3", "edit"), "intervention_3", "it holds itself"),
    (("interventions", "intervention_3", "edit"), "intervention_0", "needs more than the latents"),
    (("modules", "rotation_0", "kind"), "matrix", "the kind 'matrix' is not known"),
    (("modules", "rotation_0", "rank"), 7, "the rank is 7; expected at most 6, the width"),
    (("modules", "rotation_0", "rank"), 0, "'rank' is 0; expected 1 or more"),
    (("modules", "rotation_0", "rank"), 5, "of the shape (6, 6); expected numbers of the shape"),
    (("modules", "rotation_0", "size"), 5, "'size' is not known"),
    (("modules", "rotation_0", "tensors", "free"), "no", "the tensor 'no' is not in"),
    (("modules", "rotation_0", "tensors", "free"), "mask_1.mask", "of the shape (6,); expected"),
    (("modules", "adapter_3", "alpha"), ..., "'alpha' is missing; expected a number"),
    (("tensors", "sha256"), "0", "not the file that intervention.json was written with"),
    (("tensors", "file"), "../x", "the file '../x' is not in the folder"),
]


@pytest.mark.parametrize(("keys", "to", "message"), DAMAGE, ids=[m for _, _, m in DAMAGE])
def test_damage_is_named(folder: Path, keys: tuple[Any, ...], to: object, message: str) -> None:
    change(folder, *keys, to=to)
    with pytest.raises(UsageError) as caught:
        read(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def put(folder: Path, tensors: dict[str, Tensor]) -> None:
    import hashlib

    data = save(tensors)
    (folder / TENSORS).write_bytes(data)
    change(folder, "tensors", "sha256", to=hashlib.sha256(data).hexdigest())


def test_wrong_tensors(folder: Path) -> None:
    right = load((folder / TENSORS).read_bytes())

    def fails(changed: dict[str, Tensor], message: str) -> None:
        put(folder, changed)
        with pytest.raises(UsageError) as caught:
            read(folder)
        assert message in str(caught.value)

    fails({**right, "more": torch.ones(1)}, "nothing uses the tensor 'more'")
    fails({**right, "rotation_0.free": torch.ones(6, 6).int()}, "'free' is torch.int32")
    fails({**right, "rotation_0.free": torch.full((6, 6), math.nan)}, "not finite")
    fails({**right, "mask_1.temperature": torch.tensor(0.0)}, "a temperature is a finite number")
    del right["mask_1.mask"]
    fails(right, "the tensor 'mask_1.mask' is not in intervention.safetensors")


def test_missing_and_broken_files(folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file; expected a folder that `interv"):
        read(folder / "nowhere")
    text = (folder / JSON).read_text()
    (folder / JSON).write_text("[1, 2")
    with pytest.raises(UsageError, match="not JSON"):
        read(folder)
    (folder / JSON).write_text("[1, 2]")
    with pytest.raises(UsageError, match=r"the file: is \[1, 2\]; expected an object"):
        read(folder)
    (folder / JSON).write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not JSON"):
        read(folder)
    (folder / JSON).write_text(text)
    (folder / TENSORS).write_bytes(b"what is this?")
    with pytest.raises(UsageError, match="its SHA-256 is another"):
        read(folder)
    import hashlib

    change(folder, "tensors", "sha256", to=hashlib.sha256(b"what is this?").hexdigest())
    with pytest.raises(UsageError, match="not a safetensors file"):
        read(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read(folder)


def test_a_failed_write_leaves_the_old(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full before anything is replaced."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(folder, Trained((), {}))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_writing_changes_nothing(tmp_path: Path) -> None:
    made = MAKE["boundless_rotated_space"](1)
    before = copy.deepcopy([p.detach() for p in made.parameters()])
    write(tmp_path, Trained((Part(Site("block_output"), 0, "x", made),), {}))
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


# The card


def front(text: str) -> dict[str, Any]:
    """The card's YAML."""
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_card() -> None:
    site = Site("block_output", 9, None, None, (0, 1, 2, 3))
    parts = (
        Part(site, "END", "name|position", MAKE["rotated_space"](1)),
        Part(Site("head_query_output", 3, None, (0, 5)), None, "token", MAKE["sigmoid_mask"](1)),
    )
    about = {
        "model": {"name": "owner/tiny", "revision": "main"},
        "results": [
            {"layer": 9, "iia": 0.912345, "note": "held | out\nhere"},
            {"layer": 3, "seeds": [1, 2]},
        ],
        "spec": {"kind": "train-das", "note": "```\nfenced"},
        "versions": {"torch": "2.13"},
    }
    text = card(Trained(parts, about), "interv train-das spec.yaml seed=3")
    assert front(text) == {
        "library_name": "interv",
        "tags": [
            *("interv", "causal-intervention", "interpretability"),
            *("rotated_space", "sigmoid_mask"),
        ],
        "base_model": "owner/tiny",
    }
    for line in (
        "# rotated_space and sigmoid_mask in owner/tiny",
        "| layer | iia | note | seeds |",
        "| 9 | 0.9123 | held \\| out here |  |",
        "| 3 |  |  | [1, 2] |",
        "| block_output | 9 | END | all | 0–3 | name\\|position | rotated_space | 3 of 6 |",
        "| head_query_output | 3 | all | 0, 5 | all | token | sigmoid_mask | 4 of 6 |",
        "interv train-das spec.yaml seed=3",
        "interv pull USER/NAME FOLDER",
        "````yaml",
        "| torch | 2.13 |",
    ):
        assert line in text.splitlines(), text
    assert "license" not in text


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_card_of_every_type(name: str) -> None:
    """Without a hub's name there is no base model; what is not said is not made up."""
    trained = Trained((Part(Site("mlp_output"), -1, "x", MAKE[name](2)),), {"model": "mlp"})
    text = card(trained, "interv train-das spec.yaml")
    assert front(text)["tags"][-1] == name
    assert "base_model" not in front(text)
    assert f"# {name} in mlp" in text.splitlines()
    assert "## Result" not in text and "## Versions" not in text


def test_a_card_of_one_result() -> None:
    text = card(Trained((), {"results": {"iia": 1.0, "controls": {"random": 0.5}}}), "interv")
    assert "| iia | 1 |" in text
    assert '| controls | {"random": 0.5} |' in text
