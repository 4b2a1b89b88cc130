"""What every workflow needs: a clock of its stages, a device."""

from __future__ import annotations

import time

import torch


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
