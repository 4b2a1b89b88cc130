"""A benchmark's table: every row that was measured, what it says in short, and where both are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from probmed.report.panels import png

Row = dict[str, Any]

PACKAGES = (
    *("probmed", "torch", "pyro-ppl", "numpy", "scipy", "nibabel", "nilearn"),
    *("antspyx", "dipy", "SimpleITK", "voxelmorph", "neurite", "scikit-learn", "statsmodels", "glimix-core"),
)


@dataclass
class Table:
    """What a benchmark found.

    Arguments:
        name: of the table; its file is ``results/NAME.json``.
        rows: every measurement.
        summary: the lines of the printed table, all with the same keys; values are shown as they are.
        notes: what a reader has to know, Markdown.
        settings: what was run, JSON values.
        picture: of the rows, if any.
    """

    name: str
    rows: list[Row]
    summary: list[dict[str, str]]
    notes: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    picture: Figure | None = None

    def markdown(self) -> str:
        """The summary as a table, the notes below it."""
        if not self.summary:
            return self.notes
        heads = list(self.summary[0])
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(row[h] for h in heads) + " |" for row in self.summary]
        return "\n".join(lines) + (f"\n\n{self.notes}" if self.notes else "")

    def write(self, folder: Path) -> None:
        """``results/NAME.json``, ``results/NAME.png`` where there is a picture, and the table in ``README.md``, all in ``folder``."""
        text = json.dumps(
            {
                "table": self.name,
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
                "machine": machine(),
                "versions": versions(),
                "seed": self.seed,
                "settings": self.settings,
                "notes": self.notes,
                "summary": self.summary,
                "rows": self.rows,
            },
            indent=1,
            ensure_ascii=False,
        )
        results = folder / "results"
        results.mkdir(exist_ok=True)
        _replace(results / f"{self.name}.json", text + "\n")
        if self.picture is not None:
            (results / f"{self.name}.png").write_bytes(png(self.picture))
        page = folder / "README.md"
        _replace(page, with_table(page.read_text(encoding="utf-8"), self.name, self.markdown()))


class Log:
    """Rows of a run, kept as they come, so that a long run that was cut off goes on where it was.

    Arguments:
        path: a file of one JSON row a line; without one nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[row["key"]] = row

    def row(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row that is stored under the key, or else a new one, with the machine's load when it began."""
        if key not in self.rows:
            load = round(os.getloadavg()[0], 1)
            self.rows[key] = {"key": key, **measure(), "load": load}
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self.rows[key], ensure_ascii=False) + "\n")
        return self.rows[key]


def machine() -> dict[str, Any]:
    """Cores, processor, memory and accelerator; nothing that names the machine."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "cpu": platform.machine(), "system": platform.system()}
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = re.findall(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if models:
            found["cpu"] = models[0]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Python and the packages that the tables use, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def with_table(page: str, name: str, table: str) -> str:
    """A page with what stands between the markers of a table replaced.

    Raises:
        ValueError: where the page lacks the markers.
    """
    start, end = f"<!-- table {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the markers {start} and {end} in the page, got neither or one")
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over scans; an en dash where there is nothing."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    # Not statistics.stdev: it fails on infinite values, which a missed structure gives.
    sd = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
