"""Networks from an image to logits of labels, ``(B, C, *shape)`` → ``(B, K, *shape)``, of any shape. Bodies are MONAI's where it has them.

References: Ronneberger et al., MICCAI 2015 (U-Net); Kamnitsas et al., MedIA 2017 (DeepMedic); Simonyan & Zisserman, ICLR 2015 (VGG);
Kohl et al., NeurIPS 2018 (probabilistic U-Net); Moeskops et al., DLMIA 2017 (adversary).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional

from probmed.networks import Convolution3d, sound

_HALVINGS = 4  # of the U-Net
_LOG_VARIANCE = 4.0  # of the probabilistic U-Net's latents, at most, and its negative at least


def convolution(ndim: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """Of a dimension."""
    return Convolution3d if ndim == 3 else nn.Conv2d


class UNet(nn.Module):
    """Encoder and decoder with four halvings and skip connections.

    Arguments:
        features: of the five stages, and of the last layer. dropout: share of features that is left out.
    """

    def __init__(
        self, ndim: int, channels: int, classes: int, features: Sequence[int] = (16, 16, 32, 64, 128, 16), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.body = sound(BasicUNet(ndim, channels, classes, tuple(features), dropout=dropout))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        multiple = 2**_HALVINGS
        missing = [length for n in reversed(size) for length in (0, -n % multiple + (multiple if n <= multiple else 0))]
        out: Tensor = self.body(functional.pad(images, missing, mode="replicate"))
        return cropped(out, size)


class FCN(nn.Module):
    """Ten convolutions without pooling: every voxel sees 17 voxels along each axis, at full resolution throughout."""

    def __init__(self, ndim: int, channels: int, classes: int, features: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(8):
            layers += block(ndim, features if number else channels, features, dropout=dropout)
        layers += block(ndim, features, 2 * features, side=1, dropout=dropout)
        self.body = nn.Sequential(*layers, convolution(ndim)(2 * features, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.body(images)
        return out


class DeepMedic(nn.Module):
    """Pathways of one shape that read the image at several resolutions, and a classifier of what they see together.

    Each pathway sees 17 voxels of its own size: with scales 1 and 3, 51 voxels of the image, and 85 with 5 as well. Each pair of convolutions
    after the first is residual.

    Arguments:
        scales: of the pathways; 1 is the image itself.
    """

    def __init__(
        self, ndim: int, channels: int, classes: int, features: int = 24, scales: Sequence[int] = (1, 3), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.ndim, self.scales = ndim, tuple(scales)
        self.pathways = nn.ModuleList(Pathway(ndim, channels, features) for _ in scales)
        joined = len(self.scales) * features
        self.head = nn.Sequential(
            *block(ndim, joined, 3 * features, side=1, dropout=dropout),
            *block(ndim, 3 * features, 3 * features, side=1, dropout=dropout),
            convolution(ndim)(3 * features, classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        pool = functional.avg_pool3d if self.ndim == 3 else functional.avg_pool2d
        mode = "trilinear" if self.ndim == 3 else "bilinear"
        size, found = images.shape[2:], []
        for scale, pathway in zip(self.scales, self.pathways, strict=True):
            if scale == 1:
                found.append(pathway(images))
                continue
            whole = [length for n in reversed(size) for length in (0, -n % scale)]
            coarse = pathway(pool(functional.pad(images, whole, mode="replicate"), scale))
            fine = functional.interpolate(coarse, scale_factor=float(scale), mode=mode, align_corners=False)
            found.append(cropped(fine, size))
        out: Tensor = self.head(torch.cat(found, 1))
        return out


class Pathway(nn.Module):
    """Eight convolutions of side 3, each second pair residual."""

    def __init__(self, ndim: int, channels: int, features: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*block(ndim, channels, features), *block(ndim, features, features))
        self.pairs = nn.ModuleList(nn.Sequential(*block(ndim, features, features), *block(ndim, features, features)) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.first(images)
        for pair in self.pairs:
            hidden = hidden + pair(hidden)
        return hidden


class VoxelWise(nn.Module):
    """A classifier of the middle voxel of a patch, of VGG's kind: pairs of convolutions with pooling between them, then one over all that is left.

    Evaluated at every voxel of an image with holes (dilation) in the place of strides, which gives the same numbers as patch after patch; ``side`` is
    what a patch has along each axis.
    """

    def __init__(self, ndim: int, channels: int, classes: int, features: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        layer, pool = convolution(ndim), nn.MaxPool3d if ndim == 3 else nn.MaxPool2d
        layers: list[nn.Module] = []
        self.side, hole, width = 1, 1, channels
        for stage in range(2):
            for _ in range(2):
                layers += [layer(width, features << stage, 3, dilation=hole), nn.ReLU()]
                width = features << stage
                self.side += 2 * hole
            layers.append(pool(2, stride=1, dilation=hole))
            self.side += hole
            hole *= 2
        layers += [layer(width, 4 * features, 3, dilation=hole), nn.ReLU(), nn.Dropout(dropout), layer(4 * features, classes, 1)]
        self.side += 2 * hole
        self.body = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        before = (self.side - 1) // 2
        sides = [length for _ in images.shape[2:] for length in (before, self.side - 1 - before)]
        out: Tensor = self.patches(functional.pad(images, sides, mode="constant"))
        return out

    def patches(self, images: Tensor) -> Tensor:
        """Of patches of ``side`` voxels, one voxel each; of larger ones, one for each place that a patch fits in."""
        out: Tensor = self.body(images)
        return out


class Encoder(nn.Module):
    """What a whole image comes to: halvings by strides, the mean over the voxels that are left, and numbers ``(B, outputs)``.

    Also the adversary of a segmenter, of label maps and with one output.
    """

    def __init__(self, ndim: int, channels: int, outputs: int, features: Sequence[int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        # Without normalisation, which would leave little of an image in the mean over its voxels.
        for wider in features:
            layers += [convolution(ndim)(width, wider, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
            layers += [convolution(ndim)(wider, wider, 3, padding=1), nn.LeakyReLU(0.1)]
            width = wider
        self.body = nn.Sequential(*layers)
        # Features of one length, or a discriminator's slopes and a latent's place run away while they are trained.
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        found = self.body(images).flatten(2).mean(-1)
        with torch.autocast(images.device.type, enabled=False):  # rounded, distributions would be others
            out: Tensor = self.head(self.norm(found.to(self.norm.weight.dtype)))
        return out


class ProbabilisticUNet(nn.Module):
    """A U-Net with a normal latent for the whole image, that its last layers see beside the features: one draw of it, one label map.

    ``forward`` gives the logits at the mean of the latent given the image, p(z | I); ``draw`` those at a draw of it; ``fitted`` what training needs.

    Arguments:
        latent: dimensions. warm_up: steps of training over which the weight of the divergence rises from 0 to 1.
    """

    warmed: Tensor

    def __init__(self, ndim: int, channels: int, classes: int, latent: int = 6, warm_up: int = 200, dropout: float = 0.0) -> None:
        super().__init__()
        width = 16
        self.classes = classes
        self.body = UNet(ndim, channels, classes + width, dropout=dropout)
        self.prior = Encoder(ndim, channels, 2 * latent)
        self.posterior = Encoder(ndim, channels + classes, 2 * latent)
        for encoder in (self.prior, self.posterior):  # both are standard normal at first
            _zero(encoder.head)
        layer = convolution(ndim)
        # Without normalisation, which would take away what is the same at all voxels: the latent.
        self.head = nn.Sequential(
            nn.LeakyReLU(0.1), layer(width + latent, width, 1), nn.LeakyReLU(0.1), layer(width, width, 1), nn.LeakyReLU(0.1), layer(width, classes, 1)
        )
        # What a latent changes comes beside the logits of the U-Net, and is nothing at first.
        _zero(self.head[-1])
        self.warm_up = warm_up
        self.register_buffer("warmed", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        return self._at(images, normal(self.prior(images)).mean)

    def draw(self, images: Tensor) -> Tensor:
        """Logits at a latent that is drawn from p(z | I)."""
        return self._at(images, normal(self.prior(images)).sample())

    def fitted(self, images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at a draw of q(z | I, S), and KL(q ‖ p(z | I)) in nats, ``(B,)``.

        Arguments:
            truth: ``(B, K, *shape)``, one at each voxel's label and zero where it is not known.
        """
        q = normal(self.posterior(torch.cat([images, truth], 1)))
        return self._at(images, q.rsample()), kl_divergence(q, normal(self.prior(images)))

    def divergence_weight(self) -> float:
        """Of this step of the training; the count is a buffer, so that a training that goes on is where it was."""
        self.warmed += 1
        return min(1.0, int(self.warmed) / max(1, self.warm_up))

    def _at(self, images: Tensor, latents: Tensor) -> Tensor:
        logits, seen = self.body(images).tensor_split([self.classes], 1)
        everywhere = latents.reshape(*latents.shape, *[1] * (images.ndim - 2)).expand(-1, -1, *images.shape[2:])
        out: Tensor = logits + self.head(torch.cat([seen, everywhere], 1))
        return out


def _zero(layer: nn.Module) -> None:
    for numbers in layer.parameters():
        nn.init.zeros_(numbers)


def normal(numbers: Tensor) -> Independent:
    """Of means and log variances, ``(B, 2 n)``, the latter held within bounds, softly: beyond hard ones there is no gradient back."""
    mean, log_variance = numbers.chunk(2, 1)
    return Independent(Normal(mean, (0.5 * _LOG_VARIANCE * torch.tanh(log_variance / _LOG_VARIANCE)).exp()), 1)


def cropped(images: Tensor, size: Sequence[int]) -> Tensor:
    """The first voxels along each axis."""
    for axis, length in enumerate(size, images.ndim - len(size)):
        images = images.narrow(axis, 0, length)
    return images


def block(ndim: int, inputs: int, outputs: int, side: int = 3, dropout: float = 0.0) -> list[nn.Module]:
    """Convolution, normalisation of each image's features, leaky rectifier, and dropout where asked for."""
    norm = nn.InstanceNorm3d if ndim == 3 else nn.InstanceNorm2d
    layers: list[nn.Module] = [
        convolution(ndim)(inputs, outputs, side, padding=side // 2),
        norm(outputs, affine=True),
        nn.LeakyReLU(0.1),
    ]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "fcn": FCN,
    "deepmedic": DeepMedic,
    "deepmedic-three": partial(DeepMedic, scales=(1, 3, 5)),
    "voxelwise": VoxelWise,
    "probabilistic-unet": ProbabilisticUNet,
}
"""Name → network of (ndim, channels, classes, dropout=...)."""
