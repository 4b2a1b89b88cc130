"""The default atlas: MNI152's grey and white matter, completed to a whole head."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor

from probmed.atlases.labels import LabelAtlas
from probmed.grids import Grid, resample


@dataclass(frozen=True)
class AtlasRecipe:
    """How `default_atlas` completes the MNI152 maps to a whole head; every length in mm. `docs/atlas.md`
    explains each step.

    Distances are from the surface of the brain, outwards. A class boundary at distance b with width w is a
    logistic function, 1 / (1 + exp((distance − b) / w)).
    """

    version: int = 1
    spacing_mm: float = 1.5
    smoothing_fwhm_mm: float = 2.0
    cistern_radius_mm: float = 9.0
    """Gaps of the brain's surface narrower than twice this (fissures, basal cisterns) count as inside the
    skull.
    """
    csf_mm: tuple[float, float] = (3.0, 1.2)
    """Where CSF and meninges end and bone begins: boundary, width."""
    skull_mm: tuple[float, float] = (9.0, 1.7)
    scalp_mm: tuple[float, float] = (16.5, 2.2)
    skull_base_mm: tuple[float, float] = (-25.0, 8.0)
    """Height (z) below which the closed skull gives way to its base, and the width of that change."""
    base_muscle_mm: float = 5.0
    """How much thicker the tissue around the skull is below that height."""
    face_centre_mm: tuple[float, float, float] = (0.0, 15.0, -80.0)
    face_axes_mm: tuple[float, float, float] = (74.0, 78.0, 88.0)
    neck_centre_mm: tuple[float, float] = (0.0, -32.0)
    neck_axes_mm: tuple[float, float] = (78.0, 80.0)
    neck_top_mm: float = -50.0
    body_width_mm: float = 5.0
    """Width of the outer boundary of face and neck."""
    face_mixture: tuple[float, float, float] = (0.25, 0.63, 0.12)
    """Bone, soft tissue and air inside face and neck, away from the skull."""
    cord_length_mm: float = 12.0
    """Length over which the brain stem, cut at the edge of the MNI maps, fades out below it."""
    low_mm: tuple[float, float, float] = (-110.0, -146.0, -132.0)
    high_mm: tuple[float, float, float] = (110.0, 122.0, 122.0)
    floor: float = 1e-4


def default_atlas(spacing_mm: float = 1.5, cache: bool = True) -> LabelAtlas:
    """The MNI152 atlas of a whole head: GM, WM, CSF, bone, soft, air.

    GM and WM are the maps of the ICBM 152 2009a symmetric template that nilearn's wheel contains. CSF is what
    they leave of the brain's filled mask and a margin around it. Bone, soft tissue and air follow from the
    distance to the brain and from two simple shapes for face and neck; they are deliberately vague.

    Arguments:
        spacing_mm: voxel size; the maps come at 1 mm. Above 1.5 mm, the atlas of 1.5 mm averaged over voxels
            of about that size, so that thin layers keep their volumes.
        cache: keep the result in `cache_folder`, and use what an earlier call kept there. The name holds a
            hash of the recipe and of the input files. Where the folder cannot be written, the atlas is built
            each time (a few seconds).

    Returns:
        An atlas with the (stripped) T1 template, intensities in [0, 1], and brain = ("GM", "WM", "CSF"). The
        same call gives the same values with and without cache.

    >>> atlas = default_atlas(spacing_mm=6.0)
    >>> atlas.names
    ('GM', 'WM', 'CSF', 'bone', 'soft', 'air')
    >>> atlas.stripped().names
    ('GM', 'WM', 'CSF', 'background')
    """
    if not 0.5 <= spacing_mm <= 20:
        raise ValueError(f"expected a spacing between 0.5 and 20 mm, got {spacing_mm}")
    recipe = AtlasRecipe(spacing_mm=min(float(spacing_mm), AtlasRecipe.spacing_mm))
    inputs = {name: _packaged_map(name) for name in ("t1", "gm", "wm")}
    folder = cache_folder() if cache else None
    path = None if folder is None else folder / f"atlas-mni152-{_digest(recipe, inputs)}.safetensors"
    stored = _read_cached(path) if path is not None else None
    if stored is None:
        stored = _build(recipe, inputs)
        if path is not None:
            _write_cached(path, *stored)
    packed, grid = stored
    probabilities = packed["probabilities"].float().clamp_min(recipe.floor)
    probabilities /= probabilities.sum(0)
    names = ("GM", "WM", "CSF", "bone", "soft", "air")
    atlas = LabelAtlas(names, probabilities, grid, packed["template"].float())
    return atlas.resampled(spacing_mm) if spacing_mm > recipe.spacing_mm else atlas


def cache_folder() -> Path:
    """Where built atlases are kept: ``PROBMED_CACHE``, else ``XDG_CACHE_HOME/probmed``, else the system's
    place for caches.
    """
    chosen, shared = os.environ.get("PROBMED_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    if shared:
        return Path(shared).expanduser() / "probmed"
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "probmed"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(home / "AppData" / "Local"))) / "probmed" / "Cache"
    return home / ".cache" / "probmed"


Packed = tuple[dict[str, Tensor], Grid]


def _packaged_map(name: str) -> bytes:
    """A map of nilearn's package, still compressed. Read from the package's files: importing nilearn itself
    takes seconds.
    """
    file = f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    return (resources.files("nilearn") / "datasets" / "data" / file).read_bytes()


def _digest(recipe: AtlasRecipe, inputs: dict[str, bytes]) -> str:
    digest = hashlib.sha256(repr(recipe).encode())
    for name in sorted(inputs):
        digest.update(hashlib.sha256(inputs[name]).digest())
    return digest.hexdigest()[:16]


def _read_cached(path: Path) -> Packed | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            packed = {name: file.get_tensor(name) for name in ("probabilities", "template")}
            affine = torch.tensor(json.loads(file.metadata()["affine"]), dtype=torch.float64)
        if not torch.isfinite(packed["probabilities"]).all():
            return None
        return packed, Grid(tuple(packed["template"].shape), affine)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # absent or damaged: it is built again


def _write_cached(path: Path, packed: dict[str, Tensor], grid: Grid) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        save_file(packed, temporary, metadata={"affine": json.dumps(grid.affine.tolist())})
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        # A read-only or full home is no reason to fail: the atlas is in memory.
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _build(recipe: AtlasRecipe, inputs: dict[str, bytes]) -> Packed:
    low, high = np.array(recipe.low_mm), np.array(recipe.high_mm)
    shape = tuple(int(n) for n in np.ceil((high - low) / recipe.spacing_mm))
    affine = torch.diag(torch.tensor([recipe.spacing_mm] * 3 + [1.0], dtype=torch.float64))
    affine[:3, 3] = torch.as_tensor(low + recipe.spacing_mm / 2)
    grid = Grid(shape, affine)

    template, gm, wm, inside = _brain_maps(recipe, inputs, grid)
    z = grid.coordinates(torch.float64)[..., 2].numpy()
    mask = inside > 0.5
    radius = recipe.cistern_radius_mm
    distance = _distance(mask, grid)
    vault = _distance(distance > radius, grid) > radius
    vault |= mask
    # Narrow gaps of the surface are fluid near the brain; far from it (clivus, sella, petrous bone) they are
    # bone.
    vault_distance = _signed_distance(vault, grid)
    rest = np.clip(1 - gm - wm, 0, 1)
    csf = rest * _below(vault_distance, recipe.csf_mm) * _below(distance, (10.0, 3.0))
    outside = np.clip(rest - csf, 0, 1)

    base = _below(z, recipe.skull_base_mm)
    face = _body(recipe, grid)
    skull = _below(vault_distance, recipe.skull_mm)
    head = np.maximum(_below(vault_distance - recipe.base_muscle_mm * base, recipe.scalp_mm), face)
    # Beside and below the skull's base there is no closed shell: a third is bone, the rest muscle, fat,
    # vessels and cavities.
    deep = np.maximum(base * head * skull, face * (1 - skull))
    bone_deep, _, air_deep = recipe.face_mixture
    bone = skull * (1 - 0.65 * base)
    bone = bone + (1 - bone) * deep * bone_deep
    air = (1 - bone) * ((1 - head) + head * deep * air_deep)
    soft = np.clip(1 - bone - air, 0, 1)
    classes = np.stack([gm, wm, csf, outside * bone, outside * soft, outside * air])
    classes /= classes.sum(0)
    packed = {
        # Half precision, in memory as in the cache, so that both give the same atlas.
        "probabilities": torch.from_numpy(classes).half(),
        "template": torch.from_numpy(template).half(),
    }
    return packed, grid


def _brain_maps(recipe: AtlasRecipe, inputs: dict[str, bytes], grid: Grid) -> tuple[NDArray[np.float64], ...]:
    """Template, GM, WM and the filled brain mask on the working grid, ``(*shape)`` each."""
    images = {name: nib.Nifti1Image.from_bytes(gzip.decompress(data)) for name, data in inputs.items()}
    affine = torch.as_tensor(np.asarray(images["t1"].affine), dtype=torch.float64)
    # The stored integers are probabilities in units of 1/255; the files' own scaling factor is not one.
    t1, gm, wm = (_unscaled(images[name]) / 255 for name in ("t1", "gm", "wm"))
    mask = ndimage.binary_closing((t1 > 0) | (gm + wm > 0.5), iterations=2) | (t1 > 0)
    mask = np.asarray(ndimage.binary_fill_holes(mask))
    stack = torch.from_numpy(np.stack([t1, gm, wm, mask.astype(np.float32)]))

    # The maps end inside the brain stem. Repeat the last slice downwards, fading, so that no skull is put
    # across the cord.
    extra = math.ceil(3 * recipe.cord_length_mm)
    fade = torch.linspace(0, 1, extra + 1)[:-1] ** 2
    stack = torch.cat([stack[..., :1] * fade, stack], -1)
    affine[:3, 3] -= affine[:3, 2] * extra
    source = Grid(tuple(stack.shape[1:]), affine)

    sd = math.hypot(recipe.smoothing_fwhm_mm / 2.3548, 0.45 * max(recipe.spacing_mm - 1, 0))
    smooth = torch.from_numpy(ndimage.gaussian_filter(stack.numpy(), (0, sd, sd, sd), truncate=3.0))
    smooth[0] = stack[0] if recipe.spacing_mm <= 1 else smooth[0]
    out = resample(smooth, source, grid).clamp(0, 1).double().numpy()
    return out[0], out[1], out[2], out[3]


def _unscaled(image: nib.Nifti1Image) -> NDArray[np.float32]:
    if not isinstance(image.dataobj, nib.arrayproxy.ArrayProxy):
        raise TypeError(f"expected an image that was read from bytes, got data of type {type(image.dataobj).__name__}")
    return np.asarray(image.dataobj.get_unscaled(), dtype=np.float32)  # type: ignore[no-untyped-call]


def _distance(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.float64]:
    """mm from each voxel outside the mask to the mask; 0 inside."""
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=grid.spacing), dtype=np.float64)


def _signed_distance(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.float64]:
    """mm to the mask's surface, positive outside."""
    return _distance(mask, grid) - _distance(~mask, grid)


def _below(distance: NDArray[np.float64], boundary: tuple[float, float]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(np.clip((distance - boundary[0]) / boundary[1], -50, 50)))


def _body(recipe: AtlasRecipe, grid: Grid) -> NDArray[np.float64]:
    """Probability of being inside face or neck by two ellipses, ``(*shape)``."""
    x, y, z = grid.coordinates(torch.float64).numpy().transpose(3, 0, 1, 2)
    (fx, fy, fz), (ax, ay, az) = recipe.face_centre_mm, recipe.face_axes_mm
    (nx, ny), (bx, by) = recipe.neck_centre_mm, recipe.neck_axes_mm
    # Distance to a surface, near it: (relative radius - 1) times the mean axis. The power 3 flattens face and
    # cheeks.
    radius = (np.abs((x - fx) / ax) ** 3 + np.abs((y - fy) / ay) ** 3 + np.abs((z - fz) / az) ** 3) ** (1 / 3)
    face = (radius - 1) * (ax + ay + az) / 3
    neck = (np.sqrt(((x - nx) / bx) ** 2 + ((y - ny) / by) ** 2) - 1) * (bx + by) / 2
    neck = np.maximum(neck, z - recipe.neck_top_mm)
    return _below(np.minimum(face, neck), (0.0, recipe.body_width_mm))
