"""A checkpoint into a module of transformers: these files alone, and every weight of them."""

from __future__ import annotations

import contextlib
import importlib
import re
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from interv.errors import ModelError
from interv.models import ModelFacts, ModelFiles
from interv.models.adapter import Adapter
from interv.models.checkpoint import Weights

# What checkpoints of a type hold beside the weights of its language model: buffers that its code
# once saved and now computes, and heads that have no part in the logits. transformers leaves out
# some of these itself (`_keys_to_ignore_on_load_unexpected`).
_ONCE_SAVED = (r"(^|\.)position_ids$", r"(^|\.)rotary_emb\.inv_freq$")
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "gpt2": (r"(^|\.)h\.\d+\.(attn|crossattention)\.(masked_)?bias$",),
    "gpt_neo": (r"(^|\.)h\.\d+\.attn\.attention\.(masked_)?bias$",),
    "gptj": (r"(^|\.)h\.\d+\.attn\.((masked_)?bias|embed_positions)$",),
    "gpt_neox": (
        r"(^|\.)layers\.\d+\.attention\.(masked_)?bias$",
        r"\.rotary_emb\.(cos|sin)_cached$",
    ),
    "falcon": (r"\.self_attention\.(maybe_)?rotary\.inv_freq$",),
    "opt": (r"^(model\.)?decoder\.version$",),
    "bert": (r"^(bert\.)?pooler\.dense\.", r"^cls\.seq_relationship\."),
    "roberta": (r"^(roberta\.)?pooler\.dense\.",),
    "esm": (
        r"^(esm\.)?(contact_head\.regression|pooler\.dense)\.",
        r"^(esm\.)?embeddings\.position_embeddings\.weight$",
        r"\.rotary_embeddings\.inv_freq$",
    ),
}


def auto_class(facts: ModelFacts) -> Any:
    """Return the class of transformers that loads a model.

    Raises:
        ModelError: transformers runs no language model of this type.
    """
    if facts.family is not None:
        return getattr(transformers, facts.family.auto)
    for auto, names in (
        (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (
            transformers.AutoModelForImageTextToText,
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        ),
    ):
        if facts.model_type in names:
            return auto
    raise ModelError(
        f"models of type '{facts.model_type}' are no language models that transformers "
        f"{transformers.__version__} can run; interv.executor takes any module from Python"
    )


def from_checkpoint(
    files: ModelFiles, source: Path, weights: Weights, options: dict[str, Any]
) -> Any:
    """Load a model's weights.

    transformers sees the config and these weights in a folder of their own, so that it reads
    nothing that the model's identity does not cover.

    Args:
        files: what is known of the model.
        source: the folder with its config.json.
        weights: its weights.
        options: for `from_pretrained`.

    Raises:
        ModelError: a weight is missing or has another shape, or one is not used.
    """
    assert files.facts is not None
    auto = auto_class(files.facts)
    stage = tempfile.TemporaryDirectory(prefix="interv-")
    with contextlib.ExitStack() as stack:
        stack.callback(stage.cleanup)
        for path in (source / "config.json", *weights.every):
            (Path(stage.name) / path.name).symlink_to(path.resolve())
        module, info = auto.from_pretrained(
            stage.name,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or the message does not name them
            **options,
        )
        # Weights that are spread to disk are read from there for as long as the module lives.
        weakref.finalize(module, stack.pop_all().close)
    check_complete(files.label, files.facts.model_type, info)
    module.name_or_path = module.config.name_or_path = str(source)
    return module


def check_complete(label: str, model_type: str, info: Mapping[str, Iterable[Any]]) -> None:
    """Check that every weight of a checkpoint went into the model, and that none is missing.

    Args:
        label: the model's, for the message.
        model_type: as its config says it.
        info: as `from_pretrained(output_loading_info=True)` gives it.

    Raises:
        ModelError: transformers filled a weight with random numbers, or left one out.
    """
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{label}: {len(missing)} weights are missing or misshapen: {_some(missing)}"
        )
    known = re.compile("|".join((*_ONCE_SAVED, *_BESIDE.get(model_type, ()))))
    unused = sorted(key for key in info["unexpected_keys"] if not known.search(key))
    if unused:
        raise ModelError(
            f"{label}: has {len(unused)} weights that a '{model_type}' of its config has no place "
            f"for: {_some(unused)}"
        )


def merged(module: Any, adapter: Adapter) -> Any:
    """Add an adapter to a model's weights, in the numbers that the model computes in.

    Raises:
        ModelError: a weight of the adapter is missing, or one is not used.
    """
    peft = importlib.import_module("peft")
    config = peft.PeftConfig.from_pretrained(str(adapter.folder), local_files_only=True)
    config.inference_mode = True
    with warnings.catch_warnings():
        # What peft calls of transformers is deprecated there.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.PeftModel(module, config, autocast_adapter_dtype=False)
    found = wrapped.load_adapter(
        str(adapter.folder), "default", is_trainable=False, autocast_adapter_dtype=False
    )
    for names, what in (
        (found.missing_keys, "are missing or misshapen"),
        (found.unexpected_keys, "have no place in the model"),
    ):
        if names:
            raise ModelError(
                f"{adapter.weights}: {len(names)} weights of the adapter {what}: {_some(names)}"
            )
    return wrapped.merge_and_unload(safe_merge=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
