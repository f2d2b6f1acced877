"""interv: causal interventions on PyTorch models, from one YAML file.

Importing this package imports neither torch nor transformers.
"""

from interv.api import Results, executor, load, run
from interv.plugins import function, metric
from interv.version import __version__

__all__ = ["Results", "__version__", "executor", "function", "load", "metric", "run"]
