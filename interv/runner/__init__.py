"""Execution: the run folder, its journal and record, resuming. Torch only in `trace`."""
