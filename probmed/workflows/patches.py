"""Parts of scans that a network is trained on, and windows of that size that it goes over whole ones in: what a scan too large for one pass needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

_WINDOWS = 4  # at once
_OVERLAP = 0.5  # of neighbouring windows, of their length


def random_patches(images: Tensor, labels: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A part of each scan, about a random voxel of a random one of its labels, so that small structures are seen as often as large ones.

    Draws are of PyTorch's global generator.

    Arguments:
        images: ``(B, C, *shape)``. labels: ``(B, *shape)``, negative where unknown; the part of a scan without any is anywhere.
        size: voxels along each axis; the scan's where it has fewer.
    """
    shape = labels.shape[1:]
    size = [min(own, whole) for own, whole in zip(size, shape, strict=True)]
    parts = []
    for image, own in zip(images, labels, strict=True):
        present = (own.flatten().clamp_min(-1) + 1).bincount()[1:].nonzero()[:, 0]
        wanted = own == present[torch.randint(len(present), ())] if len(present) else torch.ones_like(own, dtype=torch.bool)
        # Which of them by a running count: their places would be three numbers for each voxel of a whole head.
        rank = torch.randint(int(wanted.sum()), (), device=own.device) + 1
        middle = torch.unravel_index(torch.searchsorted(wanted.flatten().cumsum(0), rank), shape)
        begin = [min(max(int(m) - n // 2, 0), whole - n) for m, n, whole in zip(middle, size, shape, strict=True)]
        part = (..., *(slice(b, b + n) for b, n in zip(begin, size, strict=True)))
        parts.append((image[part], own[part]))
    return torch.stack([image for image, _ in parts]), torch.stack([own for _, own in parts])


def in_windows(network: Callable[[Tensor], Tensor], images: Tensor, size: Sequence[int]) -> Tensor:
    """What a network makes of images ``(B, C, *shape)`` in windows that overlap by half, means weighted by a Gaussian about each window's middle.

    They go also where nothing is known: networks that normalise over what they see have seen such margins in training.
    """
    size = [min(own, whole) for own, whole in zip(size, images.shape[2:], strict=True)]
    found: Tensor = sliding_window_inference(images, size, _WINDOWS, network, overlap=_OVERLAP, mode="gaussian")  # type: ignore[assignment]
    return found
