"""Networks: tensors in, tensors out. Bodies are MONAI's; nothing here knows of Pyro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST_SIDE = 16  # voxels that the U-Net needs
Body = TypeVar("Body", bound=nn.Module)


class Convolution3d(nn.Conv3d):
    """PyTorch's, with right gradients.

    On a CPU with bfloat16, oneDNN's gradient of the weights is made of memory that nobody wrote where the first axis has two voxels (PyTorch 2.13,
    AMD EPYC; other lengths and axes are right); such layers are small, and computed in float32.
    """

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "cpu" or images.shape[2] != 2:
            return super().forward(images)
        with torch.autocast("cpu", enabled=False):
            return super().forward(images.float() if images.dtype == torch.bfloat16 else images)


def sound(body: Body) -> Body:
    """A network whose three-dimensional convolutions are ours, with the same weights and names; in place."""
    for owner in list(body.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Conv3d:
                size, strides, padding = layer.kernel_size, layer.stride, layer.padding
                ours = Convolution3d(
                    *(layer.in_channels, layer.out_channels, size, strides, padding, layer.dilation, layer.groups),  # type: ignore[arg-type]
                    bias=layer.bias is not None,
                    device="meta",
                )
                ours.weight, ours.bias = layer.weight, layer.bias
                setattr(owner, name, ours)
    return body


class VelocityNetwork(nn.Module):
    """Reads two images on one grid, and gives a velocity with the log of its spread at half their resolution.

    A convolution of stride two, then a U-Net. The last layer starts at zero, hence the deformation at the identity.

    Arguments:
        ndim: 2 or 3.
        channels: C of each image.
        features: of the U-Net's six stages, as in MONAI's ``BasicUNet``.
        reach_mm: a unit of the last layer, mm.
        dropout: share of what each layer of the U-Net gives that is left out in training mode.
        mixed_precision: compute in bfloat16 where that is safe. What comes out, and all that is done with it, is float32.

    References: Balakrishnan et al., IEEE TMI 2019 (a U-Net that reads both images).
    """

    def __init__(
        self,
        ndim: int = 3,
        channels: int = 1,
        features: Sequence[int] = (16, 32, 32, 32, 32, 16),
        reach_mm: float = 1.0,
        mixed_precision: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        convolution = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.ndim, self.channels, self.reach_mm = ndim, channels, float(reach_mm)
        self.features, self.mixed_precision = tuple(features), mixed_precision
        self.stem = nn.Sequential(convolution(2 * channels, features[0], 3, stride=2, padding=1), nn.LeakyReLU(0.1))
        # No normalisation, as published: small images are down to one voxel at the deepest stage.
        self.body = BasicUNet(ndim, features[0], features[5], self.features, norm=None, dropout=dropout)  # type: ignore[arg-type]
        for layer in [*self.stem.modules(), *self.body.modules()]:
            # PyTorch's own start shrinks what passes each layer, and twenty layers without normalisation to nothing.
            if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(layer.weight, a=0.1)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.head = convolution(features[5], 2 * ndim, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        sound(self)

    def forward(self, moving: Tensor, fixed: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """
        Arguments:
            moving, fixed: ``(B, C, *image)``, NaN where nothing is known.
            shape: of the lattice that covers the same field of view.

        Returns:
            The velocity, mm, and the log of its spread relative to the prior's, each ``(B, d, *shape)``.
        """
        images = torch.cat([moving, fixed], 1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.mixed_precision):
            hidden = self.stem(images.nan_to_num(0.0))
            size = hidden.shape[2:]
            # Four times halved, a side has to keep a voxel.
            missing = [length for n in reversed(size) for length in (0, max(0, _SMALLEST_SIDE - n))]
            out = self.head(self.body(functional.pad(hidden, missing)))
        out = out[(..., *(slice(n) for n in size))].to(images.dtype)
        if tuple(out.shape[2:]) != tuple(shape):
            out = functional.interpolate(out, tuple(shape), mode="trilinear" if self.ndim == 3 else "bilinear", align_corners=False)
        velocity, spread = out.chunk(2, 1)
        return self.reach_mm * velocity, spread.clamp(-8, 3)
