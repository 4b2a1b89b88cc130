"""Segmentation from one labelled scan: its labels carried to the test scans by registration, directly or by way of scans without labels.

Data: `msd_hippocampus` in the folder ``PROBMED_DATA``. Five labelled scans, the first of the training scans in the order of a seeded permutation; all
55 test scans each. `python -m benchmarks.propagation ORDER` is the child that measures one method from one labelled scan.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pairs import beside, scans
from benchmarks.registrations import ants
from benchmarks.runs import child_rows
from benchmarks.tables import Log, Row, Table, mean_sd
from benchmarks.tissue import data_folder
from probmed.metrics import dice, interval_coverage, paired_bootstrap
from probmed.transforms import warp
from probmed.volumes import Volume, read_labels, read_scan
from probmed.workflows.propagation import fuse, label_templates
from probmed.workflows.registration import RegistrationSettings, register

LABELLED = 5
TEMPLATES = 15
LABELS = (1, 2)
LEVELS = (0.50, 0.80, 0.95)
OURS = "probmed, MAP"
METHODS = {
    "ANTs SyN": "syn",
    OURS: "mode",
    "probmed, 20 draws": "draws",
    f"probmed, through {TEMPLATES} scans": "templates",
}


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every method from every labelled scan."""
    rows: list[Row] = []
    train, test = scans()
    order = [train[int(i)] for i in np.random.default_rng(seed).permutation(len(train))] if train else []
    if not order:
        print(f"no scans in {data_folder()}: set PROBMED_DATA")
    for labelled in order[:LABELLED][:limit]:
        for method, kind in METHODS.items():
            if only and not any(word in method for word in only):
                continue
            name = labelled.name[12:15]
            wanted = {f"{name}/{p.name[12:15]}/{method}": str(p) for p in test[: None if limit is None else 3 * limit]}
            said = {"method": kind, "labelled": str(labelled), "templates": [str(p) for p in order[LABELLED : LABELLED + TEMPLATES]]}
            common = {"labelled": name, "method": method}
            rows += child_rows(log, "benchmarks.propagation", said, wanted, common, threads)
    return Table("propagation", rows, summarise(rows), notes(rows), {"threads": threads, "templates": TEMPLATES, "draws": 20}, seed)


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line a method: over all pairs of labelled and test scan, and the means of each labelled scan."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [r for r in rows if r["method"] == method]
        means = [statistics.fmean(r["dice"] for r in chosen if r["labelled"] == one) for one in dict.fromkeys(r["labelled"] for r in chosen)]
        covered = []
        for k in (str(label) for label in LABELS):
            found = [r["volumes"][k] for r in chosen if r["volumes"][k]["quantiles_ml"]]
            if found:
                truth = torch.tensor([f["truth_ml"] for f in found])
                q = torch.tensor([f["quantiles_ml"] for f in found])
                covered.append(" / ".join(f"{100 * interval_coverage(q[:, 2 * i], q[:, 2 * i + 1], truth):.0f}" for i in range(len(LEVELS))))
        errors = [100 * (r["volumes"][str(k)]["volume_ml"] / r["volumes"][str(k)]["truth_ml"] - 1) for r in chosen for k in LABELS]
        lines.append(
            {
                "method": method,
                "Dice": mean_sd([r["dice"] for r in chosen]),
                "by labelled scan": ", ".join(f"{m:.3f}" for m in means),
                "anterior / posterior": " / ".join(f"{statistics.fmean(r['dice_by_label'][str(k)] for r in chosen):.3f}" for k in LABELS),
                "volume error, %": mean_sd(errors, 1),
                "coverage anterior; posterior": "; ".join(covered) or "–",
                "seconds": f"{statistics.median(r['seconds'] for r in chosen):.2f}",
            }
        )
    return lines


def notes(rows: Sequence[Row]) -> str:
    """Differences in Dice from SyN, paired by test scan, whose Dice are averaged over labelled scans."""
    of: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of.setdefault(row["method"], {}).setdefault(row["scan"], []).append(row["dice"])
    base = of.get("ANTs SyN", {})
    parts = []
    for method, found in of.items():
        both = sorted(set(base) & set(found))
        if method == "ANTs SyN" or len(both) < 2:
            continue
        ours, theirs = (torch.tensor([statistics.fmean(x[scan]) for scan in both]) for x in (found, base))
        d = paired_bootstrap(ours, theirs)
        parts.append(f"{method} {d.mean:+.3f} [{d.lower:+.3f}, {d.upper:+.3f}]")
    return f"Dice less that of SyN, mean over test scans with a 95 % paired bootstrap interval: {'; '.join(parts)}." if parts else ""


def _measured(said: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    labelled = Path(said["labelled"])
    scan, labels = read_scan(labelled), read_labels(beside(labelled))
    methods: dict[str, Method] = {"syn": _syn, "mode": _ours, "draws": partial(_ours, draws=20), "templates": _templates}
    method = methods[said["method"]]
    call = method(scan, labels, [read_scan(path) for path in said["templates"]], labelled)
    for key, path in said["wanted"].items():
        target, truth = read_scan(path), read_labels(beside(Path(path)))
        start = time.perf_counter()
        shares, hard, volumes = call(target)
        seconds = time.perf_counter() - start
        scores = {str(k): round(dice(hard == k, truth.data == k), 5) for k in LABELS}
        voxel = target.grid.voxel_volume / 1000
        measured: dict[str, Any] = {}
        for number, k in enumerate(LABELS):
            tails = torch.tensor([t for level in LEVELS for t in ((1 - level) / 2, (1 + level) / 2)], dtype=torch.float64)
            quantiles = torch.quantile(volumes[:, number].double(), tails).tolist() if len(volumes) > 1 else []
            volume = float(shares[number].double().sum()) * voxel
            measured[str(k)] = {"truth_ml": float((truth.data == k).sum()) * voxel, "volume_ml": volume, "quantiles_ml": quantiles}
        yield key, {
            "scan": Path(path).name[12:15],
            "dice": statistics.fmean(scores.values()),
            "dice_by_label": scores,
            "volumes": measured,
            "seconds": round(seconds, 3),
        }


Answer = tuple[Tensor, Tensor, Tensor]
"""Shares of the labels ``(2, *shape)``, the label map, and volumes by draw ``(n, 2)``, ml, none for methods without intervals."""


Method = Callable[[Volume, Volume, Sequence[Volume], Path], Callable[[Volume], Answer]]


def _ours(scan: Volume, labels: Volume, templates: Sequence[Volume], path: Path, draws: int = 0) -> Callable[[Volume], Answer]:
    def call(target: Volume) -> Answer:
        result = register(scan, target, draws=draws, device="cpu", settings=RegistrationSettings())
        voxel = target.grid.voxel_volume / 1000
        if not draws:
            shares = _shares(labels, result.transform, target)
            return shares[1:], shares.argmax(0), shares.new_zeros(0, 2)
        carried = torch.stack([_shares(labels, draw, target) for draw in result.draws])
        shares = carried.mean(0)
        return shares[1:], shares.argmax(0), carried[:, 1:].flatten(2).sum(-1) * voxel

    return call


def _templates(scan: Volume, labels: Volume, templates: Sequence[Volume], path: Path) -> Callable[[Volume], Answer]:
    found = label_templates(labels, scan, templates, partial(register, device="cpu"))

    def call(target: Volume) -> Answer:
        every = fuse(found, target, partial(register, device="cpu"))
        shares = every.mean(0)
        return shares[1:], shares.argmax(0), every[:, 1:].flatten(2).sum(-1) * target.grid.voxel_volume / 1000

    return call


def _syn(scan: Volume, labels: Volume, templates: Sequence[Volume], path: Path) -> Callable[[Volume], Answer]:
    from_paths = ants()

    def call(target: Volume) -> Answer:
        assert target.path is not None
        outcome = from_paths(path, target.path)
        shares = _shares(labels, outcome.transform, target)
        return shares[1:], shares.argmax(0), shares.new_zeros(0, 2)

    return call


def _shares(labels: Volume, transform: Any, target: Volume) -> Tensor:
    """Background and labels interpolated linearly, ``(3, *shape)``."""
    one_hot = torch.stack([(labels.data == k).float() for k in (0, *LABELS)])
    return warp(one_hot, labels.grid, transform, target.grid, fill="edge")


if __name__ == "__main__":
    for _key, _row in _measured(json.loads(Path(sys.argv[1]).read_text())):
        print("ROW " + json.dumps({"key": _key, **_row}), flush=True)
