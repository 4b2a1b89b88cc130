"""What is known to correspond in a pair besides its images: landmarks, and segmentations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from probmed.tables import read_table
from probmed.tables.points import AXES, coordinates
from probmed.volumes import UnusableInput, Volume, read_labels
from probmed.workflows.propagation import check_same_grid
from probmed.workflows.registration import PointPairs


def read_landmarks(path: Path, moving: Volume, fixed: Volume) -> PointPairs:
    """Points that correspond: columns ``fixed_x``, ``fixed_y``, ``fixed_z`` and ``moving_x``, ``moving_y``, ``moving_z``, mm, RAS; of 2D images no z.

    Raises:
        UnusableInput: where the table cannot be read, has no rows, lacks a column or a number, or has a point outside its image.
    """
    table = read_table(path)
    names = [[f"{image}_{axis}" for axis in AXES[: fixed.grid.ndim]] for image in ("fixed", "moving")]
    missing = [name for name in (*names[0], *names[1]) if name not in table.columns]
    if missing:
        raise UnusableInput(path, f"has no column {missing[0]}", f"give columns {', '.join((*names[0], *names[1]))} in mm, RAS")
    points = [coordinates(path, table, columns) for columns in names]
    for volume, there in ((fixed, points[0]), (moving, points[1])):
        inside = volume.grid.holds(there)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0])
            place = ", ".join(f"{value:.4g}" for value in there[row].tolist())
            remedy = "give world coordinates in mm, RAS (those of ITK are LPS: change the signs of x and y)"
            raise UnusableInput(path, f"has a point outside {volume.name} in row {row + 1}: ({place})", remedy)
    return PointPairs(*points)


def read_label_pair(paths: tuple[Path, Path], moving: Volume, fixed: Volume) -> tuple[Tensor, Tensor]:
    """Segmentations of the moving and the fixed image that are to agree, ``(*shape)`` int64 each.

    Raises:
        UnusableInput: where one cannot be read or is on another grid than its image, and where they have no label in common.
    """
    maps = []
    for path, volume in zip(paths, (moving, fixed), strict=True):
        labels = read_labels(path)
        check_same_grid(labels, volume)
        maps.append(labels.data)
    common = np.intersect1d(*(each.unique().numpy() for each in maps))
    if not common.any():
        raise UnusableInput(paths[0], f"has no label but 0 in common with {paths[1]}", "give label maps of one scheme")
    return maps[0], maps[1]
