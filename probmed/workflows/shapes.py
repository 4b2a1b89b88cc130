"""Shape priors from label maps, and scans segmented with them: no scan needs labels.

Label maps of a table → one grid in a world of their own → a variational autoencoder of them; scans without labels → q(z | I), each scan's appearance
at its best by EM, so that no contrast is learned; a scan → q(z | I), then gradient steps on its mean and spread with EM inside → labels on the
scan's own voxels.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer import TraceMeanField_ELBO
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional

from probmed.appearances import BiasField, GaussianMixture
from probmed.atlases import LabelAtlas
from probmed.distributions import LabelMixture
from probmed.grids import Grid, sample
from probmed.inference.em import em
from probmed.inference.parameters import local_parameters, seeded
from probmed.inference.training import Row, TrainingSettings, train
from probmed.models.segmentation import Segmentation
from probmed.models.shape_vae import ImageShapeGuide, ShapeGuide, ShapeVAE, check_labels, evidence_bound, standard_divergence
from probmed.priors import FixedAtlas
from probmed.shape_networks import ShapeDecoder, ShapeEncoder
from probmed.transforms import warp
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan, scaled
from probmed.workflows.amortisation import brought
from probmed.workflows.cohorts import common_grid, own_world
from probmed.workflows.network_folders import read_network, read_weights, write_network
from probmed.workflows.training_sets import Augmentation

_SYSTEM = "shapes"
_TOGETHER = 4  # codes whose labels are found at once; one takes as long
_TRIED = 5  # part of the steps that both starts take
_UNSEEN = 0.5  # label maps that have each label at each voxel, beside those of the table
_PARTS = 3  # of the background, where scans tell of it
TEMPERING = 0.2
"""Of a scan's voxels, whose noise is shared, and whose labels are not all that they depend on; chosen on three scans of a hippocampus."""


@dataclass(frozen=True)
class ShapeSettings:
    """A shape prior.

    Arguments:
        codes: L. features: of the networks' finest layer.
        warm_up: steps over which the weight of the KL divergence rises to one; bounds that are reported have it whole.
    """

    codes: int = 16
    features: int = 8
    warm_up: int = 0

    def __post_init__(self) -> None:
        if min(self.codes, self.features) < 1 or self.warm_up < 0:
            raise ValueError(f"expected codes and features >= 1 and warm_up >= 0, got {self.codes}, {self.features} and {self.warm_up}")


@dataclass(frozen=True)
class LabelMapTable:
    """Label maps on one grid: indices ``(N, *grid.shape)`` of ``codes``, and the maps' names."""

    grid: Grid
    labels: Tensor
    codes: tuple[int, ...]
    names: tuple[str, ...]


def read_label_maps(
    table: pd.DataFrame, source: Path, spacing_mm: float | None = None, grid: Grid | None = None, codes: Sequence[int] | None = None
) -> LabelMapTable:
    """Label maps of a table on a common grid, each in its own world.

    Arguments:
        table: column ``labels``: paths, relative ones to the table's folder. source: the table's path.
        spacing_mm: of the common grid; grid: of a prior that there is already, and codes: those that it knows.

    Raises:
        UnusableInput: for a table without the column or without rows, maps of different dimensions, and codes that are not known.
    """
    if "labels" not in table.columns:
        raise UnusableInput(source, f"has no column labels (it has {', '.join(map(str, table.columns))})", "give a column labels with paths")
    if table.empty:
        raise UnusableInput(source, "has no rows", "give a row for each label map")
    paths = [source.parent / str(path) for path in table["labels"]]
    volumes = [read_labels(path) for path in paths]
    for path, volume in zip(paths, volumes, strict=True):
        if volume.grid.ndim != volumes[0].grid.ndim:
            raise UnusableInput(path, f"has {volume.grid.ndim} axes, and the first map {volumes[0].grid.ndim}", "give maps of one dimension")
    grid = common_grid([volume.grid for volume in volumes], spacing_mm) if grid is None else grid
    maps = torch.stack([brought(volume, grid, labels=True) for volume in volumes])
    found = torch.cat([torch.zeros(1).long(), maps.unique()]).unique() if codes is None else torch.tensor(list(codes))
    for path, values in zip(paths, maps, strict=True):
        unknown = values[~torch.isin(values, found)]
        if unknown.numel():
            raise UnusableInput(path, f"has the label {int(unknown[0])}, which training has not seen", f"use the codes {found.tolist()}")
    return LabelMapTable(grid, torch.searchsorted(found, maps), tuple(found.tolist()), tuple(path.name for path in paths))


def mean_atlas(labels: Tensor, classes: int) -> Tensor:
    """log of how often each label lies at each voxel, ``(K, *shape)``, half a label map of each label added."""
    shares = functional.one_hot(labels, classes).movedim(-1, 1).to(torch.get_default_dtype()).sum(0) + _UNSEEN
    return (shares / shares.sum(0)).log()


def usual_bias(channels: int = 1, grid: Grid | None = None) -> BiasField:
    """The scanner's field as generative segmentation has it (``BiasField``'s cosines down to 60 mm, SPM's).

    Arguments:
        grid: over whose field of view the cosines run; by default that of each grid on which the field is asked for.
    """
    return BiasField(channels=channels, domain=grid)


@dataclass
class TrainedShapes:
    """A shape prior with its guides.

    Arguments:
        codes: label k of the prior in label maps. shapes: the prior. guide: q(z | S).
        reader: of q(z | I); until it is trained on images, the weights of q(z | S).
        parts: log shares of the tissues of the background at each voxel, ``(P, *grid.shape)``, as ``fit_background`` finds them in scans; None where
            no scan was seen, and the background looks alike everywhere.
    """

    settings: ShapeSettings
    codes: tuple[int, ...]
    shapes: ShapeVAE
    guide: ShapeGuide
    reader: ShapeGuide
    parts: Tensor | None = None

    @property
    def grid(self) -> Grid:
        return self.shapes.grid

    @classmethod
    def build(
        cls, grid: Grid, settings: ShapeSettings, codes: Sequence[int], names: Sequence[str], location: Tensor, seed: int = 0
    ) -> TrainedShapes:
        """Untrained; same seed, same weights.

        Arguments:
            location: log of the mean atlas, ``(K, *grid.shape)``.

        Raises:
            ValueError: for fewer than two labels, or names that are not as many.
        """
        if len(codes) < 2 or len(names) != len(codes):
            raise ValueError(f"expected two labels or more with a name each, got {tuple(codes)} and {tuple(names)}")
        with seeded(seed):
            decoder = ShapeDecoder(settings.codes, len(codes), grid.shape, settings.features)
            encoder = ShapeEncoder(settings.codes, len(codes), grid.shape, settings.features)
        shapes = ShapeVAE(names, grid, decoder, settings.codes, location)
        guide = ShapeGuide(shapes, encoder)
        return cls(settings, tuple(int(code) for code in codes), shapes, guide, copy.deepcopy(guide))

    def model(
        self,
        channels: int = 1,
        appearance: GaussianMixture | None = None,
        bias: BiasField | Literal["default"] | None = "default",
        tempering: float = 1.0,
        grid: Grid | None = None,
    ) -> Segmentation:
        """p(I | S) p(S | z) p(z), with the appearance and the bias field found anew for each scan.

        Arguments:
            appearance: of the labels of ``seen``; the usual one of labels of these names by default. bias: ``usual_bias`` by default; None for none.
            grid: over whose field of view the usual bias field runs; by default that of each scan.
        """
        field = usual_bias(channels, grid) if isinstance(bias, str) else bias
        seen = self.seen()
        return Segmentation(seen, appearance or GaussianMixture.for_labels(seen.names, channels), field, tempering)

    def seen(self) -> ShapeVAE:
        """The shapes as they are in scans: the same network, with the parts of the background."""
        plain = self.shapes
        if self.parts is None:
            return plain
        names, location = plain.names, plain.location
        return ShapeVAE(names, plain.grid, plain.decoder, plain.codes, location, plain.deformation, plain.floor, self.parts)

    def atlas(self) -> FixedAtlas:
        """The mean atlas alone: the prior without codes, to compare with."""
        return FixedAtlas(LabelAtlas(self.shapes.names, self.log_atlas.exp(), self.grid, brain=()))

    @property
    def log_atlas(self) -> Tensor:
        """log T, ``(K, *grid.shape)``."""
        location: Tensor = self.shapes.location  # type: ignore[assignment]
        return location

    def save(self, folder: Path) -> None:
        """``shapes.safetensors`` and ``shapes.json``."""
        described = {**asdict(self.settings), "shape": self.grid.shape, "spacing_mm": self.grid.spacing}
        described |= {"label_codes": self.codes, "names": self.shapes.names, "parts": 0 if self.parts is None else len(self.parts)}
        write_network(folder, self._modules(), _SYSTEM, described, _SYSTEM)

    @classmethod
    def load(cls, folder: Path) -> TrainedShapes:
        """
        Raises:
            UnusableInput: where there is no trained shape prior.
        """
        with read_network(folder, _SYSTEM, _SYSTEM) as described:
            settings = ShapeSettings(**{f.name: described[f.name] for f in fields(ShapeSettings)})
            grid = Grid.from_spacing(described["shape"], described["spacing_mm"])
            codes = described["label_codes"]
            trained = cls.build(grid, settings, codes, described["names"], torch.zeros(len(codes), *grid.shape))
            if described.get("parts"):  # shapes of before there were parts have none
                trained.parts = torch.zeros(described["parts"], *grid.shape)
        read_weights(folder, trained._modules(), _SYSTEM)
        return trained

    def _modules(self) -> nn.ModuleDict:
        modules: dict[str, nn.Module] = {"shapes": self.shapes, "guide": self.guide, "reader": self.reader}
        return nn.ModuleDict(modules if self.parts is None else {**modules, "background": _Background(self.parts)})


class _Background(nn.Module):
    """What is kept of it with the networks, in a folder."""

    def __init__(self, parts: Tensor) -> None:
        super().__init__()
        self.register_buffer("parts", parts)


class _WarmUp(nn.Module):
    """The weight of the KL divergence at each step; how many there were is kept with the run's checkpoint."""

    taken: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def forward(self) -> float:
        self.taken += 1
        return min(1.0, int(self.taken) / self.steps) if self.steps else 1.0


def fit_shapes(
    labels: Tensor,
    grid: Grid,
    codes: Sequence[int],
    names: Sequence[str],
    settings: ShapeSettings | None = None,
    training: TrainingSettings | None = None,
    *,
    batch: int = 16,
    augmentation: Augmentation | None = None,
    held_out: Tensor | None = None,
    folder: Path | None = None,
    tell: Callable[[Row, float], None] = lambda row, share: None,
) -> tuple[TrainedShapes, list[Row]]:
    """A shape prior of label maps, about their mean atlas, trained by the ELBO; no image is seen.

    Arguments:
        labels: ``(N, *grid.shape)`` indices; held_out: more of them, whose mean ELBO each row of the log gives, in nats.
        augmentation: random changes of shape, anew at each step, where label maps are few; none of its changes of appearance.
        codes: of the labels in files. names: of the labels.
        folder: where the run is kept and saved.

    Returns:
        The prior, and the log as ``inference.training.train``: the loss is the negative ELBO of a label map, in nats.

    Raises:
        ValueError: for label maps of another shape or with other labels than ``codes``.
    """
    settings, training = settings or ShapeSettings(), training or TrainingSettings()
    for maps in (labels, labels if held_out is None else held_out):
        check_labels(maps, grid, len(codes))
    trained = TrainedShapes.build(grid, settings, codes, names, mean_atlas(labels, len(codes)), training.seed)
    shapes, guide, warm_up = trained.shapes, trained.guide, _WarmUp(settings.warm_up)

    def loss(chosen: Tensor) -> Tensor:
        maps = labels[chosen]
        if augmentation is not None:
            maps = warp(maps[:, None], grid, augmentation.transform(len(maps), grid), grid, "nearest", fill=0)[:, 0]
        return -evidence_bound(shapes, guide, maps, warm_up()).mean()

    log = train(
        loss,
        {"shapes": shapes, "guide": guide, "warm_up": warm_up},
        lambda generator: torch.randint(len(labels), (min(batch, len(labels)),), generator=generator),
        training,
        folder=folder,
        described={**asdict(settings), "batch": batch, "augmentation": None if augmentation is None else asdict(augmentation)},
        validate=None if held_out is None else lambda: {"held_out": float(evidence_bound(shapes, guide, held_out).mean())},
        tell=tell,
    )
    trained.reader.load_state_dict(guide.state_dict())
    if folder is not None:
        trained.save(folder)
    return trained, log


def read_unlabelled(table: pd.DataFrame, source: Path, ndim: int) -> tuple[list[Tensor], list[Grid]]:
    """Scans of a table, scaled, ``(1, *shape)``, each on its own voxels in a world of its own, in which shape priors are.

    Arguments:
        table: column ``scan``: paths, relative ones to the table's folder. source: the table's path. ndim: of the prior.

    Raises:
        UnusableInput: for a table without the column or without rows, and scans of another dimension.
    """
    if "scan" not in table.columns:
        raise UnusableInput(source, f"has no column scan (it has {', '.join(map(str, table.columns))})", "give a column scan with paths")
    if table.empty:
        raise UnusableInput(source, "has no rows", "give a row for each scan")
    volumes = [read_scan(source.parent / str(path)) for path in table["scan"]]
    for volume in volumes:
        if volume.grid.ndim != ndim:
            remedy = "give scans of one dimension with the label maps"
            raise UnusableInput(volume.name, f"has {volume.grid.ndim} axes, and the shapes have {ndim}", remedy)
    return [scaled(volume.data)[None].to(torch.get_default_dtype()) for volume in volumes], [in_own_world(volume.grid) for volume in volumes]


@torch.no_grad()
def fit_background(
    trained: TrainedShapes,
    images: Sequence[Tensor],
    grids: Sequence[Grid],
    *,
    rounds: int = 2,
    tell: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Learn from scans without labels where which tissue of the background lies; the shapes stay as they are.

    .. math:: p(S_x = (0, t)) = p(S_x = 0 \\mid z) \\; \\rho_{tx}

    Without it all of the background looks alike everywhere, and labels grow into a neighbour of their own intensity. The shares ρ are EM's, the shape
    being the mean one: means over scans of what each voxel is given to a part, relative to all parts. Parts start as clusters of each scan's
    intensities, in their order, so scans have to be of one contrast; the scans that are segmented then need not be.

    Arguments:
        images: ``(C, *shape)`` each, the first channel of which the parts start from; and the grid of each in the prior's world. rounds: of EM.
        tell: called with the share of the work done.

    Returns:
        log ρ, ``(P, *grid.shape)``, which ``trained`` has from now on.

    Raises:
        ValueError: for no scans, or another number of grids.
    """
    _check_scans(images, grids)
    points = trained.grid.coordinates(trained.log_atlas.dtype, trained.log_atlas.device)
    given = [_clusters(image[0]) for image in images]
    for number in range(rounds):
        trained.parts = _shares(given, grids, points).log()
        for n, (image, grid) in enumerate(zip(images, grids, strict=True)):
            model = trained.model(channels=len(image), grid=grid)
            state = ImageShapeGuide(model, trained.reader).start(image, grid)
            given[n] = model.label_posterior(state, image, grid)[:_PARTS]
            tell((number + (n + 1) / len(images)) / rounds)
    trained.parts = _shares(given, grids, points).log()
    return trained.parts


def _check_scans(images: Sequence[Tensor], grids: Sequence[Grid]) -> None:
    if not images or len(images) != len(grids):
        raise ValueError(f"expected scans with a grid each, got {len(images)} and {len(grids)}")


def _clusters(image: Tensor) -> Tensor:
    """Of an image's intensities, the darkest first: zeros and a one at each voxel, NaN where the image is, ``(P, *shape)``."""
    known = ~image.isnan()
    values = image[known].cpu().double().numpy()
    middles = np.linspace(np.quantile(values, 0.02), np.quantile(values, 0.98), _PARTS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # it stays where it is
        _, own = kmeans2(values[:, None], middles[:, None], minit="matrix", iter=20)
    found = image.new_full((_PARTS, *image.shape), math.nan)
    found[:, known] = functional.one_hot(torch.from_numpy(own).long(), _PARTS).mT.to(found)
    return found


def _shares(given: Sequence[Tensor], grids: Sequence[Grid], points: Tensor) -> Tensor:
    """Of each part in all that is given to them at each point, over scans that reach it; where none does, alike."""
    total = points.new_full((_PARTS, *points.shape[:-1]), _UNSEEN / _PARTS)
    for probabilities, grid in zip(given, grids, strict=True):
        total += sample(probabilities, grid, points, fill=math.nan).nan_to_num(0.0)
    return total / total.sum(0)


def fit_reader(
    trained: TrainedShapes,
    images: Sequence[Tensor],
    grids: Sequence[Grid],
    training: TrainingSettings | None = None,
    *,
    model: Segmentation | None = None,
    batch: int = 4,
    folder: Path | None = None,
    tell: Callable[[Row, float], None] = lambda row, share: None,
) -> list[Row]:
    """Train q(z | I) in place on scans without labels, through the collapsed likelihood; the prior stays as it is.

    Each scan's appearance is at its best by EM, given the shape, and is nobody's parameter: what is learned holds for any contrast.

    Arguments:
        images: ``(C, *shape)`` each, and the grid of each in the prior's world.
        model: with ``trained.shapes`` as its labels; the usual one by default.
        folder: where the run is kept, and goes on from. tell: as ``inference.training.train``.

    Returns:
        The log: the loss is the mean negative ELBO of a scan, in nats.

    Raises:
        ValueError: for no scans, or another number of grids.
    """
    _check_scans(images, grids)
    model = model or trained.model(channels=len(images[0]))
    guide = ImageShapeGuide(model, trained.reader)
    held = [p for p in model.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)

    def loss(chosen: Tensor) -> Tensor:
        estimator = TraceMeanField_ELBO()
        with local_parameters(model, guide):
            each = [estimator.differentiable_loss(model, guide, images[n], grids[n]) for n in chosen.tolist()]
        return torch.stack(each).mean()

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(images), (min(batch, len(images)),), generator=generator)

    try:
        described = {"scans": len(images), "batch": batch}
        return train(loss, {"reader": trained.reader}, draw, training, folder=folder, described=described, tell=tell)
    finally:
        for p in held:
            p.requires_grad_(True)


@dataclass(frozen=True)
class ShapeFit:
    """One scan's posterior.

    Arguments:
        code: q(z), ``(L,)``. state: the other latents at their best.
        amortised, refined: ELBOs before and after the gradient steps, by the same draws, nats.
    """

    code: Normal
    state: dict[str, Tensor]
    amortised: float
    refined: float


def code_bound(
    model: Segmentation, code: Normal, state: dict[str, Tensor], image: Tensor, grid: Grid, noise: Tensor, log_prior: Tensor | None = None
) -> Tensor:
    """E_q log p(I | z, θ) − KL(q ‖ p(z)) + log p(θ) at a value of the other latents θ, by draws of standard normals ``(M, L)``, nats.

    Arguments:
        log_prior: log p(θ), where it is known already.
    """
    fits = at_codes(model, state, code.loc + code.scale * noise, grid).log_prob(image)
    return model.tempering * fits.mean() - standard_divergence(code) + (log_prior_of(model, state, grid) if log_prior is None else log_prior)


def at_codes(model: Segmentation, state: dict[str, Tensor], codes: Tensor, grid: Grid) -> LabelMixture:
    """p(I | z, θ) for codes ``(M, L)``, all at once, and one value of the other latents θ; batch ``(M,)``."""
    alike = {name: state[name].expand(len(codes), *state[name].shape) for name in model.closed_form_sites if name in state}
    return model.mixture(state | alike | {"shape_code": codes}, grid)


@torch.no_grad()
def log_prior_of(model: Segmentation, state: dict[str, Tensor], grid: Grid) -> Tensor:
    """log p of all latents but the code."""
    others = set(state) - {"shape_code"}
    trace = poutine.trace(poutine.condition(model, data=state)).get_trace(None, grid)
    trace.compute_log_prob(lambda name, site: name in others)
    return torch.stack([trace.nodes[name]["log_prob_sum"] for name in others]).sum()


def refine(
    model: Segmentation,
    code: Normal,
    state: dict[str, Tensor],
    image: Tensor,
    grid: Grid,
    *,
    steps: int = 100,
    learning_rate: float = 0.05,
    draws: int = 4,
    every: int = 5,
    seed: int = 0,
) -> ShapeFit:
    """Gradient steps (Adam) on the mean and spread of q(z) of one scan, with EM on its appearance between them; the best bound on the way is kept.

    Arguments:
        code: where to start. state: the other latents.
        draws: pairs of opposite draws, the same at every step. every: steps between two updates of the appearance.

    Raises:
        FloatingPointError: where the bound is not finite at the start.
    """
    with seeded(seed):
        half = torch.randn(draws, len(code.loc), dtype=code.loc.dtype, device=code.loc.device)
    noise = torch.cat([half, -half])
    loc, log_sd = (x.detach().clone().requires_grad_() for x in (code.loc, code.scale.log()))
    state = model.em_step(state | {"shape_code": loc.detach()}, image, grid)
    log_prior = log_prior_of(model, state, grid)
    with torch.no_grad():
        first = float(code_bound(model, code, state, image, grid, noise, log_prior))
    if not math.isfinite(first):
        raise FloatingPointError(f"the bound is {first} nats at the start")
    best = ShapeFit(Normal(code.loc.detach(), code.scale.detach()), state, first, first)
    optimiser = torch.optim.Adam([loc, log_sd], lr=learning_rate)
    for step in range(1, steps + 1):
        bound = code_bound(model, Normal(loc, log_sd.exp()), state, image, grid, noise, log_prior)
        if float(bound.detach()) > best.refined:
            best = ShapeFit(Normal(loc.detach().clone(), log_sd.detach().exp()), state, first, float(bound.detach()))
        loc.grad, log_sd.grad = torch.autograd.grad(-bound, [loc, log_sd])
        optimiser.step()
        if step % every == 0:
            state = model.em_step(state | {"shape_code": loc.detach().clone()}, image, grid)
            log_prior = log_prior_of(model, state, grid)
    return best


def fit_scan(
    trained: TrainedShapes, image: Tensor, grid: Grid, *, model: Segmentation | None = None, steps: int = 100, seed: int = 0
) -> ShapeFit:
    """q(z | I) of a scan ``(C, *shape)`` on a grid of the prior's world, refined from the network's answer or from the mean shape, the better.

    Where the model's shapes are deformed too, all latents go to a mode by EM and gradients before, the mean shape's place is taken by the mode's, and
    the deformation stays there.
    """
    model = model or trained.model(channels=len(image), grid=grid)
    guide = ImageShapeGuide(model, trained.reader)
    state = guide.start(image, grid)
    if set(state) - {"shape_code", *model.closed_form_sites}:
        state = em(model, image, grid, state=state, rounds=10).state
    with torch.no_grad():
        read = guide.distribution(state | {"shape_code": torch.zeros_like(state["shape_code"])}, image, grid)
    starts = (read, Normal(state["shape_code"], read.scale))
    tried = steps // _TRIED
    begun = max((refine(model, start, state, image, grid, steps=tried, seed=seed) for start in starts), key=lambda fit: fit.refined)
    found = refine(model, begun.code, begun.state, image, grid, steps=steps - tried, seed=seed)
    return replace(found, amortised=begun.amortised)


@torch.no_grad()
def label_draws(model: Segmentation, fit: ShapeFit, image: Tensor, grid: Grid, draws: int = 20, seed: int = 0) -> Tensor:
    """p(S_v = k | I, z), ``(draws, K, *shape)``, of draws of q(z); their mean is p(S_v = k | I)."""
    with seeded(seed):
        drawn = fit.code.sample((draws,))
    return torch.cat([at_codes(model, fit.state, some, grid).posterior(image) for some in drawn.split(_TOGETHER)])


def in_own_world(grid: Grid) -> Grid:
    """The grid of a scan in its own world, in which shape priors are."""
    return Grid(grid.shape, own_world(grid).inverse().matrix @ grid.affine)


@dataclass(frozen=True)
class SegmentedScan:
    """A scan's labels on its own voxels.

    Arguments:
        probabilities: ``(K, *shape)``, the mean over draws of the shape, ``(draws, K, *shape)``.
        labels: ``(*shape)``, as codes of label maps. fit: the posterior of its shape.
    """

    probabilities: Tensor
    draws: Tensor
    labels: Tensor
    fit: ShapeFit


def segment_with_shapes(
    trained: TrainedShapes, volume: Volume, *, model: Segmentation | None = None, steps: int = 100, draws: int = 20, seed: int = 0
) -> SegmentedScan:
    """Labels of a scan from a shape prior, whatever the scan's contrast.

    Arguments:
        model: the usual one by default, whose voxels count ``TEMPERING`` times.

    Raises:
        UnusableInput: for a scan of another dimension.
    """
    if volume.grid.ndim != trained.grid.ndim:
        raise UnusableInput(volume.name, f"has {volume.grid.ndim} axes, and the shapes have {trained.grid.ndim}", "give other shapes or scans")
    grid = in_own_world(volume.grid)
    model = model or trained.model(tempering=TEMPERING, grid=grid)
    image = scaled(volume.data)[None].to(trained.log_atlas)
    fit = fit_scan(trained, image, grid, model=model, steps=steps, seed=seed)
    drawn = model.labels.whole(label_draws(model, fit, image, grid, draws, seed))
    probabilities = drawn.mean(0)
    return SegmentedScan(probabilities, drawn, torch.tensor(trained.codes)[probabilities.argmax(0)], fit)


@dataclass(frozen=True)
class ShapeSegmenter:
    """A shape prior that is asked as a network is (``supervision.TrainedSegmenter``)."""

    trained: TrainedShapes
    draws: ClassVar[bool] = True
    volume_errors: ClassVar[None] = None

    @property
    def names(self) -> dict[int, str]:
        """Of codes but the first."""
        return dict(zip(self.trained.codes[1:], self.trained.shapes.names[1:], strict=True))

    def probabilities(self, volume: Volume, passes: int = 0, seed: int = 0) -> Tensor:
        """p(label) on the scan's own voxels, ``(K, *shape)``, or of each of ``passes`` draws of its shape, ``(passes, K, *shape)``."""
        found = segment_with_shapes(self.trained, volume, draws=passes or 20, seed=seed)
        return found.draws if passes else found.probabilities
