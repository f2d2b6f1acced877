"""`python -m tests.independent NAME ...`: write configs/default_model/NAME.csv anew."""

from __future__ import annotations

import argparse
import importlib

from tests.independent.model import write

NAMES = (
    "rome_figure1",
    "rome_figure2",
    "rome_figure3",
    "ioi_activation_patching",
    "ioi_figure3b",
    "ioi_das",
    "ioi_circuit",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.independent", description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    for name in parser.parse_args().names:
        experiment = importlib.import_module(f"tests.independent.{name}")
        for table, rows in experiment.tables().items():
            print(write(table, rows))


if __name__ == "__main__":
    main()
