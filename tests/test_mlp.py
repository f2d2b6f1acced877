"""MLPs: against formulas, against pyvene's own module, and the network whose weights are set."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from interv.engine import (
    Edit,
    Inputs,
    ReferenceExecutor,
    RotatedSpace,
    Run,
    Site,
    SuffixExecutor,
    Vanilla,
    Zero,
)
from interv.engine.mlp import Activation, Mlp, equality_mlp, mlp_anatomy
from interv.engine.rotations import Rotation
from interv.errors import EngineError

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    from pyvene.models.mlp.modelings_mlp import MLPConfig, MLPForClassification

HIDDEN = (6, 5, 7)


def small(activation: Activation = "tanh", hidden: tuple[int, ...] = HIDDEN) -> Mlp:
    """A random MLP of 4 inputs and 3 outputs, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Mlp(4, hidden, 3, activation).double().eval().requires_grad_(False)


def executor(model: Mlp, hidden: tuple[int, ...] = HIDDEN) -> ReferenceExecutor:
    return ReferenceExecutor(model, mlp_anatomy(4, hidden, 3))


def vector(seed: int, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def run(x: Tensor, *edits: Edit) -> Run:
    return Run(Inputs(inputs=x), edits)


def by_hand(model: Mlp, x: Tensor, *, upto: int = 3, begin: int = 0) -> Tensor:
    """What block `upto - 1` gives; after the last block the logits."""
    weights = dict(model.named_parameters())
    for k in range(begin, upto):
        x = torch.tanh(weights[f"h.{k}.ff1.weight"] @ x + weights[f"h.{k}.ff1.bias"])
    return x


def head(model: Mlp, state: Tensor) -> Tensor:
    return model.score.weight @ state + model.score.bias


def test_forward_is_its_formula() -> None:
    model, x = small(), vector(0)
    expected = head(model, by_hand(model, x))
    torch.testing.assert_close(model(x[None])[0], expected)
    torch.testing.assert_close(executor(model).logits([run(x)])[0], expected)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_same_logits_as_pyvene(activation: Activation) -> None:
    model = small(activation, (4, 4))
    config = MLPConfig(h_dim=4, n_layer=2, num_classes=3, activation_function=activation)
    config.squeeze_output = False
    theirs = MLPForClassification(config).double().eval()
    theirs.load_state_dict(
        {f"mlp.{k}" if k.startswith("h.") else k: v for k, v in model.state_dict().items()}
    )
    x = torch.stack([vector(i) for i in range(5)])
    expected = theirs(inputs_embeds=x[:, None], return_dict=True).logits[:, 0]
    torch.testing.assert_close(model(x), expected.detach())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_swap_of_some_units(layer: int) -> None:
    model, base, source = small(), vector(1), vector(2)
    units = (3, 0)
    site = Site("block_output", layer, dims=units)
    state = by_hand(model, base, upto=layer + 1)
    state[list(units)] = by_hand(model, source, upto=layer + 1)[list(units)]
    got = executor(model).logits([run(base, Edit(site, Vanilla(), run(source)))])[0]
    torch.testing.assert_close(got, head(model, by_hand(model, state, begin=layer + 1)))


def test_swap_of_a_blocks_input_is_one_of_the_output_before() -> None:
    model, base, source = small(), vector(1), vector(2)
    runs = [
        run(base, Edit(Site(component, layer, dims=(1, 2)), Vanilla(), run(source)))
        for component, layer in (("block_input", 1), ("block_output", 0), ("block_input", 0))
    ]
    inside, before, first = executor(model).logits(runs)
    assert torch.equal(inside, before)
    mixed = base.clone()
    mixed[1:3] = source[1:3]
    torch.testing.assert_close(first, head(model, by_hand(model, mixed)))


def test_zeros_and_logits() -> None:
    model, x = small(), vector(1)
    runs = [
        run(x, Edit(Site("block_output", 2), Zero())),
        run(x, Edit(Site("logits", dims=(1,)), Zero())),
    ]
    zeroed, cut = executor(model).logits(runs)
    torch.testing.assert_close(zeroed, model.score.bias.data)
    expected = head(model, by_hand(model, x))
    expected[1] = 0
    torch.testing.assert_close(cut, expected)


def test_rotation() -> None:
    model, base, source = small(), vector(1), vector(2)
    rotation = Rotation.seeded(5, 5, seed=0).double()
    intervention = RotatedSpace(rotation, dims=(0, 3))
    got = executor(model).logits(
        [run(base, Edit(Site("block_output", 1), intervention, run(source)))]
    )[0]
    b, s = by_hand(model, base, upto=2), by_hand(model, source, upto=2)
    basis = rotation().detach()[:, [0, 3]]
    mixed = b + basis @ (basis.T @ (s - b))
    torch.testing.assert_close(got, head(model, by_hand(model, mixed, begin=2)))


def test_many_runs_share_a_forward_and_keep_their_order() -> None:
    model = small()
    site = Site("block_output", 0, dims=(2,))
    runs = [run(vector(i), Edit(site, Vanilla(), run(vector(i + 1)))) for i in range(5)]
    together = executor(model).logits(runs)
    for alone, row in zip(runs, together, strict=True):
        torch.testing.assert_close(executor(model).logits([alone])[0], row)
    (states,) = executor(model).states([run(vector(0))], [Site("block_output", 1)])
    torch.testing.assert_close(states[0][0], by_hand(model, vector(0), upto=2))


def test_suffix_executor_refuses_vectors() -> None:
    with pytest.raises(EngineError, match="token ids only"):
        SuffixExecutor(small(), mlp_anatomy(4, HIDDEN, 3)).logits([run(vector(0))])


def test_anatomy() -> None:
    anatomy = mlp_anatomy(4, HIDDEN, 3)
    assert anatomy.components == ("block_input", "block_output", "logits")
    assert (anatomy.n_layers, anatomy.reach) == (3, "layers")
    assert str(anatomy.place("block_output", 2)) == "h.2.output"
    assert anatomy.layer_of(anatomy.place("logits", 0)) == 3
    assert anatomy.facts is not None
    assert anatomy.facts.n_params == sum(p.numel() for p in small().parameters())
    assert [anatomy.width_at("block_output", k) for k in range(3)] == [6, 5, 7]
    assert [anatomy.width_at("block_input", k) for k in range(3)] == [4, 6, 5]
    assert anatomy.width("block_output") is None
    assert anatomy.width("logits") == anatomy.width_at("logits", 0) == 3
    even = mlp_anatomy(16, (16, 16), 2)
    assert (even.width("block_input"), even.width("block_output")) == (16, 16)
    wider = mlp_anatomy(8, (16, 16), 2)
    assert (wider.width("block_input"), wider.width("block_output")) == (None, 16)


def test_anatomy_errors() -> None:
    anatomy = mlp_anatomy(4, HIDDEN, 3)
    with pytest.raises(EngineError, match="no layer 3, there are 3"):
        anatomy.width_at("block_output", 3)
    with pytest.raises(EngineError, match=r"MLP models have no component 'mlp_output'.*logits"):
        anatomy.place("mlp_output", 0)
    with pytest.raises(EngineError, match="at least one hidden layer"):
        mlp_anatomy(4, (), 3)
    edit = Edit(Site("block_output", 1, dims=(5,)), Zero())
    with pytest.raises(EngineError, match="dimension 5: there are 5"):
        executor(small()).logits([run(vector(0), edit)])


def entities(n: int, width: int, seed: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """w, x, y, z side by side `[n, 4 · width]`; whether w = x, and whether y = z."""
    rng = np.random.default_rng(seed)
    each = rng.uniform(-1, 1, (n, 4, width)).astype(np.float32)
    left, right = rng.random(n) < 0.5, rng.random(n) < 0.5
    each[left, 1], each[right, 3] = each[left, 0], each[right, 2]
    return torch.from_numpy(each.reshape(n, -1)), left, right


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equality_network_is_never_wrong(width: int, dtype: torch.dtype) -> None:
    x, left, right = entities(100_000, width, seed=width)
    model = equality_mlp(width, dtype)
    answers = model(x.to(dtype)).argmax(-1).numpy()
    assert (answers == (left == right)).all()
    for scale in (1e-3, 1e3):
        assert (model(x.to(dtype) * scale).argmax(-1).numpy() == (left == right)).all()


def test_equality_network_on_one_example() -> None:
    """w − x = (0.5, −0.25), y = z: a = 0.75, b = 0."""
    x = torch.tensor([[0.75, 0.25, 0.25, 0.5, 0.1, 0.2, 0.1, 0.2]])
    model = equality_mlp()
    first = model.h[0](x)
    assert first.tolist() == [[0.5, 0, 0, 0.25, 0, 0, 0, 0]]
    assert model.h[1](first).tolist() == [[0.75, 0, 0.75, 0, 0, 0, 0, 0]]
    assert model(x).tolist() == [[0.75, 0.75 * (1 - 2**-16)]]


@pytest.mark.parametrize("half", ["left", "right"])
def test_equality_network_interchanged(half: str) -> None:
    n = 600
    base, base_left, base_right = entities(n, 2, seed=0)
    source, source_left, source_right = entities(n, 2, seed=1)
    units = (0, 1, 2, 3) if half == "left" else (4, 5, 6, 7)
    site = Site("block_output", 0, dims=units)
    runs = [run(b, Edit(site, Vanilla(), run(s))) for b, s in zip(base, source, strict=True)]
    model = ReferenceExecutor(equality_mlp(), mlp_anatomy(8, (8, 8), 2))
    answers = model.logits(runs).argmax(-1).numpy()
    left = source_left if half == "left" else base_left
    right = source_right if half == "right" else base_right
    assert (answers == (left == right)).all()
    # Half of the labels are others than the base's: the base's own answers would not do.
    assert 0.4 < ((left == right) != (base_left == base_right)).mean() < 0.6


def test_equality_network_at_wrong_units() -> None:
    """The first coordinate alone: w = x is then said where base and source both have it."""
    base, base_left, base_right = entities(400, 2, seed=0)
    source, source_left, _ = entities(400, 2, seed=1)
    site = Site("block_output", 0, dims=(0, 1))
    runs = [run(b, Edit(site, Vanilla(), run(s))) for b, s in zip(base, source, strict=True)]
    model = ReferenceExecutor(equality_mlp(), mlp_anatomy(8, (8, 8), 2))
    answers = model.logits(runs).argmax(-1).numpy()
    assert (answers == ((base_left & source_left) == base_right)).all()
    assert (answers == (source_left == base_right)).mean() < 0.85


def test_equality_network_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    model = equality_mlp()
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    used = [bool(model.h[1].ff1.weight[i].any()) for i in range(8)]
    assert used == [*itertools.repeat(True, 4), *itertools.repeat(False, 4)]
    with pytest.raises(EngineError, match="width 0: at least 1"):
        equality_mlp(0)
