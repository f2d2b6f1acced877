"""pyvene's folders: what it saved does here what it does there, and the other way round."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interv.engine import Edit, ReferenceExecutor, Run, Site, anatomy_of
from interv.engine.adapters import Adapter, Lora
from interv.engine.constants import Constant, Replace
from interv.engine.dictionaries import (
    Autoencoder,
    JumpReLUAutoencoder,
    JumpReluDictionary,
    ReluDictionary,
)
from interv.engine.interventions import (
    Addition,
    Collect,
    Intervention,
    Noise,
    Scale,
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
from interv.engine.rotations import (
    LowRankRotatedSpace,
    PCARotatedSpace,
    RotatedSpace,
    Rotation,
)
from interv.errors import UsageError
from interv.keep import Part, Trained
from interv.keep.pyvene import orthogonal, parametrized, read_pyvene, write_pyvene
from tests import zoo

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import pyvene

BASE, SOURCE = tuple(zoo.ids(0)), tuple(zoo.ids(1))
MODELS = ("gpt2", "llama")
WIDTH, HEAD = 48, 12


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """pyvene logs a warning at each load, and copies tensors in a way that torch warns of."""
    logging.disable(logging.WARNING)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        torch.manual_seed(0)
        yield
    logging.disable(logging.NOTSET)


def model(kind: str) -> nn.Module:
    return zoo.make(kind).float()


def at(unit: str, heads: Sequence[int] | None, positions: Sequence[int]) -> Any:
    """One intervention's locations in pyvene's call, for one row."""
    if unit == "pos":
        return [list(positions)]
    return [[list(heads or ())]] if unit == "h" else [[list(heads or ())], [list(positions)]]


def their_logits(
    wrapped: Any,
    positions: Sequence[Sequence[int]],
    heads: Sequence[Sequence[int] | None] | None = None,
    subspaces: Any = None,
    source: tuple[int, ...] = SOURCE,
) -> Tensor:
    """pyvene's logits `[pos, vocab]`; those with a source of their own take none."""
    rows = list(wrapped.representations.values())
    heads = heads or [None] * len(rows)
    where = [at(r.unit, h, p) for r, h, p in zip(rows, heads, positions, strict=True)]
    where = [w[0] if r.unit == "h" else w for r, w in zip(rows, where, strict=True)]
    takes = [not i.is_source_constant for i in wrapped.interventions.values()]
    with torch.no_grad():
        _, out = wrapped(
            {"input_ids": torch.tensor([BASE])},
            [{"input_ids": torch.tensor([source])} if t else None for t in takes],
            {
                "sources->base": (
                    [w if t else None for w, t in zip(where, takes, strict=True)],
                    where,
                )
            },
            subspaces=subspaces,
        )
    logits: Tensor = out.logits[0]
    return logits


def our_logits(of: nn.Module, trained: Trained, positions: Sequence[Sequence[int]]) -> Tensor:
    """Ours, by the reference executor, `[pos, vocab]`."""
    edits = []
    for part, where in zip(trained.parts, positions, strict=True):
        s = part.site
        site = Site(s.component, s.layer, tuple(where), s.heads, s.dims)
        needs = part.intervention.needs_source
        edits.append(Edit(site, part.intervention, Run(SOURCE) if needs else None))
    with torch.no_grad():
        return ReferenceExecutor(of, anatomy_of(of)).logits([Run(BASE, tuple(edits))], None)[0]


def plain_logits(of: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = of(torch.tensor([BASE])).logits[0]
    return logits


def assert_close(ours: Tensor, theirs: Tensor, plain: Tensor | None) -> None:
    """Logits to 1e-5 of the largest, in float32."""
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    if plain is not None:
        assert float((ours - plain).abs().max()) > 1e-3, "the intervention does nothing"


# What pyvene saved


def shaken(intervention: nn.Module) -> None:
    """As after training: every tensor that is trained is moved, and every temperature."""
    with torch.no_grad():
        for name, parameter in intervention.named_parameters():
            if name == "temperature":
                parameter.fill_(1.3)
            elif name == "threshold":
                parameter.copy_(0.2 * torch.rand(parameter.shape))
            elif name == "intervention_boundaries":
                parameter.fill_(0.3)
            elif parameter.is_floating_point():
                noise = 0.4 * torch.randn(parameter.shape)
                # No gradient reaches what else there is of a parametrized tall matrix.
                tall = name.endswith("original") and noise.shape[0] > noise.shape[1]
                parameter.add_(noise.tril(-1) if tall else noise)


Options = dict[str, Any]
THEIRS: dict[str, tuple[type, Options]] = {
    "vanilla": (pyvene.VanillaIntervention, {}),
    "addition": (pyvene.AdditionIntervention, {}),
    "subtraction": (pyvene.SubtractionIntervention, {}),
    "zero": (pyvene.ZeroIntervention, {}),
    "rotated_space": (pyvene.RotatedSpaceIntervention, {}),
    "low_rank_rotated_space": (pyvene.LowRankRotatedSpaceIntervention, {"low_rank_dimension": 3}),
    "boundless_rotated_space": (pyvene.BoundlessRotatedSpaceIntervention, {}),
    "sigmoid_mask": (pyvene.SigmoidMaskIntervention, {}),
    "sigmoid_mask_rotated_space": (pyvene.SigmoidMaskRotatedSpaceIntervention, {}),
    "autoencoder": (pyvene.AutoencoderIntervention, {"latent_dim": 60}),
    "jump_relu_autoencoder": (
        pyvene.JumpReLUAutoencoderIntervention,
        {"low_rank_dimension": 60},
    ),
}
"""All that pyvene trains, and what it has without tensors."""


def saved(
    of: nn.Module,
    folder: Path,
    kinds: Sequence[type],
    rows: Sequence[Any],
    dimension: int | list[int] | None = None,
) -> Any:
    """A pyvene model, moved and saved."""
    config = pyvene.IntervenableConfig(list(rows), intervention_types=list(kinds))
    wrapped = pyvene.IntervenableModel(config, of)
    wrapped.disable_model_gradients()
    for intervention in dict.fromkeys(wrapped.interventions.values()):
        shaken(intervention)
        if dimension is not None:
            intervention.set_interchange_dim(dimension)
    with contextlib.redirect_stdout(io.StringIO()):
        wrapped.save(str(folder))
    return wrapped


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_pyvene_saved_does_the_same(kind: str, name: str, tmp_path: Path) -> None:
    of = model(kind)
    cls, options = THEIRS[name]
    row = pyvene.RepresentationConfig(1, "block_output", "pos", 1, **options)
    wrapped = saved(of, tmp_path, [cls], [row], [4, 50, 9] if name == "autoencoder" else None)
    theirs = their_logits(wrapped, [[4]])
    for anatomy in (None, anatomy_of(of)):
        found = read_pyvene(tmp_path, anatomy)
        assert found.parts[0].intervention.name == name
        assert_close(our_logits(model(kind), found, [[4]]), theirs, plain_logits(of))
    assert found.parts[0].unit is None
    assert found.parts[0].variable == "source_0"


@pytest.mark.parametrize("name", ["rotated_space", "low_rank_rotated_space", "vanilla", "addition"])
def test_heads(name: str, tmp_path: Path) -> None:
    """Two heads of one position: pyvene turns them together."""
    of = model("gpt2")
    cls, options = THEIRS[name]
    row = pyvene.RepresentationConfig(1, "head_attention_value_output", "h.pos", 2, **options)
    wrapped = saved(of, tmp_path, [cls], [row])
    theirs = their_logits(wrapped, [[4]], [[3, 1]])
    with pytest.raises(UsageError, match="pyvene does not save at which heads"):
        read_pyvene(tmp_path)
    found = read_pyvene(tmp_path, heads=[[3, 1]], units=["END"])
    assert found.parts[0].site.heads == (3, 1)
    assert found.parts[0].unit == "END"
    assert_close(our_logits(model("gpt2"), found, [[4]]), theirs, plain_logits(of))


@pytest.mark.parametrize("name", ["rotated_space", "low_rank_rotated_space", "vanilla"])
def test_subspaces(name: str, tmp_path: Path) -> None:
    """Of a partition, or columns; pyvene names them at the call."""
    of = model("gpt2")
    cls, options = THEIRS[name]
    if "low_rank_dimension" in options:
        options = {"low_rank_dimension": 30}
    partition = [[0, 6], [6, 20], [21, 23, 25]]
    parted = pyvene.RepresentationConfig(
        1, "mlp_output", "pos", 1, subspace_partition=partition, **options
    )
    wrapped = saved(of, tmp_path / "a", [cls], [parted])
    theirs = their_logits(wrapped, [[4]], subspaces=[[[2, 0]]])
    found = read_pyvene(tmp_path / "a", subspaces=[[2, 0]])
    assert_close(our_logits(model("gpt2"), found, [[4]]), theirs, plain_logits(of))
    with pytest.raises(UsageError, match="subspace 3: its partition has 3"):
        read_pyvene(tmp_path / "a", subspaces=[[3]])
    row = pyvene.RepresentationConfig(1, "mlp_output", "pos", 1, **options)
    wrapped = saved(of, tmp_path / "b", [cls], [row])
    theirs = their_logits(wrapped, [[4]], subspaces=[[[7, 2, 29]]])
    found = read_pyvene(tmp_path / "b", subspaces=[[7, 2, 29]])
    assert_close(our_logits(model("gpt2"), found, [[4]]), theirs, plain_logits(of))


@pytest.mark.parametrize("name", ["rotated_space", "vanilla", "jump_relu_autoencoder"])
def test_the_first_columns(name: str, tmp_path: Path) -> None:
    """pyvene's interchange_dim; of a JumpReLU dictionary the first latents, 48 at first."""
    of = model("llama")
    cls, options = THEIRS[name]
    row = pyvene.RepresentationConfig(1, "block_output", "pos", 1, **options)
    wrapped = saved(of, tmp_path, [cls], [row], 5)
    theirs = their_logits(wrapped, [[4]])
    found = read_pyvene(tmp_path, anatomy_of(of))
    assert_close(our_logits(model("llama"), found, [[4]]), theirs, plain_logits(of))


@pytest.mark.parametrize("name", ["vanilla", "addition", "subtraction"])
def test_a_source_of_its_own(name: str, tmp_path: Path) -> None:
    of = model("gpt2")
    cls, _ = THEIRS[name]
    row = pyvene.RepresentationConfig(
        1, "mlp_output", "pos", 1, source_representation=torch.randn(WIDTH)
    )
    wrapped = saved(of, tmp_path, [cls], [row])
    theirs = their_logits(wrapped, [[2, 4]])
    found = read_pyvene(tmp_path)
    assert isinstance(found.parts[0].intervention, Replace | Constant)
    assert_close(our_logits(model("gpt2"), found, [[2, 4]]), theirs, plain_logits(of))


def test_noise_collect_and_skip(tmp_path: Path) -> None:
    """pyvene's noise is drawn for four positions; its collect writes nothing; its skip gets the
    module's input from the source, which must be the base."""
    of = model("gpt2")
    rows = [pyvene.RepresentationConfig(1, "mlp_output", "pos", 1)]
    plain = plain_logits(of)
    wrapped = saved(of, tmp_path / "noise", [pyvene.NoiseIntervention], rows)
    four = [[1, 2, 3, 5]]
    theirs, found = their_logits(wrapped, four), read_pyvene(tmp_path / "noise")
    assert_close(our_logits(model("gpt2"), found, four), theirs, plain)
    wrapped = saved(of, tmp_path / "skip", [pyvene.SkipIntervention], rows)
    theirs, found = their_logits(wrapped, [[4]], source=BASE), read_pyvene(tmp_path / "skip")
    assert_close(our_logits(model("gpt2"), found, [[4]]), theirs, plain)
    saved(of, tmp_path / "collect", [pyvene.CollectIntervention], rows)
    found = read_pyvene(tmp_path / "collect")
    assert isinstance(found.parts[0].intervention, Collect)


def test_several_and_linked(tmp_path: Path) -> None:
    """Two variables in parts of one basis, and a swap in another layer."""
    of = model("llama")
    partition = [[0, 10], [10, 25]]
    rows = [
        pyvene.RepresentationConfig(
            1, "block_output", "pos", 1, subspace_partition=partition, intervention_link_key=0
        )
        for _ in range(2)
    ]
    rows.append(pyvene.RepresentationConfig(2, "mlp_output", "pos", 1))
    kinds = [pyvene.RotatedSpaceIntervention] * 2 + [pyvene.VanillaIntervention]
    wrapped = saved(of, tmp_path, kinds, rows)
    theirs = their_logits(wrapped, [[4]] * 2 + [[6]], subspaces=[[[0]], [[1]], None])
    found = read_pyvene(tmp_path, anatomy_of(of), subspaces=[[0], [1], None])
    one, other = (part.intervention for part in found.parts[:2])
    assert isinstance(one, RotatedSpace) and isinstance(other, RotatedSpace)
    assert one.rotation is other.rotation
    assert [part.variable for part in found.parts] == ["source_0", "source_1", "source_2"]
    assert found.parts[2].site == Site("mlp_output", 2)
    assert_close(our_logits(model("llama"), found, [[4], [4], [6]]), theirs, plain_logits(of))


PATHS = {
    "mlp_activation": Site("mlp_gate_activation", 1),
    "model.layers[1].mlp.down_proj.input": Site("mlp_activation", 1),
    "model.layers[1].post_attention_layernorm.input": Site("resid_mid", 1),
    "model.layers[1].mlp.up_proj.output": Site("model.layers[1].mlp.up_proj.output"),
}


@pytest.mark.parametrize("component", PATHS)
def test_components_by_other_names(component: str, tmp_path: Path) -> None:
    """pyvene's mlp_activation is the gate's in a gated MLP; a path may have a name here, and
    needs it where pyvene's write into a module's input reaches the residual stream too."""
    of = model("llama")
    rows = [pyvene.RepresentationConfig(1, component, "pos", 1)]
    wrapped = saved(of, tmp_path, [pyvene.VanillaIntervention], rows)
    theirs = their_logits(wrapped, [[4]])
    found = read_pyvene(tmp_path, anatomy_of(of))
    assert found.parts[0].site == PATHS[component]
    assert_close(our_logits(model("llama"), found, [[4]]), theirs, plain_logits(of))
    if component.endswith("output"):
        assert read_pyvene(tmp_path).parts[0].site == PATHS[component]
        return
    message = "is gated is not known" if component == "mlp_activation" else "writes into the tensor"
    fails(tmp_path, message)


def test_rotations() -> None:
    """R of torch's parametrization, moved, and back."""
    for width, rank in ((6, 6), (6, 2), (5, 1)):
        layer = pyvene.models.layers.LowRankRotateLayer(width, rank)
        layer = torch.nn.utils.parametrizations.orthogonal(layer)
        shaken(layer)
        state = layer.state_dict()
        found = orthogonal(
            state["parametrizations.weight.original"], state["parametrizations.weight.0.base"]
        )
        assert float((found - layer.weight.detach()).abs().max()) < 1e-6
        again = parametrized(found)
        layer.load_state_dict({k.removeprefix("rotate_layer."): v for k, v in again.items()})
        assert float((found - layer.weight.detach()).abs().max()) < 1e-6


# What we write


def relu(width: int, seed: int = 0) -> ReluDictionary:
    generator = torch.Generator().manual_seed(seed)
    made = ReluDictionary.seeded(width, 60, seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


def jump(width: int) -> JumpReluDictionary:
    d = relu(width)
    threshold = torch.linspace(0, 0.3, 60)
    return JumpReluDictionary(d.encoder, d.encoder_bias, d.decoder, d.decoder_bias, threshold)


def trained_rotation(width: int, rank: int) -> Rotation:
    """As after training: the free parameter is not orthonormal."""
    made = Rotation.seeded(width, rank, 3)
    with torch.no_grad():
        made.free.add_(0.3 * torch.randn(made.free.shape, generator=torch.Generator()))
    return made


def gate(kind: type, width: int) -> Any:
    made = kind(width, temperature=1.7)
    if isinstance(made, Mask):
        with torch.no_grad():
            made.mask.copy_(torch.linspace(-3, 3, width))
    return made


Make = Callable[[int], Intervention]
OURS: dict[str, Make] = {
    "vanilla": lambda _: Vanilla(),
    "addition": lambda _: Addition(),
    "subtraction": lambda _: Subtraction(),
    "zero": lambda _: Zero(),
    "replace": lambda n: Replace(torch.linspace(-1, 1, n)),
    "constant": lambda n: Constant(Addition(), torch.linspace(-1, 2, n)),
    "rotated": lambda n: RotatedSpace(trained_rotation(n, n)),
    "rotated, first": lambda n: RotatedSpace(trained_rotation(n, n), (0, 1, 2)),
    "rotated, some": lambda n: RotatedSpace(trained_rotation(n, n), (7, 2, 4)),
    "low rank": lambda n: LowRankRotatedSpace(trained_rotation(n, 3)),
    "low rank, some": lambda n: LowRankRotatedSpace(trained_rotation(n, 5), (4, 1)),
    "boundless": lambda n: BoundlessRotatedSpace(trained_rotation(n, n), gate(Boundary, n)),
    "mask": lambda n: SigmoidMask(gate(Mask, n)),
    "rotated mask": lambda n: SigmoidMaskRotatedSpace(trained_rotation(n, n), gate(Mask, n)),
    "pca": lambda n: PCARotatedSpace.fit(
        torch.randn(30, n, generator=torch.Generator()), 6, dims=(0, 3)
    ),
    "autoencoder": lambda n: Autoencoder(relu(n), (3, 40, 8), error_term=False),
    "autoencoder, all": lambda n: Autoencoder(relu(n), error_term=False),
    "jump": lambda n: JumpReLUAutoencoder(jump(n), (3, 40, 8), error_term=False),
    "jump, all": lambda n: JumpReLUAutoencoder(jump(n), error_term=False),
}
TOGETHER = ("rotated", "rotated, some", "low rank", "pca", "autoencoder")
"""Those that pyvene makes at several heads together."""


def both_ways(
    of: str, parts: Sequence[Part], positions: Sequence[Sequence[int]], folder: Path
) -> Trained:
    """Written; pyvene's logits are ours, and so are those of what we read back."""
    trained = Trained(tuple(parts), {"seed": 3})
    ours = our_logits(model(of), trained, positions)
    write_pyvene(folder, trained, anatomy_of(model(of)))
    wrapped = pyvene.IntervenableModel.load(str(folder), model(of))
    theirs = their_logits(wrapped, positions, [part.site.heads for part in parts])
    assert_close(ours, theirs, plain_logits(model(of)))
    again = read_pyvene(folder, anatomy_of(model(of)))
    assert_close(our_logits(model(of), again, positions), theirs, None)
    assert again.about["seed"] == 3
    for before, after in zip(parts, again.parts, strict=True):
        assert (before.unit, before.variable) == (after.unit, after.variable)
    return again


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", MODELS)
def test_pyvene_loads_what_we_write(kind: str, name: str, tmp_path: Path) -> None:
    site = Site("block_output", 1)
    both_ways(kind, [Part(site, "S2", "name", OURS[name](WIDTH))], [[4]], tmp_path)


@pytest.mark.parametrize("name", TOGETHER)
def test_heads_that_we_write(name: str, tmp_path: Path) -> None:
    """At one position, and at all."""
    site = Site("query_output", 1, None, (3, 0))
    both_ways("llama", [Part(site, 4, "x", OURS[name](2 * HEAD))], [[4]], tmp_path / "a")
    every = [range(len(BASE))]
    both_ways("llama", [Part(site, None, "x", OURS[name](2 * HEAD))], every, tmp_path / "b")


@pytest.mark.parametrize("name", ["mask", "jump", "replace"])
def test_one_head_that_we_write(name: str, tmp_path: Path) -> None:
    site = Site("head_value_output", 1, None, (1,))
    both_ways("gpt2", [Part(site, 4, "x", OURS[name](HEAD))], [[4]], tmp_path)
    two = Part(Site("head_value_output", 1, None, (1, 2)), 4, "x", OURS[name](2 * HEAD))
    with pytest.raises(UsageError, match="at each of the 2 heads by itself"):
        write_pyvene(tmp_path, Trained((two,), {}), anatomy_of(model("gpt2")))


def test_latents_that_are_never_negative_in_pyvene(tmp_path: Path) -> None:
    d = jump(WIDTH)
    d.threshold[4] = -0.1
    part = Part(Site("block_output", 1), 4, "x", JumpReLUAutoencoder(d, error_term=False))
    with pytest.raises(UsageError, match="threshold is below 0"):
        write_pyvene(tmp_path, Trained((part,), {}), anatomy_of(model("gpt2")))


@pytest.mark.parametrize("name", ["rotated, some", "low rank", "pca"])
def test_columns_that_we_write(name: str, tmp_path: Path) -> None:
    """A basis of some columns is a basis of low rank of all."""
    site = Site("block_output", 1, None, None, tuple(range(40, 4, -2)))
    both_ways("gpt2", [Part(site, 4, "x", OURS[name](18))], [[4]], tmp_path / "a")
    heads = Site("query_output", 1, None, (2, 1), (3, 0, 7, 8, 1))
    both_ways("gpt2", [Part(heads, 4, "x", OURS[name](10))], [[4]], tmp_path / "b")


def test_vanilla_columns_that_we_write(tmp_path: Path) -> None:
    for i, dims in enumerate([(0, 1, 2), (5, 40, 2)]):
        site = Site("mlp_output", 1, None, None, dims)
        both_ways("gpt2", [Part(site, 4, "x", Vanilla())], [[4]], tmp_path / str(i))
    heads = Site("value_output", 1, None, (2, 1), (3, 0, 7))
    both_ways("gpt2", [Part(heads, 4, "x", Vanilla())], [[4]], tmp_path / "heads")
    first = Site("mlp_output", 1, None, None, (0, 1, 2))
    steer = Constant(Addition(), torch.tensor([4.0, -3.0, 2.0]))
    both_ways("gpt2", [Part(first, 4, "x", steer)], [[4]], tmp_path / "steer")


def test_parts_of_one_basis_that_we_write(tmp_path: Path) -> None:
    """Each for itself: linked ones pyvene chains, and tells apart at the call only."""
    basis = trained_rotation(WIDTH, WIDTH)
    site = Site("block_output", 1)
    parts = [
        Part(site, "S2", "name", RotatedSpace(basis, (0, 5))),
        Part(site, "S2", "place", RotatedSpace(basis, (3, 7, 8))),
        Part(Site("mlp_output", 2), -1, "name", Vanilla()),
    ]
    both_ways("llama", parts, [[4], [4], [6]], tmp_path)


@pytest.mark.parametrize("component", ["mlp_activation", "mlp_gate_activation", "resid_mid"])
def test_components_under_other_names(component: str, tmp_path: Path) -> None:
    site = Site(component, 1)
    both_ways("llama", [Part(site, 4, "x", Vanilla())], [[4]], tmp_path)
    if component == "mlp_gate_activation":
        return
    width = anatomy_of(model("llama")).width(component)
    assert width is not None
    low = Part(site, 4, "x", OURS["low rank"](width))
    with pytest.raises(UsageError, match=f"pyvene has no component {component} of this model"):
        write_pyvene(tmp_path, Trained((low,), {}), anatomy_of(model("llama")))


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt_neox", "mistral", "gemma", "gemma2", "qwen2"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    width = anatomy_of(model(kind)).width("block_output")
    assert width is not None
    for component in ("block_output", "attention_output", "mlp_output"):
        part = Part(Site(component, 1), 4, "x", OURS["low rank"](width))
        both_ways(kind, [part], [[4]], tmp_path / component)


BLOCK = Site("block_output", 1)
CANNOT: list[tuple[str, Part, str]] = [
    ("llama", Part(BLOCK, 4, "x", Lora(Adapter.seeded(WIDTH, 2, 1, 0))), "no such type"),
    ("llama", Part(BLOCK, 4, "x", Scale(2)), "no such type"),
    ("llama", Part(BLOCK, 4, "x", Noise(1, 1, 0)), "no such type"),
    ("llama", Part(BLOCK, 4, "x", Collect()), "no such type"),
    ("llama", Part(BLOCK, None, "x", OURS["low rank"](WIDTH)), "at all positions: pyvene takes"),
    ("llama", Part(BLOCK, 4, "x", Autoencoder(relu(WIDTH))), "with its error term"),
    ("llama", Part(Site("block_output", 9), 4, "x", Vanilla()), "no layer 9"),
    ("llama", Part(Site("block", 1), 4, "x", Vanilla()), "no component 'block'"),
    (
        "llama",
        Part(Site("attention_weight", 1), 4, "x", Vanilla()),
        "no component attention_weight",
    ),
    ("qwen3", Part(BLOCK, 4, "x", OURS["low rank"](WIDTH)), "no component block_output of this"),
    (
        "llama",
        Part(Site("key_output", 1), 4, "x", OURS["low rank"](24)),
        "to be of another width than it is",
    ),
    (
        "gemma",
        Part(Site("attention_value_output", 1), 4, "x", OURS["low rank"](64)),
        "to be of another width than it is",
    ),
    (
        "llama",
        Part(
            BLOCK,
            4,
            "x",
            SigmoidMaskRotatedSpace(trained_rotation(WIDTH, 4), gate(Mask, 4)),
        ),
        "its rotation is 48 by 4; pyvene's is square",
    ),
    (
        "llama",
        Part(Site("query_output", 1, None, (1,)), 4, "x", OURS["boundless"](HEAD)),
        "of heads it fails in pyvene",
    ),
    (
        "llama",
        Part(Site("block_output", 1, None, None, (3, 4)), 4, "x", Addition()),
        "without being told at the call, pyvene takes the first",
    ),
    (
        "llama",
        Part(Site("block_output", 1, None, None, (3, 4)), 4, "x", OURS["mask"](2)),
        "at some columns only",
    ),
    (
        "llama",
        Part(BLOCK, 4, "x", Constant(OURS["low rank"](WIDTH), torch.ones(WIDTH))),
        "with a constant source pyvene has no 'low_rank_rotated_space'",
    ),
    ("llama", Part(BLOCK, 4, "x", Replace(torch.ones(2, WIDTH))), "a value for each position"),
    (
        "llama",
        Part(
            BLOCK,
            4,
            "x",
            PCARotatedSpace(torch.eye(3, WIDTH), torch.zeros(WIDTH), torch.full((WIDTH,), 2.0)),
        ),
        "of standardised activations",
    ),
]


@pytest.mark.parametrize(("kind", "part", "message"), CANNOT, ids=[m for _, _, m in CANNOT])
def test_what_pyvene_cannot(kind: str, part: Part, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_pyvene(tmp_path, Trained((part,), {}), anatomy_of(model(kind)))
    assert message in str(caught.value)
    assert f"part 0 ({part.intervention.name}): " in str(caught.value)
    assert not list(tmp_path.iterdir())


# Folders that are not as they should be


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = pyvene.RepresentationConfig(1, "block_output", "pos", 1, low_rank_dimension=3)
    saved(model("gpt2"), tmp_path, [pyvene.LowRankRotatedSpaceIntervention], [row])
    return tmp_path


def fails(folder: Path, message: str, **told: Any) -> None:
    with pytest.raises(UsageError) as caught:
        read_pyvene(folder, **told)
    assert message in str(caught.value)


def put(folder: Path, key: str, value: object, field: int | None = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    if field is None:
        config[key] = value
    else:
        config[key][0][field] = value
    (folder / "config.json").write_text(json.dumps(config))


CONFIGS: list[tuple[str, object, int | None, str]] = [
    ("mode", "serial", None, "the mode is 'serial'"),
    ("intervention_types", [], None, "as many intervention_types as representations"),
    ("representations", "x", None, "expected lists 'representations'"),
    ("representations", [[1, 2]], None, "representation 0 is not pyvene's: [1, 2]"),
    ("representations", "1", 0, "representation 0 is not pyvene's: ['1'"),
    ("representations", 0, 3, "representation 0 is not pyvene's"),
    ("representations", [[1], 2], 7, "representation 0 is not pyvene's"),
    ("representations", [1], 8, "representation 0 is not pyvene's"),
    ("intervention_dimensions", ["x"], None, "intervention dimension x"),
    ("intervention_types", ["<class 'os.system'>"], None, "only pyvene's own can be read"),
    (
        "intervention_types",
        ["<class 'pyvene.models.interventions.NewIntervention'>"],
        None,
        "this type is not known; known are VanillaIntervention",
    ),
    (
        "intervention_types",
        ["<class 'pyvene.models.interventions.PCARotatedSpaceIntervention'>"],
        None,
        "pyvene does not save its components",
    ),
    (
        "intervention_types",
        ["<class 'pyvene.models.interventions.BoundlessRotatedSpaceIntervention'>"],
        None,
        "has no 'temperature'",
    ),
    ("representations", "nothing", 1, "the component 'nothing' has no name here"),
    ("representations", "attention_weight", 1, "never fires"),
    ("representations", "t", 2, "the unit 't' of block_output"),
    ("representations", 2, 3, "made for 2 positions, which pyvene takes as one long vector"),
    ("representations", 3, 10, "a single expert"),
    ("representations", 2, 0, "its file intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin"),
    ("interv", {"parts": []}, None, "'interv' is not what interv writes"),
]


@pytest.mark.parametrize(
    ("key", "value", "field", "message"), CONFIGS, ids=[m for *_, m in CONFIGS]
)
def test_damaged_configs(
    folder: Path, key: str, value: object, field: int | None, message: str
) -> None:
    put(folder, key, value, field)
    fails(folder, message)


def test_damaged_files(folder: Path) -> None:
    fails(folder, "2 units for 1 representations", units=[1, 2])
    fails(folder / "nowhere", "expected a folder that pyvene's IntervenableModel.save wrote")
    (file,) = folder.glob("*.bin")
    state = torch.load(file, weights_only=True)
    original = "rotate_layer.parametrizations.weight.original"
    for wrong, message in (
        ({**state, original: torch.ones(3)}, "has the shape (3,), expected finite numbers"),
        ({**state, original: state[original] * torch.nan}, "expected finite numbers"),
        # Signs that weight decay has shrunk: torch makes them 0, and the rotation with them.
        ({**state, original: 0.9 * state[original]}, "are not orthonormal"),
        ({k: v for k, v in state.items() if k != original}, "has no 'rotate_layer"),
        ([1], "holds other things than tensors"),
        ({"a": 1}, "holds other things than tensors"),
    ):
        torch.save(wrong, file)
        fails(folder, message)
    file.write_bytes(b"not a pickle")
    fails(folder, "is not a file of tensors")
    (folder / "config.json").write_text("{")
    fails(folder, "not JSON")


class Bomb:
    """Something that would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "boom")


def test_nothing_is_run(folder: Path, tmp_path: Path) -> None:
    (file,) = folder.glob("*.bin")
    target = tmp_path / "boom"
    torch.save({"weight": Bomb(target)}, file)
    fails(folder, "is not a file of tensors")
    assert not target.exists()
