"""Segmentation networks side by side, each trained for as many steps on parts of the same examples: how good they are, and what they cost. The
probabilistic U-Net and DeepMedic see whole scans, for half as many steps, which are about as many voxels.

Data, in the folder ``PROBMED_DATA``: `msd_hippocampus` with the split of `few_labels` and all labels, and `oasis_trt_slices`, 2D, all structures,
trained on eight slices and tested on every third. Costs are measured in a process each, on random images of the same size:
``python -m benchmarks.architectures ORDER``.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.losses.dice import DiceCELoss

from benchmarks.few_labels import BATCH, FULL, PATCH, RATE, STEPS, Data, Method, fitted, labelled_table, network, score
from benchmarks.pairs import SMALLEST, beside, slices
from benchmarks.registration_sizes import peak_gib
from benchmarks.runs import child_rows
from benchmarks.tables import Log, Row, Table, mean_sd
from benchmarks.tissue import data_folder
from benchmarks.uncertainty import PROBABILISTIC, WHOLE_STEPS
from probmed.grids import Grid
from probmed.inference.training import TrainingSettings
from probmed.metrics import dice, paired_bootstrap
from probmed.segmentation_networks import VoxelWise
from probmed.volumes import read_labels, read_scan
from probmed.workflows.amortisation import Cohort, read_cohort
from probmed.workflows.supervision import SegmenterSettings, TrainedSegmenter, train_segmenter
from probmed.workflows.training_sets import Augmentation, labelled

SLICE_STEPS, SLICE_PATCH = 3000, (96, 96)
LEFT_OUT = 3  # every third slice is for the test
TIMED = 24  # steps, after two that warm up; their median counts
PATCHES = 512
NETWORKS: Mapping[str, SegmenterSettings] = {
    "U-Net": SegmenterSettings("unet", mixed_precision=True),
    "U-Net with an adversary": SegmenterSettings("unet", adversary=0.05, mixed_precision=True),
    "probabilistic U-Net": SegmenterSettings("probabilistic-unet", mixed_precision=True),
    "DeepMedic": SegmenterSettings("deepmedic", mixed_precision=True),
    "FCN of ten layers": SegmenterSettings("fcn", mixed_precision=True),
    "voxel-wise": SegmenterSettings("voxelwise", mixed_precision=True),
}
TRAINED = {"U-Net": FULL, "probabilistic U-Net": PROBABILISTIC}
"""Networks of `few_labels` and `uncertainty`, which are trained once where the tables' networks are kept in one place."""
WHOLE = ("probabilistic U-Net", "DeepMedic")
"""Those that see whole scans."""
ON_CROPS = tuple(name for name in NETWORKS if name != "voxel-wise")
"""Those that are trained there; of the voxel-wise network the costs alone are measured."""
SLICED = ("U-Net", "FCN of ten layers")
PLAIN = "U-Net in a plain loop, loss of MONAI"
PATCHWISE = "voxel-wise, patch after patch"
CROPS, SLICES = "msd_hippocampus", "oasis_trt_slices"


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Train every network on both sets, and measure its steps."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Data.of(log, Path(temporary), limit, seed)
        if data.test:
            rows += [row for name in _wanted(ON_CROPS, only) for row in _crops(log, data, name, seed)]
            rows += [row for name in _wanted(SLICED, only) for row in _sliced(log, data.kept, name, limit, seed)]
            for collection, names in ((CROPS, (*NETWORKS, PLAIN, PATCHWISE)), (SLICES, SLICED)):
                cohort, grid = data.cohort if collection == CROPS else _training_slices()
                for name in _wanted(names, only):
                    patch = None if name == PATCHWISE else patch_of(collection, name)
                    said = {"shape": patch or grid.shape, "classes": len(cohort.codes)}
                    key, common = f"cost/{collection}/{name}", {"collection": collection, "method": name, "kind": "cost", "scans": len(cohort.images)}
                    rows += child_rows(log, "benchmarks.architectures", {**said, "method": name}, {key: None}, common, threads)
    settings = {"steps": STEPS, "whole_steps": WHOLE_STEPS, "slice_steps": SLICE_STEPS, "patch": PATCH, "slice_patch": SLICE_PATCH}
    settings |= {"batch": BATCH, "learning_rate": RATE, "threads": threads}
    return Table("architectures", rows, summarise(rows), notes(rows), settings, seed)


def _wanted(names: Sequence[str] | Mapping[str, Any], only: Sequence[str]) -> Iterator[str]:
    return (name for name in names if not only or any(word in name for word in only))


def _crops(log: Log, data: Data, name: str, seed: int) -> list[Row]:
    keys = {f"{CROPS}/{name}/{path.name[12:15]}": path for path in data.test}
    if any(key not in log.rows for key in keys):
        trained = trained_on_crops(data, name, seed)
        for key, path in keys.items():
            log.row(key, lambda path=path: {"collection": CROPS, "kind": "scan", **score(name, path, trained.probabilities)})  # type: ignore[misc]
    return [log.rows[key] for key in keys]


def trained_on_crops(data: Data, name: str, seed: int) -> TrainedSegmenter:
    """On all labelled scans."""
    method = Method(lambda data: data.supervised(None), settings_of(CROPS, name), steps_of(CROPS, name), calibrated=True)
    return network(data, TRAINED.get(name, f"{CROPS}, {name}"), method, seed)


def settings_of(collection: str, name: str) -> SegmenterSettings:
    return replace(NETWORKS[name], patch=patch_of(collection, name))


def steps_of(collection: str, name: str) -> int:
    if collection == SLICES:
        return SLICE_STEPS
    return WHOLE_STEPS if name in WHOLE else STEPS


def patch_of(collection: str, name: str) -> tuple[int, ...] | None:
    """What a step sees; None for whole scans."""
    if name in WHOLE:
        return None
    return PATCH if collection == CROPS else SLICE_PATCH


def _sliced(log: Log, kept: Path, name: str, limit: int | None, seed: int) -> list[Row]:
    test = slices()[::LEFT_OUT]
    keys = {f"{SLICES}/{name}/{path.name.split('_')[0]}": path for path in test[:limit]}
    if any(key not in log.rows for key in keys):
        cohort, grid = _training_slices()
        examples = partial(labelled, cohort.images, cohort.labels, grid, BATCH, Augmentation())
        untrained = TrainedSegmenter.build(grid, settings_of(SLICES, name), cohort.codes, seed=seed)
        trained = fitted(kept, f"{SLICES}, {name}", untrained, examples, SLICE_STEPS, seed)
        for key, path in keys.items():
            log.row(key, partial(score_slice, name, path, trained))
    return [log.rows[key] for key in keys]


def _training_slices() -> tuple[Cohort, Grid]:
    return read_cohort(labelled_table([path for path in slices() if path not in slices()[::LEFT_OUT]]), data_folder() / "table.tsv")


def score_slice(name: str, path: Path, trained: TrainedSegmenter) -> Row:
    """Mean Dice over structures of 20 pixels and more, and the share of them that is missed altogether."""
    volume, truth = read_scan(path), read_labels(beside(path)).data
    start = time.perf_counter()
    found = torch.tensor(trained.codes)[trained.probabilities(volume).argmax(0)]
    seconds = time.perf_counter() - start
    wanted = [k for k in truth.unique().tolist() if k and int((truth == k).sum()) >= SMALLEST]
    each = [dice(found == k, truth == k) for k in wanted]
    common = {"collection": SLICES, "kind": "scan", "method": name, "scan": path.name.split("_")[0]}
    return {**common, "dice": statistics.fmean(each), "missed": statistics.fmean(d == 0 for d in each), "seconds": round(seconds, 3)}


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for each set and network."""
    lines = []
    for collection in (CROPS, SLICES):
        for name in dict.fromkeys(row["method"] for row in rows if row["collection"] == collection):
            own, cost = _of(rows, "scan", collection, name), next(iter(_of(rows, "cost", collection, name)), {})
            steps = steps_of(collection, name)
            line = {"set": collection, "network": name, "steps": str(steps) if own else "–", "Dice": mean_sd([row["dice"] for row in own])}
            line["HD95, mm"] = mean_sd([row["hd95"] for row in own if "hd95" in row], 2)
            line["nats a voxel"] = mean_sd([row["nll"] for row in own if "nll" in row], 4)
            line["structures missed, %"] = f"{100 * statistics.fmean(row['missed'] for row in own):.0f}" if own and "missed" in own[0] else "–"
            line["seconds a scan"] = f"{statistics.median(row['seconds'] for row in own):.2f}" if own else _told(cost, "scan_seconds", "{:.0f}")
            line["parameters"] = _told(cost, "parameters", "{:,}")
            line["seconds a step"] = _told(cost, "seconds", "{:.2f}")
            epoch = cost["seconds"] * cost["scans"] / BATCH if "seconds" in cost else None
            line["seconds an epoch"] = "–" if epoch is None else f"{epoch:.{int(epoch < 10)}f}"
            line["peak GiB"] = _told(cost, "peak_gib", "{:.2f}")
            lines.append(line)
    return lines


def _of(rows: Sequence[Row], kind: str, collection: str, name: str) -> list[Row]:
    return [row for row in rows if (row["kind"], row["collection"], row["method"]) == (kind, collection, name)]


def _told(cost: Row, key: str, layout: str) -> str:
    return layout.format(cost[key]) if key in cost else "–"


def notes(rows: Sequence[Row]) -> str:
    """Differences to the U-Net, and what our loop costs."""
    texts = []
    for collection in (CROPS, SLICES):
        names = dict.fromkeys(row["method"] for row in rows if row["collection"] == collection and row["kind"] == "scan")
        of = {name: torch.tensor([row["dice"] for row in _of(rows, "scan", collection, name)]) for name in names}
        parts = []
        for name in names:
            if name != "U-Net" and "U-Net" in of and len(of[name]) == len(of["U-Net"]) > 1:
                found = paired_bootstrap(of[name], of["U-Net"])
                parts.append(f"{name} {found.mean:+.3f} [{found.lower:+.3f}, {found.upper:+.3f}]")
        if parts:
            texts.append(f"Dice less that of the U-Net, {collection}, with a 95 % paired bootstrap interval over scans: {'; '.join(parts)}.")
    costs = {row["method"]: row for row in rows if row["kind"] == "cost" and row["collection"] == CROPS}
    if {"U-Net", PLAIN} <= set(costs):
        ours, plain = costs["U-Net"], costs[PLAIN]
        ratio, memory = ours["seconds"] / plain["seconds"], ours["peak_gib"] / plain["peak_gib"]
        texts.append(f"A step of the U-Net takes {ratio:.2f} of the plain loop's time, and the process {memory:.2f} of its memory.")
    return " ".join(texts)


def cost(method: str, shape: Sequence[int], classes: int) -> Row:
    """Parameters, seconds a step on images that are drawn beforehand, and the largest resident memory."""
    if method == PATCHWISE:
        return _patch_after_patch(shape, classes)
    grid = Grid.from_spacing(tuple(shape), 1.0)
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 1, *shape), torch.randint(classes, (BATCH, *shape))
    trained = TrainedSegmenter.build(grid, NETWORKS.get(method, NETWORKS["U-Net"]), range(classes))
    ends = [time.perf_counter()]

    def ended(*_: Any) -> None:
        ends.append(time.perf_counter())

    if method == PLAIN:
        _plain_loop(trained.network, images, labels, ended)
    else:
        train_segmenter(trained, lambda: (images, labels), TrainingSettings(TIMED + 2, RATE, every=1), tell=ended)
    each = [after - before for before, after in itertools.pairwise(ends[2:])]
    return {
        "parameters": sum(p.numel() for p in trained.network.parameters()),
        "seconds": round(statistics.median(each), 4),
        "spread": [round(min(each), 4), round(max(each), 4)],
        "peak_gib": round(peak_gib(), 3),
    }


def _plain_loop(net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, ended: Callable[[], None]) -> None:
    """As MONAI's tutorials write it."""
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, TIMED + 2)
    net.train()
    for _ in range(TIMED + 2):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # as ours
            found = net(images)
        loss(found.float(), labels[:, None]).backward()
        optimiser.step()
        schedule.step()
        ended()


def _patch_after_patch(shape: Sequence[int], classes: int) -> Row:
    """Seconds of a scan if each voxel's patch goes through the network by itself, by some of them."""
    net = VoxelWise(len(shape), 1, classes).eval()
    patches = torch.randn(PATCHES, 1, *[net.side] * len(shape))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net.patches(patches[:16])
        start = time.perf_counter()
        net.patches(patches)
    each = (time.perf_counter() - start) / PATCHES
    return {"scan_seconds": round(each * torch.Size(shape).numel(), 1)}


def _child(order: Path) -> None:
    said: dict[str, Any] = json.loads(order.read_text())
    row = cost(said["method"], said["shape"], said["classes"])
    for key in said["wanted"]:
        print("ROW " + json.dumps({**row, "key": key}), flush=True)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
