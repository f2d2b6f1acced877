"""Which class of transformers reads a model's tokenizer files, as tables.

`AutoTokenizer` of transformers 5 chooses by the model's type and the class that the files name.
The tests compare the tables with transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Roles of special tokens, in the order in which transformers adds them."""

_END = "<|endoftext|>"
_BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
DEFAULTS: dict[str, dict[str, str]] = {
    "BertTokenizer": _BERT,
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
    "EsmTokenizer": {
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "cls_token": "<cls>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {
        "bos_token": _END,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": "<|padding|>",
    },
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "RobertaTokenizer": _ROBERTA,
}
"""Special tokens that a class has where the files name none."""

# The class that transformers registers for a type of model. The types of `GENERIC` take
# tokenizer.json as it is written; types that are not here take the class that their files name.
REGISTERED: dict[str, str] = {
    model_type: name
    for name, types in {
        "BertTokenizer": "bert blip convbert distilbert electra ernie git layoutlm megatron-bert "
        "nomic_bert squeezebert",
        "CohereTokenizer": "cohere cohere2",
        "EsmTokenizer": "esm",
        "GPT2Tokenizer": "codegen dbrx emu3 gpt2 gpt_neo gptj jais2 opt phi starcoder2",
        "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
        "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma",
        "Qwen2Tokenizer": "qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next",
        "RobertaTokenizer": "bart data2vec-text ibert longformer mra roberta roberta-prelayernorm",
    }.items()
    for model_type in types.split()
}
GENERIC = frozenset(
    [
        "beam",
        "bigbird_pegasus",
        "ernie4_5",
        "ernie4_5_moe",
        "flex_olmo",
        "fuyu",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "got_ocr2",
        "gpt_bigcode",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jamba",
        "kimi_linear",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert",
        "modernbert-decoder",
        "nemotron",
        "nystromformer",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "persimmon",
        "phi3",
        "phimoe",
        "stablelm",
        "xlm-roberta-xl",
    ]
)
# Transformers holds the class that these types' files name to be wrong.
_NOT_AS_NAMED = frozenset({"qwen2"})


def class_of(
    config: Mapping[str, Any], settings: Mapping[str, Any], *, byte_level: bool
) -> str | None:
    """Return the class that `AutoTokenizer` takes; None: the generic one, or unknown.

    Args:
        config: the model's config.json.
        settings: tokenizer_config.json.
        byte_level: tokenizer.json says that it is ByteLevel.
    """
    model_type = config.get("model_type")
    registered = REGISTERED.get(model_type) if isinstance(model_type, str) else None
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str):
        return registered
    named = named.removesuffix("Fast")
    if model_type in GENERIC:
        return None
    if registered and model_type in _NOT_AS_NAMED:
        return registered
    if named == "LlamaTokenizer" and byte_level:
        return None
    return {"BartTokenizer": "RobertaTokenizer"}.get(named, named)
