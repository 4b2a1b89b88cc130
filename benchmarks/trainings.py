"""Trained networks beside a table's rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import THREAD_VARIABLES
from benchmarks.tables import Log


def trained(
    log: Log, folder: Path, name: str, system: str, settings: Mapping[str, Any], scans: Sequence[Path], steps: int, threads: int
) -> Path:
    """The folder of a trained network, beside the log's file where there is one; a training that was cut off goes on.

    Arguments:
        folder: for what need not be kept. name: of the network's folder.
        system: "registration", ours, or "voxelmorph". settings: of the network, JSON values.
    """
    place = folder / name if log.path is None else log.path.resolve().with_suffix(f".{name}")
    if (place / "network.json").exists():
        return place
    order = folder / f"{name}.json"
    order.write_text(
        json.dumps({"system": system, "settings": dict(settings), "scans": [str(path) for path in scans], "steps": steps, "place": str(place)})
    )
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    print(f"training a network of {steps} steps in {place}", flush=True)
    call = [sys.executable, "-m", "benchmarks.networks", str(order)]
    subprocess.run(call, env=environment, cwd=Path(__file__).resolve().parent.parent, check=True)
    return place
