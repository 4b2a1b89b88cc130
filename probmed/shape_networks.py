"""Networks between label maps and codes of shape. Blocks are MONAI's; nothing here knows of Pyro."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks.convolutions import Convolution
from torch import Tensor, nn
from torch.nn import functional

from probmed.segmentation_networks import cropped

_HALVINGS = 2


def _coarse(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // 2**_HALVINGS) for n in shape)


def _layer(ndim: int, inputs: int, outputs: int, strides: int = 1) -> nn.Module:
    # No normalisation: the size of a shape is the mean of its features.
    return Convolution(ndim, inputs, outputs, strides=strides, kernel_size=3, act=("LEAKYRELU", {"negative_slope": 0.1}), norm=None)


class ShapeDecoder(nn.Module):
    """Codes to logits of labels, ``(B, L)`` → ``(B, K, *shape)``: two linear layers to a coarse lattice, then doubled twice with convolutions.

    Arguments:
        codes: L. classes: K. shape: of the lattice of labels. features: of the finest layer; twice as many at each halving.
    """

    def __init__(self, codes: int, classes: int, shape: Sequence[int], features: int = 8) -> None:
        super().__init__()
        self.shape, self.coarse, ndim = tuple(shape), _coarse(shape), len(shape)
        widths = [features << level for level in range(_HALVINGS, -1, -1)]
        self.spread = nn.Sequential(nn.Linear(codes, 64), nn.SiLU(), nn.Linear(64, widths[0] * math.prod(self.coarse)))
        self.layers = nn.ModuleList(_layer(ndim, a, b) for a, b in pairwise(widths))
        self.head = nn.Conv3d(features, classes, 3, padding=1) if ndim == 3 else nn.Conv2d(features, classes, 3, padding=1)
        self.mode = "trilinear" if ndim == 3 else "bilinear"

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.spread(codes).unflatten(1, (-1, *self.coarse))
        for layer in self.layers:
            hidden = layer(functional.interpolate(hidden, scale_factor=2.0, mode=self.mode, align_corners=False))
        return cropped(self.head(hidden), self.shape)


class ShapeEncoder(nn.Module):
    """Label probabilities to the mean and log standard deviation of codes, ``(B, K, *shape)`` → ``(B, 2 L)``.

    Arguments:
        As ``ShapeDecoder``.
    """

    def __init__(self, codes: int, classes: int, shape: Sequence[int], features: int = 8) -> None:
        super().__init__()
        ndim = len(shape)
        widths = [features << level for level in range(_HALVINGS + 1)]
        self.layers = nn.Sequential(_layer(ndim, classes, features), *[_layer(ndim, a, b, strides=2) for a, b in pairwise(widths)])
        self.head = nn.Sequential(nn.Linear(widths[-1] * math.prod(_coarse(shape)), 64), nn.SiLU(), nn.Linear(64, 2 * codes))

    def forward(self, probabilities: Tensor) -> Tensor:
        out: Tensor = self.head(torch.flatten(self.layers(probabilities), 1))
        return out
