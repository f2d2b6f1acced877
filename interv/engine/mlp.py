"""Multi-layer perceptrons, with pyvene's names, and one whose weights are set by hand.

Their inputs are vectors, not tokens: `Run(Inputs(inputs=x))`, x `[inputs]`; sites have no
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor, nn

from interv.errors import EngineError
from interv.models.made import mlp_anatomy

__all__ = ["Mlp", "MlpBlock", "equality_mlp", "mlp_anatomy"]

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
Activation = Literal["relu", "tanh", "gelu"]

_SHRINK = 2.0**-16
_TIE = 2.0**-40


@final
class MlpBlock(nn.Module):
    """One hidden layer: `[row, width before]` to `[row, width]`."""

    def __init__(self, before: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.ff1 = nn.Linear(before, width)
        self.act = _ACTIVATIONS[activation]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.act(self.ff1(hidden_states))
        return out


@final
class Mlp(nn.Module):
    """Blocks `h.0`, `h.1`, ..., and a linear head `score`; the weights are torch's initial ones.

    Args:
        inputs: width of the input.
        hidden: width of each hidden layer.
        outputs: how many logits.
        activation: after each hidden layer.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        self.h = nn.ModuleList(
            MlpBlock(before, width, activation) for before, width in pairwise(widths)
        )
        self.score = nn.Linear(widths[-1], outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits `[row, outputs]` of inputs `[row, inputs]`."""
        for block in self.h:
            inputs = block(inputs)
        logits: Tensor = self.score(inputs)
        return logits


def equality_mlp(width: int = 2, dtype: torch.dtype = torch.float32) -> Mlp:
    """The network that answers (w = x) = (y = z) by hand-set weights, two ReLU layers of 4 · width.

    The input is w, x, y and z, each `[width]`, one after the other; the answers are 0 (the two
    equalities differ) and 1 (they agree).

    Block 0 has the positive and the negative part of each coordinate's difference,

        unit 2i      relu(wᵢ − xᵢ)     unit 2 width + 2i      relu(yᵢ − zᵢ)
        unit 2i + 1  relu(xᵢ − wᵢ)     unit 2 width + 2i + 1  relu(zᵢ − yᵢ)

    so that the first half sums to a = |w − x|₁, which is 0 just where w = x, and the second to
    b = |y − z|₁. Block 1 has a, b, relu(a − b), relu(b − a), and zeros. The head gives

        logit 0 = relu(a − b) + relu(b − a) = |a − b|
        logit 1 = (1 − ε)(a + b) + c,  ε = 2⁻¹⁶, c = 2⁻⁴⁰

    Where both are equal, 0 < c: answer 1. Where one is, say b = 0: a > (1 − ε) a + c as soon as
    a > c / ε = 2⁻²⁴: answer 0. Where neither is, |a − b| = a + b − 2 min(a, b) is below
    (1 − ε)(a + b) as soon as the smaller is more than ε / 2 of the sum: answer 1. No network of
    this kind does without such margins, being continuous; 2-d entities drawn from [−1, 1]² fall
    into them less than once in 10⁹ draws, and rounding (2⁻²⁴) is far below ε.

    Whether w = x is thus a function of the first half of block 0 and whether y = z one of the
    second: an interchange of either gives the label of the causal model.

    Args:
        width: of an entity's vector.
        dtype: of the weights.

    Raises:
        EngineError: a width below 1.
    """
    if width < 1:
        raise EngineError(f"an entity's vector of width {width}: at least 1")
    half = 2 * width
    with torch.device("meta"):  # without drawing weights from torch's generator
        model = Mlp(2 * half, (2 * half, 2 * half), 2)
    model = model.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first, second = (block.ff1 for block in model.h if isinstance(block, MlpBlock))
        for i in range(width):
            for unit, column in ((2 * i, i), (half + 2 * i, half + i)):
                first.weight[unit, column] = first.weight[unit + 1, column + width] = 1
                first.weight[unit, column + width] = first.weight[unit + 1, column] = -1
        second.weight[0, :half] = second.weight[1, half:] = 1
        second.weight[2] = second.weight[0] - second.weight[1]
        second.weight[3] = -second.weight[2]
        model.score.weight[0, 2:4] = 1
        model.score.weight[1, :2] = 1 - _SHRINK
        model.score.bias[1] = _TIE
    return model.eval().requires_grad_(False)
