"""What `probmed segment` does, in the form that `benchmarks.runs.measure` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probmed.workflows.segmentation import segment


def probmed(scan: Path, draws: int = 50) -> tuple[tuple[str, ...], NDArray[np.float32], dict[str, float], dict[str, Any]]:
    """Everything with its defaults; nobody tells it whether the scan is stripped."""
    result = segment([scan], draws=draws, device="cpu")
    volumes = result.volumes.set_index("name")
    remarks = {
        "stripped": result.stripped,
        "converged": result.converged,
        "quality": float(result.quality["score"]),
        "volumes_ml": {name: [float(x) for x in volumes.loc[name, ["volume_ml", "q025", "q975"]]] for name in volumes.index},
    }
    return result.names, result.probabilities.numpy(), dict(result.seconds), remarks
