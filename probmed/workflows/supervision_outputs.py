"""A scan that a network has segmented, as files: BIDS derivatives, all of them or none.

Of ``sub-01_T1w.nii.gz``: ``_dseg.nii.gz`` with ``_dseg.tsv``, ``_label-X_probseg.nii.gz`` for each label, ``_desc-entropy.nii.gz``,
``_volumes.tsv``, a ``.json`` beside each, and ``_report.html``. Volumes are sums of probabilities. Their intervals are of their errors on
validation scans, where networks know them; else of passes with dropout, draws, or several networks, where there are any.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probmed.volumes import Volume, write_labels, write_scan
from probmed.workflows.outputs import (
    VOLUME_COLUMNS,
    check_outputs,
    described_table,
    entity,
    remove_stale,
    staged,
    table_text,
    with_sidecars,
    write_sidecars,
)
from probmed.workflows.provenance import Provenance
from probmed.workflows.segmentation import interval_table
from probmed.workflows.volume_errors import VolumeErrors

_DRAWS = 4000  # of volumes, over all answers


@dataclass(frozen=True)
class Labelled:
    """What networks make of a scan.

    Arguments:
        names: of the labels' codes, in the networks' order, background left out.
        answers: of passes, draws or networks, ``(N, K, *shape)``, background first.
        errors: of the volumes of each answer, where all are known; or none.
    """

    scan: Volume
    names: dict[int, str]
    answers: Tensor
    errors: Sequence[VolumeErrors] = ()

    @cached_property
    def probabilities(self) -> Tensor:
        """Their mean, ``(K, *shape)``."""
        return self.answers.mean(0)

    @property
    def labels(self) -> Tensor:
        """The likeliest code of each voxel."""
        return torch.tensor([0, *self.names])[self.probabilities.argmax(0)]

    @property
    def entropy(self) -> Tensor:
        """Of each voxel's mean probabilities, nats: what each answer leaves open, and how far the answers differ."""
        return torch.special.entr(self.probabilities).sum(0)

    @cached_property
    def volumes(self) -> pd.DataFrame:
        """``interval_table`` in ml: where errors are known, of draws of them for each answer; else of draws of the answers and of each one's labels,
        voxels being independent given it, and one answer has none."""
        voxel_ml = self.scan.as_3d().grid.voxel_volume / 1000
        p = self.answers[:, 1:].flatten(2).double()
        means, generator = voxel_ml * p.sum(-1), torch.Generator().manual_seed(0)
        if self.errors:
            each = [torch.rand(-(-_DRAWS // len(p)), p.shape[1], dtype=torch.float64, generator=generator) for _ in self.errors]
            drawn = torch.cat([own.quantiles(mean, levels) for own, mean, levels in zip(self.errors, means, each, strict=True)])
            middle = torch.stack([own.medians(mean) for own, mean in zip(self.errors, means, strict=True)]).mean(0)
            return interval_table(list(self.names), list(self.names.values()), middle, drawn)
        sds = voxel_ml * (p * (1 - p)).sum(-1).sqrt()
        drawn = (means + sds * torch.randn(means.shape, dtype=torch.float64, generator=generator)).clamp_min(0.0)
        return interval_table(list(self.names), list(self.names.values()), means.mean(0), drawn if len(drawn) > 1 else drawn[:0])


def network_names(stem: str, labels: Sequence[str]) -> dict[str, str]:
    """Names of all files of a scan: what it is → name."""
    names = {"dseg": f"{stem}_dseg.nii.gz", "labels": f"{stem}_dseg.tsv"}
    names |= {f"probability {label}": f"{stem}_label-{entity(label, labels)}_probseg.nii.gz" for label in labels}
    return names | {"entropy": f"{stem}_desc-entropy.nii.gz", "volumes": f"{stem}_volumes.tsv", "report": f"{stem}_report.html"}


def write_network_segmentation(
    result: Labelled, folder: Path, stem: str, provenance: Provenance, page: str, protect: Iterable[Path] = ()
) -> None:
    """Write every file of a scan into a folder, which has to exist.

    Arguments:
        page: ``network_page``.

    Raises:
        UnusableInput: where a file would replace an input or one that probmed did not write, or cannot be written; then none is.
    """
    names, scan = result.names, result.scan
    files = network_names(stem, list(names.values()))
    every = with_sidecars(files)
    check_outputs(folder, every, stem, protect)
    described: dict[str, dict[str, Any]] = {
        "dseg": {"Description": "The likeliest label of each voxel.", "Labels": {name: code for code, name in names.items()}},
        "entropy": {"Description": "Entropy of the mean of all passes, draws and networks.", "Units": "nats", "Answers": len(result.answers)},
        "volumes": described_table("Volumes, and their quantiles by errors on validation scans, or over passes, draws or networks.", VOLUME_COLUMNS),
    }
    with staged(folder, stem) as stage:
        write_labels(stage / files["dseg"], result.labels, scan)
        for name, p in zip(names.values(), result.probabilities[1:], strict=True):
            write_scan(stage / files[f"probability {name}"], p, scan)
            described[f"probability {name}"] = {"Description": f"Probability of {name}."}
        write_scan(stage / files["entropy"], result.entropy, scan)
        rows = pd.DataFrame({"index": list(names), "name": list(names.values())})
        (stage / files["labels"]).write_text(rows.to_csv(sep="\t", index=False, lineterminator="\n"), encoding="utf-8")
        (stage / files["volumes"]).write_text(table_text(result.volumes[list(VOLUME_COLUMNS)]), encoding="utf-8")
        (stage / files["report"]).write_text(page, encoding="utf-8")
        write_sidecars(stage, files, described, provenance)
    remove_stale(folder, f"{glob.escape(stem)}_label-*_probseg.*", every)
