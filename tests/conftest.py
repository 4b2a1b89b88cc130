"""One thread a process: tensors here are tiny, and pytest-xdist fills the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
