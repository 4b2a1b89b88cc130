"""From a scan to tissue posteriors: what `probmed segment` does, as one function.

Prepare (bring channels together, tell a whole head from a stripped brain) → align the atlas → fit on a subsample near the brain → posterior on
the scan's own grid → joint draws of everything for the volumes' intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor

from probmed.appearances import BiasField, GaussianMixture
from probmed.atlases import BACKGROUNDS, LabelAtlas, default_atlas
from probmed.distributions import LabelMixture
from probmed.grids import Grid, MaskedGrid, sample
from probmed.inference.em import Mode, Round, em
from probmed.inference.laplace import laplace_draws
from probmed.models.segmentation import Segmentation
from probmed.priors import AffinePrior, DeformableAtlas, MarkovField, SmoothVelocity
from probmed.transforms import Transform
from probmed.volumes import Volume, read_scan
from probmed.workflows.preparation import Prepared, prepare
from probmed.workflows.stages import Clock, pick_device

EQUATION = "p(I, S, φ, c, θ) = p(φ) p(c) p(θ) ∏ₓ p(βₓ(c) Iₓ | Sₓ, θ) βₓ(c) · p(S | φ),   p(Sₓ = k | φ) ∝ w_k T_k(φ(x))"
LEVELS = (0.025, 0.1, 0.25, 0.75, 0.9, 0.975)
_PIECE = 1 << 22  # voxels of a full-resolution slab: with six labels about 100 MB a tensor


@dataclass(frozen=True)
class Settings:
    """How a scan is fitted. Lengths in mm.

    Arguments:
        spacing_mm: of the subsample on which everything is fitted.
        margin_mm: how far from the atlas's brain voxels count in the fit.
        velocity_mm: spacing of the velocity; velocity_sd_mm and velocity_length_mm its prior.
        cutoff_mm: of the bias field.
        markov: strength of the Markov field at 1 mm spacing, nats for a pair of neighbours.
        rounds, steps, tolerance: of ``em``.
        tempering: factor on the likelihood; None estimates it from the residuals' correlation.
        tie: one covariance for the tissues of the brain, where there is one channel.
        gaussians: label → number of Gaussians, where not that of ``probmed.appearances.GAUSSIANS``.
        weight_certainty: voxels that the atlas's proportions are worth. With so many the atlas deforms to change a tissue's share; left free, the
            share itself absorbs voxels that are half one tissue and half another.
    """

    spacing_mm: float = 3.0
    margin_mm: float = 15.0
    velocity_mm: float = 8.0
    velocity_sd_mm: float = 4.0
    velocity_length_mm: float = 30.0
    cutoff_mm: float = 60.0
    markov: float = 0.1
    rounds: int = 8
    steps: int = 6
    tolerance: float = 1e-4
    tempering: float | None = None
    tie: bool = True
    gaussians: Mapping[str, int] | None = None
    weight_certainty: float = 1e5


@dataclass
class SegmentationResult:
    """Everything that is known of a segmented scan; tensors on the grid of the first channel.

    Arguments:
        names, indices, colours, brain: of the labels, as in ``LabelAtlas``.
        channels: the scans.
        probabilities: p(S_v = k | I), ``(K, *shape)``; labels: the likeliest, ``(*shape)`` int64 from ``indices``.
        entropy: nats, ``(*shape)``.
        bias, corrected: β and β·I, ``(C, *shape)``.
        transform, inverse: scan's world to atlas's world and back, mm; velocity_grid: where the atlas-side velocity lives.
        volumes: index, name, volume_ml, sd_ml and quantiles q025 … q975, a row a label; volume_draws: ``(draws, K)`` ml.
        stripped: whether the scan was taken for a skull-stripped brain.
        rounds, converged: of the fit. mixture: shares, means, covariances and owner in the scan's own unit.
        quality: log evidence per voxel, residual mean and sd by label, a score in [0, 1], remarks.
        mode: the fitted latents, by site; unit: the intensity that was scaled to one, ``(C,)``.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    colours: tuple[str, ...]
    brain: tuple[str, ...]
    channels: list[Volume]
    probabilities: Tensor
    labels: Tensor
    entropy: Tensor
    bias: Tensor
    corrected: Tensor
    transform: Transform
    inverse: Transform
    velocity_grid: Grid
    volumes: pd.DataFrame
    volume_draws: Tensor
    stripped: bool
    rounds: list[Round]
    converged: bool
    mixture: dict[str, Tensor]
    quality: dict[str, Any]
    tempering: float
    seconds: dict[str, float]
    mode: dict[str, Tensor]
    unit: Tensor
    seed: int
    equation: str = EQUATION
    _draw: Callable[[int, int], Tensor] | None = field(default=None, repr=False)

    def draw_labels(self, count: int, seed: int = 0) -> Tensor:
        """Label maps from the posterior, appearance, bias, deformation and labels drawn together, ``(count, *shape)`` int64."""
        if self._draw is None:
            raise ValueError("this result holds no posterior to draw from")
        return self._draw(count, seed)


def segment(
    scans: Sequence[Path | str | Volume],
    *,
    atlas: LabelAtlas | None = None,
    draws: int = 50,
    seed: int = 0,
    device: str = "auto",
    settings: Settings | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> SegmentationResult:
    """Tissue posteriors of one subject.

    Arguments:
        scans: the channels of one subject (paths or volumes); the first gives the grid of the results.
        atlas: label probabilities; the default is the MNI152 head of ``default_atlas``.
        draws: joint posterior draws for the volumes' intervals.
        seed: same seed, same result on the same machine.
        device: "auto", "cpu" or "cuda".
        progress: called with a stage's name and the share of the work done, in [0, 1].

    Raises:
        UnusableInput: for scans that cannot be read or that do not overlap.
    """
    settings = settings or Settings()
    tell = progress or (lambda stage, share: None)
    clock = Clock()
    torch.manual_seed(seed)
    where = pick_device(device)
    channels = [scan if isinstance(scan, Volume) else read_scan(scan) for scan in scans]
    if not channels:
        raise ValueError("expected at least one scan")
    clock.lap("read")

    tell("aligning the atlas", 0.02)
    atlas = default_atlas() if atlas is None else atlas
    prepared = prepare([volume.as_3d() for volume in channels], atlas, settings.spacing_mm, settings.margin_mm, seed, where)
    clock.lap("align")

    tell("fitting", 0.15)
    model = build(prepared, settings).to(where)
    mode = _fit(model, prepared, settings, lambda r: tell("fitting", 0.15 + 0.4 * min(1.0, r.number / settings.rounds)))
    clock.lap("fit")

    tell("posterior", 0.55)
    posterior = full_posterior(model, mode.state, prepared)
    clock.lap("posterior")

    tell("draws", 0.7)
    samples = draw_latents(model, mode.state, prepared, draws, seed) if draws else {}
    volume_draws = draw_volumes(model, samples, prepared, posterior, seed) if draws else posterior.volumes_ml[None]
    clock.lap("draws")
    tell("done", 1.0)
    result = _result(model, mode, prepared, posterior, samples, volume_draws, channels, settings, clock.seconds, seed)
    # In the atlas for a stripped scan fluid counts as outside; in the result it is one of the brain's labels again.
    result.brain = tuple(name for name in atlas.brain if name in result.names)
    return result


def build(prepared: Prepared, settings: Settings) -> Segmentation:
    """The model for a prepared scan: a Markov field over the deformed atlas, Gaussian mixtures, a bias field."""
    atlas = prepared.atlas
    brain = atlas.grid.coordinates()[atlas.brain_mask]
    low, high = brain.amin(0) - 20, brain.amax(0) + 20
    shape = ((high - low) / settings.velocity_mm).ceil().int() + 1
    affine = torch.diag(torch.tensor([settings.velocity_mm] * 3 + [1.0], dtype=torch.float64))
    affine[:3, 3] = low
    velocity = SmoothVelocity(Grid(tuple(shape.tolist()), affine), settings.velocity_sd_mm, settings.velocity_length_mm)
    labels = DeformableAtlas(atlas, AffinePrior(start=prepared.start, centre=(low + high) / 2), velocity)
    # The interaction is one of surfaces: at half the spacing a surface has four times the neighbours, each of a quarter of the weight.
    markov = MarkovField(labels, settings.markov * min(min(prepared.grid.spacing), 1.5) ** 2) if settings.markov else labels
    channels = len(prepared.image)
    # Several channels tell tissues from mixtures of them; one noise for all would only blur their different covariances.
    appearance = GaussianMixture.for_labels(
        atlas.names, channels, settings.tie and channels == 1, settings.gaussians, weight_certainty=settings.weight_certainty
    )
    # The cosines run over what is fitted; beyond, they go on as their own mirror image.
    where = prepared.points.mask.nonzero()
    domain = prepared.points.lattice.cropped(where.amin(0).tolist(), (where.amax(0) + 1).tolist())
    bias = BiasField(settings.cutoff_mm, channels=channels, domain=domain)
    return Segmentation(markov, appearance, bias, tempering=settings.tempering or 0.1)


def _fit(model: Segmentation, prepared: Prepared, settings: Settings, callback: Callable[[Round], None]) -> Mode:
    """The mode on the subsample; the tempering, where it is not given, from the residuals of a first round."""
    data = prepared.values, prepared.points
    run = partial(em, model, *data, steps=settings.steps, tolerance=settings.tolerance, callback=callback)
    if settings.tempering is not None:
        return run(rounds=settings.rounds)
    first = run(rounds=2)
    model.tempering = tempering_of(residuals(model.mixture(first.state, prepared.points), *data))
    rest = run(state=first.state, rounds=settings.rounds - 2)
    return Mode(rest.state, first.rounds + [Round(r.number + 2, r.log_joint, r.gain) for r in rest.rounds], rest.converged)


def residuals(mixture: LabelMixture, image: Tensor, grid: Grid | MaskedGrid) -> Tensor:
    """Each voxel's departure from the mean of its Gaussians in their standard deviations, on the lattice, NaN elsewhere; first channel."""
    values = mixture._corrected(image)[:1]
    r = mixture._flat(mixture.responsibilities(image))
    sd = mixture.covariances[:, 0, 0].sqrt()
    z = (r * (values - mixture.means[:, :1]) / sd[:, None]).sum(0) / r.sum(0).clamp_min(1e-6)
    return grid.scatter(torch.where(z.isnan(), 0.0, z) + 1e-12).masked_fill(grid.scatter(torch.ones_like(z)) == 0, torch.nan)


def tempering_of(residual: Tensor) -> float:
    """τ for residuals on a lattice ``(*shape)``, NaN where there are none: Π_a (1 − ρ_a) / (1 + ρ_a), ρ_a the correlation of neighbours on axis a.

    It is the share of independent observations among voxels whose noise is a separable first-order autoregression (SPM's 1/ff; "virtual
    decimation" in Groves et al., NeuroImage 2011).
    """
    share = 1.0
    for axis, n in enumerate(residual.shape):
        if n < 2:
            continue
        a, b = residual.narrow(axis, 0, n - 1), residual.narrow(axis, 1, n - 1)
        both = ~(a.isnan() | b.isnan())
        if int(both.sum()) < 50:
            continue
        x, y = a[both], b[both]
        rho = float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()).clamp_min(1e-12))
        share *= (1 - min(max(rho, 0.0), 0.95)) / (1 + min(max(rho, 0.0), 0.95))
    return min(1.0, max(0.01, share))


@dataclass(frozen=True)
class FullPosterior:
    """p(S | I) at the mode on the scan's own grid.

    Arguments:
        probabilities: ``(K, *shape)``. log_bias: ``(C, *shape)``.
        volumes_ml: Σ_v p(S_v = k), ``(K,)``. covariance: of the volumes given the latents, were voxels independent, ``(K, K)`` ml².
        tempering: the share of independent voxels on this grid.
        log_evidence: mean log p(I_v) over the voxels near the brain, nats.
        residual: mean and sd of the residual by label, ``(K, 2)``.
    """

    probabilities: Tensor
    log_bias: Tensor
    volumes_ml: Tensor
    covariance: Tensor
    tempering: float
    log_evidence: float
    residual: Tensor


@torch.no_grad()
def full_posterior(model: Segmentation, state: dict[str, Tensor], prepared: Prepared) -> FullPosterior:
    """Evaluate the posterior slab by slab, so that memory stays within a few tensors of the scan's size; slabs overlap by the neighbours' reach."""
    image, grid, names = prepared.image, prepared.grid, prepared.atlas.names
    outside = next((k for k, name in enumerate(names) if name in BACKGROUNDS), None)
    probabilities = image.new_zeros(len(names), *grid.shape)
    if outside is not None:
        probabilities[outside] = 1.0
    log_bias = image.new_zeros(image.shape)
    seen = ~image.isnan().all(0)
    box = _bounding_box(seen)
    halo = 8 if isinstance(model.labels, MarkovField) else 0
    thick = max(8, _PIECE // max(1, math.prod(s.stop - s.start for s in box[1:])))
    totals = _Totals(len(names), image.device)
    for begin in range(box[0].start, box[0].stop, thick):
        end = min(begin + thick, box[0].stop)
        low, high = max(box[0].start, begin - halo), min(box[0].stop, end + halo)
        piece = (slice(low, high), *box[1:])
        part = grid.cropped([s.start for s in piece], [s.stop for s in piece])
        values = image[(slice(None), *piece)]
        log_atlas = model.log_atlas(state, part)
        mixture = model.mixture(state, part, log_atlas)
        p = mixture.posterior(values)
        here = seen[piece]
        # A voxel with nothing to explain is background by construction, not by its prior.
        if outside is not None:
            p = torch.where(here, p, torch.nn.functional.one_hot(torch.tensor(outside, device=p.device), len(names)).to(p)[:, None, None, None])
        else:
            p = p * here
        p = _as_fitted(p, mixture, prepared, part)
        keep = slice(begin - low, end - low)
        target = (slice(begin, end), *box[1:])
        probabilities[(slice(None), *target)] = p[:, keep]
        if mixture.log_bias is not None:
            log_bias[(slice(None), *target)] = mixture.log_bias[:, keep]
        totals.add(mixture, values, p, log_atlas, here, keep)
    scale = grid.voxel_volume / 1000
    flat = probabilities.flatten(1)
    sums = flat.double().sum(1)
    covariance = torch.diag(sums) - torch.stack([(row * flat).double().sum(1) for row in flat])
    return FullPosterior(
        probabilities, log_bias, sums * scale, covariance * scale**2, totals.tempering(), totals.log_evidence(), totals.residual()
    )


def _as_fitted(p: Tensor, mixture: LabelMixture, prepared: Prepared, part: Grid) -> Tensor:
    """``p`` with the prior's share of the brain beyond what was fitted. The bias field is only extrapolated there, and a large head has litres of
    it: some per cent of error in the intensities made tens of millilitres of bone and air into fluid, of which no draw knew."""
    if prepared.stripped:
        return p
    brain = torch.tensor([name in prepared.atlas.brain for name in prepared.atlas.names], device=p.device)
    points = part.coordinates(p.dtype, p.device)
    fitted = sample(prepared.points.mask.to(p)[None], prepared.points.lattice, points, fill="edge")[0] > 0.5
    prior = mixture.log_prior.exp()
    rest = p * ~brain[:, None, None, None]
    rest = rest * ((1 - prior[brain].sum(0)) / rest.sum(0).clamp_min(1e-12))
    return torch.where(fitted, p, torch.where(brain[:, None, None, None], prior, rest))


class _Totals:
    """Sums over slabs for the quality score."""

    def __init__(self, labels: int, device: torch.device) -> None:
        self.evidence = self.voxels = 0.0
        self.moments = torch.zeros(labels, 3, dtype=torch.float64, device=device)
        self.shares: list[tuple[int, float]] = []

    def add(self, mixture: LabelMixture, values: Tensor, p: Tensor, log_atlas: Tensor, here: Tensor, keep: slice) -> None:
        # Every fourth slice is plenty for means over millions of voxels.
        rows = torch.arange(keep.start, keep.stop, 4, device=p.device)[:64]
        thin = LabelMixture(
            mixture.log_prior[:, rows], mixture.mixing, mixture.means, mixture.covariances, mixture.owner,
            None if mixture.log_bias is None else mixture.log_bias[:, rows], mixture.outlier, mixture.outlier_density,
        )  # fmt: skip
        sub, labels, seen = values[:, rows], p[:, rows], here[rows]
        if not bool(seen.any()):
            return
        self.evidence += float(thin.voxel_log_prob(sub)[seen].double().sum())
        self.voxels += float(seen.sum())
        corrected = thin._corrected(sub)[:1]
        r = thin._flat(thin.responsibilities(sub, labels))
        z = (r * (corrected - thin.means[:, :1]) / thin.covariances[:, :1, :1][..., 0].sqrt()).sum(0) / r.sum(0).clamp_min(1e-6)
        z = torch.where(seen.flatten(), z, 0.0).nan_to_num(0.0).double()
        weight = labels.flatten(1).double() * seen.flatten()
        self.moments += torch.stack([weight.sum(1), weight @ z, weight @ z**2], 1)
        planes = z.reshape(seen.shape).masked_fill(~seen | (labels[-1] > 0.5), torch.nan)
        self.shares += [(int((~plane.isnan()).sum()), tempering_of(plane)) for plane in planes[:: max(1, len(planes) // 8)]]

    def tempering(self) -> float:
        """Over planes, so the share of the third axis is taken to be the geometric mean of the two seen."""
        total = sum(n for n, _ in self.shares)
        return (sum(n * share for n, share in self.shares) / total) ** 1.5 if total else 1.0

    def log_evidence(self) -> float:
        return self.evidence / max(self.voxels, 1.0)

    def residual(self) -> Tensor:
        mass, first, second = self.moments.unbind(1)
        mean = first / mass.clamp_min(1e-9)
        return torch.stack([mean, (second / mass.clamp_min(1e-9) - mean**2).clamp_min(0).sqrt()], 1)


def draw_latents(model: Segmentation, state: dict[str, Tensor], prepared: Prepared, count: int, seed: int) -> dict[str, Tensor]:
    """Joint draws of every latent from the Laplace posterior, each site with a leading axis of draws."""
    generator = torch.Generator(prepared.image.device).manual_seed(seed + 1)
    scores = model.scores(state, prepared.values, prepared.points)
    return model.moved(state, *laplace_draws(scores, count, model.tempering, generator))


@torch.no_grad()
def draw_volumes(
    model: Segmentation, samples: dict[str, Tensor], prepared: Prepared, posterior: FullPosterior, seed: int
) -> Tensor:
    """Volumes of the labels in ml, ``(draws, K)``: the mode's on the scan's own grid, moved as draws of the latents move those on the subsample;
    labels are then drawn given them, their count being normal by its size. Draws are centred on the mode: their mean differs from it by terms of
    second order, which a Laplace posterior has not got right either."""
    points, values = prepared.points, prepared.values
    factor = points.voxel_volume / 1000

    def volumes(latents: dict[str, Tensor]) -> Tensor:
        return model.mixture(latents, points).posterior(values).double().sum(-1) * factor

    count = len(samples["means"])
    moved = torch.stack([volumes({name: sample[i] for name, sample in samples.items()}) for i in range(count)])
    moved = moved - moved.mean(0)
    generator = torch.Generator(values.device).manual_seed(seed + 2)
    white = torch.randn(count, moved.shape[1], generator=generator, dtype=torch.float64, device=values.device)
    spectrum, axes = torch.linalg.eigh(posterior.covariance / posterior.tempering)
    noise = white * spectrum.clamp_min(0).sqrt() @ axes.T
    return (posterior.volumes_ml + moved + noise).clamp_min(0)


def _bounding_box(mask: Tensor) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        line = mask.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0]
        box.append(slice(int(line[0]), int(line[-1]) + 1))
    return tuple(box)


def _result(
    model: Segmentation,
    mode: Mode,
    prepared: Prepared,
    posterior: FullPosterior,
    samples: dict[str, Tensor],
    volume_draws: Tensor,
    channels: list[Volume],
    settings: Settings,
    seconds: dict[str, float],
    seed: int,
) -> SegmentationResult:
    atlas, state = prepared.atlas, mode.state
    shape = channels[0].data.shape
    p = posterior.probabilities
    entropy = torch.special.entr(p).sum(0)
    labels = torch.tensor(atlas.indices, device=p.device)[p.argmax(0)].masked_fill(p.sum(0) == 0, 0)
    log_bias = posterior.log_bias
    offset, unit = (x.reshape(-1, 1, 1, 1) for x in (prepared.offset, prepared.unit))
    corrected = prepared.image * log_bias.exp() * unit + offset
    transform = pyro.poutine.condition(_deformable(model).transform, data=state)()
    deformation, weights = _deformable(model).deformation, state["weights"]
    velocity_grid = prepared.grid if deformation is None else deformation.grid

    def draw(count: int, draw_seed: int) -> Tensor:
        return draw_label_maps(model, state, samples, prepared, count, draw_seed).reshape(count, *shape).cpu()

    unit_1 = prepared.unit.cpu()
    return SegmentationResult(
        names=atlas.names,
        indices=atlas.indices,
        colours=atlas.colours,
        brain=atlas.brain,
        channels=channels,
        probabilities=p.reshape(len(p), *shape).cpu(),
        labels=labels.reshape(shape).cpu(),
        entropy=entropy.reshape(shape).cpu(),
        bias=log_bias.exp().reshape(-1, *shape).cpu(),
        corrected=corrected.nan_to_num(0.0).reshape(-1, *shape).cpu(),
        transform=transform,
        inverse=transform.inverse(),
        velocity_grid=velocity_grid,
        volumes=volume_table(atlas, posterior.volumes_ml.cpu(), volume_draws.cpu()),
        volume_draws=volume_draws.cpu(),
        stripped=prepared.stripped,
        rounds=mode.rounds,
        converged=mode.converged,
        mixture={
            "shares": (weights / weights.sum()).cpu(),
            "means": model.appearance.component_means(state["means"]).cpu() * unit_1 + prepared.offset.cpu(),
            "covariances": state["covariances"][model.appearance.noise].cpu() * unit_1[:, None] * unit_1,
            "owner": model.appearance.owner.cpu(),
        },
        quality=quality(atlas.names, atlas.brain, posterior, mode.converged, entropy, labels, atlas.indices),
        tempering=model.tempering,
        seconds=seconds,
        mode={name: value.cpu() for name, value in state.items()},
        unit=unit_1,
        seed=seed,
        _draw=draw,
    )


def _deformable(model: Segmentation) -> DeformableAtlas:
    labels = model.labels
    return labels.labels if isinstance(labels, MarkovField) else labels  # type: ignore[return-value]


@torch.no_grad()
def draw_label_maps(
    model: Segmentation, state: dict[str, Tensor], samples: dict[str, Tensor], prepared: Prepared, count: int, seed: int
) -> Tensor:
    """Whole label maps, each with its own draw of every latent; neighbours are coupled by Gibbs sweeps where the model has a Markov field."""
    torch.manual_seed(seed)
    indices = torch.tensor(prepared.atlas.indices, device=prepared.image.device)
    seen = ~prepared.image.isnan().all(0)
    box = _bounding_box(seen)
    part = prepared.grid.cropped([s.start for s in box], [s.stop for s in box])
    out = torch.zeros(count, *prepared.grid.shape, dtype=torch.int64, device=indices.device)
    available = len(samples.get("means", ()))
    for i in range(count):
        latents = {name: sample[i % available] for name, sample in samples.items()} if available else state
        drawn = model.mixture(latents, part).sample_labels(prepared.image[(slice(None), *box)])[0]
        out[i][box] = indices[drawn] * seen[box]
    return out


def volume_table(atlas: LabelAtlas, volumes_ml: Tensor, draws: Tensor) -> pd.DataFrame:
    """``interval_table`` of an atlas's labels but the background, a row a label, by index."""
    table = interval_table(atlas.indices, atlas.names, volumes_ml, draws)
    outside = table["name"].isin(BACKGROUNDS)
    return table[~outside].sort_values("index").reset_index(drop=True)


def interval_table(indices: Sequence[int], names: Sequence[str], volumes_ml: Tensor, draws: Tensor) -> pd.DataFrame:
    """index, name, volume_ml, sd_ml and the quantiles q025 … q975 of the draws, a row a label.

    Arguments:
        volumes_ml: ``(K,)``. draws: ``(n, K)`` ml; what they do not tell is NaN.
    """
    unknown = torch.full_like(volumes_ml, torch.nan)
    quantiles = torch.quantile(draws, torch.tensor(LEVELS, dtype=draws.dtype), dim=0) if len(draws) else [unknown] * len(LEVELS)
    sd = draws.std(0) if len(draws) > 1 else unknown
    table = pd.DataFrame({"index": list(indices), "name": list(names), "volume_ml": volumes_ml.tolist(), "sd_ml": sd.tolist()})
    for level, row in zip(LEVELS, quantiles, strict=True):
        table[f"q{round(1000 * level):03d}"] = row.tolist()
    return table


def quality(
    names: tuple[str, ...],
    brain: tuple[str, ...],
    posterior: FullPosterior,
    converged: bool,
    entropy: Tensor,
    labels: Tensor,
    indices: tuple[int, ...],
) -> dict[str, Any]:
    """How well the model explains the scan: log evidence per voxel, residuals by label, and a score of 1 for a scan like any other.

    The score is the product of exp(−|mean residual|) over the brain's labels and of one minus the mean entropy in the brain relative to log 2.
    """
    score, remarks, residual = 1.0, [], {}
    for name, (mean, sd) in zip(names, posterior.residual.tolist(), strict=True):
        residual[name] = {"mean": mean, "sd": sd}
        if name in brain:
            score *= math.exp(-min(abs(mean), 2.0))
            if abs(mean) > 0.5 or not 0.5 < sd < 1.6:
                remarks.append(f"the intensities of {name} are not what the mixture expects (mean {mean:.2f}, sd {sd:.2f})")
    inside = torch.isin(labels, torch.tensor([indices[names.index(n)] for n in brain], device=labels.device))
    uncertain = float(entropy[inside].mean()) / math.log(2) if bool(inside.any()) else 1.0
    score *= max(0.0, 1 - uncertain)
    if uncertain > 0.5:
        remarks.append("labels are uncertain in most of the brain")
    if not converged:
        remarks.append("the fit stopped at its last round, still gaining")
    return {"log_evidence_per_voxel": posterior.log_evidence, "residual": residual, "score": score, "remarks": remarks}
