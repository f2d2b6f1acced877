"""Adapters in a model's folder: merged, part of the identity, or refused by name."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interv.engine.load import load_model
from interv.errors import ModelError
from interv.models import locate
from interv.spec.schema import ModelSection
from tests.conftest import Result, SpecWriter

# What peft calls of transformers is deprecated there; interv itself silences that.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[5, 9, 70, 33, 12]])
QKV = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
KINDS: dict[str, Callable[[list[str]], peft.PeftConfig]] = {
    "lora": lambda names: peft.LoraConfig(r=2, lora_alpha=8, target_modules=names),
    "dora": lambda names: peft.LoraConfig(
        r=2, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=names
    ),
    "adalora": lambda names: peft.AdaLoraConfig(
        init_r=2, target_r=2, total_step=10, target_modules=names
    ),
    "loha": lambda names: peft.LoHaConfig(r=2, alpha=8, target_modules=names),
    "lokr": lambda names: peft.LoKrConfig(r=2, alpha=8, target_modules=names),
    "ia3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=[]),
}


def adapt(base: Path, folder: Path, config: peft.PeftConfig) -> None:
    """Save an adapter with random weights for a base."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = model.config.model_type == "gpt2"
    wrapped: Any = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def section(folder: Path) -> ModelSection:
    return ModelSection(path=str(folder), dtype="float64")


def logits(folder: Path) -> torch.Tensor:
    model = load_model(locate(section(folder), 0), section(folder), 0, "cpu")
    with torch.no_grad():
        return model.module(IDS).logits


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of the adapter beside its base, not merged, by peft itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(adapter))(IDS).logits


@pytest.fixture
def both(llama_folder: Path, tmp_path: Path) -> Path:
    """A base's weights with a LoRA adapter beside them."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "both"))
    adapt(llama_folder, tmp_path / "adapter", KINDS["lora"](QKV["llama"]))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_an_adapter_is_merged_as_peft_applies_it(
    kind: str, base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if base == "gpt2" and kind in ("loha", "lokr"):
        pytest.skip("peft has these for linear layers alone")
    weights: Path = request.getfixturevalue(f"{base}_folder")
    adapt(weights, tmp_path, KINDS[kind](QKV[base]))
    found, expected = logits(tmp_path), by_peft(weights, tmp_path)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert (found - logits(weights)).abs().max() > 1e-2


def test_an_adapter_beside_its_base_is_applied(both: Path, llama_folder: Path) -> None:
    found = logits(both)
    assert torch.allclose(found, by_peft(llama_folder, both), rtol=0, atol=1e-9)
    # The weights beside it are its base, whatever its config names.
    edit(both, base_model_name_or_path="owner/elsewhere")
    assert torch.equal(logits(both), found)


def test_an_adapter_alone_names_its_base(both: Path, llama_folder: Path) -> None:
    whole = logits(both)
    shutil.copytree(llama_folder, both.parent / "base")
    for name in ("model.safetensors", "config.json"):  # the last first without its weights
        (both / name).unlink()
        edit(both, base_model_name_or_path="base")
        assert torch.equal(logits(both), whole)
    files = locate(section(both), 0)
    assert (files.label, files.folder) == ("both", both.parent / "base")
    edit(both, base_model_name_or_path="owner/elsewhere", revision="v1")
    files = locate(section(both), 0)
    assert files.origin == "hub" and files.identity is None
    assert "'owner/elsewhere' are not in the hub's cache" in files.absent[0]


def test_the_adapter_and_its_config_and_pefts_version_are_in_the_identity(
    both: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(folder: Path) -> str | None:
        return locate(section(folder), 0).identity

    seen = [identity(llama_folder), identity(both)]
    edit(both, lora_alpha=1)
    seen.append(identity(both))
    weights = {k: 2 * v for k, v in load_file(both / "adapter_model.safetensors").items()}
    save_file(weights, both / "adapter_model.safetensors", metadata={"format": "pt"})
    seen.append(identity(both))
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9" if name == "peft" else version(name)
    )
    seen.append(identity(both))
    assert len(set(seen)) == 5 and None not in seen


def test_weights_of_an_adapter_that_do_not_fit_are_an_error(both: Path) -> None:
    path = both / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"base_model.model.score.weight": torch.ones(2, 24)}, path)
    with pytest.raises(ModelError, match=r"1 weights of the adapter have no place.*score"):
        logits(both)
    weights.pop(next(iter(weights)))
    save_file(weights, path)
    with pytest.raises(ModelError, match="1 weights of the adapter are missing"):
        logits(both)


def test_a_pickled_adapter_with_code_in_it_is_refused(both: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    (both / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": Evil()}, both / "adapter_model.bin")
    with pytest.raises(ModelError, match="hold more than tensors"):
        logits(both)
    assert not marker.exists(), "code in the pickle ran"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "adapters of type PREFIX_TUNING are not merged"),
        ({"task_type": "SEQ_CLS"}, "the adapter's task_type is SEQ_CLS"),
        ({}, None),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_before_it_is_loaded(
    fields: dict[str, object],
    message: str | None,
    both: Path,
    write_spec: SpecWriter,
    cli: Callable[..., Result],
) -> None:
    edit(both, **fields)
    result = cli("validate", write_spec(model={"path": str(both)}))
    assert result.code == (2 if message else 0), result.err
    assert message is None or message in " ".join(result.err.split())


def test_without_peft_an_adapter_is_refused_by_name(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ModelError, match=r"an adapter, and peft.*interv\[adapters\]"):
        locate(section(both), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "without their adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "an adapter without its weights"),
        (
            lambda f: (f / "config.json").write_text(
                json.dumps(
                    json.loads((f / "config.json").read_text())
                    | {"quantization_config": {"quant_method": "bitsandbytes"}}
                )
            ),
            "quantised weights",
        ),
    ],
)
def test_half_an_adapter_is_an_error(
    both: Path, change: Callable[[Path], object], message: str
) -> None:
    change(both)
    with pytest.raises(ModelError, match=message):
        locate(section(both), 0)
