"""interv: causal interventions on PyTorch models, from one YAML file.

Importing this package imports neither torch nor transformers.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
