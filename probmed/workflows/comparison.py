"""Several segmentations of one scan side by side: volumes, agreement with a truth or with each other, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from probmed.metrics import dice, mean_dice, surface_distances
from probmed.volumes import UnusableInput, Volume, bids_stem, read_labels
from probmed.workflows.propagation import check_same_grid, names_beside


@dataclass(frozen=True)
class Comparison:
    """Segmentations of a scan.

    Arguments:
        maps: label maps by name, ``(*shape)`` int64; the truth is among them where there is one. labels: names of all codes but 0.
        truth: its name, or None.
        expected: of some maps, by name and code: expected volume, 2.5 and 97.5 % quantile, ml.
    """

    scan: Volume
    maps: Mapping[str, Tensor]
    labels: Mapping[int, str]
    truth: str | None = None
    expected: Mapping[tuple[str, int], tuple[float, float, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, scan: Volume, paths: Mapping[str, Path], truth: Path | None = None, names: Mapping[int, str] | None = None) -> Comparison:
        """From label maps on the scan's voxels; of ``X_dseg.nii.gz`` with what ``X_volumes.tsv`` and ``X_dseg.tsv`` tell, where they are.

        Raises:
            UnusableInput: where one cannot be read or is on other voxels, or all are empty.
        """
        every = {**paths, **({} if truth is None else {"truth": truth})}
        maps: dict[str, Tensor] = {}
        found: dict[int, str] = {}
        expected: dict[tuple[str, int], tuple[float, float, float]] = {}
        for name, path in every.items():
            labels = read_labels(path)
            check_same_grid(labels, scan)
            maps[name] = labels.data
            # A name says more than the number itself, which some tables have in its place.
            found = {**{code: label for code, label in names_beside(path).items() if label != str(code)}, **found}
            expected |= {(name, code): told for code, told in volumes_beside(path).items()}
        codes = sorted(set().union(*(set(m.unique().tolist()) for m in maps.values())) - {0})
        if not codes:
            raise UnusableInput(next(iter(every.values())), "and all others are empty: every voxel is 0", "give maps of labels other than 0")
        known = {**found, **(names or {})}
        names = {code: known.get(code, str(code)) for code in codes}
        return cls(scan, maps, names, None if truth is None else "truth", {key: told for key, told in expected.items() if key[1] in names})

    def volumes(self) -> pd.DataFrame:
        """A row a segmentation and label: ``volume_ml``; ``expected_ml``, ``q025`` and ``q975`` where a segmentation tells them; against the truth,
        if any, ``dice``, ``hd95_mm`` and ``volume_error`` in per cent."""
        voxel_ml = self.scan.as_3d().grid.voxel_volume / 1000
        rows = []
        for name, own in self.maps.items():
            for code, label in self.labels.items():
                row: dict[str, object] = {"segmentation": name, "index": code, "label": label, "volume_ml": float((own == code).sum()) * voxel_ml}
                if self.expected:
                    told = self.expected.get((name, code), (math.nan,) * 3)
                    row |= dict(zip(("expected_ml", "q025", "q975"), told, strict=True))
                if self.truth is not None:
                    row |= self._against(own == code, self.maps[self.truth] == code)
                rows.append(row)
        return pd.DataFrame(rows)

    def _against(self, own: Tensor, truth: Tensor) -> dict[str, float]:
        there = float(truth.sum())
        error = 100 * (float(own.sum()) / there - 1) if there else math.nan
        return {"dice": dice(own, truth), "hd95_mm": surface_distances(own, truth, self.scan.spacing).hausdorff(), "volume_error": error}

    def agreement(self) -> pd.DataFrame:
        """Dice of each pair, the mean over labels that either has, as a square table by name."""
        names = list(self.maps)
        square = [[mean_dice(self.maps[a], self.maps[b], self.labels) for b in names] for a in names]
        return pd.DataFrame(square, index=names, columns=names)

    def disagreement(self) -> Tensor:
        """Entropy of the segmentations' votes at each voxel, the truth's left out, ``(*shape)`` nats."""
        votes = torch.stack([own for name, own in self.maps.items() if name != self.truth])
        shares = torch.stack([(votes == code).float().mean(0) for code in (0, *self.labels)])
        return -torch.special.xlogy(shares, shares).sum(0)


def volumes_beside(path: Path) -> dict[int, tuple[float, float, float]]:
    """Expected volume, 2.5 and 97.5 % quantile of each label of ``X_dseg.nii.gz``, ml, where ``X_volumes.tsv`` has them as probmed writes it."""
    stem = bids_stem(path).removesuffix("_dseg")
    try:
        rows = pd.read_csv(path.with_name(f"{stem}_volumes.tsv"), sep="\t", na_values="n/a")
        told = rows[["volume_ml", "q025", "q975"]].astype(float).to_numpy()
        return {int(code): (float(a), float(b), float(c)) for code, (a, b, c) in zip(rows["index"], told, strict=True)}
    except (OSError, ValueError, KeyError):
        # A file of that name may be about something else.
        return {}
