"""A run's certificate in words, and what it means for the effects that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interv.spec.metrics import parse_metric

if TYPE_CHECKING:
    import pandas as pd

TOLD = 0.1  # the share of effects from which on people are told in the terminal

# By how much a metric may move where a logit moves by 1: a difference of two logits by 2, a
# log-probability by 2, a probability by no more than p (1 - p) of its logit's share, 1/4, twice.
_SLOPES = {
    "logit": 1.0,
    "logit_difference": 2.0,
    "log_probability": 2.0,
    "log_probability_difference": 2.0,
    "cross_entropy": 2.0,
    "probability": 0.5,
    "probability_difference": 1.0,
}


def holds(certificate: Mapping[str, Any]) -> bool:
    """Whether it does; records of earlier versions have one comparison only."""
    found: bool = certificate.get("holds", certificate["difference"] <= certificate["allowed"])
    return found


def in_words(certificate: Mapping[str, Any]) -> str:
    """One sentence."""
    told = (
        f"{'holds' if holds(certificate) else 'does not hold'}: on {certificate['rows']} rows of "
        f"its own plan the fast executor is within {certificate['difference']:.2g} of the "
        f"reference in any logit, {certificate['allowed']:.2g} allowed; the farthest: "
        f"{certificate['worst']}"
    )
    if wide := certificate.get("float64"):
        told += (
            f"; in float64 within {wide['difference']:.2g}, {wide['allowed']:.2g} allowed; the "
            f"farthest: {wide['worst']}"
        )
    if why := certificate.get("not_in_float64"):
        told += f"; not compared in float64: {why}"
    return "; ".join([told, *shares(certificate)])


def shares(certificate: Mapping[str, Any], least: float = 0.0) -> list[str]:
    """For each metric the share of effects below what is allowed, from the least share on."""
    return [
        f"{share:.0%} of the effects on {metric} are below what {certificate['allowed']:.2g} of a "
        "logit can make of them"
        for metric, share in certificate.get("effects_below", {}).items()
        if share and share >= least
    ]


def below(certificate: Mapping[str, Any], results: pd.DataFrame) -> dict[str, float]:
    """Of each metric the share of effects that are smaller than what the certificate allows.

    Effects of exactly 0 are not counted: nothing was computed for them. The limit of a metric is
    the certificate's, in logits, times the most that the metric moves with a logit.

    Args:
        certificate: of the run, as recorded.
        results: its table, with `metric` and `effect`.
    """
    found = {}
    for name, rows in results.groupby("metric", sort=False):
        metric = parse_metric(str(name))
        slope = _SLOPES.get(metric.of)
        effects = rows["effect"].abs()
        effects = effects[effects > 0]
        if slope is not None and not metric.normalised and len(effects):
            found[str(name)] = float((effects < slope * certificate["allowed"]).mean())
    return found
