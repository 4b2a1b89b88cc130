"""What commands that read a cohort share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from probmed.atlases import default_atlas
from probmed.volumes import UnusableInput, read_scan
from probmed.workflows.growth import LabelledScan
from probmed.workflows.propagation import read_moving_labels


class TimeUnit(str, Enum):
    """Of the column of time."""

    years = "years"
    days = "days"


def names_in(text: str) -> tuple[str, ...]:
    """Columns, with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def read_atlas(image: Path | None, labels: Path | None) -> LabelledScan:
    """
    Raises:
        UnusableInput: where one is given without the other, or as ``read_moving_labels``.
    """
    if image is None and labels is None:
        return LabelledScan.of(default_atlas())
    if image is None or labels is None:
        raise UnusableInput(str(image or labels), "is an atlas's image or labels alone", "give both --atlas-image and --atlas-labels, or neither")
    scan = read_scan(image)
    return LabelledScan(scan, *read_moving_labels(labels, scan))
