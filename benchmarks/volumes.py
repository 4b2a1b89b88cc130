"""Do the volumes' intervals hold the truth as often as they say? Simulated heads at 2 mm, where it is known.

Beside the intervals of probmed stand those of independent voxels: mean Σ p and variance Σ p(1 − p) from the same
probabilities, which is what summing a probability map assumes. The first condition simulates exactly the model that is fitted;
the second has spatially smooth labels and the model of `probmed segment`; those after it add one thing each to the first.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from scipy import ndimage, stats

from benchmarks.runs import THREAD_VARIABLES
from benchmarks.tables import Log, Row, Table
from probmed.atlases import LabelAtlas, default_atlas
from probmed.metrics import interval_coverage, interval_score
from probmed.simulation import simulate_subject
from probmed.simulation.contrasts import CONTRASTS
from probmed.workflows.segmentation import Settings, segment

WORKERS = 4
LEVELS = (0.50, 0.80, 0.95)
TISSUES = ("GM", "WM", "CSF")
DRAWS = 50
BLUR_MM = 3.0


@dataclasses.dataclass(frozen=True)
class Condition:
    """What heads are simulated, and how many.

    Arguments:
        heads: their number. options: of ``simulate_subject``. blurred: whether the fit is given a blurred atlas.
        settings: of the fit.
    """

    heads: int
    options: dict[str, Any]
    blurred: bool = False
    settings: Settings | None = None


FIT = Settings(
    spacing_mm=6.0, rounds=40, tolerance=1e-5, tie=False, markov=0.0, weight_certainty=100.0,
    velocity_mm=6.0, velocity_sd_mm=3.0, gaussians={"bone": 2, "soft": 3, "air": 1},
)  # fmt: skip
"""The model that the first simulation draws from: tissues with noise of their own and as many Gaussians as they have, voxels independent, the same
velocity; fitted on every third voxel to its optimum."""
COMMAND = Settings(spacing_mm=6.0, rounds=40, tolerance=1e-5)
"""The model of `probmed segment`."""

# Raised by more than the noise reaches: from a scan with negative values the least is subtracted first, after which bias no longer multiplies.
RAISED = {name: tuple((share, mean + 0.3, sd) for share, mean, sd in mixture) for name, mixture in CONTRASTS["T1"].items()}
_MATCHED: dict[str, Any] = {"labels": "independent", "alpha": 2.0, "noise_sd": 0.06, "contrast": RAISED}
CONDITIONS = {
    "as modelled": Condition(100, _MATCHED, settings=FIT),
    "smooth labels, the command's model": Condition(10, {"noise_sd": 0.06}, settings=COMMAND),
    "Rician noise": Condition(10, {**_MATCHED, "noise": "rician"}, settings=FIT),
    "correlated noise": Condition(10, {**_MATCHED, "noise": "correlated"}, settings=FIT),
    "lesions": Condition(10, {**_MATCHED, "lesions": 30}, settings=FIT),
    "blurred atlas": Condition(10, _MATCHED, blurred=True, settings=FIT),
}


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure the coverage under every condition; as many heads at once as there are threads, one thread each."""
    wanted = [name for name in CONDITIONS if not only or any(word in name for word in only)]
    tasks = [(f"{name}/{seed + number}", name, seed + number) for name in wanted for number in range(CONDITIONS[name].heads)[:limit]]
    missing = [task for task in tasks if task[0] not in log.rows]
    for done, (key, row) in enumerate(_measured(missing, min(threads, WORKERS))):
        log.row(key, partial(dict, row))
        print(f"{done + 1}/{len(missing)} {key} {row['seconds']:.1f} s", flush=True)
    rows = [log.rows[key] for key, _, _ in tasks]
    settings = {"workers": min(threads, WORKERS), "draws": DRAWS, "levels": LEVELS, "blur_mm": BLUR_MM}
    return Table("volumes", rows, summarise(rows), NOTES, settings, seed)


NOTES = (
    "Coverage in per cent of the 50 / 80 / 95 % intervals; error: mean of volume − truth in per cent of the truth, ± its sd over heads; "
    "score ratio: interval score (80 %) of probmed over that of independent voxels, less is better. With 100 heads the "
    "standard error of a coverage is 5, 4 and 2 points, with 10 heads 16, 13 and 7."
)


def measure(name: str, seed: int) -> Row:
    """One head: simulated, segmented, and its volumes beside the truth."""
    torch.set_num_threads(1)
    condition = CONDITIONS[name]
    atlas = default_atlas()
    head = simulate_subject(atlas, 2.0, seed, **condition.options)
    start = time.perf_counter()
    result = segment(
        [head.image], atlas=blurred(atlas, BLUR_MM) if condition.blurred else atlas, settings=condition.settings, draws=DRAWS, seed=seed, device="cpu"
    )
    seconds = time.perf_counter() - start
    row: Row = {"condition": name, "seed": seed, "seconds": round(seconds, 2), "tempering": result.tempering}
    scale = head.grid.voxel_volume / 1000
    for tissue in TISSUES:
        k = result.names.index(tissue)
        p = result.probabilities[k].double()
        draws = result.volume_draws[:, k].double()
        tails = torch.tensor([q for level in LEVELS for q in ((1 - level) / 2, (1 + level) / 2)], dtype=torch.float64)
        row[tissue] = {
            "truth_ml": head.volumes_ml[tissue],
            "volume_ml": float(p.sum()) * scale,
            "quantiles_ml": torch.quantile(draws, tails).tolist(),
            "sd_ml": float(draws.std()),
            "independent_sd_ml": float((p * (1 - p)).sum().sqrt()) * scale,
        }
    return row


def blurred(atlas: LabelAtlas, sd_mm: float) -> LabelAtlas:
    """An atlas less sharp than the anatomy that the heads come from."""
    sd = [0.0, *(sd_mm / h for h in atlas.grid.spacing)]
    smooth = torch.from_numpy(ndimage.gaussian_filter(atlas.probabilities.numpy(), sd, mode="nearest"))
    return dataclasses.replace(atlas, probabilities=smooth / smooth.sum(0))


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per condition and tissue."""
    lines = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        for tissue in TISSUES:
            found = [row[tissue] for row in rows if row["condition"] == condition]
            truth = torch.tensor([f["truth_ml"] for f in found], dtype=torch.float64)
            own = torch.tensor([f["quantiles_ml"] for f in found], dtype=torch.float64)
            middle = torch.tensor([f["volume_ml"] for f in found], dtype=torch.float64)
            sd = torch.tensor([f["independent_sd_ml"] for f in found], dtype=torch.float64)
            covered, naive, scores = [], [], []
            for i, level in enumerate(LEVELS):
                reach = float(stats.norm.ppf((1 + level) / 2)) * sd
                bounds = (own[:, 2 * i], own[:, 2 * i + 1]), (middle - reach, middle + reach)
                covered.append(interval_coverage(*bounds[0], truth))
                naive.append(interval_coverage(*bounds[1], truth))
                scores.append([interval_score(*bound, truth, level) for bound in bounds])
            errors = (100 * (middle / truth - 1)).tolist()
            spread = statistics.stdev(errors) if len(errors) > 1 else float("nan")
            lines.append(
                {
                    "heads": f"{condition} ({len(found)})",
                    "tissue": tissue,
                    "coverage": " / ".join(f"{100 * c:.0f}" for c in covered),
                    "independent voxels": " / ".join(f"{100 * c:.0f}" for c in naive),
                    "sd, ml": f"{statistics.fmean(f['sd_ml'] for f in found):.1f}",
                    "independent sd, ml": f"{statistics.fmean(sd.tolist()):.2f}",
                    "error, %": f"{statistics.fmean(errors):+.2f} ± {spread:.2f}",
                    "score ratio": f"{scores[1][0] / scores[1][1]:.2f}",
                }
            )
    return lines


def _measured(tasks: Sequence[tuple[str, str, int]], workers: int) -> Iterator[tuple[str, Row]]:
    """Rows in the order of the tasks, each from a process with one thread."""
    if not tasks:
        return
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            rows = pool.map(measure, [name for _, name, _ in tasks], [seed for _, _, seed in tasks])
            yield from zip((key for key, _, _ in tasks), rows, strict=True)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
