"""The classical peers, run as their own guides run them: N4 and Atropos of ANTs, and dipy's HMRF classifier.

Each function takes a three-dimensional scan and a folder with the atlas that probmed uses (see
``benchmarks.tissue.write_atlas``), and returns what `benchmarks.runs.measure` expects. A stripped scan's
brain is where it is not zero. None of these methods takes a whole head: there the brain is the atlas's mask,
brought over by a registration that the clock counts.

References:
    N. Tustison et al., N4ITK, IEEE TMI 29, 2010.
    B. Avants et al., An open source multivariate framework for n-tissue segmentation (Atropos),
    Neuroinformatics 9, 2011.
    Y. Zhang et al., Segmentation of brain MR images through a hidden Markov random field model, IEEE TMI 20,
    2001 (dipy's TissueClassifierHMRF).
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from dipy.segment.tissue import TissueClassifierHMRF
from numpy.typing import NDArray
from scipy import ndimage

ants: Any = importlib.import_module("ants")  # a package whose names type checkers do not see

TISSUES = ("CSF", "GM", "WM")
"""In the order of their intensity on a T1 scan."""

Answer = tuple[tuple[str, ...], NDArray[np.float32], dict[str, float], dict[str, Any]]


def atropos_kmeans(
    scan: Path,
    atlas: str,
    stripped: bool,
    work: str,
    registration: str = "Affine",
    markov: str = "[0.1,1x1x1]",
) -> Answer:
    """N4, then Atropos of three classes from k-means."""
    image, mask, _, seconds = _prepared(scan, Path(atlas), stripped, registration, work)
    start = time.perf_counter()
    found = ants.atropos(a=image, x=mask, i="kmeans[3]", m=markov, c="[5,0]")
    seconds["segment"] = time.perf_counter() - start
    probabilities = np.stack([p.numpy() for p in found["probabilityimages"]])
    return (
        TISSUES,
        _by_intensity(probabilities, image.numpy()),
        seconds,
        {"markov": markov, "registration": registration},
    )


def atropos_priors(
    scan: Path,
    atlas: str,
    stripped: bool,
    work: str,
    registration: str = "Affine",
    markov: str = "[0.1,1x1x1]",
    weight: float = 0.25,
) -> Answer:
    """N4, then Atropos of three classes with the atlas's maps, registered to the scan, as priors."""
    image, mask, transforms, seconds = _prepared(scan, Path(atlas), stripped, registration, work, register=True)
    start = time.perf_counter()
    maps = [
        ants.apply_transforms(image, ants.image_read(str(Path(atlas) / f"{name}.nii.gz")), transforms, interpolator="linear").numpy()
        for name in TISSUES
    ]
    # A prior that is zero for all classes inside the mask would leave voxels without a label.
    shares = np.clip(np.stack(maps), 1e-4, 1)
    shares = shares / shares.sum(0) * mask.numpy()
    priors = [image.new_image_like(share.astype(np.float32)) for share in shares]
    found = ants.atropos(a=image, x=mask, i=priors, m=markov, c="[5,0]", priorweight=weight)
    seconds["segment"] = time.perf_counter() - start
    probabilities = np.stack([p.numpy() for p in found["probabilityimages"]])
    remarks = {"markov": markov, "registration": registration, "prior_weight": weight}
    return TISSUES, probabilities.astype(np.float32), seconds, remarks


def dipy_hmrf(
    scan: Path,
    atlas: str,
    stripped: bool,
    work: str,
    registration: str = "Affine",
    beta: float = 0.1,
    iterations: int = 20,
) -> Answer:
    """N4, then dipy's hidden Markov random field of three classes."""
    image, mask, _, seconds = _prepared(scan, Path(atlas), stripped, registration, work)
    start = time.perf_counter()
    data = image.numpy() * mask.numpy()
    _, labels, shares = TissueClassifierHMRF(verbose=False).classify(data, 3, beta, max_iter=iterations)
    probabilities = np.moveaxis(np.asarray(shares, dtype=np.float32), -1, 0)[:3].copy()
    # Its shares can be zero for all classes, or disagree with its labels; the labels are its answer.
    inside = np.asarray(labels) > 0
    probabilities *= inside
    seconds["segment"] = time.perf_counter() - start
    hard = np.stack([np.asarray(labels) == k + 1 for k in range(3)]).astype(np.float32)
    agree = float((probabilities.argmax(0) == hard.argmax(0))[inside].mean())
    remarks = {"beta": beta, "iterations": iterations, "labels_that_are_the_likeliest": agree}
    return TISSUES, _by_intensity(hard, image.numpy()), seconds, remarks


def _prepared(
    scan: Path, atlas: Path, stripped: bool, registration: str, work: str, register: bool = False
) -> tuple[Any, Any, list[str], dict[str, float]]:
    """The scan corrected by N4, its brain, the transforms that bring the atlas to it, and each step's seconds.

    What the methods share is done once for a scan, kept in ``work``, and counted in each one's time.
    """
    store = Path(work)
    said = store / f"{registration if not stripped else 'brain'}.json"
    files = [said.with_suffix(f".{kind}.nii.gz") for kind in ("corrected", "mask")]
    if said.exists():
        image, mask = (ants.image_read(str(file)) for file in files)
        kept = json.loads(said.read_text())
        seconds, transforms = kept["seconds"], kept["transforms"]
    else:
        image, mask, transforms, seconds = _brain(scan, atlas, stripped, registration)
        for part, file in zip((image, mask), files, strict=True):
            ants.image_write(part, str(file))
        transforms = [shutil.copy(path, store / f"{said.stem}-{Path(path).name}") for path in transforms]
        said.write_text(json.dumps({"seconds": seconds, "transforms": [str(path) for path in transforms]}))
    if register and not transforms:
        transforms = _registered(image, atlas / "template.nii.gz", registration, seconds)
    return image, mask, [str(path) for path in transforms], seconds


def _brain(scan: Path, atlas: Path, stripped: bool, registration: str) -> tuple[Any, Any, list[str], dict[str, float]]:
    start = time.perf_counter()
    image = ants.image_read(str(scan))
    seconds: dict[str, float] = {"read": time.perf_counter() - start}
    transforms: list[str] = []
    if stripped:
        mask = image.new_image_like((image.numpy() > 0).astype(np.float32))
    else:
        # As antsBrainExtraction does: a first correction without a mask helps the registration.
        start = time.perf_counter()
        rough = ants.n4_bias_field_correction(image)
        seconds["n4 for the registration"] = time.perf_counter() - start
        transforms = _registered(rough, atlas / "head.nii.gz", registration, seconds)
        brain = ants.apply_transforms(image, ants.image_read(str(atlas / "brain.nii.gz")), transforms, interpolator="linear")
        mask = image.new_image_like(_whole(brain.numpy() > 0.5).astype(np.float32))
    start = time.perf_counter()
    # As antsAtroposN4 does. Without it a few bright vessels or remains of the skull take a class of their
    # own from dipy's classifier.
    data, inside = image.numpy(), mask.numpy() > 0
    image = image.new_image_like(np.minimum(data, np.quantile(data[inside], 0.995)).astype(np.float32))
    image = ants.n4_bias_field_correction(image, mask=mask, shrink_factor=4)
    seconds["n4"] = time.perf_counter() - start
    return image, mask, transforms, seconds


def _registered(image: Any, template: Path, registration: str, seconds: dict[str, float]) -> list[str]:
    start = time.perf_counter()
    found = ants.registration(image, ants.image_read(str(template)), type_of_transform=registration, random_seed=1)
    seconds["registration"] = time.perf_counter() - start
    return list(found["fwdtransforms"])


def _whole(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest piece, its holes filled."""
    pieces, count = ndimage.label(mask)
    if count > 1:
        mask = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.asarray(ndimage.binary_fill_holes(mask))


def _by_intensity(probabilities: NDArray[np.float32], image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The classes from dark to bright."""
    means = [(p * image).sum() / max(p.sum(), 1e-6) for p in probabilities]
    return np.ascontiguousarray(probabilities[np.argsort(means)], dtype=np.float32)
