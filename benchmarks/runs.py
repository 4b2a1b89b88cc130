"""One method on one scan in a process of its own, so that its threads and its peak memory are its own.

The parent calls `measure`; the child is ``python -m benchmarks.runs``. Threads are fixed in the child's
environment, before any library is imported. The seconds are those of the method's stages, imports left out;
the peak includes them.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tables import Log, Row

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_ITK_THREADS",
)


@dataclass(frozen=True)
class Run:
    """What a method made of a scan.

    Arguments:
        names: of the classes.
        probabilities: ``(K, *shape)`` float32, on the scan's own grid; hard labels are zeros and ones.
        seconds: wall time by stage and in total ("total").
        peak_gib: largest resident memory of the process.
        remarks: anything else that the method says, JSON values.
    """

    names: tuple[str, ...]
    probabilities: NDArray[np.float32]
    seconds: dict[str, float]
    peak_gib: float
    remarks: dict[str, Any]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Position of the likeliest class, ``(*shape)``; the number of classes where none is possible."""
        labels = self.probabilities.argmax(0).astype(np.int64)
        labels[self.probabilities.sum(0) <= 0] = len(self.names)
        return np.asarray(labels)


def measure(entry: str, scan: Path, options: dict[str, Any], threads: int = 4, timeout: float = 3600) -> Run:
    """Run ``module:function`` on a scan in a child process.

    The function takes the path and the options, and returns names, probabilities ``(K, *shape)``, seconds by
    stage, and remarks.

    Raises:
        RuntimeError: where the child fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, order = Path(folder) / "run.npz", Path(folder) / "order.json"
        order.write_text(json.dumps({"entry": entry, "scan": str(scan), "options": options, "out": str(out)}))
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.runs", str(order)],
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{entry} failed on {scan.name}: {(done.stderr or done.stdout)[-1500:]}")
        with np.load(out) as stored:
            said = json.loads(str(stored["said"]))
            return Run(
                tuple(said["names"]),
                stored["probabilities"],
                said["seconds"],
                said["peak_gib"],
                said["remarks"],
            )


def child_rows(
    log: Log, module: str, said: Mapping[str, Any], wanted: Mapping[str, Any], common: Mapping[str, Any], threads: int
) -> list[Row]:
    """Rows of many cases from one child process, ``python -m module ORDER``, which prints each as ``ROW`` and JSON with its key.

    Arguments:
        said: the order, to which what is missing of ``wanted`` (key → case) is added under that name.
        common: what every row begins with.

    Raises:
        RuntimeError: where the child fails; the rows before are kept.
    """
    missing = {key: case for key, case in wanted.items() if key not in log.rows}
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            order = Path(folder) / "order.json"
            order.write_text(json.dumps({**said, "wanted": missing}))
            environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
            place = Path(__file__).resolve().parent.parent
            call = [sys.executable, "-m", module, str(order)]
            with subprocess.Popen(call, env=environment, cwd=place, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith("ROW "):
                        row = json.loads(line.removeprefix("ROW "))
                        key = row.pop("key")
                        log.row(key, partial(dict, {**common, **row}))
                        told = [f"{name} {row[name]:.4g}" for name in ("dice", "error_mm", "seconds", "peak_gib") if name in row]
                        print(f"{key:50s} {row.get('skipped', ', '.join(told))}", flush=True)
            if child.returncode:
                raise RuntimeError(f"{module} failed with status {child.returncode} on {common}")
    return [log.rows[key] for key in wanted]


def _child(order: Path) -> None:
    said = json.loads(order.read_text())
    module, function = said["entry"].split(":")
    call = getattr(importlib.import_module(module), function)
    names, probabilities, seconds, remarks = call(Path(said["scan"]), **said["options"])
    seconds = {**seconds, "total": sum(seconds.values())}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    answer = {"names": names, "seconds": seconds, "peak_gib": peak, "remarks": remarks}
    np.savez(said["out"], probabilities=np.asarray(probabilities, dtype=np.float32), said=json.dumps(answer))


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
