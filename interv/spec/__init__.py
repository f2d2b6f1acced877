"""What the user asked for: YAML with places, overrides, pydantic models. No torch."""

from interv.spec.collect import CollectSpec
from interv.spec.kinds import Spec
from interv.spec.load import LoadedSpec, load_spec
from interv.spec.patch import PatchSpec
from interv.spec.schema import TraceSpec
from interv.spec.train import TrainSpec

__all__ = ["CollectSpec", "LoadedSpec", "PatchSpec", "Spec", "TraceSpec", "TrainSpec", "load_spec"]
