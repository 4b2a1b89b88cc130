"""Trained on T1, asked about other contrasts of the same scans: which methods still work.

Data, methods and networks: those of `few_labels` and `uncertainty`, with which rows can be shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.few_labels import CARRIED_LABELS, FULL, REGISTRATION, SHAPES
from benchmarks.tables import Log, Table
from benchmarks.uncertainty import CONTRASTS, ENSEMBLE, FEW, SCANS, answers, summarise

METHODS = (
    *(REGISTRATION, SHAPES, CARRIED_LABELS, "one label, random contrasts", "all labels, random contrasts"),
    *("U-Net, 1 label", "U-Net, 10 labels", FULL, ENSEMBLE),
)


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Ask every method about the scans as they are, inverted, and as in T2."""
    rows = answers(log, limit, METHODS, CONTRASTS, only, threads, seed)
    return Table("contrast", rows, summarise(rows, CONTRASTS), "", {"threads": threads, "scans": {"most": SCANS, **FEW}}, seed)
