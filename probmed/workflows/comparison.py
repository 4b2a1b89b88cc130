"""Several segmentations of one scan side by side: volumes, agreement with a truth or with each other, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from probmed.metrics import dice, mean_dice, surface_distances
from probmed.volumes import UnusableInput, Volume, read_labels
from probmed.workflows.propagation import check_same_grid, names_beside


@dataclass(frozen=True)
class Comparison:
    """Segmentations of a scan.

    Arguments:
        maps: label maps by name, ``(*shape)`` int64; the truth is among them where there is one. labels: names of all codes but 0.
        truth: its name, or None.
    """

    scan: Volume
    maps: Mapping[str, Tensor]
    labels: Mapping[int, str]
    truth: str | None = None

    @classmethod
    def read(cls, scan: Volume, paths: Mapping[str, Path], truth: Path | None = None, names: Mapping[int, str] | None = None) -> Comparison:
        """From label maps on the scan's voxels.

        Raises:
            UnusableInput: where one cannot be read or is on other voxels, or all are empty.
        """
        every = {**paths, **({} if truth is None else {"truth": truth})}
        maps: dict[str, Tensor] = {}
        found: dict[int, str] = {}
        for name, path in every.items():
            labels = read_labels(path)
            check_same_grid(labels, scan)
            maps[name] = labels.data
            found |= names_beside(path)
        codes = sorted(set().union(*(set(m.unique().tolist()) for m in maps.values())) - {0})
        if not codes:
            raise UnusableInput(next(iter(every.values())), "and all others are empty: every voxel is 0", "give maps of labels other than 0")
        known = {**found, **(names or {})}
        return cls(scan, maps, {code: known.get(code, str(code)) for code in codes}, None if truth is None else "truth")

    def volumes(self) -> pd.DataFrame:
        """A row a segmentation and label: ``volume_ml``; against the truth, if any, ``dice``, ``hd95_mm`` and ``volume_error`` in per cent."""
        voxel_ml = self.scan.as_3d().grid.voxel_volume / 1000
        rows = []
        for name, own in self.maps.items():
            for code, label in self.labels.items():
                row: dict[str, object] = {"segmentation": name, "index": code, "label": label, "volume_ml": float((own == code).sum()) * voxel_ml}
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
