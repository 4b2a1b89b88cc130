"""Probabilities of labels, on scans as they were trained on and on scans that are changed: the networks of `few_labels`, and registration.

Data: `msd_hippocampus` in the folder ``PROBMED_DATA``; the networks are those of `few_labels`, trained where they are not kept beside the rows.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.few_labels import METHODS, REGISTRATION, Data, network, registered, score
from benchmarks.tables import Log, Row, Table
from probmed.fields import GaussianField
from probmed.simulation.contrasts import stream
from probmed.volumes import Volume, read_scan, scaled

FEW = 15  # test scans that registration, which takes seconds, is measured on
SLICES = 4  # of which one is lost
Shift = Callable[[Tensor, Sequence[float], torch.Generator], Tensor]


def _inverted(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    return image.max() - image


def _squared(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    return image.clamp_min(0.0).square()


def _noisy(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    return image + 0.15 * torch.randn(image.shape, generator=generator)


def _biased(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    field = GaussianField.from_sd(image.shape, spacing, 0.4, 20.0, 2.0)
    return image * field.unwhiten(torch.randn(1, *image.shape, generator=generator))[0].exp()


def _blurred(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    field = GaussianField.from_sd(image.shape, spacing, 1.0, 1.0, 2.0)
    smooth = field.covariance_matvec(image[None])[0]
    return smooth * (image.mean() / smooth.mean())


def _lacking(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    lost = image.clone()
    lost[:, ::SLICES] = 0.0
    return lost


def _rescaled(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    return 500.0 * image + 200.0


SHIFTS: Mapping[str, Shift | None] = {
    "none": None,
    "inverted contrast": _inverted,
    "squared": _squared,
    "noise": _noisy,
    "bias": _biased,
    "blur": _blurred,
    "every fourth slice lost": _lacking,
    "another unit": _rescaled,
}


def shifted(path: Path, shift: str, seed: int = 0) -> Volume:
    """A scan, changed; the same for every method."""
    scan, change = read_scan(path), SHIFTS[shift]
    if change is None:
        return scan
    return scan.with_data(change(scaled(scan.data), scan.spacing, stream(seed, shift, path.name)))


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Ask every method about every change of the test scans."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Data.of(log, Path(temporary), limit, seed)
        for name in (REGISTRATION, *METHODS):
            if only and not any(word in name for word in only):
                continue
            answer = registered(data) if name == REGISTRATION else network(data, name, seed).probabilities
            for shift in SHIFTS:
                for path in data.test[: FEW if name == REGISTRATION else None]:
                    rows.append(log.row(f"{name}/{shift}/{path.name[12:15]}", partial(_row, name, shift, path, answer, seed)))
            print(f"{name:50s} {_line(rows, name, 'dice', 3)}", flush=True)
    return Table("uncertainty", rows, summarise(rows), "", {"threads": threads, "registration_scans": FEW}, seed)


def _row(name: str, shift: str, path: Path, answer: Callable[[Volume], Tensor], seed: int) -> Row:
    return {"shift": shift, **score(name, path, answer, shifted(path, shift, seed))}


def _line(rows: Sequence[Row], name: str, what: str, digits: int) -> dict[str, str]:
    """Means of a score, a column a shift."""
    of = {shift: [row[what] for row in rows if row["method"] == name and row["shift"] == shift] for shift in SHIFTS}
    return {shift: f"{statistics.fmean(values):.{digits}f}" if values else "–" for shift, values in of.items()}


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Three lines a method: Dice, nats a voxel, and the calibration error near the border."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        for what, head, digits in (("dice", "Dice", 3), ("nll", "nats a voxel", 3), ("ece", "ECE near the border", 3)):
            lines.append({"method": name, "score": head, **_line(rows, name, what, digits)})
    return lines
