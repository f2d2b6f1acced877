"""An autoencoder that is given to `interv train-das`: what its file says is what runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interv.engine.batch import BatchRunner
from interv.plan import make_train_plan
from interv.runner.train import load
from interv.spec import load_spec
from interv.train.data import groups_of
from interv.train.fit import Intervening, prepare
from tests.conftest import Result
from tests.test_das import run_of, write
from tests.test_das_attack import CHOOSING

WIDTH, LATENTS = 32, 50
FILE = "given.safetensors"


def tensors(threshold: Tensor | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {
        "encoder": numbers(WIDTH, LATENTS) / 4,
        "encoder_bias": numbers(LATENTS) / 4,
        "decoder": numbers(LATENTS, WIDTH) / 4,
        "decoder_bias": numbers(WIDTH) / 4,
    }
    return found if threshold is None else {**found, "threshold": threshold}


def spec(folder: Path, dictionary: dict[str, Any] | None = None, **changes: Any) -> Path:
    asked = {"path": FILE, **(dictionary or {})}
    return write(
        folder,
        **{
            **CHOOSING,
            "intervention": {"type": "autoencoder", "dictionary": asked},
            "train": None,
            "controls": None,
            **changes,
        },
    )


THRESHOLDS = {
    "relu": None,
    "jump": torch.linspace(-0.8, 0.8, LATENTS),
    "dead": torch.full((LATENTS,), 1e9),
}


@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("error_term", [True, False])
def test_an_autoencoder_is_run_as_its_file_has_it(
    kind: str, error_term: bool, tmp_path: Path
) -> None:
    given = tensors(THRESHOLDS[kind])
    save_file(given, tmp_path / FILE)
    plan = make_train_plan(load_spec(spec(tmp_path, {"error_term": error_term})))
    loaded = load(plan)
    model = loaded.module.double()
    runner = BatchRunner(model, loaded.anatomy)
    [fit] = plan.fits
    split = prepare(runner, groups_of(plan, "test"), fit, 2**30)
    parts = Intervening(plan.spec, fit, runner, split, split, None, 0).parts
    assert not any(p.requires_grad for part in parts for p in part.intervention.parameters())
    known = {name: tensor.double() for name, tensor in given.items()}

    def encode(x: Tensor) -> Tensor:
        # Gemma Scope's code and SAELens': of a JumpReLU autoencoder no bias is taken off.
        if kind == "relu":
            x = x - known["decoder_bias"]
            return (x @ known["encoder"] + known["encoder_bias"]).clamp(min=0)
        before = x @ known["encoder"] + known["encoder_bias"]
        return before * (before > known["threshold"])

    seen: list[Tensor] = []

    def look(_module: Any, _args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    for prepared in split.groups:
        rows = torch.arange(len(prepared.group))
        with torch.no_grad():
            found = prepared.logits(rows, prepared.edits(parts, rows))
        for logits, pair in zip(found, prepared.group.said, strict=True):
            [source] = pair.sources
            handle = model.model.layers[0].register_forward_hook(look)
            with torch.no_grad():
                model(torch.tensor([source.ids]))
            handle.remove()
            state = seen[-1][0, source.spans["word"][0]]

            def exchange(_module: Any, _args: Any, out: Any) -> Any:
                hidden = (out[0] if isinstance(out, tuple) else out).clone()
                base = hidden[0, pair.base.spans["word"][0]]  # noqa: B023
                new = encode(state) @ known["decoder"] + known["decoder_bias"]  # noqa: B023
                if error_term:
                    rebuilt = encode(base) @ known["decoder"] + known["decoder_bias"]
                    new = new + base - rebuilt
                hidden[0, pair.base.spans["word"][0]] = new  # noqa: B023
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            handle = model.model.layers[0].register_forward_hook(exchange)
            with torch.no_grad():
                wanted = model(torch.tensor([pair.base.ids])).logits[0, -1]
            handle.remove()
            torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_a_given_autoencoder_is_trained_only_if_that_is_said(
    train: bool, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    given = tensors()
    save_file(given, tmp_path / FILE)
    asked = {"type": "autoencoder", "dictionary": {"path": FILE}, "train_dictionary": train}
    controls = {"shuffled": True} if train else {"full": True}
    more = {"train": {"epochs": 1, "batch": 16, "lr": 0.05}} if train else {"train": None}
    path = spec(tmp_path, intervention=asked, controls=controls, **more)
    folder = run_of(cli("train-das", path, "-o", tmp_path / "out", "-q"))
    [kept] = (folder / "fits").glob("*/intervention.safetensors")
    after = {name.rpartition(".")[2]: tensor for name, tensor in load_file(kept).items()}
    same = [torch.equal(after[name], tensor) for name, tensor in given.items()]
    assert not any(same) if train else all(same)
    metrics = set(pd.read_csv(folder / "results.csv")["metric"])
    assert metrics == {"iia", "iia_full", "iia_random", *(["iia_shuffled"] if train else [])}
    assert bool(len(pd.read_csv(folder / "curve.csv"))) == train


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in {**tensors(), **changes}.items() if v is not None}


SAELENS = {
    "W_enc": tensors()["encoder"],
    "b_enc": tensors()["encoder_bias"],
    "W_dec": tensors()["decoder"],
    "b_dec": tensors()["decoder_bias"],
}
WRONG = [
    (changed(decoder=None), "has no decoder"),
    (changed(scale=torch.ones(3)), "tensor 'scale' has no meaning here"),
    (changed(threshhold=torch.ones(LATENTS)), "(here: threshold)"),
    (SAELENS, "tensor 'W_enc' has no meaning here (here: encoder)"),
    (changed(encoder=torch.zeros(3)), "encoder has the shape (3,)"),
    (changed(decoder=tensors()["encoder"]), "decoder has the shape (32, 50), expected (50, 32)"),
    (changed(threshold=torch.ones(3)), "threshold has the shape (3,), expected (50,)"),
    (changed(decoder_bias=torch.ones(WIDTH, dtype=torch.int64)), "decoder_bias is of I64"),
    (
        {
            "encoder": torch.ones(8, 4),
            "encoder_bias": torch.ones(4),
            "decoder": torch.ones(4, 8),
            "decoder_bias": torch.ones(8),
        },
        "an autoencoder 8 wide, block_output is 32 wide",
    ),
]


@pytest.mark.parametrize(("held", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_file_that_is_no_autoencoder_is_told_by_validate(
    held: dict[str, Tensor], message: str, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / FILE)
    path = spec(tmp_path)
    done = cli("validate", path)
    assert done.code == 2
    assert message in done.err
    assert "given.safetensors" in done.err and "das.yaml:" in done.err


def test_a_file_that_is_cut_off_is_told_without_torch(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    code = (
        "import sys, pathlib\n"
        "from interv.errors import ModelError\n"
        "from interv.models.dictionaries import read_dictionary_shape\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "print(read_dictionary_shape(path))\n"
        "path.write_bytes(path.read_bytes()[:200])\n"
        "try:\n    read_dictionary_shape(path)\n"
        "except ModelError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert len(whole) > 200
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / FILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "width=32, n_latents=50, jumps=False" in done.stdout
    assert "is not a safetensors file" in done.stdout
