"""Weights into a module: from the hub, a folder, a GGUF file or a config. Needs torch."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import nn

from interv.engine.gguf import dequantised
from interv.engine.hooks import find_module
from interv.engine.pretrained import auto_class, from_checkpoint, merged
from interv.engine.recognise import recognise
from interv.errors import IntervError, ModelError
from interv.models import ModelFacts, ModelFiles
from interv.models.anatomy import Anatomy
from interv.models.checkpoint import Weights
from interv.models.config import read_facts
from interv.models.known_faults import refuse_known_faults
from interv.spec.schema import ModelSection

_EMBEDDED_TOGETHER = 4096  # tokens


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what is worth recording of how it was loaded."""

    module: nn.Module
    anatomy: Anatomy
    device: torch.device
    attn_implementation: str


def load_model(files: ModelFiles, section: ModelSection, seed: int, device: str) -> LoadedModel:
    """Load the weights; no code from the model's folder is run, pickles only as plain weights.

    Raises:
        ModelError: the weights are not at hand or do not fill the model, or the device or the
            attention implementation is not to be had or known to be wrong.
    """
    where = _device(device)
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if section.dtype == "float64":
        # The fused kernels of mixtures of experts know no float64; others ignore this.
        options["experts_implementation"] = "eager"
    try:
        with _quiet():
            if files.origin == "config":
                module = _random(files, options, seed)
            else:
                module = _pretrained(files, section, options, where)
        if section.device_map is None and not _is_quantised(files):
            module = module.to(where)
    except IntervError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{files.label}: its pickled weights hold more than tensors and are not opened; "
            "convert them to safetensors where you trust them"
        ) from error
    except Exception as error:
        # A model's files may be wrong in any way, and each raises something else; the message
        # names the cause and the traceback is kept as its cause.
        kind = type(error).__name__
        raise ModelError(f"{files.label}: cannot be loaded: {kind}: {error}") from error
    facts = _compare(files, module)
    refuse_known_faults(module.config.to_dict(), module.config._attn_implementation)
    module.eval().requires_grad_(False)
    return LoadedModel(
        module,
        anatomy_of(module, facts),
        next(module.parameters()).device,
        module.config._attn_implementation,
    )


def anatomy_of(module: nn.Module, facts: ModelFacts | None = None) -> Anatomy:
    """Where the components of a `transformers` model stand.

    Args:
        module: the model.
        facts: its shape, if read already.

    Raises:
        ModelError: its type is not in the table and its blocks are not recognised.
    """
    config = module.config.to_dict()  # type: ignore[operator,union-attr]
    facts = facts or read_facts(config, type(module).__name__)
    return Anatomy(facts.family or recognise(module, facts), facts, config)


def _compare(files: ModelFiles, module: Any) -> ModelFacts:
    """The loaded model's shape, for which the plan must have been made.

    Raises:
        ModelError: it is another than its config's, as read without torch.
    """
    loaded = read_facts(module.config.to_dict(), files.label)
    planned, family = files.facts, loaded.family
    assert planned is not None
    blocks = loaded.n_layers
    if family and isinstance(family.blocks, str):
        blocks = len(module.get_submodule(family.blocks))
    for name in (f.name for f in fields(planned) if f.name != "n_params"):
        if getattr(planned, name) != getattr(loaded, name) or blocks != loaded.n_layers:
            raise ModelError(
                f"{files.label}: its config says {name} {getattr(planned, name)}, the model has "
                f"{getattr(loaded, name)} ({blocks} blocks); name each field as transformers does"
            )
    return loaded


def embedding_sigma(model: LoadedModel, tokens: Sequence[int] | None = None) -> float:
    """Return the standard deviation of what the embedding module gives, as one scalar.

    The module is that of the component `token_embedding`, to whose output noise is added: where
    it scales its weights (Gemma by √width), so is its deviation. What the model does behind it
    (a norm, positions, a multiplier) is not in it. `collect_embedding_std` of Meng et al. 2022
    (experiments/causal_trace.py) reads the same place.

    Args:
        model: the model.
        tokens: ids, which count as often as they occur; None: each of the vocabulary once.
    """
    place = model.anatomy.place("token_embedding", 0)
    module = find_module(model.module, place.path)
    assert model.anatomy.facts is not None
    ids = torch.tensor(range(model.anatomy.facts.vocab_size) if tokens is None else tokens)
    n, mean, squares = 0, 0.0, 0.0
    with torch.no_grad():
        for some in torch.split(ids.to(model.device), _EMBEDDED_TOGETHER):
            given = module(some[None]).double()
            var, centre = torch.var_mean(given, correction=0)
            # Chan et al. 1983: deviations of parts about their own means, put together.
            more, apart = given.numel(), float(centre) - mean
            squares += float(var) * more + apart**2 * n * more / (n + more)
            mean += apart * more / (n + more)
            n += more
    return math.sqrt(squares / (n - 1))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"run.device: {name}, but torch {torch.__version__} sees no CUDA device")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelError("run.device: mps, but torch sees no such device")
    return torch.device(name)


def _random(files: ModelFiles, options: dict[str, Any], seed: int) -> Any:
    fields = dict(files.config or {})
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert files.facts is not None
        return auto_class(files.facts).from_config(config, **options)


def _is_quantised(files: ModelFiles) -> bool:
    """Whether the weights are quantised on disk; transformers places such a model itself."""
    return files.origin != "gguf" and "quantization_config" in (files.config or {})


def _pretrained(
    files: ModelFiles, section: ModelSection, options: dict[str, Any], where: torch.device
) -> Any:
    if files.origin == "gguf":
        assert files.gguf_file is not None and files.identity is not None
        assert files.folder is not None
        source = dequantised(files.gguf_file, files.identity, files.folder)
        weights = Weights((source / "model.safetensors",))
    else:
        assert files.folder is not None and files.weights is not None
        source, weights = files.folder, files.weights
    if section.device_map is not None:
        options["device_map"] = section.device_map
    elif _is_quantised(files):
        options["device_map"] = {"": where}
    module = from_checkpoint(files, source, weights, options)
    return module if files.adapter is None else merged(module, files.adapter)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and advice; its errors are raised all the same."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
