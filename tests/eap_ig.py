"""Numbers of the authors' own code for edge attribution and circuits, on two small models.

EAP-IG (github.com/hannamw/EAP-IG, commit 795f560) and MIB's evaluation
(github.com/hannamw/MIB-circuit-track, commit b759df3) were run with TransformerLens 2.16.1 in
float64 on the models below, on the CPU, with prompts given as token ids. Faithfulness is at MIB's
ten sizes. Nothing here imports interv.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_positions": 64, "vocab_size": 100, **_IDS},
    "llama": {
        "hidden_size": 48,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        **_IDS,
    },
}
CLEAN = ([7, 23, 41, 9, 66, 23, 12], [8, 31, 55, 9, 66, 31, 12], [7, 72, 18, 9, 90, 72, 14])
CORRUPTED = ([7, 23, 41, 9, 66, 41, 12], [8, 31, 55, 9, 66, 55, 12], [7, 72, 18, 9, 90, 18, 14])
ANSWERS = ((41, 23), (55, 31), (18, 72))
"""The right token and the wrong one, whose logits' difference is the metric."""
STEPS = 4


class Side(NamedTuple):
    """Circuits of one ranking."""

    edges: list[int]
    faithfulness: list[float]
    area_under: float
    area_from_1: float


class Numbers(NamedTuple):
    """What the code printed.

    Attributes:
        scores: of some edges, where a positive one helps the metric: what carrying something else
            over it takes away.
        signed, magnitude: `absolute=False` and `absolute=True`.
    """

    model: str
    method: str
    intervention: str
    n_edges: int
    baseline: float
    empty: float
    scores: dict[str, float]
    signed: Side
    magnitude: Side


def text(ids: list[int]) -> str:
    """A prompt as text."""
    return " ".join(f"w{i}" for i in ids)


def save(name: str, folder: Path) -> None:
    """Write a model and its tokenizer of one word for each token.

    The weights are waves, not random numbers: the same under every version of torch.
    """
    config = AutoConfig.for_model(name, **_CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).requires_grad_(False)
    for k, (path, weights) in enumerate(sorted(model.named_parameters())):
        i = torch.arange(weights.numel(), dtype=torch.float64)
        wave = torch.sin(0.618034 * i * i + k).reshape(weights.shape)
        if weights.ndim == 1:
            weights.copy_(0.2 * wave + (1 if "weight" in path else 0))
        elif "wte" in path or "wpe" in path or "embed" in path:
            weights.copy_(wave)
        else:
            wide = weights.shape[0] if name == "gpt2" else weights.shape[1]
            weights.copy_(2 * wave / wide**0.5)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w99"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "w99"}))


NUMBERS = [
    Numbers(
        "gpt2",
        "EAP",
        "patching",
        262,
        -1.196057099,
        -1.449793749,
        {
            "input a0.h0.v": 1.355984092,
            "input a0.h3.q": 0.9132723212,
            "input a0.h0.k": -0.8492982984,
            "a0.h3 a1.h0.q": -0.2135528475,
            "m0 a1.h0.q": -0.06027541682,
        },
        Side(
            [0, 0, 0, 0, 3, 7, 14, 41, 94, 262],
            [
                0.0,
                0.0,
                0.0,
                0.0,
                0.4879488276,
                1.674166539,
                2.383626696,
                2.696497872,
                4.046223748,
                1.0,
            ],
            2.663286714,
            1.712768761,
        ),
        Side(
            [0, 0, 0, 0, 0, 9, 10, 46, 130, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 1.621400462, 2.580381913, 3.585661743, 3.063249739, 1.0],
            2.450816906,
            1.519816906,
        ),
    ),
    Numbers(
        "gpt2",
        "EAP",
        "zero",
        262,
        -1.196057099,
        -4.455336136,
        {
            "input a0.h3.k": -2.015938044,
            "input a0.h3.v": 1.984818816,
            "m0 logits": -1.823329091,
            "input a0.h1.q": -0.6105394959,
            "input a2.h2.q": 0.1861130893,
        },
        Side(
            [0, 0, 0, 0, 0, 2, 10, 30, 115, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 2.524127204, 4.800395626, 5.337828083, 5.560812199, 1.0],
            4.002885256,
            3.071885256,
        ),
        Side(
            [0, 0, 0, 0, 0, 2, 18, 46, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, -0.894948538, 1.433383471, 2.14617464, 0.8262655595, 1.0],
            1.081446971,
            0.4410304061,
        ),
    ),
    Numbers(
        "gpt2",
        "EAP",
        "mean-positional",
        262,
        -1.196057099,
        -1.504671353,
        {
            "input a0.h3.v": 1.007112026,
            "input a0.h1.q": -0.9654704332,
            "input a0.h0.k": -0.8826743364,
            "a1.h0 logits": -0.3850812316,
            "m1 a2.h2.v": -0.1110990196,
        },
        Side(
            [0, 0, 0, 0, 0, 4, 14, 50, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 2.154871259, 3.818498423, 5.215544016, 9.244094583, 1.0],
            5.363328868,
            4.432328868,
        ),
        Side(
            [0, 0, 0, 0, 0, 0, 15, 51, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.099612741, 2.401108083, 0.6818772502, 1.0],
            1.160443472,
            0.5639416721,
        ),
    ),
    Numbers(
        "gpt2",
        "EAP-IG-inputs",
        "patching",
        262,
        -1.196057099,
        -1.449793749,
        {
            "m0 logits": 0.5490344167,
            "input a0.h0.v": 0.5249328017,
            "input a1.h2.k": -0.4924387038,
            "a0.h3 a1.h1.q": -0.1814135313,
            "m0 a1.h2.k": -0.047493577,
        },
        Side(
            [0, 0, 0, 0, 0, 7, 20, 42, 88, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 1.708463185, 2.357871981, 2.96688805, 3.600702888, 1.0],
            2.528837691,
            1.597837691,
        ),
        Side(
            [0, 0, 0, 0, 0, 4, 8, 46, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.6730795509, 1.641914711, 2.222655183, 1.15915787, 1.0],
            1.30826097,
            0.4034146056,
        ),
    ),
    Numbers(
        "llama",
        "EAP",
        "patching",
        262,
        1.277754035,
        1.252122868,
        {
            "a0.h1 m0": 0.4592746198,
            "m0 m1": 0.3128111064,
            "m1 logits": 0.2745755911,
            "m0 a1.h3.q": -0.07050753385,
            "m0 a2.h2.k": -0.01294086408,
        },
        Side(
            [0, 0, 0, 0, 3, 8, 19, 35, 87, 262],
            [
                0.0,
                0.0,
                0.0,
                0.0,
                8.663070486e-15,
                13.56669791,
                16.44427832,
                20.25548885,
                18.60815359,
                1.0,
            ],
            13.52034799,
            12.58934799,
        ),
        Side(
            [0, 0, 0, 0, 0, 11, 17, 48, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 12.55735187, 15.92611638, 18.12705027, 7.71774759, 1.0],
            8.659261894,
            7.728261894,
        ),
    ),
    Numbers(
        "llama",
        "EAP",
        "zero",
        262,
        1.277754035,
        -2.980630574e-13,
        {
            "a0.h0 m0": 1.186056376,
            "a0.h2 m0": -0.9826303124,
            "m2 logits": 0.9047599435,
            "m0 m2": -0.2057332546,
            "a0.h1 a2.h2.v": 0.05657506734,
        },
        Side(
            [0, 0, 0, 0, 0, 5, 11, 23, 93, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 1.503247376, 0.968236752, 1.125047776, 2.493576867, 1.0],
            1.605187953,
            0.6789524406,
        ),
        Side(
            [0, 0, 0, 0, 0, 0, 10, 25, 73, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1629673851, 0.3259654908, -0.8976582571, 1.0],
            -0.03164765081,
            1.030647651,
        ),
    ),
    Numbers(
        "llama",
        "EAP",
        "mean-positional",
        262,
        1.277754035,
        0.7390004279,
        {
            "a0.h1 m0": -1.408131838,
            "a0.h0 m0": -0.8718795776,
            "a0.h2 m0": 0.5537383556,
            "m0 a1.h3.q": -0.2220675349,
            "a0.h3 a1.h1.v": -0.05467781052,
        },
        Side(
            [0, 0, 0, 0, 0, 0, 19, 49, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.036130105, 4.700921209, 3.645584464, 1.0],
            2.801127785,
            1.950127785,
        ),
        Side(
            [0, 0, 0, 0, 0, 6, 22, 48, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, -1.748539264, 0.1067211449, -1.066106278, 0.6169335819, 1.0],
            0.2216146924,
            0.7773853076,
        ),
    ),
    Numbers(
        "llama",
        "EAP-IG-inputs",
        "patching",
        262,
        1.277754035,
        1.252122868,
        {
            "m1 logits": 0.2581361532,
            "a0.h1 m0": 0.2334375232,
            "a0.h1 m1": -0.2033812702,
            "a1.h2 logits": -0.06636172533,
            "a0.h1 a1.h0.v": 0.0155210346,
        },
        Side(
            [0, 0, 0, 0, 0, 7, 14, 32, 83, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 5.521119492, 6.778237521, 10.10988792, 9.329909751, 1.0],
            6.733154077,
            5.802154077,
        ),
        Side(
            [0, 0, 0, 0, 0, 10, 21, 49, 131, 262],
            [0.0, 0.0, 0.0, 0.0, 0.0, 13.46615326, 3.126456434, 6.490874014, 3.330202939, 1.0],
            3.653386341,
            2.722386341,
        ),
    ),
]
