"""What the user asked for: YAML with places, overrides, pydantic models. No torch."""

from interv.spec.load import LoadedSpec, load_spec
from interv.spec.schema import Spec, TraceSpec

__all__ = ["LoadedSpec", "Spec", "TraceSpec", "load_spec"]
