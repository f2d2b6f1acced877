"""The default model's reference values, computed without interv: `python -m tests.independent`."""
