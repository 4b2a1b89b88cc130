"""Registration from small to large images: seconds and memory of a pair, and steps per second of the network, by the side of the cube.

The images are a head that is simulated from the default atlas and the same after a map that is known, with noise, over one field of view at every
size. Each row is measured in a process of its own: ``python -m benchmarks.registration_sizes ORDER``.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.fields import LARGEST_SHARE, free_gib
from benchmarks.registrations import Method, Outcome
from benchmarks.registrations import ants as peer
from benchmarks.runs import child_rows
from benchmarks.tables import Log, Row, Table
from probmed.atlases import default_atlas
from probmed.grids import Grid
from probmed.inference.parameters import seeded
from probmed.networks import VelocityNetwork
from probmed.priors import SmoothVelocity
from probmed.simulation import simulate_subject
from probmed.transforms import Affine, Velocity, warp
from probmed.volumes import Volume, read_scan, write_scan
from probmed.workflows.amortisation import Cohort, brought, training_loss
from probmed.workflows.registration import register
from probmed.workflows.registration_networks import NetworkSettings, TrainedRegistration

SIZES = (64, 96, 128, 192, 256)
FIELD_MM = 240.0  # side of the cube
DRAWS = 20
NOISE = 0.03  # of the moving image, in which white matter is about 1
STEPS = 5  # of a network, after one that warms up; their median counts
REPETITIONS = {64: 3, 96: 3}  # of a pair's registration, of which the median counts; 1 for others
SYN_LARGEST = 128  # beyond it SyN takes many minutes
SYN, NETWORK, PLAIN = "ANTs SyN", "network", "plain loop"
PAIR_METHODS = {"probmed, MAP": 0, f"probmed, MAP and {DRAWS} draws": DRAWS}
STEP_METHODS = tuple(f"{loop}, {step}" for step in ("inference", "training step") for loop in (NETWORK, PLAIN))
_BYTES = {f"{NETWORK}, training step": 550, f"{PLAIN}, training step": 400}  # a voxel, roughly
_OTHERS = 300
_STATUS = Path("/proc/self/status")


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every method at every size, on the CPU and on CUDA where there is one."""
    rows: list[Row] = []
    for size in SIZES[:limit]:
        cases = {
            f"{device}/{size}/{method}": (device, method)
            for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
            for method in (*PAIR_METHODS, SYN, *STEP_METHODS)
            if method != SYN or (size <= SYN_LARGEST and device == "cpu")
        }
        cases = {key: case for key, case in cases.items() if not only or any(word in key for word in only)}
        with tempfile.TemporaryDirectory() as folder:
            if any(key not in log.rows for key in cases):
                # In a process that ends: a child's peak memory begins with its parent's.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    pool.submit(write_pair, Path(folder), size, seed).result()
            for key, (device, method) in cases.items():
                said = {"folder": folder, "size": size, "device": device, "method": method, "seed": seed}
                common = {"device": device, "size": size, "method": method}
                rows += child_rows(log, "benchmarks.registration_sizes", said, {key: None}, common, threads)
    return Table("registration_sizes", rows, summarise(rows), NOTES, {"threads": threads, "field_mm": FIELD_MM, "draws": DRAWS}, seed)


NOTES = (
    "Seconds: of a registration with all its stages, reading left out, or of a step. Peak: largest resident memory of the process, imports "
    "and images included; GPU: the most that tensors held there. Error: mean distance to the known map over the head."
)


def write_pair(folder: Path, size: int, seed: int) -> None:
    """``fixed.nii``, ``moving.nii`` and ``truth.pt``: the map from the fixed world to the moving one, a flow and an affine map after it."""
    atlas = default_atlas()
    middle = torch.eye(4, dtype=torch.float64)
    middle[:3, 3] = atlas.grid.voxel_to_world((torch.tensor(atlas.grid.shape, dtype=torch.float64) - 1) / 2)
    grid = Grid.from_spacing((size,) * 3, FIELD_MM / size).transformed(middle)
    head = simulate_subject(atlas, seed=seed, grid=grid).image.data
    lattice = grid.at_spacing(6.0)
    with seeded(seed):
        velocity = SmoothVelocity(lattice, 3.0, 20.0, 3.0).prior().sample()
        affine = Affine.exp(torch.tensor([3.0, -2.0, 4.0, 0.05, -0.04, 0.03]).double(), centre=middle[:3, 3])
        # m(A exp(v)) = f, hence m = f(exp(−v) A⁻¹).
        moving = warp(head[None], grid, Velocity(lattice, -velocity).exp(both=False) @ affine.inverse(), grid, fill="edge")[0]
        moving = moving + NOISE * torch.randn(grid.shape)
    for name, image in (("fixed", head), ("moving", moving)):
        write_scan(folder / f"{name}.nii", image, Volume.from_grid(image, grid))
    torch.save({"grid": lattice.affine, "velocity": velocity, "affine": affine.matrix}, folder / "truth.pt")


def error_mm(outcome: Outcome, fixed: Volume, folder: Path) -> float:
    """Mean distance between the map that was found and the known one over the head, every fourth millimetre or so."""
    truth = torch.load(folder / "truth.pt")
    known = Affine(truth["affine"]) @ Velocity(Grid(tuple(truth["velocity"].shape[1:]), truth["grid"]), truth["velocity"]).exp(both=False)
    steps = max(1, round(4 / fixed.grid.spacing[0]))
    inside = fixed.data[::steps, ::steps, ::steps] > 0.2
    points = fixed.grid.subsampled((steps,) * 3).coordinates()[inside]
    return float((outcome.transform(points) - known(points)).norm(dim=-1).mean())


def ours(draws: int, device: str) -> Method:
    """`probmed register` with its defaults."""

    def run(moving: Path, fixed: Path) -> Outcome:
        images = read_scan(moving), read_scan(fixed)
        start = time.perf_counter()
        result = register(*images, draws=draws, device=device)
        return Outcome(result.transform, result.inverse, time.perf_counter() - start)

    return run


def measure_pair(method: str, size: int, device: str, folder: Path) -> Row:
    """A row of a method that registers one pair."""
    run = peer("SyN") if method == SYN else ours(PAIR_METHODS[method], device)
    outcomes = [run(folder / "moving.nii", folder / "fixed.nii") for _ in range(REPETITIONS.get(size, 1))]
    row = measured([outcome.seconds for outcome in outcomes], device)
    return {**row, "error_mm": round(error_mm(outcomes[-1], read_scan(folder / "fixed.nii"), folder), 4)}


def measure_steps(method: str, device: str, folder: Path, seed: int) -> Row:
    """A row of a network's steps with a batch of one pair."""
    fixed, moving = (read_scan(folder / f"{name}.nii") for name in ("fixed", "moving"))
    grid = Grid.from_spacing(fixed.grid.shape, fixed.grid.spacing)
    images = torch.stack([brought(volume, grid) for volume in (moving, fixed)])[:, None].to(device)
    loop, step = method.split(", ")
    build = our_steps if loop == NETWORK else plain_steps
    infer, learn = build(images, grid, seed)
    work = infer if step == "inference" else learn
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return measured(seconds[1:], device)


Steps = tuple[Callable[[], object], Callable[[], object]]
"""Inference and training step of a network."""


def our_steps(images: Tensor, grid: Grid, seed: int) -> Steps:
    """Those of `probmed train registration`: the evidence lower bound, and the map of a pair with its inverse."""
    trained = TrainedRegistration.build(grid, NetworkSettings(batch=1), seed)
    trained.model.to(images.device)
    trained.guide.to(images.device)
    cohort = Cohort(images, torch.full((2, *grid.shape), -1), ("moving", "fixed"), (0,))
    loss, optimiser = training_loss(trained, cohort), torch.optim.Adam(trained.guide.parameters(), 1e-3)
    batch = torch.tensor([0]), torch.tensor([1])

    def infer() -> object:
        return Velocity(trained.lattice, trained.velocities(images[:1], images[1:])[0]).exp()

    return infer, lambda: descend(optimiser, loss(batch))


def plain_steps(images: Tensor, grid: Grid, seed: int) -> Steps:
    """The same network in a bare loop of PyTorch: seven squarings by ``grid_sample`` at half the resolution, mean squares and squared differences."""
    with seeded(seed):
        network = VelocityNetwork(3).to(images.device)
    images = images.nan_to_num(0.0)
    half = [n // 2 for n in grid.shape]
    axes = [(2 * torch.arange(n, device=images.device) + 1) / n - 1 for n in half]
    identity = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None]
    units = 2 / (grid.shape[0] * grid.spacing[0])  # of [-1, 1], a millimetre
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)

    def flow(velocity: Tensor) -> Tensor:
        field = velocity.flip(1) * (units / 2**7)
        for _ in range(7):
            there = identity + field.movedim(1, -1)
            field = field + functional.grid_sample(field, there, padding_mode="border", align_corners=False)
        return field

    @torch.no_grad()
    def infer() -> object:
        velocity = network(images[:1], images[1:], half)[0]
        return flow(velocity), flow(-velocity)

    def learn() -> None:
        velocity = network(images[:1], images[1:], half)[0]
        there = functional.interpolate(identity.movedim(-1, 1) + flow(velocity), grid.shape, mode="trilinear")
        moved = functional.grid_sample(images[:1], there.movedim(1, -1), padding_mode="border", align_corners=False)
        roughness = sum(velocity.diff(dim=axis).square().mean() for axis in (2, 3, 4))
        descend(optimiser, (moved - images[1:]).square().mean() + 0.01 * roughness)

    return infer, learn


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def measured(seconds: Sequence[float], device: str) -> Row:
    """Median time and peaks of this process."""
    row = {"seconds": round(statistics.median(seconds), 4), "repetitions": len(seconds), "peak_gib": round(peak_gib(), 2)}
    if device == "cuda":
        row["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def peak_gib() -> float:
    """Of this process alone: what ``getrusage`` tells begins, on Linux, with the parent's peak."""
    high = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    if high:
        return int(high[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per device, size and method."""
    lines = []
    for row in rows:
        line = {"device": row["device"], "cube": f"{row['size']}³", "method": row["method"]}
        heads = ("seconds", "per second", "peak GiB", "GPU GiB", "error, mm")
        if "skipped" in row:
            lines.append({**line, **dict.fromkeys(heads, "–"), "seconds": row["skipped"]})
            continue
        what = "pairs" if "error_mm" in row else "steps"
        values = (f"{row['seconds']:.3g}", f"{1 / row['seconds']:.3g} {what}", f"{row['peak_gib']:.1f}")
        optional = (f"{row[name]:.{digits}f}" if name in row else "–" for name, digits in (("gpu_gib", 1), ("error_mm", 2)))
        lines.append({**line, **dict(zip(heads, (*values, *optional), strict=True))})
    return lines


def measure(method: str, size: int, device: str, folder: Path, seed: int) -> Row:
    """A row, or why there is none."""
    needed = _BYTES.get(method, _OTHERS) * size**3 / 2**30
    if needed > LARGEST_SHARE * free_gib(device):
        return {"skipped": f"needs about {needed:.0f} GiB"}
    if method == SYN and importlib.util.find_spec("ants") is None:
        return {"skipped": "is not installed"}
    try:
        return measure_steps(method, device, folder, seed) if method in STEP_METHODS else measure_pair(method, size, device, folder)
    except torch.cuda.OutOfMemoryError:
        return {"skipped": "out of memory"}


def _child(order: Path) -> None:
    said: dict[str, Any] = json.loads(order.read_text())
    row = measure(said["method"], said["size"], said["device"], Path(said["folder"]), said["seed"])
    for key in said["wanted"]:
        print("ROW " + json.dumps({**row, "key": key}), flush=True)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
