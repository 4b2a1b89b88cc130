"""Segmentation from few labelled scans: by registration, by networks on draws of learned transforms or random contrasts, by a shape prior of label
maps, and by supervised networks.

Data: `msd_hippocampus` in the folder ``PROBMED_DATA``. Every tenth training scan is for calibration and choices; of the others, in the order of a
seeded permutation, the first ones are labelled; all test scans report.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.figures import band
from benchmarks.pairs import beside, scans
from benchmarks.tables import Log, Row, Table, mean_sd
from benchmarks.tissue import data_folder
from probmed.grids import Grid, sample
from probmed.inference.training import TrainingSettings
from probmed.metrics import boundary_band, brier_score, calibration_error, dice, negative_log_likelihood, paired_bootstrap, surface_distances
from probmed.report.palette import ACCENT
from probmed.report.panels import bare_axes, blank_figure
from probmed.volumes import Volume, read_labels, read_scan
from probmed.workflows.amortisation import Cohort, read_cohort
from probmed.workflows.growth import Registered, Registrations
from probmed.workflows.one_shot import Estimates, carried, coupled, estimate, learned
from probmed.workflows.registration import RegistrationSettings, places, register
from probmed.workflows.shapes import (
    ShapeSettings,
    TrainedShapes,
    fit_background,
    fit_shapes,
    read_label_maps,
    read_unlabelled,
    segment_with_shapes,
)
from probmed.workflows.supervision import SegmenterSettings, TrainedSegmenter, train_segmenter
from probmed.workflows.training_sets import Augmentation, Examples, completed, labelled, on_grid, one_shot, random_contrast, regions_of
from probmed.workflows.volume_errors import VolumeErrors

STEPS, BATCH, RATE = 1000, 2, 2e-3
PATCH = (32, 48, 32)  # voxels of a scan that a step sees, of some 35 × 50 × 36
UNLABELLED = 60  # scans that learned transforms, and the background of shapes, are estimated from
CARRIED = 60  # scans that the labels of one are carried to
DRAWS = 20  # of a registration's posterior
BAND_MM = 3.0  # about the true border, where calibration is judged
LABELS = (1, 2)
REGISTRATION = "registration, 20 draws"
SHAPES = "shapes of all label maps, no labelled scan"
SHAPE_STEPS, SHAPE_SPACING = 600, 1.5
REFINED = 40  # gradient steps on a scan's shape
FEW = {SHAPES: 12}  # test scans, the first ones, where a scan takes long
FULL = "U-Net, all labels"


@dataclass(frozen=True)
class Data:
    """Scans by their part, and what is made of them once.

    Arguments:
        kept: where registrations and networks are kept.
    """

    order: list[Path]
    validation: list[Path]
    test: list[Path]
    kept: Path

    @classmethod
    def of(cls, log: Log, temporary: Path, limit: int | None, seed: int) -> Data:
        """The split; what is made is kept beside the log's file where there is one."""
        train, test = scans()
        if not train:
            print(f"no scans in {data_folder()}: set PROBMED_DATA")
            return cls([], [], [], temporary)
        validation = train[::10]
        rest = [path for path in train if path not in validation]
        order = [rest[int(i)] for i in np.random.default_rng(seed).permutation(len(rest))]
        kept = temporary if log.path is None else log.path.with_suffix(".networks")
        kept.mkdir(exist_ok=True)
        return cls(order, validation, test[:limit], kept)

    @cached_property
    def cohort(self) -> tuple[Cohort, Grid]:
        """Of all training scans, the labelled one first."""
        return read_cohort(labelled_table(self.order), data_folder() / "table.tsv")

    @cached_property
    def checked(self) -> Cohort:
        return read_cohort(labelled_table(self.validation), data_folder() / "table.tsv", grid=self.cohort[1])[0]

    @cached_property
    def one(self) -> tuple[Volume, Tensor]:
        """The labelled scan and its labels as probabilities, on its own voxels."""
        labels = read_labels(beside(self.order[0])).data
        return read_scan(self.order[0]), torch.stack([(labels == k).float() for k in (0, *LABELS)])

    @cached_property
    def estimates(self) -> Estimates:
        return estimate(self.one[0], [read_scan(path) for path in self.order[1 : 1 + UNLABELLED]], self.register)

    def register(self, moving: Volume, fixed: Volume) -> Registered:
        """Once; registrations are kept."""
        return Registrations(self.kept / "registrations", device="cpu")(moving, fixed, RegistrationSettings())

    def supervised(self, count: int | None) -> Examples:
        cohort, grid = self.cohort
        return labelled(cohort.images[:count], cohort.labels[:count], grid, BATCH, Augmentation())

    def carried(self) -> Examples:
        """Scans without labels, with those that registration carries to them, and the labelled one."""
        paths = self.order[: 1 + CARRIED]
        found = carried(self.one[0], read_labels(beside(paths[0])), [read_scan(path) for path in paths[1:]], self.register)
        cohort, grid = self.cohort
        some = replace(cohort, images=cohort.images[: len(paths)], labels=cohort.labels[: len(paths)].clone())
        some.labels[1:] = -1
        some = completed(some, found, grid)
        return labelled(some.images, some.labels, grid, BATCH, Augmentation())

    def drawn(self, spatial: str, appearance: str, augmentation: Augmentation | None = None) -> Examples:
        scan, shares = self.one
        return on_grid(one_shot([learned(self.estimates, shares, spatial, appearance)], BATCH, augmentation), scan.grid, self.cohort[1])

    def drawn_coupled(self) -> Examples:
        scan, shares = self.one
        models = [coupled(self.estimates, shares, number) for number in range(len(self.estimates.velocities))]
        return on_grid(one_shot(models, BATCH), scan.grid, self.cohort[1])

    def contrasts(self, count: int | None) -> Examples:
        cohort, grid = self.cohort
        images, labels = cohort.images[:count], cohort.labels[:count]
        change = Augmentation(velocity_mm=2.5, rotation=0.15, log_scale=0.12)
        return random_contrast(regions_of(images, labels), labels, grid, BATCH, change)

    @cached_property
    def shapes(self) -> TrainedShapes:
        """Learned from label maps, the background's tissues from scans without labels, and kept."""
        place = self.kept / "shapes"
        if not (place / "shapes.json").exists():
            place.mkdir(exist_ok=True)
            maps = read_label_maps(labelled_table(self.order), data_folder() / "table.tsv", SHAPE_SPACING)
            change = Augmentation(velocity_mm=1.0, translation_mm=1.0, log_scale=0.05, rotation=0.07)
            training = TrainingSettings(SHAPE_STEPS, RATE, every=SHAPE_STEPS // 6)
            names = ("background", "anterior", "posterior")
            fit_shapes(maps.labels, maps.grid, maps.codes, names, ShapeSettings(), training, batch=8, augmentation=change, folder=place)
        trained = TrainedShapes.load(place)
        if trained.parts is None:
            table = labelled_table(self.order[1 : 1 + UNLABELLED])[["scan"]]
            fit_background(trained, *read_unlabelled(table, data_folder() / "table.tsv", trained.grid.ndim))
            trained.save(place)
        return trained


@dataclass(frozen=True)
class Method:
    """A network: what it is trained on, and what it is.

    Arguments:
        calibrated: by a temperature, for which few labels leave none.
    """

    examples: Callable[[Data], Examples]
    settings: SegmenterSettings = field(default_factory=lambda: SegmenterSettings(mixed_precision=True, patch=PATCH))
    steps: int = STEPS
    calibrated: bool = False


def labelled_table(paths: Sequence[Path]) -> pd.DataFrame:
    return pd.DataFrame({"scan": [str(path) for path in paths], "labels": [str(beside(path)) for path in paths]})


LEARNED = "one label, learned transforms and augmentation"
CARRIED_LABELS = f"one label, carried to {CARRIED} scans"
METHODS: Mapping[str, Method] = {
    FULL: Method(lambda data: data.supervised(None), calibrated=True),
    LEARNED: Method(lambda data: data.drawn("principal", "principal", Augmentation())),
    CARRIED_LABELS: Method(lambda data: data.carried()),
    **{f"U-Net, {n} label{'s' * (n > 1)}": Method(partial(Data.supervised, count=n)) for n in (1, 2, 5, 10, 50)},
    "one label, learned transforms": Method(lambda data: data.drawn("principal", "principal")),
    "one label, learned transforms, spatial alone": Method(lambda data: data.drawn("principal", "none")),
    "one label, transforms as estimated": Method(lambda data: data.drawn_coupled()),
    "one label, random contrasts": Method(lambda data: data.contrasts(1)),
    "all labels, random contrasts": Method(lambda data: data.contrasts(None)),
}
"""Augmentation is that of all supervised networks."""


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Train every network, and measure every method on the test scans."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Data.of(log, Path(temporary), limit, seed)
        for name in (*ANSWERS, *METHODS):
            if not only or any(word in name for word in only):
                rows += measured(log, data, name, seed)
                if data.test:
                    print(f"{name:50s} {statistics.fmean(row['dice'] for row in rows if row['method'] == name):.4f}", flush=True)
    settings: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "learning_rate": RATE, "unlabelled": UNLABELLED, "carried": CARRIED}
    settings |= {"patch": PATCH, "threads": threads, "scans": len(data.order)}
    return Table("few_labels", rows, summarise(rows), notes(rows), settings, seed, figure(rows, len(data.order)) if rows else None)


def measured(log: Log, data: Data, name: str, seed: int) -> list[Row]:
    """A row for each test scan; for some methods the first ones."""
    keys = {f"{name}/{path.name[12:15]}": path for path in data.test[: FEW.get(name)]}
    if any(key not in log.rows for key in keys):
        answer = answering(data, name, seed)
        for key, path in keys.items():
            log.row(key, partial(score, name, path, answer))
    return [log.rows[key] for key in keys]


def answering(data: Data, name: str, seed: int) -> Answer:
    return ANSWERS[name](data) if name in ANSWERS else Networks((network(data, name, METHODS[name], seed),))


def network(data: Data, name: str, method: Method, seed: int) -> TrainedSegmenter:
    cohort, grid = data.cohort
    untrained = TrainedSegmenter.build(grid, method.settings, cohort.codes, seed=seed)
    return fitted(data.kept, name, untrained, lambda: method.examples(data), method.steps, seed, data.checked if method.calibrated else None)


def fitted(
    kept: Path, name: str, untrained: TrainedSegmenter, examples: Callable[[], Examples], steps: int, seed: int, checked: Cohort | None = None
) -> TrainedSegmenter:
    """A network that is trained, or as it was kept; a training that was cut off goes on.

    Arguments:
        checked: scans by which it is calibrated.
    """
    place = kept / re.sub("[^-A-Za-z0-9]+", "-", name)
    if (place / "network.json").exists():
        return TrainedSegmenter.load(place)
    place.mkdir(exist_ok=True)
    start = time.perf_counter()

    def tell(row: Row, share: float) -> None:
        print(f"{name}: {row['step']:.0f} steps, loss {row['loss']:.3f}, {time.perf_counter() - start:.0f} s", flush=True)

    training = TrainingSettings(steps, RATE, seed=seed, every=max(1, steps // 10))
    train_segmenter(untrained, examples(), training, folder=place, validation=checked, tell=tell)
    return untrained


def registered(data: Data) -> Answer:
    """The labelled scan's shares of labels at the place of each voxel, a draw of the deformation each."""
    scan, shares = data.one

    def answer(volume: Volume) -> Tensor:
        found = register(scan, volume, draws=DRAWS, device="cpu")
        return torch.stack([sample(shares, scan.grid, places(draw, volume.grid), fill="edge") for draw in found.draws])

    return answer


def shaped(data: Data) -> Answer:
    shapes = data.shapes  # not in the time of the first scan
    return lambda volume: segment_with_shapes(shapes, volume, steps=REFINED, draws=DRAWS).draws


@dataclass(frozen=True)
class Networks:
    """An ``Answer`` of one network or more.

    Arguments:
        passes: of each network that draws; 0 for its mean.
    """

    members: Sequence[TrainedSegmenter]
    passes: int = 0
    seed: int = 0

    def __call__(self, volume: Volume) -> Tensor:
        found = [member.probabilities(volume, self.passes, self.seed) for member in self.members]
        return torch.cat(found) if self.passes else torch.stack(found)

    @property
    def errors(self) -> list[VolumeErrors]:
        """Of the volumes of each answer, where all are known."""
        known = [member.volume_errors for member in self.members if member.volume_errors is not None]
        return [own for own in known for _ in range(max(1, self.passes))] if len(known) == len(self.members) else []


Answer = Callable[[Volume], Tensor]
"""Probabilities of the labels of a scan, ``(K, *shape)``, or draws of them, ``(draws, K, *shape)``."""

ANSWERS: Mapping[str, Callable[[Data], Answer]] = {REGISTRATION: registered, SHAPES: shaped}
"""Those without a network of their own."""


def score(name: str, path: Path, answer: Answer, volume: Volume | None = None) -> Row:
    """Dice, 95 % Hausdorff distance and volume error as means over labels; nats and Brier score a voxel; calibration error near the border; how many
    standard deviations the true volume of each label is from what the method says.

    Arguments:
        volume: what is answered; the scan itself by default.
    """
    errors = answer.errors if isinstance(answer, Networks) else []
    volume, truth = volume or read_scan(path), read_labels(beside(path)).data
    start = time.perf_counter()
    draws = answer(volume)
    seconds = time.perf_counter() - start
    draws = draws if draws.ndim > truth.ndim + 1 else draws[None]
    p = draws.mean(0)
    found = p.argmax(0)
    band = boundary_band(truth > 0, BAND_MM, volume.spacing)
    true = torch.stack([(truth == k).sum() for k in LABELS])
    return {
        "method": name,
        "scan": path.name[12:15],
        "dice": statistics.fmean(dice(found == k, truth == k) for k in LABELS),
        "hd95": statistics.fmean(surface_distances(found == k, truth == k, volume.spacing).hausdorff() for k in LABELS),
        "nll": negative_log_likelihood(p, truth),
        "brier": brier_score(p, truth),
        "ece": statistics.fmean(calibration_error(p[k], truth == k, band) for k in LABELS),
        "volume_error": float(100 * (volumes_of(draws, errors) / true - 1).abs().mean()),
        "z": [round(z, 3) for z in volume_scores(draws, true, errors)],
        "seconds": round(seconds, 3),
    }


def volumes_of(draws: Tensor, errors: Sequence[VolumeErrors] = ()) -> Tensor:
    """What is said of the volume of each label but the background, voxels: a mean over draws ``(D, K, *shape)``, corrected by errors."""
    volumes = draws[:, 1:].flatten(2).double().sum(-1)
    return torch.stack([own.medians(v) for own, v in zip(errors, volumes, strict=True)]).mean(0) if errors else volumes.mean(0)


def volume_scores(draws: Tensor, true: Tensor, errors: Sequence[VolumeErrors] = ()) -> list[float]:
    """(true volume − mean) / standard deviation, of each label but the background; where errors on validation scans are known, the standard normal's
    quantile of the true volume's level.

    Given a draw of p(label), voxels are independent; the variance is what they leave, and that of the mean volume between draws.

    Arguments:
        draws: ``(D, K, *shape)``. true: volumes, voxels, ``(K - 1,)``. errors: of each draw, or none.
    """
    flat = draws[:, 1:].flatten(2).double()
    if errors:
        levels = torch.stack([own.levels(v, true) for own, v in zip(errors, flat.sum(-1), strict=True)]).mean(0)
        found: list[float] = torch.special.ndtri(levels.clamp(1e-12, 1 - 1e-12)).tolist()
        return found
    volumes, left = flat.sum(-1), (flat * (1 - flat)).sum(-1).mean(0)
    sd = (left + (volumes.var(0) if len(volumes) > 1 else 0.0)).sqrt().clamp_min(1e-6)
    scores: list[float] = ((true - volumes.mean(0)) / sd).tolist()
    return scores


def coverage(rows: Sequence[Row]) -> str:
    """Share of true volumes that are in 50, 80 and 95 % intervals, %; an en dash where no row tells."""
    scores = torch.tensor([z for row in rows for z in row.get("z", [])])
    if not len(scores):
        return "–"
    return " / ".join(f"{100 * float((scores.abs() < width).double().mean()):.0f}" for width in (0.674, 1.282, 1.960))


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line a method, the least labels first."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        line = {"method": name}
        for key, head, digits in (("dice", "Dice", 3), ("hd95", "HD95, mm", 2), ("nll", "nats a voxel", 4), ("brier", "Brier", 4)):
            line[head] = mean_sd([row[key] for row in own], digits)
        line["ECE near the border"] = f"{statistics.fmean(row['ece'] for row in own):.3f}"
        line["volume error, %"] = mean_sd([row["volume_error"] for row in own], 1)
        line["volumes in 50 / 80 / 95 % intervals"] = coverage(own)
        line["seconds"] = f"{statistics.median(row['seconds'] for row in own):.2f}"
        lines.append(line)
    return lines


def notes(rows: Sequence[Row]) -> str:
    """Differences of Dice, and how much of the way from registration to all labels one label goes."""
    of = {name: {row["scan"]: row["dice"] for row in rows if row["method"] == name} for name in dict.fromkeys(row["method"] for row in rows)}
    if REGISTRATION not in of:
        return ""
    parts = []
    for name in of:
        shared = sorted(set(of[name]) & set(of[REGISTRATION]))
        if name != REGISTRATION and len(shared) > 1:
            ours, theirs = (torch.tensor([of[each][scan] for scan in shared]) for each in (name, REGISTRATION))
            found = paired_bootstrap(ours, theirs)
            parts.append(f"{name} {found.mean:+.3f} [{found.lower:+.3f}, {found.upper:+.3f}]")
    text = f"Dice of each method less that of registration, mean over scans with a 95 % paired bootstrap interval: {'; '.join(parts)}."
    if LEARNED in of and FULL in of:
        low, high, reached = (statistics.fmean(of[name].values()) for name in (REGISTRATION, FULL, LEARNED))
        text += f" Of the way from registration to all labels, learned transforms with augmentation go {100 * (reached - low) / (high - low):.0f} %."
    return text


def figure(rows: Sequence[Row], everything: int) -> Figure:
    """Dice of the U-Net against the number of labelled scans, and beside it those of the other methods, with 95 % bootstrap bands over test scans.

    Arguments:
        everything: number of scans where all are labelled.
    """
    drawn = blank_figure(9.0, 4.0)
    axis, beside_it = drawn.add_axes((0.07, 0.14, 0.36, 0.8)), drawn.add_axes((0.74, 0.14, 0.24, 0.8))
    of = {name: torch.tensor([row["dice"] for row in rows if row["method"] == name]) for name in dict.fromkeys(row["method"] for row in rows)}
    bands = {name: band(values) for name, values in of.items()}
    counts = {name: int(found.group(1)) for name in of if (found := re.match(r"U-Net, (\d+) label", name))}
    counts |= dict.fromkeys({FULL} & of.keys(), everything)
    order = sorted(counts, key=lambda name: counts[name])
    x = [counts[name] for name in order]
    if order:
        axis.fill_between(x, [bands[n][0] for n in order], [bands[n][2] for n in order], color=ACCENT, alpha=0.2, lw=0)
        axis.plot(x, [bands[n][1] for n in order], "o-", color=ACCENT)
    axis.set_xscale("log")
    axis.set_xticks(x, [str(count) for count in x])
    axis.minorticks_off()
    axis.set_xlabel("labelled training scans of a U-Net")
    axis.set_ylabel("Dice on test scans")
    others = sorted((name for name in of if name not in counts), key=lambda name: bands[name][1])
    for place, name in enumerate(others):
        low, middle, high = bands[name]
        beside_it.plot([low, high], [place, place], color=ACCENT, lw=4, alpha=0.25, solid_capstyle="butt")
        beside_it.plot(middle, place, "o", color=ACCENT)
    beside_it.set_yticks(range(len(others)), others, fontsize=7.5)
    beside_it.set_xlabel("Dice on test scans")
    for each in (axis, beside_it):
        bare_axes(each)
    return drawn
