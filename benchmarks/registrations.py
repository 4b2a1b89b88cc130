"""Methods that register a pair, each in one process for all pairs of a set: ``python -m benchmarks.registrations ORDER``.

A method takes paths of moving and fixed images and gives a map from the fixed world to the moving one, RAS mm, its inverse where it has one, and the
seconds of the registration with all its stages, reading and imports left out. Everything is scored by the same code (`benchmarks.pairs.score`).
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probmed.grids import Grid
from probmed.transforms import Displacement, Transform
from probmed.volumes import read_scan
from probmed.warps import read_transforms
from probmed.workflows.registration import RegistrationSettings, register

_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass
class Outcome:
    """What a method found for a pair.

    Arguments:
        transform: fixed world to moving world; inverse: back, or None. seconds: of the registration.
        remarks: anything else, JSON values.
    """

    transform: Transform
    inverse: Transform | None
    seconds: float
    remarks: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Path, Path], Outcome]


def ours(draws: int = 0, **settings: Any) -> Method:
    """`probmed register` with its defaults."""

    def run(moving: Path, fixed: Path) -> Outcome:
        images = read_scan(moving), read_scan(fixed)
        start = time.perf_counter()
        result = register(*images, draws=draws, device="cpu", settings=RegistrationSettings(**settings))
        seconds = time.perf_counter() - start
        return Outcome(result.transform, result.inverse, seconds, {"stages": {k: round(v, 3) for k, v in result.seconds.items()}})

    return run


def affine() -> Method:
    """The affine stage of `probmed register` alone."""
    return ours(deformable=False)


def amortised(run: str, refine: int = 0) -> Method:
    """A network of `probmed train registration`, by its folder."""
    amortisation, networks = (importlib.import_module(f"probmed.workflows.{name}") for name in ("amortisation", "registration_networks"))
    trained = networks.TrainedRegistration.load(Path(run))

    def method(moving: Path, fixed: Path) -> Outcome:
        images = read_scan(moving), read_scan(fixed)
        start = time.perf_counter()
        answer = amortisation.answer(trained, *images, refine=refine)
        transform = answer.affine @ answer.velocity.exp()
        seconds = time.perf_counter() - start
        remarks = {} if answer.refinement is None else {"gap_nats": answer.refinement.gap, "gap_error": answer.refinement.error}
        return Outcome(transform, transform.inverse(), seconds, remarks)

    return method


def voxelmorph(run: str) -> Method:
    """The network of the voxelmorph package, trained by `benchmarks.networks`, by its folder."""
    networks = importlib.import_module("benchmarks.networks")
    trained = networks.VoxelMorph.load(Path(run))

    def method(moving: Path, fixed: Path) -> Outcome:
        images = read_scan(moving), read_scan(fixed)
        start = time.perf_counter()
        transform = trained.transform(*images)
        return Outcome(transform, transform.inverse(), time.perf_counter() - start)

    return method


def ants(kind: str = "SyN") -> Method:
    """antspyx's ``registration`` with its defaults: affine, then symmetric normalisation."""
    package: Any = importlib.import_module("ants")

    def run(moving: Path, fixed: Path) -> Outcome:
        m, f = package.image_read(str(moving)), package.image_read(str(fixed))
        start = time.perf_counter()
        found = package.registration(f, m, type_of_transform=kind, random_seed=1)
        seconds = time.perf_counter() - start
        forward = read_transforms(found["fwdtransforms"])
        back = [f"[{p},1]" if str(p).endswith(".mat") else p for p in found["invtransforms"]]
        outcome = Outcome(forward, read_transforms(back), seconds)
        for path in {*found["fwdtransforms"], *found["invtransforms"]}:
            Path(path).unlink(missing_ok=True)
        return outcome

    return run


def _sitk_affine(sitk: Any, fixed: Any, moving: Any) -> Any:
    middle = sitk.CenteredTransformInitializerFilter.GEOMETRY
    start = sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(fixed.GetDimension()), middle)
    method = _sitk_method(sitk, [4, 2, 1], fixed)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=False)
    return method.Execute(fixed, moving)


def _sitk_method(sitk: Any, shrink: list[int], fixed: Any) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    if fixed.GetNumberOfPixels() > 1_000_000:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.1, 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([s / 2 if s > 1 else 0 for s in shrink])
    return method


def _sitk_field(sitk: Any, transform: Any, fixed: Any) -> Displacement:
    """A transform of SimpleITK sampled on the fixed image's grid."""
    made = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, fixed.GetSize(), fixed.GetOrigin(), fixed.GetSpacing(), fixed.GetDirection()
    )
    d = fixed.GetDimension()
    vectors = np.transpose(sitk.GetArrayFromImage(made), [*range(d)[::-1], d]) * _LPS[:d]
    matrix = np.eye(d + 1)
    matrix[:d, :d] = np.reshape(fixed.GetDirection(), (d, d)) * np.array(fixed.GetSpacing())
    matrix[:d, d] = fixed.GetOrigin()
    matrix[:d] *= _LPS[:d, None]
    grid = Grid(tuple(fixed.GetSize()), torch.from_numpy(matrix))
    return Displacement(grid, torch.from_numpy(np.moveaxis(vectors, -1, 0).astype(np.float32)))


def sitk_bspline(spacing_mm: float = 15.0) -> Method:
    """SimpleITK: affine, then cubic B-splines with knots that far apart, by mutual information."""
    sitk: Any = importlib.import_module("SimpleITK")

    def run(moving: Path, fixed: Path) -> Outcome:
        m, f = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (moving, fixed))
        start = time.perf_counter()
        first = _sitk_affine(sitk, f, m)
        method = _sitk_method(sitk, [2, 1], f)
        mesh = [max(2, round(n * h / spacing_mm)) for n, h in zip(f.GetSize(), f.GetSpacing(), strict=True)]
        spline = sitk.BSplineTransformInitializer(f, mesh, 3)
        method.SetMovingInitialTransform(first)
        method.SetInitialTransform(spline, inPlace=False)
        method.SetOptimizerAsLBFGSB(gradientConvergenceTolerance=1e-5, numberOfIterations=50, maximumNumberOfCorrections=5)
        total = sitk.CompositeTransform([first, method.Execute(f, m)])
        seconds = time.perf_counter() - start
        return Outcome(_sitk_field(sitk, total, f), None, seconds)

    return run


def sitk_demons(iterations: int = 50, sd: float = 1.0) -> Method:
    """SimpleITK: affine, histograms matched, then diffeomorphic demons on two scales."""
    sitk: Any = importlib.import_module("SimpleITK")

    def run(moving: Path, fixed: Path) -> Outcome:
        m, f = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (moving, fixed))
        start = time.perf_counter()
        first = _sitk_affine(sitk, f, m)
        carried = sitk.HistogramMatching(sitk.Resample(m, f, first, sitk.sitkLinear, 0.0), f, 128, 7, True)
        found = None
        for shrink in (2, 1):
            small = [sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, shrink / 2), [shrink] * f.GetDimension()) for image in (f, carried)]
            demons = sitk.DiffeomorphicDemonsRegistrationFilter()
            demons.SetNumberOfIterations(iterations)
            demons.SetStandardDeviations(sd)
            field = None if found is None else sitk.Resample(found, small[0])
            found = demons.Execute(*small) if field is None else demons.Execute(*small, field)
        warp = sitk.DisplacementFieldTransform(sitk.Cast(found, sitk.sitkVectorFloat64))
        total = sitk.CompositeTransform([first, warp])
        seconds = time.perf_counter() - start
        return Outcome(_sitk_field(sitk, total, f), None, seconds)

    return run


METHODS: dict[str, Callable[..., Method]] = {
    "affine": affine,
    "ours": ours,
    "amortised": amortised,
    "voxelmorph": voxelmorph,
    "ants": ants,
    "sitk_bspline": sitk_bspline,
    "sitk_demons": sitk_demons,
}


def _child(order: Path) -> None:
    """Measure the pairs of an order, a JSON line each."""
    said = json.loads(order.read_text())
    pairs: Any = importlib.import_module("benchmarks.pairs")
    method = METHODS[said["method"]](**said["options"])
    for key, pair in said["wanted"].items():
        outcome = method(Path(pair["moving"]), Path(pair["fixed"]))
        row = pairs.score(Path(pair["moving_labels"]), Path(pair["fixed_labels"]), outcome, said["set"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        print("ROW " + json.dumps({**row, "key": key, "pair": key.split("/")[1], "peak_gib": round(peak, 2)}), flush=True)



if __name__ == "__main__":
    _child(Path(sys.argv[1]))
