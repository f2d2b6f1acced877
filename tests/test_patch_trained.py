"""A trained intervention as what a patch exchanges, and what a trace puts back."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import interv
from interv.engine import Edit, Noise, ReferenceExecutor, Run, Site, load_model
from interv.engine.interventions import Intervention
from interv.engine.rotations import LowRankRotatedSpace, Rotation
from interv.errors import SpecError, UsageError
from interv.keep import Part, Trained, write
from interv.plan import make_patch_plan
from interv.spec import load_spec
from tests.conftest import SpecWriter
from tests.test_patch import report_of, spec_of

GRID = {"component": "block_output", "layers": 0, "positions": [1, 2]}


def kept(folder: Path, intervention: Intervention, **about: object) -> str:
    write(folder, Trained((Part(Site("block_output", 0), None, "x", intervention),), about))
    return str(folder)


def values(gpt2_folder: Path, folder: Path, trained: str | None) -> pd.DataFrame:
    intervention = {"type": "denoise", "trained": trained}
    spec = spec_of(gpt2_folder, intervention=intervention, grid=GRID, metric=["logit_difference"])
    return report_of(spec, folder).tables["results"]


def test_only_its_directions_are_exchanged(gpt2_folder: Path, tmp_path: Path) -> None:
    spec = spec_of(gpt2_folder, grid=GRID)
    plan = make_patch_plan(load_spec(spec, (), kind="patch"))
    model = load_model(plan.files, plan.spec.model, 0, "cpu")
    assert plan.facts is not None
    width = plan.facts.d_model
    swap = LowRankRotatedSpace(Rotation.seeded(width, 2, 3))
    found = values(gpt2_folder, tmp_path / "two", kept(tmp_path / "kept", swap))
    reference = ReferenceExecutor(model.module, model.anatomy)
    for row in found.to_dict("records"):
        pair = plan.pairs[row["prompt_id"]]
        assert pair.corrupted_ids is not None
        edit = Edit(Site("block_output", 0, (row["pos"],)), swap, Run(pair.ids))
        logits = reference.logits([Run(pair.corrupted_ids, (edit,))])[0, 0]
        right = logits[pair.answer_ids[0][0]]
        wrong = logits[[ids[0] for ids in pair.wrong_ids]].mean()
        assert row["value"] == pytest.approx(float(right - wrong), abs=1e-5)
    every = LowRankRotatedSpace(Rotation.seeded(width, width, 0))
    whole = values(gpt2_folder, tmp_path / "all", kept(tmp_path / "every", every))
    plain = values(gpt2_folder, tmp_path / "plain", None)
    assert whole["value"].tolist() == pytest.approx(plain["value"].tolist(), abs=1e-5)
    assert found["value"].tolist() != pytest.approx(plain["value"].tolist(), abs=1e-5)


def test_what_does_not_fit_is_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    swap = LowRankRotatedSpace(Rotation.seeded(5, 2, 3))
    with pytest.raises(UsageError, match="other weights"):
        values(gpt2_folder, tmp_path / "a", kept(tmp_path / "b", swap, weights="others"))
    with pytest.raises(SpecError, match=r"intervention\.json"):
        values(gpt2_folder, tmp_path / "c", str(tmp_path / "nowhere"))


def test_sites_with_bases_of_their_own(gpt2_folder: Path, tmp_path: Path) -> None:
    one, other = (LowRankRotatedSpace(Rotation.seeded(24, 2, seed)) for seed in (0, 1))
    first, second = Site("block_output", 0), Site("block_output", 1)
    apart = Trained((Part(first, None, "x", one), Part(second, None, "x", other)), {})
    write(tmp_path / "apart", apart)
    with pytest.raises(UsageError, match="2 sites with bases of their own"):
        values(gpt2_folder, tmp_path / "a", str(tmp_path / "apart"))
    linked = Trained((Part(first, None, "x", one), Part(second, None, "x", one)), {})
    write(tmp_path / "linked", linked)
    assert len(values(gpt2_folder, tmp_path / "b", str(tmp_path / "linked")))


def test_a_trace_restores_only_its_directions(tmp_path: Path, write_spec: SpecWriter) -> None:
    width, site = 24, "block_output"
    some = kept(tmp_path / "some", LowRankRotatedSpace(Rotation.seeded(width, 2, 3)))
    every = kept(tmp_path / "every", LowRankRotatedSpace(Rotation.seeded(width, width, 0)))
    grid = {"component": site, "layers": 1}
    plain, whole, part = (
        interv.run(
            write_spec(grid=grid, intervention={"trained": folder} if folder else None),
            outputs=tmp_path / "outputs",
        )
        for folder in (None, every, some)
    )
    assert len({plain.folder, whole.folder, part.folder}) == 3
    assert list(whole.summary["value"]) == pytest.approx(list(plain.summary["value"]), abs=1e-6)
    assert list(part.summary["value"]) != pytest.approx(list(plain.summary["value"]), abs=1e-6)

    # By hand: the corrupted runs, with two directions of the clean state put back.
    plan = interv.load(write_spec(grid=grid, intervention={"trained": some}))
    model = load_model(plan.files, plan.spec.model, 0, "cpu")
    reference = ReferenceExecutor(model.module, model.anatomy)
    [prompt] = plan.prompts.values()
    swap = LowRankRotatedSpace(Rotation.seeded(width, 2, 3))
    for row in part.summary.to_dict("records"):
        found = []
        for draw in range(3):
            noise = Edit(
                Site("token_embedding", 0, prompt.role("subject")),
                Noise(1.0, plan.draw_seeds[0], draw),
            )
            put_back = Edit(Site(site, 1, (row["pos"],)), swap, Run(prompt.ids))
            logits = reference.logits([Run(prompt.ids, (noise, put_back))])[0, 0]
            found.append(float(logits.softmax(-1)[prompt.answer_ids[0]]))
        assert row["value"] == pytest.approx(sum(found) / 3, abs=1e-6)
    with pytest.raises(SpecError, match=r"intervention\.json"):
        interv.load(write_spec(intervention={"trained": str(tmp_path / "nowhere")}))
