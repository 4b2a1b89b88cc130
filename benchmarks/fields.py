"""Fields and warps: the time of each operation against a plain copy of the same tensor and against one ``grid_sample``.

A ratio is taken within each repetition, in which copy, ``grid_sample`` and the operation follow one another, so
that a machine that is busy or slows down moves both sides. Rows give the median and the quartiles.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import Log, Row, Table
from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.transforms import Displacement, Velocity, warp

SIZES = (64, 128, 192, 256)
REPETITIONS = {64: 15, 128: 9, 192: 5, 256: 3}
SPACING_MM = (1.0, 1.0, 1.2)
OPERATIONS = ("log_prob", "rsample", "exp(v)", "warp")
_MEMORY = Path("/proc/meminfo")
LARGEST_SHARE = 0.6  # of the free memory that an operation may take


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every operation, forward and backward, at every size, on the CPU and on CUDA where there is one."""
    torch.set_num_threads(threads)
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for size in [n for n in SIZES if not only or str(n) in only][:limit]:
            for operation in OPERATIONS:
                key = f"{device}/{size}/{operation}"
                row = log.row(key, lambda d=device, n=size, o=operation: measure(o, n, d, seed))  # type: ignore[misc]
                rows.append(row)
                print(key, row.get("skipped", row), flush=True)
    return Table("fields", rows, summarise(rows), NOTES, {"threads": threads, "spacing_mm": SPACING_MM}, seed)


NOTES = (
    "Median [quartiles] over the repetitions. copy: `torch.clone` of the same (3, n, n, n) float32 field; grid_sample: trilinear "
    "sampling of that field at as many points, its forward pass for forward ratios and its gradient (to field and points) for "
    "backward ratios. exp(v) gives the displacement alone, without its inverse, with the squarings that |v| ≤ 6 mm asks for; warp "
    "resamples one image through a displacement on the same grid, affines included. Backward is the time of the gradient alone: "
    "to the field for log_prob and exp(v), to the strength for rsample, to image and displacement for warp."
)


def measure(operation: str, size: int, device: str, seed: int) -> Row:
    """Seconds of copy, ``grid_sample`` and an operation, and their ratios within repetitions."""
    needed = _gib(operation, size)
    if needed > LARGEST_SHARE * free_gib(device):
        return {"device": device, "size": size, "operation": operation, "skipped": f"needs about {needed:.1f} GiB"}
    torch.manual_seed(seed)
    run = _operation(operation, size, device)
    reference = _grid_sample(size, device)
    plain = torch.randn(3, size, size, size, device=device)
    repetitions = REPETITIONS.get(size, 3)
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "grid_sample forward", "grid_sample backward", "forward", "backward")}
    for repetition in range(repetitions + 1):
        copy = _seconds(plain.clone, device)[0]
        sampled = _both(reference, device)
        own = _both(run, device)
        if repetition:  # the first warms up
            for name, value in zip(seconds, (copy, *sampled, *own), strict=True):
                seconds[name].append(value)
    ratios = {
        f"{way} / {other}": _spread([a / b for a, b in zip(seconds[way], seconds[base], strict=True)])
        for way in ("forward", "backward")
        for other, base in (("copy", "copy"), ("grid_sample", f"grid_sample {way}"))
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "device": device,
        "size": size,
        "operation": operation,
        "repetitions": repetitions,
        "milliseconds": {name: round(1000 * value, 3) for name, value in medians.items()},
        "ratios": ratios,
    }


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per device, size and operation."""
    lines = []
    for row in rows:
        line = {"device": row["device"], "size": f"{row['size']}³", "operation": row["operation"]}
        heads = ("forward / copy", "forward / grid_sample", "backward / copy", "backward / grid_sample")
        if "skipped" in row:
            lines.append({**line, "forward, ms": row["skipped"], "backward, ms": "–", **dict.fromkeys(heads, "–")})
            continue
        for way in ("forward", "backward"):
            line[f"{way}, ms"] = f"{row['milliseconds'][way]:.1f}"
        for head in heads:
            low, middle, high = row["ratios"][head]
            line[head] = f"{middle:.1f} [{low:.1f}, {high:.1f}]"
        lines.append(line)
    return lines


Work = Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]
"""Gives a fresh forward function and the leaves whose gradient the backward pass asks for."""


def _operation(name: str, size: int, device: str) -> Work:
    shape = (size,) * 3
    affine = torch.diag(torch.tensor([*SPACING_MM, 1.0], dtype=torch.float64)).to(device)
    grid = Grid(shape, affine)
    field = GaussianField.from_sd(shape, SPACING_MM, torch.tensor(1.5, device=device), 20.0, 3.0, 3)
    velocity = field.rsample()
    velocity *= 6 / velocity.abs().max()
    image = torch.rand(1, *shape, device=device)

    def log_prob() -> tuple[Callable[[], Tensor], list[Tensor]]:
        leaf = velocity.clone().requires_grad_()
        return lambda: field.log_prob(leaf), [leaf]

    def rsample() -> tuple[Callable[[], Tensor], list[Tensor]]:
        strength = field.strength.detach().clone().requires_grad_()
        learnable = GaussianField(shape, SPACING_MM, strength, 1 / 20.0, 3.0, 3)
        return lambda: learnable.rsample(), [strength]

    def exp() -> tuple[Callable[[], Tensor], list[Tensor]]:
        leaf = velocity.clone().requires_grad_()
        return lambda: Velocity(grid, leaf).exp(both=False).field, [leaf]

    def pull() -> tuple[Callable[[], Tensor], list[Tensor]]:
        leaves = [image.clone().requires_grad_(), velocity.clone().requires_grad_()]
        return lambda: warp(leaves[0], grid, Displacement(grid, leaves[1]), grid), leaves

    return {"log_prob": log_prob, "rsample": rsample, "exp(v)": exp, "warp": pull}[name]


def _grid_sample(size: int, device: str) -> Work:
    field = torch.randn(1, 3, size, size, size, device=device)
    axis = torch.linspace(-1, 1, size, device=device)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1)[None]
    points = points + 2 / size * torch.randn_like(points)

    def work() -> tuple[Callable[[], Tensor], list[Tensor]]:
        leaves = [field.clone().requires_grad_(), points.clone().requires_grad_()]
        return lambda: torch.nn.functional.grid_sample(leaves[0], leaves[1], align_corners=True), leaves

    return work


def _both(work: Work, device: str) -> tuple[float, float]:
    """Seconds of the forward pass without a graph, and of the gradient alone."""
    forward, leaves = work()
    with torch.no_grad():
        plain = _seconds(forward, device)[0]
    out = forward()
    weights = torch.randn_like(out)
    return plain, _seconds(lambda: torch.autograd.grad(out, leaves, weights), device)[0]


def _seconds(work: Callable[[], object], device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _spread(values: Sequence[float]) -> list[float]:
    """Quartiles and median: lower, middle, upper."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [round(lower, 3), round(middle, 3), round(upper, 3)]


def _gib(operation: str, size: int) -> float:
    """Rough need of memory: fields kept for the backward pass, beside those of the reference."""
    kept = {"log_prob": 6, "rsample": 6, "exp(v)": 24, "warp": 10}[operation]
    return (kept + 12) * 12 * size**3 / 2**30


def free_gib(device: str) -> float:
    """Memory that is free on a device."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) / 2**30
    available = re.search(r"MemAvailable:\s*(\d+) kB", _MEMORY.read_text()) if _MEMORY.exists() else None
    return int(available[1]) / 2**20 if available else 8.0
