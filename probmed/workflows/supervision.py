"""Segmentation networks from a table of labelled scans: what `probmed train segmentation` does, and how a trained network segments a scan.

Scans are brought to one grid in a world of their own, as for registration networks; results go back to the scan's own voxels. Loss: cross-entropy and
one minus the mean soft Dice of the labels, and where asked for what an adversary makes of the label map. Uncertainty: the softmax with a temperature
that is fitted to validation scans, dropout at prediction, draws of a probabilistic U-Net, and several networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from probmed.grids import Grid
from probmed.inference.parameters import cuda_devices, seeded
from probmed.inference.training import Row, TrainingSettings, train
from probmed.metrics import mean_dice
from probmed.models.segmentation import Segmentation
from probmed.segmentation_networks import NETWORKS, Encoder, ProbabilisticUNet
from probmed.transforms import warp
from probmed.volumes import UnusableInput, Volume
from probmed.workflows.amortisation import Cohort, brought
from probmed.workflows.cohorts import own_world
from probmed.workflows.network_folders import read_network, read_weights, write_network
from probmed.workflows.patches import in_windows, random_patches
from probmed.workflows.training_sets import Examples, Resolution, drawn_from
from probmed.workflows.volume_errors import VolumeErrors

_HOTTEST = 20.0  # temperature


@dataclass(frozen=True)
class SegmenterSettings:
    """A segmentation network.

    Arguments:
        network: one of ``segmentation_networks.NETWORKS``. dropout: share of features that training leaves out.
        overlap: weight of the soft Dice beside the cross-entropy; the probabilistic U-Net has none.
        adversary: weight of how improbable a discriminator finds that the network's label map is a true one; 0 trains none.
        mixed_precision: the network in bfloat16, its loss and its parameters not.
        patch: voxels along each axis, or one number for all, of the part of a scan that a step of training sees, and of the windows that answers are
            put together from; None for whole scans, which the probabilistic U-Net needs: its latent is one of the whole scan.
    """

    network: str = "unet"
    dropout: float = 0.0
    overlap: float = 1.0
    adversary: float = 0.0
    mixed_precision: bool = False
    patch: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"expected a network of {sorted(NETWORKS)}, got {self.network!r}")
        if not 0 <= self.dropout < 1 or min(self.overlap, self.adversary) < 0:
            found = f"{self.dropout}, {self.overlap} and {self.adversary}"
            raise ValueError(f"expected 0 <= dropout < 1, overlap >= 0 and adversary >= 0, got {found}")
        if self.patch is not None and (min(self.patch, default=0) < 1 or self.network == "probabilistic-unet"):
            raise ValueError(f"expected a patch of voxels along each axis, of a network without a latent, got {self.patch} of {self.network!r}")


@dataclass
class TrainedSegmenter:
    """A network with the labels that it gives.

    Arguments:
        grid: on which it sees scans. codes: label k of the network in label maps, 0 first. names: of codes but the first.
        temperature: by which logits are divided. discriminator: of label maps, in training alone.
        volume_errors: as learned from validation scans, where there are enough of them.
    """

    grid: Grid
    settings: SegmenterSettings
    codes: tuple[int, ...]
    names: dict[int, str]
    network: nn.Module
    temperature: float = 1.0
    discriminator: Encoder | None = None
    volume_errors: VolumeErrors | None = None

    @classmethod
    def build(
        cls, grid: Grid, settings: SegmenterSettings, codes: Sequence[int], names: dict[int, str] | None = None, seed: int = 0
    ) -> TrainedSegmenter:
        """Untrained; same seed, same weights.

        Raises:
            ValueError: for fewer than two labels, the background among them, or a patch of another dimension than the grid.
        """
        if settings.patch is not None:
            if len(settings.patch) not in (1, grid.ndim):
                raise ValueError(f"expected a patch of one length or {grid.ndim}, got {settings.patch}")
            settings = replace(settings, patch=settings.patch * (grid.ndim // len(settings.patch)))
        if len(codes) < 2 or codes[0] != 0:
            raise ValueError(f"expected the background and one label or more, got {tuple(codes)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = NETWORKS[settings.network](grid.ndim, 1, len(codes), dropout=settings.dropout)
            discriminator = Encoder(grid.ndim, len(codes), 1) if settings.adversary else None
        found = {code: (names or {}).get(code, str(code)) for code in codes[1:]}
        return cls(grid, settings, tuple(int(code) for code in codes), found, network, discriminator=discriminator)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.mixed_precision)

    @property
    def draws(self) -> bool:
        """Whether it says something else each time: it has dropout, or a latent."""
        return self.settings.dropout > 0 or isinstance(self.network, ProbabilisticUNet)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that training changes."""
        return {"network": self.network} if self.discriminator is None else {"network": self.network, "discriminator": self.discriminator}

    def logits(self, images: Tensor) -> Tensor:
        """Of images ``(B, 1, *shape)``, NaN where unknown, whatever their units."""
        return self._logits(self.network, images)

    def _logits(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        seen, patch = standardised(images), self.settings.patch
        with self.autocast:
            return (network(seen) if patch is None else in_windows(network, seen, patch)).to(images.dtype)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of images and labels, −1 where they are not known."""
        images, labels = (x.to(self.device) for x in batch)
        images = standardised(images)  # as a whole, also where a part is seen
        if self.settings.patch is not None:
            images, labels = random_patches(images, labels, self.settings.patch)
        known = labels >= 0
        truth = one_hot(labels, len(self.codes))
        if isinstance(self.network, ProbabilisticUNet):
            with self.autocast:
                logits, divergence = self.network.fitted(images, truth)
            # The evidence's bound in nats, over the voxels. Soft Dice would count as a nat for each voxel, and the divergence beside it for nothing.
            overlap, rest = 0.0, self.network.divergence_weight() * divergence.sum() / known.sum().clamp_min(1)
        else:
            with self.autocast:
                logits = self.network(images)
            overlap, rest = self.settings.overlap, images.new_zeros(())
        logits = logits.to(images.dtype)
        p = logits.softmax(1)
        value = functional.cross_entropy(logits, labels.masked_fill(~known, -100), ignore_index=-100) + rest
        if overlap:
            value = value + overlap * (1 - soft_dice(p, labels.clamp_min(0), known))
        if self.discriminator is not None:
            value = value + adversarial(self.discriminator, p * known[:, None], truth, self.settings.adversary)
        return value

    @torch.no_grad()
    def validation(self, cohort: Cohort) -> Row:
        """Mean Dice over scans, of each over the labels but the background that it has or is given, and nats a voxel."""
        scores, nats = [], []
        for logits, labels in self._at_known_voxels(cohort):
            scores.append(mean_dice(logits.argmax(1), labels, range(1, len(self.codes))))
            nats.append(float(functional.cross_entropy(logits, labels)))
        self.network.train()
        told = [score for score in scores if not math.isnan(score)]
        return {"dice": sum(told) / len(told) if told else math.nan, "nll": sum(nats) / len(nats)}

    @torch.no_grad()
    def calibrate(self, cohort: Cohort) -> float:
        """Set the temperature at which scans that training has not seen are most probable, and how far volumes are from the truth on them.

        References: Guo et al., ICML 2017.
        """
        parts = list(self._at_known_voxels(cohort))
        self.temperature = best_temperature(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        found = torch.stack([(x / self.temperature).softmax(1).sum(0) for x, _ in parts])
        true = torch.stack([y.bincount(minlength=len(self.codes)) for _, y in parts])
        self.volume_errors = VolumeErrors.of(found[:, 1:], true[:, 1:])
        return self.temperature

    def _at_known_voxels(self, cohort: Cohort) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each scan, logits ``(N, K)`` and labels ``(N,)`` where these are known, on the CPU wherever the cohort and the network are."""
        self.network.eval()
        for image, labels in zip(cohort.images, cohort.labels.cpu(), strict=True):
            known = labels >= 0
            yield self.logits(image[None].to(self.device))[0].cpu()[:, known].mT, labels[known]

    @torch.no_grad()
    def probabilities(self, volume: Volume, passes: int = 0, seed: int = 0) -> Tensor:
        """p(label) on the scan's own voxels, ``(K, *shape)``; with dropout or draws of the latent ``passes`` times, ``(passes, K, *shape)``.

        Raises:
            UnusableInput: for a scan of another dimension.
            ValueError: for passes of a network that has neither dropout nor a latent.
        """
        if volume.grid.ndim != self.grid.ndim:
            raise UnusableInput(volume.name, f"has {volume.grid.ndim} axes, and the network takes {self.grid.ndim}", "give another network or scan")
        if passes and not self.draws:
            raise ValueError("expected a network that was trained with dropout or has a latent, got one without")
        image = brought(volume, self.grid)[None, None].to(self.device)
        self.network.eval()
        if not passes:
            return self._returned(self.logits(image), volume)[0]
        for layer in self.network.modules():
            if isinstance(layer, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
                layer.train()
        with seeded(seed, cuda_devices(self.network.parameters())):
            once = self.network.draw if isinstance(self.network, ProbabilisticUNet) else self.network
            found = torch.cat([self._returned(self._logits(once, image), volume) for _ in range(passes)])
        self.network.eval()
        return found

    def _returned(self, logits: Tensor, volume: Volume) -> Tensor:
        """Probabilities on the scan's voxels; where the network's grid does not reach, those at its edge."""
        p = (logits / self.temperature).softmax(1).cpu()
        return warp(p, self.grid, own_world(volume.grid).inverse(), volume.grid, fill="edge")

    def save(self, folder: Path) -> None:
        """``network.safetensors`` and ``network.json``."""
        described = {**asdict(self.settings), "shape": self.grid.shape, "spacing_mm": self.grid.spacing, "codes": self.codes}
        described |= {"temperature": self.temperature, "volume_errors": None if self.volume_errors is None else self.volume_errors.rows}
        described |= {"names": {str(code): name for code, name in self.names.items()}}
        write_network(folder, self.network, "segmentation", described)

    @classmethod
    def load(cls, folder: Path) -> TrainedSegmenter:
        """
        Raises:
            UnusableInput: where there is no trained segmentation network.
        """
        with read_network(folder, "segmentation") as found:
            # Networks of before there were adversaries have none, nor errors of volumes, another precision or patches.
            described = {"adversary": 0.0, "mixed_precision": False, "patch": None, **found}
            described["patch"] = described["patch"] and tuple(described["patch"])  # a list in the file
            settings = SegmenterSettings(**{f.name: described[f.name] for f in fields(SegmenterSettings)})
            grid = Grid.from_spacing(described["shape"], described["spacing_mm"])
            trained = cls.build(grid, settings, described["codes"], {int(code): name for code, name in described["names"].items()})
            trained.temperature = float(described["temperature"])
            trained.volume_errors = VolumeErrors.read(described.get("volume_errors"))
        read_weights(folder, trained.network)
        trained.network.eval()
        return trained


def amortise(
    model: Segmentation,
    grid: Grid,
    settings: SegmenterSettings | None = None,
    training: TrainingSettings | None = None,
    batch: int = 4,
    *,
    resolution: Resolution | None = None,
    folder: Path | None = None,
    tell: Callable[[Row, float], None] = lambda row, share: None,
) -> TrainedSegmenter:
    """A network that answers at once what a generative model says of a scan's labels: trained on draws of the model, and on nothing else.

    Arguments:
        model: with proper priors, of one channel; the first of its labels is taken for the background.
        grid: of the scans that it is drawn on, centred on the model's world, axes along its own.
        training: its seed is that of the network's weights and of the draws.
        resolution: of scans whose slices may be thick, which the model does not know of; None for the model's own scans alone.

    Example::

        model = Segmentation(DeformableAtlas(atlas), GaussianMixture.for_labels(atlas.names), BiasField())
        network = amortise(model, atlas.grid, training=TrainingSettings(steps=2000))
        network.probabilities(read_scan("new.nii.gz"))

    References: Papamakarios & Murray, NeurIPS 2016 (neural posterior estimation).
    """
    names, training = model.labels.names, training or TrainingSettings()
    trained = TrainedSegmenter.build(grid, settings or SegmenterSettings(), range(len(names)), dict(enumerate(names)), training.seed)
    train_segmenter(trained, drawn_from(model, grid, batch, resolution), training, folder=folder, tell=tell)
    return trained


def standardised(images: Tensor) -> Tensor:
    """Each image ``(B, 1, *shape)`` with mean 0 and standard deviation 1 where it is known, and 0 where it is NaN."""
    known = ~images.isnan()
    count = known.flatten(1).sum(1).clamp_min(1).reshape(-1, *[1] * (images.ndim - 1))
    dims = tuple(range(1, images.ndim))
    values = images.nan_to_num(0.0)
    mean = values.sum(dims, keepdim=True) / count
    sd = (((values - mean) * known).square().sum(dims, keepdim=True) / count).sqrt().clamp_min(1e-6)
    return ((values - mean) / sd).masked_fill(~known, 0.0)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """``(B, K, *shape)`` of labels ``(B, *shape)``, float; zero where they are negative."""
    return (functional.one_hot(labels.clamp_min(0), classes) * (labels >= 0)[..., None]).movedim(-1, 1).float()


def adversarial(discriminator: nn.Module, found: Tensor, truth: Tensor, weight: float) -> Tensor:
    """A network's loss by how far a discriminator is from taking its label maps for true ones, and the discriminator's own, in nats.

    Neither's gradient reaches the other's parameters, so that one optimiser lowers both.

    Arguments:
        found, truth: label maps ``(B, K, *shape)``. weight: of the network's part.
    """
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    doubted = functional.softplus(-functional_call(discriminator, fixed, (found,))).mean()
    told_apart = functional.softplus(-discriminator(truth)).mean() + functional.softplus(discriminator(found.detach())).mean()
    return weight * doubted + told_apart


def soft_dice(p: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Mean over labels but the background, and over images, of 2 Σ p s / (Σ p + Σ s); a label that an image lacks counts by what it is given.

    Arguments:
        p: ``(B, K, *shape)``. labels: ``(B, *shape)``. known: ``(B, *shape)`` bool.
    """
    truth = one_hot(labels, p.shape[1]).to(p) * known[:, None]
    found = p * known[:, None]
    dims = tuple(range(2, p.ndim))
    return ((2 * (found * truth).sum(dims) + 1) / (found.sum(dims) + truth.sum(dims) + 1))[:, 1:].mean()


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The divisor of logits ``(N, K)`` at which labels ``(N,)`` are most probable, by Newton's method on its inverse, in which −log p is convex."""
    x = logits.double()
    own = x.gather(1, labels[:, None])[:, 0]
    inverse = x.new_ones(())
    for _ in range(50):
        p = (inverse * x).softmax(1)
        mean = (p * x).sum(1)
        slope, curvature = (mean - own).sum(), ((p * x.square()).sum(1) - mean.square()).sum()
        moved = (inverse - slope / curvature.clamp_min(1e-12)).clamp(max(float(inverse) / 2, 1 / _HOTTEST), min(2 * float(inverse), _HOTTEST))
        if float((moved - inverse).abs()) < 1e-10:
            break
        inverse = moved
    return float(1 / inverse)


def train_segmenter(
    trained: TrainedSegmenter,
    examples: Examples,
    training: TrainingSettings,
    *,
    folder: Path | None = None,
    validation: Cohort | None = None,
    fabric: Fabric | None = None,
    described: dict[str, Any] | None = None,
    tell: Callable[[Row, float], None] = lambda row, share: None,
) -> list[Row]:
    """Train a network in place, calibrate it where there are validation scans, and save it where there is a folder.

    Arguments:
        examples: draws a batch. validation: scans that training does not see.
        described: what a run that goes on must agree in, beside the settings.

    Returns:
        The log, as ``inference.training.train``.
    """
    for module in trained.modules.values():
        module.to(trained.device)
    log = train(
        trained.loss,
        trained.modules,
        lambda generator: examples(),
        training,
        folder=folder,
        described={**asdict(trained.settings), **(described or {})},
        validate=None if validation is None else lambda: trained.validation(validation),
        fabric=fabric,
        tell=tell,
    )
    if validation is not None:
        trained.calibrate(validation)
    trained.network.eval()
    if folder is not None:
        trained.save(folder)
    return log
