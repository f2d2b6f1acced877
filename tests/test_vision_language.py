"""The text side of models of images and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from interv.engine import Edit, ReferenceExecutor, Run, Site, SuffixExecutor, Vanilla
from interv.engine.load import load_model
from interv.models import locate
from interv.spec.schema import ModelSection
from tests.conftest import Result, save_tokenizer

_TEXT = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_VISION},
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_VISION},
    },
    "qwen2_vl": {
        "text_config": {
            "model_type": "qwen2_vl_text",
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    },
    "gemma3": {
        "text_config": {"sliding_window": 4, "pad_token_id": 0, **_TEXT},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
}
IDS, OTHER = (5, 9, 70, 33, 12, 8), (5, 9, 71, 33, 12, 8)


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = transformers.AutoConfig.for_model(request.param, **CONFIGS[request.param])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(made)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def test_its_text_is_patched_as_by_plain_hooks(folder: Path) -> None:
    section = ModelSection(path=str(folder), dtype="float64")
    loaded = load_model(locate(section, 0), section, 0, "cpu")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    blocks = next(
        module
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 3
    )
    kept: list[torch.Tensor] = []

    def patch(_module: object, _args: object, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if not kept:
            kept.append(hidden.clone())
            return output
        hidden = hidden.clone()
        hidden[:, 2] = kept[0][:, 2]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    with torch.no_grad():
        handle = blocks[1].register_forward_hook(patch)
        theirs(input_ids=torch.tensor([OTHER]))
        expected = theirs(input_ids=torch.tensor([IDS])).logits[0]
        handle.remove()
        plain = theirs(input_ids=torch.tensor([IDS])).logits[0]
    run = Run(IDS, (Edit(Site("block_output", 1, (2,)), Vanilla(), Run(OTHER)),))
    for kind in (ReferenceExecutor, SuffixExecutor):
        found = kind(loaded.module, loaded.anatomy).logits([run, Run(IDS)], None)
        assert torch.allclose(found[0], expected, rtol=0, atol=1e-9)
        assert torch.allclose(found[1], plain, rtol=0, atol=1e-9)
    assert (expected - plain).abs().max() > 1e-3


def test_its_components_are_found_from_the_config(folder: Path, cli: Callable[..., Result]) -> None:
    result = cli("inspect", folder, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["shape"]["n_layers"] == 3
    modules = {line["component"]: line["module"] for line in document["components"]}
    assert {"block_output", "mlp_output", "logits"} <= set(modules)
    assert "vision" not in modules["block_output"]
