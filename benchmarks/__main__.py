"""``python -m benchmarks NAME``: measure one table, print it, and write it down."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.tables import Log

TABLES = (
    *("tissue", "volumes", "fields", "pairs", "propagation", "deformation_uncertainty", "registration_sizes", "scalar_change", "scaling"),
    *("gp_prior_vae", "few_labels", "uncertainty", "contrast", "architectures"),
)


def main(arguments: list[str] | None = None, folder: Path | None = None) -> int:
    """Run one table.

    Arguments:
        folder: where README.md and results/ are; by default, where this file is.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure one table of probmed's.")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--limit", type=int, help="stop after N cases of each kind; prints, and writes nothing")
    parser.add_argument("--only", default="", help="comma-separated methods, conditions or sizes; writes nothing")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="file that keeps each row as it comes: a run that was cut off goes on")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit expects a positive number, got {options.limit}")
    measure = importlib.import_module(f"benchmarks.{options.table}").table
    table = measure(
        Log(options.rows),
        limit=options.limit,
        only=tuple(word for word in options.only.split(",") if word),
        threads=options.threads,
        seed=options.seed,
    )
    print(table.markdown())
    if options.limit is None and not options.only:
        table.write(folder or Path(__file__).resolve().parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
