"""Trained interventions kept and shared: folders, model cards, the hub, pyvene."""

from interv.keep.format import Part, Trained, read, write

__all__ = ["Part", "Trained", "read", "write"]
