"""Registration of pairs: ours beside SyN, SimpleITK and the affine map alone; how well the labels agree afterwards, and what the maps are like.

Data, in the folder ``PROBMED_DATA``: `msd_hippocampus` (100 ordered pairs of the test scans, drawn with the seed), `oasis_trt_slices` (all ordered
pairs, 2D) and `ibsr18` (all ordered pairs).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.registrations import Outcome
from benchmarks.runs import child_rows
from benchmarks.tables import Log, Row, Table, mean_sd
from benchmarks.tissue import data_folder
from benchmarks.trainings import trained
from probmed.metrics import dice, paired_bootstrap, surface_distances
from probmed.transforms import determinant, physical_gradient, warp
from probmed.volumes import read_labels

HIPPOCAMPUS_PAIRS = 100
SMALLEST = 20  # voxels of a label of a slice that is scored
OURS = "probmed, MAP"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "probmed, affine alone": ("affine", {}),
    OURS: ("ours", {}),
    "probmed, 20 draws": ("ours", {"draws": 20}),
    "ANTs SyN": ("ants", {"kind": "SyN"}),
    "ANTs SyNCC": ("ants", {"kind": "SyNCC"}),
    "SimpleITK B-spline": ("sitk_bspline", {}),
    "SimpleITK demons": ("sitk_demons", {}),
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "probmed, network": ("amortised", {}),
    "probmed, network refined": ("amortised", {"refine": 100}),
    "voxelmorph, its network": ("voxelmorph", {}),
}
"""Trained in the same run on the hippocampus's training scans, without their labels, and measured on its pairs alone."""
STEPS = 4000
WEIGHTS = (0.3, 1.0, 3.0)
"""Of the voxelmorph package's penalty, 1 as published, of which one is chosen on pairs of training scans that a short training leaves out."""
TUNING = "tuning"
TUNING_STEPS, TUNING_SCANS, TUNING_PAIRS = 500, 8, 12
FEW = {
    ("msd_hippocampus", "ANTs SyNCC"): 30,
    ("msd_hippocampus", "SimpleITK B-spline"): 30,
    ("msd_hippocampus", "probmed, network refined"): 30,
    ("oasis_trt_slices", "SimpleITK B-spline"): 30,
    ("ibsr18", "ANTs SyNCC"): 0,
    ("ibsr18", "SimpleITK B-spline"): 0,
    ("ibsr18", "SimpleITK demons"): 8,
    ("ibsr18", "probmed, 20 draws"): 8,
}
"""Pairs at most, where a method takes ten seconds of a slice, or half a minute or more."""


@dataclass(frozen=True)
class Pair:
    """Two images with their labels."""

    collection: str
    name: str
    moving: Path
    fixed: Path
    moving_labels: Path
    fixed_labels: Path


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every method on every pair."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        every = list(pairs(Path(folder), seed))
        if not every:
            print(f"no scans in {data_folder()}: set PROBMED_DATA")
        for collection in dict.fromkeys(pair.collection for pair in every):
            networks = NETWORKS if collection == "msd_hippocampus" else {}
            for method, (kind, options) in (METHODS | networks).items():
                name = f"{collection} {method}"
                if only and not any(word in name for word in only):
                    continue
                if method in NETWORKS:
                    options = {**options, "run": str(network(log, Path(folder), kind, threads, seed))}
                chosen = [pair for pair in every if pair.collection == collection][: FEW.get((collection, method))][:limit]
                rows += measure(log, chosen, collection, method, kind, options, threads)
    tuned = tuning_dice(log.rows.values())
    settings = {"threads": threads, "hippocampus_pairs": HIPPOCAMPUS_PAIRS, "smallest_label_voxels": SMALLEST, "voxelmorph_tuning": tuned}
    return Table("pairs", rows, summarise(rows), notes(rows) + tuning_note(tuned), settings, seed)


def measure(log: Log, chosen: Sequence[Pair], collection: str, method: str, kind: str, options: dict[str, Any], threads: int) -> list[Row]:
    """The rows of a method, those that are missing from one child process."""
    fields = ("moving", "fixed", "moving_labels", "fixed_labels")
    wanted = {f"{collection}/{pair.name}/{method}": {name: str(getattr(pair, name)) for name in fields} for pair in chosen}
    said = {"method": kind, "options": options, "set": collection}
    return child_rows(log, "benchmarks.registrations", said, wanted, {"collection": collection, "method": method}, threads)


def network(log: Log, folder: Path, kind: str, threads: int, seed: int) -> Path:
    """The folder of a network that is trained on the training scans: ours, or that of the voxelmorph package with the better of its weights."""
    train = scans()[0]
    if kind == "amortised":
        return trained(log, folder, "network", "registration", {}, train, STEPS, threads)
    held = [train[int(index)] for index in np.random.default_rng(seed).permutation(len(train))[:TUNING_SCANS]]
    rest = [path for path in train if path not in held]
    checked = drawn_pairs(TUNING, held, TUNING_PAIRS, seed)
    rows: list[Row] = []
    for weight in WEIGHTS:
        run = trained(log, folder, f"voxelmorph-{weight}", "voxelmorph", {"weight": weight}, rest, TUNING_STEPS, threads)
        rows += measure(log, checked, TUNING, str(weight), "voxelmorph", {"run": str(run)}, threads)
    dice_of = tuning_dice(rows)
    best = float(max(dice_of, key=lambda weight: dice_of[weight]))
    return trained(log, folder, "voxelmorph", "voxelmorph", {"weight": best}, train, STEPS, threads)


def tuning_dice(rows: Iterable[Row]) -> dict[str, float]:
    """Mean Dice by weight over those rows that are of the short trainings."""
    of: dict[str, list[float]] = {}
    for row in rows:
        if row["collection"] == TUNING:
            of.setdefault(row["method"], []).append(row["dice"])
    return {weight: statistics.fmean(values) for weight, values in of.items()}


def tuning_note(tuned: dict[str, float]) -> str:
    """What the choice of the voxelmorph package's weight rests on; nothing where it was not made."""
    if not tuned:
        return ""
    found = ", ".join(f"{value:.3f} with {weight}" for weight, value in tuned.items())
    return f"\n\nDice of voxelmorph's network on {TUNING_PAIRS} training pairs after {TUNING_STEPS} steps, by the weight of its penalty: {found}."


def scans() -> tuple[list[Path], list[Path]]:
    """Training and test scans of the hippocampus."""
    every = sorted((data_folder() / "msd_hippocampus" / "images").glob("*.nii.gz"))
    number = {p: int(p.name[12:15]) % 5 for p in every}
    return [p for p in every if number[p] in (1, 2, 3)], [p for p in every if number[p] == 4]


def slices() -> list[Path]:
    """Those of OASIS-TRT, in the order of people's numbers."""
    return sorted((data_folder() / "oasis_trt_slices" / "images").glob("*.nii.gz"), key=lambda p: int(p.name.split("_")[0].split("-")[-1]))


def pairs(folder: Path, seed: int) -> Iterator[Pair]:
    """All pairs; images of an odd shape are written anew, so that every method reads the same."""
    data = data_folder()
    yield from drawn_pairs("msd_hippocampus", scans()[1], HIPPOCAMPUS_PAIRS, seed)
    for moving in slices():
        for fixed in slices():
            if moving != fixed:
                name = "-".join(p.name.split("_")[0].split("-")[-1] for p in (moving, fixed))
                yield Pair("oasis_trt_slices", name, moving, fixed, beside(moving), beside(fixed))
    brains = sorted((data / "ibsr18").glob("IBSR_??.nii.gz"))
    flat = {p: (_flat(p, folder), _flat(p.with_name(p.name.replace(".nii", "_seg.nii")), folder)) for p in brains}
    for moving in brains:
        for fixed in brains:
            if moving != fixed:
                (m, ml), (f, fl) = flat[moving], flat[fixed]
                yield Pair("ibsr18", f"{moving.name[5:7]}-{fixed.name[5:7]}", m, f, ml, fl)


def drawn_pairs(collection: str, among: Sequence[Path], count: int, seed: int) -> list[Pair]:
    """Ordered pairs of scans of the hippocampus, drawn with the seed."""
    ordered = [(m, f) for m in among for f in among if m != f]
    drawn = (ordered[int(index)] for index in np.random.default_rng(seed).permutation(len(ordered))[:count])
    return [Pair(collection, f"{m.name[12:15]}-{f.name[12:15]}", m, f, beside(m), beside(f)) for m, f in drawn]


def beside(image: Path) -> Path:
    """The labels of a scan; those of the OASIS slices say in their names which labels they are."""
    return image.parent.parent / "labels" / image.name.replace("_slice", "_DKT31_CMA_labels_slice")


def _flat(path: Path, folder: Path) -> Path:
    """A copy without the trailing axis of size one, on which ANTs would work in four dimensions."""
    target = folder / path.name
    image: Any = nib.load(path)
    data = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(data.reshape(data.shape[:3]).astype(np.float32), image.affine), target)  # type: ignore[no-untyped-call]
    return target


def score(moving_labels: Path, fixed_labels: Path, outcome: Outcome, collection: str) -> Row:
    """Labels carried by the nearest voxel, and the map itself, all on the fixed image's grid.

    Folding and spread of log det Dφ are over the whole field of view; the spread leaves out voxels that fold. Inverse consistency is the mean of
    |φ⁻¹(φ(x)) − x|, mm, over voxels that φ keeps inside the moving image.
    """
    m, f = read_labels(moving_labels), read_labels(fixed_labels)
    moved = warp(m.data[None], m.grid, outcome.transform, f.grid, "nearest")[0]
    if collection == "ibsr18":
        wanted = {"GM": 2, "WM": 3}
    else:
        least = SMALLEST if collection == "oasis_trt_slices" else 1
        both = [k for k in f.data.unique().tolist() if k and int((f.data == k).sum()) >= least and int((m.data == k).sum()) >= least]
        wanted = {str(k): k for k in both}
    by_label = {name: dice(moved == k, f.data == k) for name, k in wanted.items()}
    distances = [surface_distances(moved == k, f.data == k, f.grid.spacing).hausdorff() for k in wanted.values()]
    points = f.grid.coordinates()
    there = outcome.transform(points)
    jacobian = determinant(physical_gradient(there, f.grid))
    row: Row = {
        "dice": statistics.fmean(by_label.values()),
        "dice_by_label": {name: round(value, 4) for name, value in by_label.items()},
        "hd95": statistics.fmean(distances),
        "folding": float((jacobian <= 0).float().mean()),
        "sd_log_jacobian": float(jacobian[jacobian > 0].log().std()),
        "seconds": round(outcome.seconds, 3),
        "remarks": outcome.remarks,
    }
    if outcome.inverse is not None:
        voxels = m.grid.world_to_voxel(there)
        inside = ((voxels >= 0) & (voxels <= torch.tensor(m.grid.shape) - 1)).all(-1)
        row["inverse_mm"] = float((outcome.inverse(there) - points).norm(dim=-1)[inside].mean())
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per collection and method: means ± standard deviations over pairs."""
    lines = []
    for collection in dict.fromkeys(row["collection"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["collection"] == collection):
            chosen = [r for r in rows if r["collection"] == collection and r["method"] == method]
            inverse = [r["inverse_mm"] for r in chosen if "inverse_mm" in r]
            seconds = sorted(r["seconds"] for r in chosen)
            lines.append(
                {
                    "set": f"{collection} ({len(chosen)})",
                    "method": method,
                    "Dice": mean_sd([r["dice"] for r in chosen]),
                    "HD95, mm": mean_sd([r["hd95"] for r in chosen if np.isfinite(r["hd95"])], 2),
                    "folds, %": f"{100 * statistics.fmean(r['folding'] for r in chosen):.4f}",
                    "SD log J": f"{statistics.fmean(r['sd_log_jacobian'] for r in chosen):.3f}",
                    "φ⁻¹∘φ, mm": f"{statistics.fmean(inverse):.3f}" if inverse else "–",
                    "seconds": f"{statistics.median(seconds):.2f} [{seconds[len(seconds) // 4]:.2f}, {seconds[3 * len(seconds) // 4]:.2f}]",
                    "peak GiB": f"{max(r['peak_gib'] for r in chosen):.1f}",
                }
            )
    return lines


def notes(rows: Sequence[Row]) -> str:
    """Differences between ours and each other method, and ratios of their times, paired."""
    lines = []
    for collection in dict.fromkeys(row["collection"] for row in rows):
        of: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row["collection"] == collection:
                of.setdefault(row["method"], {})[row["pair"]] = row
        parts = []
        for method, found in of.items():
            both = sorted(set(of.get(OURS, {})) & set(found))
            if method == OURS or len(both) < 2:
                continue
            ours, theirs = (torch.tensor([of[m][pair]["dice"] for pair in both]) for m in (OURS, method))
            d = paired_bootstrap(ours, theirs)
            ratio = statistics.median(of[OURS][pair]["seconds"] / found[pair]["seconds"] for pair in both)
            parts.append(f"{method}: {d.mean:+.3f} [{d.lower:+.3f}, {d.upper:+.3f}], time × {ratio:.2f}")
        if parts:
            lines.append(f"- {collection}. " + "; ".join(parts) + ".")
    if not lines:
        return ""
    head = f"Dice of {OURS} less that of each method, mean over pairs with a 95 % paired bootstrap interval, and median ratio of its time to theirs:"
    return "\n".join([head, "", *lines])
