"""Probabilities of labels, on scans as they were trained on and on scans that are changed: the methods of `few_labels`, and the usual ways to get
uncertainty from a network.

Data: `msd_hippocampus` in the folder ``PROBMED_DATA``; the networks are those of `few_labels`, trained where they are not kept beside the rows.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.few_labels import (
    CARRIED_LABELS,
    FULL,
    LEARNED,
    METHODS,
    PATCH,
    REGISTRATION,
    SHAPES,
    Answer,
    Data,
    Method,
    Networks,
    answering,
    coverage,
    network,
    score,
)
from benchmarks.tables import Log, Row, Table
from probmed.fields import GaussianField
from probmed.simulation.contrasts import CONTRASTS as simulated
from probmed.simulation.contrasts import stream
from probmed.volumes import Volume, read_scan, scaled
from probmed.workflows.supervision import SegmenterSettings

SCANS = 27  # test scans, the first half
FEW = {SHAPES: 12}  # where a scan takes half a minute
SLICES = 4  # of which one is lost
WHITE = 0.95  # share of a crop's voxels that are darker than white matter
MEMBERS = 3  # of the ensemble
PASSES = 5
Shift = Callable[[Tensor, Sequence[float], torch.Generator], Tensor]


def _inverted(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    return image.max() - image


def _squared(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    return image.clamp_min(0.0).square()


def _like_t2(image: Tensor, spacing: Sequence[float], generator: torch.Generator) -> Tensor:
    """Fluid bright, white matter darker than grey, by straight lines between the means of the simulated contrasts; WM is the scan's bright end."""
    t1, t2 = simulated["T1"], simulated["T2"]
    means = sorted((t1[tissue][0][1], t2[tissue][0][1]) for tissue in ("CSF", "GM", "WM"))
    values = image / image.quantile(WHITE)
    return torch.from_numpy(np.interp(values.numpy(), [x for x, _ in means], [y for _, y in means])).to(image)


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
CONTRASTS: Mapping[str, Shift | None] = {"none": None, "inverted contrast": _inverted, "T2-like": _like_t2}


ENSEMBLE = f"{MEMBERS} U-Nets, all labels"
PROBABILISTIC = "probabilistic U-Net, all labels"
DROPOUT = "U-Net with dropout, all labels"
WHOLE_STEPS = 500  # of networks that see whole scans: they take as long as those that see parts
DRAWN: Mapping[str, Method] = {
    DROPOUT: replace(METHODS[FULL], settings=SegmenterSettings(dropout=0.2, mixed_precision=True, patch=PATCH)),
    PROBABILISTIC: replace(METHODS[FULL], settings=SegmenterSettings("probabilistic-unet", mixed_precision=True), steps=WHOLE_STEPS),
}
"""Networks that are asked several times."""

ONE_LABEL = (CARRIED_LABELS, LEARNED, "one label, random contrasts", "U-Net, 1 label")
MEASURED = (REGISTRATION, *ONE_LABEL, "U-Net, 10 labels", "all labels, random contrasts", FULL, *DRAWN, ENSEMBLE)
"""Not every number of labels, nor every way to learn transforms; shapes, of which a scan takes half a minute, are in `contrast`."""


def shifted(path: Path, shift: str, seed: int = 0) -> Volume:
    """A scan, changed; the same for every method."""
    scan, change = read_scan(path), {**SHIFTS, **CONTRASTS}[shift]
    if change is None:
        return scan
    return scan.with_data(change(scaled(scan.data), scan.spacing, stream(seed, shift, path.name)))


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Ask every method about every change of the test scans."""
    settings = {"threads": threads, "scans": {"most": SCANS, **FEW}, "members": MEMBERS, "passes": PASSES}
    rows = answers(log, limit, MEASURED, SHIFTS, only, threads, seed)
    return Table("uncertainty", rows, summarise(rows, SHIFTS), "", settings, seed)


def answers(
    log: Log, limit: int | None, names: Sequence[str], shifts: Iterable[str], only: Sequence[str], threads: int, seed: int
) -> list[Row]:
    """A row for each method, change and test scan; of the first ones."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Data.of(log, Path(temporary), limit, seed)
        for name in names:
            if only and not any(word in name for word in only):
                continue
            paths = data.test[: FEW.get(name, SCANS)]
            keys = {f"{name}/{shift}/{path.name[12:15]}": (shift, path) for shift in shifts for path in paths}
            if any(key not in log.rows for key in keys):
                answer = several(data, name, seed)
                for key, (shift, path) in keys.items():
                    log.row(key, partial(_row, name, shift, path, answer, seed))
            rows += [log.rows[key] for key in keys]
            print(f"{name:50s} {_line(rows, name, shifts, 'dice', 3)}", flush=True)
    return rows


def several(data: Data, name: str, seed: int) -> Answer:
    """As ``few_labels.answering``, and draws of what is asked several times."""
    if name == ENSEMBLE:
        whole = METHODS[FULL]
        others = [network(data, f"{FULL}, seed {seed + n}", whole, seed + n) for n in range(1, MEMBERS)]
        members = [network(data, FULL, whole, seed), *others]
        return Networks(members)
    if name in DRAWN:
        return Networks([network(data, name, DRAWN[name], seed)], PASSES, seed)
    return answering(data, name, seed)


def _row(name: str, shift: str, path: Path, answer: Answer, seed: int) -> Row:
    return {"shift": shift, **score(name, path, answer, shifted(path, shift, seed))}


def _line(rows: Sequence[Row], name: str, shifts: Iterable[str], what: str, digits: int) -> dict[str, str]:
    """Means of a score, a column a shift."""
    of = {shift: [row[what] for row in rows if row["method"] == name and row["shift"] == shift] for shift in shifts}
    return {shift: f"{statistics.fmean(values):.{digits}f}" if values else "–" for shift, values in of.items()}


def summarise(rows: Sequence[Row], shifts: Iterable[str]) -> list[dict[str, str]]:
    """Five lines a method: Dice, nats and Brier score a voxel, the calibration error near the border, and the coverage of volumes."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        for what, head, digits in (("dice", "Dice", 3), ("nll", "nats a voxel", 3), ("brier", "Brier score", 4), ("ece", "ECE near the border", 3)):
            lines.append({"method": name, "score": head, **_line(rows, name, shifts, what, digits)})
        of = {shift: [row for row in rows if row["method"] == name and row["shift"] == shift] for shift in shifts}
        held = {shift: coverage(own) if own else "–" for shift, own in of.items()}
        lines.append({"method": name, "score": "volumes in 50 / 80 / 95 % intervals", **held})
    return lines
