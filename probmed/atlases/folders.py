"""Atlases on disk: a folder of probability maps and an ``atlas.json`` that names them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probmed.atlases.labels import BACKGROUNDS, LabelAtlas
from probmed.volumes import UnusableInput, Volume, read_scan, write_scan

INDEX = "atlas.json"
_KEYS = ("names", "maps", "template", "brain", "indices", "colours")


def read_atlas(folder: str | os.PathLike[str]) -> LabelAtlas:
    """An atlas of one's own.

    The folder holds one NIfTI map of probabilities for each class, all on one grid, and ``atlas.json``::

        {
          "names": ["GM", "WM", "CSF"],
          "maps": {"GM": "gm.nii.gz"},
          "template": "t1.nii.gz",
          "brain": ["GM", "WM", "CSF"],
          "indices": {"GM": 1, "WM": 2, "CSF": 3},
          "colours": {"GM": "#7f8c8d"}
        }

    Only ``names`` has to be there. The map of a class is ``label-<name>_probseg.nii.gz`` unless ``maps`` says
    otherwise. ``brain`` is by default those of GM, WM and CSF that there are, or, without them, all classes
    but the background. Where probabilities sum to less than 1 the rest goes to the class named "background"
    or "air", which is added as "background" if there is none.

    Raises:
        UnusableInput: naming the file, where one is missing, malformed or on another grid, or holds no
            probabilities.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UnusableInput(folder, "is not a folder", f"give a folder with probability maps and {INDEX}")
    index = _read_index(folder / INDEX)
    names: list[str] = index["names"]
    maps, first = [], None
    for name in names:
        path = folder / index["maps"].get(name, f"label-{name}_probseg.nii.gz")
        volume = _read_map(path, name)
        first = first or volume
        if volume.grid != first.grid:
            fault = f"has another grid than the map of {names[0]!r}: shape {volume.grid.shape}, not"
            fault += f" {first.grid.shape}, or another affine"
            raise UnusableInput(path, fault, "resample all maps to one grid")
        maps.append(volume.data)
    if first is None:
        raise UnusableInput(folder / INDEX, "names no class", 'list the classes under "names"')
    probabilities, names = _completed(torch.stack(maps), names, folder)
    template = None
    if index["template"] is not None:
        path = folder / index["template"]
        volume = read_scan(path)
        if volume.grid != first.grid:
            raise UnusableInput(path, "is on another grid than the probability maps", "resample it to their grid")
        low, high = volume.data.min(), volume.data.max()
        template = (volume.data - low) / (high - low)
    brain = index["brain"]
    if brain is None:
        brain = [n for n in names if n in ("GM", "WM", "CSF")] or [n for n in names if n not in BACKGROUNDS]
    options: dict[str, Any] = {}
    for key in ("indices", "colours"):
        given = index[key]
        default = LabelAtlas(tuple(names), probabilities, first.grid, None, tuple(brain)) if given else None
        if default is not None:
            options[key] = tuple(given.get(n, d) for n, d in zip(names, getattr(default, key), strict=True))
    try:
        return LabelAtlas(tuple(names), probabilities, first.grid, template, tuple(brain), **options)
    except ValueError as error:
        raise UnusableInput(folder / INDEX, str(error), "correct it") from error


def write_atlas(atlas: LabelAtlas, folder: str | os.PathLike[str]) -> None:
    """Write an atlas as a folder that ``read_atlas`` reads, whole or not at all.

    Raises:
        UnusableInput: where the folder exists and is not empty, the atlas is not three-dimensional, or it
            cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnusableInput(folder, "exists already", "give a new or an empty folder")
    if atlas.grid.ndim != 3:
        raise UnusableInput(folder, f"would hold an atlas with {atlas.grid.ndim} axes", "write atlases with 3 axes")
    index = {
        "names": list(atlas.names),
        "maps": {name: f"label-{name}_probseg.nii.gz" for name in atlas.names},
        "template": None if atlas.template is None else "template.nii.gz",
        "brain": list(atlas.brain),
        "indices": dict(zip(atlas.names, atlas.indices, strict=True)),
        "colours": dict(zip(atlas.names, atlas.colours, strict=True)),
    }
    like = Volume.from_grid(atlas.probabilities[0].cpu(), atlas.grid)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        temporary.chmod(0o755)
        for name, values in zip(atlas.names, atlas.probabilities, strict=True):
            write_scan(temporary / f"label-{name}_probseg.nii.gz", values.cpu(), like)
        if atlas.template is not None:
            write_scan(temporary / "template.nii.gz", atlas.template.cpu(), like)
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        fault = f"cannot be written ({error.strerror or error})"
        raise UnusableInput(folder, fault, "free space there or choose another folder") from error
    finally:
        # Gone after the rename, there after any failure, one of write_scan's included.
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnusableInput(path, "does not exist", 'write one with at least {"names": ["GM", "WM", ...]}')
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnusableInput(path, f"is not JSON ({error})".replace("\n", " "), "correct it") from error
    if not isinstance(index, dict):
        raise UnusableInput(path, f"holds a {type(index).__name__}", 'write an object with "names"')
    unknown = sorted(set(index) - set(_KEYS))
    if unknown:
        raise UnusableInput(path, f"has unknown keys {unknown}", f"use {', '.join(_KEYS)}")
    index = {key: index.get(key) for key in _KEYS}
    index["maps"] = index["maps"] or {}
    names = index["names"]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise UnusableInput(path, f'has no list of names under "names" (got {names!r})', 'write "names": ["GM", ...]')
    if len(set(names)) != len(names):
        raise UnusableInput(path, f"names a class twice: {names}", "give each class its own name")
    kinds: dict[str, type] = {"maps": str, "indices": int, "colours": str}
    for key, kind in kinds.items():
        value = index[key]
        if value is None:
            continue
        if not isinstance(value, dict) or not all(isinstance(v, kind) for v in value.values()):
            raise UnusableInput(path, f'needs an object from class to {kind.__name__} under "{key}"', "correct it")
        strangers = sorted(set(value) - {*names, *BACKGROUNDS})
        if strangers:
            raise UnusableInput(path, f'has classes {strangers} under "{key}" that "names" lacks', "correct it")
    brain = index["brain"]
    if brain is not None and (not isinstance(brain, list) or not set(map(str, brain)) <= set(names)):
        raise UnusableInput(path, f'lists {brain!r} under "brain", not classes of {names}', "correct it")
    if not isinstance(index["template"], str | None):
        raise UnusableInput(path, 'needs the name of a file under "template"', "correct it")
    return index


def _read_map(path: Path, name: str) -> Volume:
    if not path.is_file():
        remedy = f'add the file, or name it in "maps" of {INDEX}'
        raise UnusableInput(path, f"does not exist; it is the map of class {name!r}", remedy)
    volume = read_scan(path)
    low, high = float(volume.data.min()), float(volume.data.max())
    if low < -1e-3 or high > 1 + 1e-3:
        fault = f"holds values from {low:.4g} to {high:.4g}, not probabilities"
        raise UnusableInput(path, fault, "scale the map to lie between 0 and 1")
    return volume


def _completed(maps: Tensor, names: list[str], folder: Path) -> tuple[Tensor, list[str]]:
    """Probabilities that sum to 1, with a background where the maps leave a rest."""
    maps = maps.float().clamp(0, 1)
    total = maps.sum(0)
    if total.max() > 1.02:
        fault = f"holds maps whose sum reaches {float(total.max()):.3f}"
        raise UnusableInput(folder, fault, "scale them so that no voxel's probabilities sum to more than 1")
    if total.min() < 0.98 or len(names) == 1:
        rest = (1 - total).clamp_min(0)
        background = next((n for n in names if n in BACKGROUNDS), None)
        if background is None:
            names, maps = [*names, "background"], torch.cat([maps, rest[None]])
        else:
            maps = maps.clone()
            maps[names.index(background)] += rest
    return maps / maps.sum(0), names
