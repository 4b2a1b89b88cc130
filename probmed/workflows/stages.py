"""What every workflow needs: a clock of its stages, a device, an image in a unit of its own."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Clock:
    """Wall time by stage, seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The stage that ends now."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now


def pick_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def foreground_unit(data: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and unit of an image: (data − offset) / unit is not negative and has a foreground of mean one. Scanners' units are arbitrary.

    Arguments:
        data: ``(*shape)``.
    """
    offset = data.min().clamp_max(0.0)
    seen = data[data > data.min()] - offset
    return offset, seen[seen > seen.mean()].mean()


def scaled(data: Tensor) -> Tensor:
    """An image with a foreground of mean one."""
    offset, unit = foreground_unit(data)
    return (data - offset) / unit
