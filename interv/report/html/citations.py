"""What to cite of a run: the papers of what it did, and the run itself."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interv.report.html.folder import RunFolder


@dataclass(frozen=True)
class Paper:
    """A work, and what of it was used here."""

    what: str
    text: str
    url: str


def _arxiv(number: str, what: str, text: str) -> Paper:
    return Paper(what, f"{text}. arXiv {number}", f"https://arxiv.org/abs/{number}")


_WANG = (
    "Wang et al. 2022: Interpretability in the Wild, a Circuit for Indirect Object "
    "Identification in GPT-2 small"
)
_TRACE = _arxiv(
    "2202.05262",
    "causal tracing",
    "Meng, Bau, Andonian and Belinkov 2022: Locating and Editing Factual Associations in GPT",
)
_MEDIATION = _arxiv(
    "2004.12265",
    "activation patching",
    "Vig et al. 2020: Causal Mediation Analysis for Interpreting Neural NLP",
)
_PRACTICES = _arxiv(
    "2309.16042",
    "its metrics and corruptions",
    "Zhang and Nanda 2023: Towards Best Practices of Activation Patching in Language Models",
)
_PATHS = _arxiv("2211.00593", "path patching, completeness and minimality", _WANG)
_IOI = _arxiv("2211.00593", "the task", _WANG)
_ATTRIBUTION = _arxiv(
    "2310.10348",
    "attribution patching",
    "Syed, Rager and Conmy 2023: Attribution Patching Outperforms Automated Circuit Discovery",
)
_EAP_IG = _arxiv(
    "2403.17806",
    "integrated gradients of edges",
    "Hanna, Pezzelle and Belinkov 2024: Have Faith in Faithfulness",
)
_MIB = _arxiv(
    "2504.13151",
    "faithfulness, CPR and CMD",
    "Mueller et al. 2025: MIB, a Mechanistic Interpretability Benchmark",
)
_FRAMEWORK = Paper(
    "direct logit attribution",
    "Elhage et al. 2021: A Mathematical Framework for Transformer Circuits",
    "https://transformer-circuits.pub/2021/framework/index.html",
)
_DAS = _arxiv(
    "2303.02536",
    "distributed alignment search",
    "Geiger, Wu, Potts, Icard and Goodman 2023: Finding Alignments Between Interpretable Causal "
    "Variables and Distributed Neural Representations",
)
_BOUNDLESS = _arxiv(
    "2305.08809",
    "boundless DAS",
    "Wu, Geiger, Icard, Potts and Goodman 2023: Interpretability at Scale, Identifying Causal "
    "Mechanisms in Alpaca",
)
_IIT = _arxiv(
    "2112.00826",
    "interchange intervention training",
    "Geiger et al. 2021: Inducing Causal Structure for Interpretable Neural Networks",
)
_MASKS = _arxiv(
    "2112.06837",
    "learned masks",
    "De Cao, Schmid, Hupkes and Titov 2021: Sparse Interventions in Language Models with "
    "Differentiable Masking",
)
_LORA = _arxiv(
    "2106.09685",
    "low-rank adaptation",
    "Hu et al. 2021: LoRA, Low-Rank Adaptation of Large Language Models",
)
_PYVENE = _arxiv(
    "2403.07809",
    "the words and kinds of interventions",
    "Wu et al. 2024: pyvene, a Library for Understanding and Improving PyTorch Models via "
    "Interventions",
)


def papers(run: RunFolder) -> list[Paper]:
    """The works that a run's methods come from."""
    spec = run.resolved
    if run.kind == "trace":
        return [_TRACE]
    if run.kind == "patch":
        return list(_patching(spec))
    if run.kind == "train-das":
        types = [str(name) for name in spec["intervention"]["type"]]
        found = [_IIT if spec["train"]["what"] == "model" else _DAS]
        found += [_BOUNDLESS] * any("boundless" in name for name in types)
        found += [_MASKS] * any("mask" in name for name in types)
        found += [_LORA] * ("lora" in types)
        return [*found, _PYVENE]
    return [_PYVENE]


def _patching(spec: Any) -> list[Paper]:
    circuit, attribution = spec.get("circuit"), spec.get("attribution")
    found = [_MEDIATION, _PRACTICES] if spec.get("grid") else []
    found += [_PATHS] * bool(spec.get("paths") or (circuit and circuit.get("knockouts")))
    found += [_ATTRIBUTION] * bool(attribution or circuit)
    found += [_EAP_IG] * bool(circuit and "ig" in str(circuit["method"]))
    found += [_MIB] * bool(circuit)
    found += [_FRAMEWORK] * bool(spec.get("decompose"))
    found += [_IOI] * (spec["data"].get("task") == "ioi" and _PATHS not in found)
    return found


def own_citation(run: RunFolder) -> str:
    """The run itself, in a line."""
    commits = sorted(
        {session["git"]["commit"][:12] for session in run.sessions if session.get("git")}
    )
    where = f", git {', '.join(commits)}" if commits else ""
    return (
        f"interv {run.record['interv']}, {run.kind} “{run.name}” on {run.model}, "
        f"run {run.record['identity']}{where}"
    )


def commands(run: RunFolder) -> list[tuple[str, str]]:
    """What computes it again: each with what it is."""
    typed = [str(part) for part in run.sessions[-1]["command"]] if run.sessions else []
    found = []
    if typed and Path(typed[0]).name == "interv":
        found.append(("as it was typed", shlex.join(["interv", *typed[1:]])))
    plugin = run.record.get("plugin")
    extra = [word for file in plugin["files"] for word in ("--plugin", file)] if plugin else []
    again = ["interv", run.kind, str(run.path / "resolved.yaml"), *extra, "-o", "elsewhere"]
    return [*found, ("from this folder, with every default written out", shlex.join(again))]


def overrides(run: RunFolder) -> list[str]:
    """Values that replaced the spec's on the command line."""
    typed = [str(part) for part in run.sessions[-1]["command"]] if run.sessions else []
    if not typed or Path(typed[0]).name != "interv":
        return []
    return [part for part in typed[1:] if "=" in part and not part.startswith("-")]
