"""Segmentation networks from a table, one run or one for each fold: what `probmed train segmentation` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from lightning_fabric import Fabric

from probmed.grids import Grid
from probmed.inference.training import Row, TrainingSettings
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan, sha256
from probmed.workflows.amortisation import Cohort, names_of, read_cohort
from probmed.workflows.comparison import Comparison
from probmed.workflows.growth import Registered, Registrations
from probmed.workflows.one_shot import carried, model_of
from probmed.workflows.propagation import check_same_grid
from probmed.workflows.registration import RegistrationSettings
from probmed.workflows.supervision import SegmenterSettings, TrainedSegmenter, train_segmenter
from probmed.workflows.training_sets import Augmentation, Examples, completed, labelled, on_grid, one_shot, random_contrast, regions_of

ExamplesOf = Literal["scans", "contrasts", "one-shot", "carried"]
OF_ONE: tuple[ExamplesOf, ...] = ("one-shot", "carried")
"""Those for which one scan has labels and the others none."""


@dataclass(frozen=True)
class SegmenterRun:
    """How a network is trained on a table.

    Arguments:
        examples: "scans", as they are labelled; "contrasts", their labels' shapes in random contrasts; "one-shot", draws of the one that has labels,
            changed as the others differ; "carried", all of them with the labels of the one carried to the others.
        augmentation: of examples; none by default. batch: scans a step. spacing_mm: of the network's grid, the finest scan's by default.
        names: of the labels, where they have others than a table beside the first label map gives.
    """

    settings: SegmenterSettings = field(default_factory=SegmenterSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    examples: ExamplesOf = "scans"
    augmentation: Augmentation | None = None
    batch: int = 2
    spacing_mm: float | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.examples not in get_args(ExamplesOf):
            raise ValueError(f"expected examples of {get_args(ExamplesOf)}, got {self.examples!r}")

    def train(
        self,
        table: pd.DataFrame,
        source: Path,
        folder: Path,
        held: pd.DataFrame | None = None,
        fabric: Fabric | None = None,
        tell: Callable[[str, float], None] = lambda stage, share: None,
    ) -> tuple[TrainedSegmenter, list[Row]]:
        """The network, saved in a folder that has to exist, and the log; a run that was stopped goes on.

        Arguments:
            table: columns ``scan`` and ``labels``: paths, relative ones to the folder of source, the table's path.
            held: such a table of scans that training does not see: they score the network and give its temperature.
            tell: called with what is being done, and the share of it.

        Raises:
            UnusableInput: for scans without labels or with labels too many, for label maps that are all 0, and as ``read_cohort``.
        """
        fabric = fabric or Fabric(accelerator="cpu", devices=1)
        tell("reading", 0.0)
        cohort, grid = read_cohort(table, source, self.spacing_mm, least=1)
        self._check_labels(cohort, source)
        if self.settings.patch is not None and len(self.settings.patch) not in (1, grid.ndim):
            remedy = f"give the patch one length, or {grid.ndim}"
            raise UnusableInput(source, f"has scans of {grid.ndim} axes, and the patch {len(self.settings.patch)} lengths", remedy)
        checked = None if held is None else read_cohort(held, source, grid=grid, codes=cohort.codes, least=1)[0].to(fabric.device)
        examples = self._examples(table, source, cohort, grid, folder, fabric.device, tell)
        trained = TrainedSegmenter.build(grid, self.settings, cohort.codes, {**names_of(table, source), **self.names}, self.training.seed)
        trained.network.to(fabric.device)

        def report(row: Row, share: float) -> None:
            score = f", Dice {row['dice']:.3f}" if "dice" in row else ""
            tell(f"step {row['step']:.0f}, loss {row['loss']:.4g}{score}", share)

        described: dict[str, Any] = {"scans": list(cohort.names), "examples": self.examples, "augment": self.augmentation is not None}
        described |= {"batch": self.batch, "codes": cohort.codes, "spacing_mm": grid.spacing, "shape": grid.shape}
        described["checksum of scans and labels"] = _checksum(table, source)
        log = train_segmenter(trained, examples, self.training, folder=folder, validation=checked, fabric=fabric, described=described, tell=report)
        return trained, log

    def _examples(
        self, table: pd.DataFrame, source: Path, cohort: Cohort, grid: Grid, folder: Path, device: torch.device, tell: Callable[[str, float], None]
    ) -> Examples:
        """What the network is trained on; registrations that it takes are kept in the run's folder."""
        if self.examples in OF_ONE:
            kept = Registrations(folder / "registrations", seed=self.training.seed, device=device.type)
            scan, labels, others = _one_and_others(table, source)

        def registered(moving: Volume, fixed: Volume) -> Registered:
            return kept(moving, fixed, RegistrationSettings())

        def registering(share: float) -> None:
            tell("registering", share)

        if self.examples == "one-shot":
            model = model_of(scan, labels, others, cohort.codes, registered, registering)
            return on_grid(one_shot([model], self.batch, self.augmentation), model.grid, grid)
        if self.examples == "carried":
            cohort = completed(cohort, carried(scan, labels, others, registered, registering), grid)
        cohort = cohort.to(device)
        if self.examples == "contrasts":
            return random_contrast(regions_of(cohort.images, cohort.labels), cohort.labels, grid, self.batch, self.augmentation)
        return labelled(cohort.images, cohort.labels, grid, self.batch, self.augmentation)

    def _check_labels(self, cohort: Cohort, source: Path) -> None:
        known = (cohort.labels >= 0).flatten(1).all(1)
        if self.examples not in OF_ONE and not bool(known.all()):
            raise UnusableInput(source, "has scans without labels", "give labels to each, leave the scan out, or use --examples one-shot or carried")
        if self.examples in OF_ONE and (int(known.sum()) != 1 or len(known) < 3):
            fault = f"has {int(known.sum())} scans with labels and {int((~known).sum())} without"
            raise UnusableInput(source, fault, "give one with labels, and two or more without")
        if len(cohort.codes) < 2:
            raise UnusableInput(source, "has label maps to train on that are all empty: every voxel is 0", "give maps of labels other than 0")


def check_folds(folds: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], source: Path) -> None:
    """Refuse, before hours of training, folds of which a later one could not be trained without, or could not be scored.

    Arguments:
        folds: of each, rows for training and those of the fold. source: the table's path.

    Raises:
        UnusableInput: for a label that only one fold has, and where all labels are in one fold.
    """
    cells = pd.concat([held for _, held in folds.values()])["labels"]
    codes = {cell: set(read_labels(source.parent / str(cell)).data.unique().tolist()) - {0} for cell in cells}
    for name, (rows, held) in folds.items():
        seen = set().union(*(codes[cell] for cell in rows["labels"]))
        for cell in held["labels"]:
            if missing := sorted(codes[cell] - seen):
                fault = f"has the label {missing[0]}, which no scan outside fold {name} has"
                raise UnusableInput(source.parent / str(cell), fault, "divide scans with this label among folds, or leave the label out")
        if not seen:
            raise UnusableInput(source, f"has no label other than 0 outside fold {name}", "give maps of labels other than 0")


def _checksum(table: pd.DataFrame, source: Path) -> str:
    """Of all files of a table, in their order."""
    cells = [cell for column in ("scan", "labels") for cell in table[column] if not pd.isna(cell)]
    return hashlib.sha256(" ".join(sha256(source.parent / str(cell)) for cell in cells).encode()).hexdigest()


def _one_and_others(table: pd.DataFrame, source: Path) -> tuple[Volume, Volume, list[Volume]]:
    """The labelled scan, its labels, and the scans without."""
    one = table["labels"].notna()
    scan, labels = read_scan(source.parent / str(table["scan"][one].iloc[0])), read_labels(source.parent / str(table["labels"][one].iloc[0]))
    return scan, labels, [read_scan(source.parent / str(name)) for name in table["scan"][~one]]


def scored(trained: TrainedSegmenter, table: pd.DataFrame, source: Path) -> pd.DataFrame:
    """How well scans are labelled, on their own voxels.

    Arguments:
        table: columns ``scan`` and ``labels``: paths, relative ones to the table's folder. source: the table's path.

    Returns:
        A row a scan and label: index, label, volume_ml, dice, hd95_mm, volume_error (%) and scan.
    """
    codes, rows = torch.tensor(trained.codes), []
    for scan_path, labels_path in zip(table["scan"], table["labels"], strict=True):
        scan, truth = read_scan(source.parent / str(scan_path)), read_labels(source.parent / str(labels_path))
        check_same_grid(truth, scan)
        found = codes[trained.probabilities(scan).argmax(0)]
        compared = Comparison(scan, {"network": found, "truth": truth.data}, trained.names, "truth").volumes()
        rows.append(compared[compared["segmentation"] == "network"].drop(columns="segmentation").assign(scan=str(scan_path)))
    return pd.concat(rows, ignore_index=True)
