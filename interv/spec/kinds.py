"""Every kind of spec, by the word that its file says."""

from __future__ import annotations

from interv.spec.collect import CollectSpec
from interv.spec.patch import PatchSpec
from interv.spec.schema import TraceSpec
from interv.spec.train import TrainSpec

Spec = TraceSpec | CollectSpec | PatchSpec | TrainSpec

KINDS: dict[str, type[Spec]] = {
    "trace": TraceSpec,
    "collect": CollectSpec,
    "patch": PatchSpec,
    "train-das": TrainSpec,
}
