"""p(S | z) p(z): label maps of an anatomy from a code of its shape, by a network.

.. math::
    z \\sim N(0, I), \\quad \\varphi \\sim p(\\varphi), \\quad S_x \\sim Cat(\\pi_x), \\quad
    \\pi_x = \\mathrm{softmax}(f(z) + \\log T)(\\varphi(x))

f is a network and T a location prior, both on one grid. As a label prior it goes into ``Segmentation``, where it gives p(I | S) p(S | z) p(z) with
the labels summed out. Guides: q(z | S) reads a label map; q(z | I) reads what the scan's own appearance makes of it under the mean shape, so that
a contrast that it has never seen looks to it as any other.

References: Dalca, Guttag & Sabuncu, CVPR 2018; Kingma & Welling, ICLR 2014; Burda et al., ICLR 2016 (importance sampling, active units).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical, Delta, Normal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional

from probmed.grids import Grid, MaskedGrid, sample
from probmed.models.segmentation import Segmentation
from probmed.priors import FLOOR, DeformationPrior, LabelPrior, Motion

_LOG_SD = (-8.0, 3.0)  # ends of the log standard deviation of q(z | S)


class ShapeVAE(LabelPrior):
    """Labels that a network expects for a code of shape, on any grid.

    Sites: ``shape_code``, ``(L,)``, and those of the deformation. Conditioned on several codes, ``(B, L)``, it gives the labels of each,
    ``(B, K, *shape)``, in little more time than one takes.

    Arguments:
        names: of the K labels.
        grid: of the decoder's labels.
        decoder: codes ``(B, L)`` to logits ``(B, K, *grid.shape)``.
        codes: L.
        location: log T, ``(K, *grid.shape)``, added to the logits; None for none.
        deformation: from the world of the scan to the grid's; None for the identity.
        floor: added to every probability before they are normalised again.
        parts: log shares of the parts that the first label is made of, such as the tissues of a background, at each voxel, ``(P, *grid.shape)``. They
            are labels of images, in the place of the first: K − 1 + P of them. None for one label that is one.

    Raises:
        ValueError: for a location prior or parts of another shape, or no codes.
    """

    location: Tensor | None
    parts: Tensor | None

    def __init__(
        self,
        names: Sequence[str],
        grid: Grid,
        decoder: nn.Module,
        codes: int,
        location: Tensor | None = None,
        deformation: DeformationPrior | None = None,
        floor: float = FLOOR,
        parts: Tensor | None = None,
    ) -> None:
        super().__init__()
        if parts is not None and tuple(parts.shape[1:]) != grid.shape:
            raise ValueError(f"expected parts of shape (P, {', '.join(map(str, grid.shape))}), got {tuple(parts.shape)}")
        expected = (len(names), *grid.shape)
        if location is not None and tuple(location.shape) != expected:
            raise ValueError(f"expected a location prior of shape {expected}, got {tuple(location.shape)}")
        if codes < 1 or floor < 0:
            raise ValueError(f"expected one code or more and floor >= 0, got {codes} and {floor}")
        first = (names[0],) if parts is None else tuple(f"{names[0]} {number + 1}" for number in range(len(parts)))
        self.names, self.grid, self.decoder, self.codes = (*first, *names[1:]), grid, decoder, codes
        self.deformation, self.floor = deformation, floor
        self.register_buffer("location", location)
        self.register_buffer("parts", parts)

    def decode(self, code: Tensor) -> Tensor:
        """log p(S_v = k | z) on the prior's own grid: ``(*batch, L)`` → ``(*batch, K, *grid.shape)``."""
        logits: Tensor = self.decoder(code.reshape(-1, self.codes))
        if self.location is not None:
            logits = logits + self.location
        found = torch.log((logits.softmax(1) + self.floor) / (1 + logits.shape[1] * self.floor)) if self.floor else logits.log_softmax(1)
        if self.parts is not None:
            found = torch.cat([found[:, :1] + self.parts, found[:, 1:]], 1)
        return found.reshape(*code.shape[:-1], *found.shape[1:])

    def forward(self, grid: Grid | MaskedGrid) -> Tensor:
        like = next((p for p in self.decoder.parameters()), torch.zeros(()))
        zeros = torch.zeros(self.codes, dtype=like.dtype, device=like.device)
        log_labels = self.decode(pyro.sample("shape_code", Normal(zeros, torch.ones_like(zeros)).to_event(1)))
        if self.deformation is None and grid == self.grid:
            return log_labels
        points = grid.coordinates(log_labels.dtype, log_labels.device)
        points = points if self.deformation is None else self.deformation()(points)
        if log_labels.ndim > self.grid.ndim + 1:
            points = points.expand(len(log_labels), *points.shape)
        # Means of probabilities, as of an atlas's: means of their logarithms would not sum to one.
        return sample(log_labels.exp(), self.grid, points, fill="edge").log()

    def whole(self, probabilities: Tensor) -> Tensor:
        """Of parts together, ``(*batch, K - 1 + P, *shape)`` → ``(*batch, K, *shape)``."""
        if self.parts is None:
            return probabilities
        label, count = -self.grid.ndim - 1, len(self.parts)
        first, others = probabilities.split([count, probabilities.shape[label] - count], label)
        return torch.cat([first.sum(label, keepdim=True), others], label)

    def motion(self, state: Mapping[str, Tensor], grid: Grid | MaskedGrid) -> Motion | None:
        """
        Raises:
            ValueError: a code changes labels without moving voxels, and Laplace's posterior would leave it to chance.
        """
        raise ValueError("a shape code has no motion, and no Laplace posterior: its posterior is that of workflows.shapes.refine")


def within(x: Tensor, least: float, greatest: float) -> Tensor:
    """x between two ends, itself to a thousandth where it is three or more from both; unlike a clamp's its slope is never zero, so that what has gone
    beyond an end can come back."""
    above = least + functional.softplus(x - least, beta=2.0, threshold=50.0)
    return greatest - functional.softplus(greatest - above, beta=2.0, threshold=50.0)


def label_maps(shapes: ShapeVAE, labels: Tensor | None = None) -> Tensor:
    """The program of label maps alone, S_v ~ Cat(π_v(z)), on the prior's own grid; in a plate, of a batch.

    Sites: ``shape_code`` and ``labels``, ``(*shape)`` int64, observed where given.

    Raises:
        ValueError: for a prior with a deformation, or label maps that are not the prior's.
    """
    if shapes.deformation is not None:
        raise ValueError("expected a shape prior without deformation, whose label maps lie on its own grid")
    if labels is not None:
        check_labels(labels, shapes.grid, len(shapes.names))
    d = shapes.grid.ndim
    log_labels = shapes(shapes.grid).movedim(-d - 1, -1)
    drawn: Tensor = pyro.sample("labels", Categorical(logits=log_labels).to_event(d), obs=labels)
    return drawn


class ShapeGuide(PyroModule):
    """q(z | S) = N(m(S), diag s(S)²), m and log s from a network.

    Arguments:
        shapes: the prior whose codes these are. It is not part of the guide.
        network: label probabilities ``(B, K, *shape)`` to means and log standard deviations ``(B, 2 L)``.
    """

    def __init__(self, shapes: ShapeVAE, network: nn.Module) -> None:
        super().__init__()
        self.classes, self.grid, self.network = len(shapes.names), shapes.grid, network

    def distribution(self, probabilities: Tensor) -> Normal:
        """q(z | S) for label probabilities ``(*batch, K, *grid.shape)``; batch ``(*batch, L)``."""
        batch = probabilities.shape[: -self.grid.ndim - 1]
        loc, log_sd = self.network(probabilities.reshape(-1, *probabilities.shape[-self.grid.ndim - 1 :])).chunk(2, 1)
        return Normal(loc.reshape(*batch, -1), within(log_sd, *_LOG_SD).exp().reshape(*batch, -1))

    def of_labels(self, labels: Tensor) -> Normal:
        """q(z | S) for label maps ``(*batch, *grid.shape)``."""
        like = next(self.network.parameters())
        return self.distribution(functional.one_hot(labels, self.classes).movedim(-1, -self.grid.ndim - 1).to(like))

    def forward(self, labels: Tensor) -> Tensor:
        code: Tensor = pyro.sample("shape_code", self.of_labels(labels).to_event(1))
        return code


class ImageShapeGuide(PyroModule):
    """q(z | I) of a scan without labels, and the appearance at its best given z (a point mass).

    The network reads p(S | I, z = 0), under the appearance that EM finds for this scan with the mean shape: no contrast is a parameter of it.

    Arguments:
        model: its labels are a ``ShapeVAE``. It is not part of the guide.
        guide: maps label probabilities to codes.
        rounds: of EM under the mean shape; ``updates``: rounds once z is known.
    """

    def __init__(self, model: Segmentation, guide: ShapeGuide, rounds: int = 3, updates: int = 2) -> None:
        super().__init__()
        if not isinstance(model.labels, ShapeVAE):
            raise ValueError(f"expected a model whose labels are a ShapeVAE, got a {type(model.labels).__name__}")
        # In a tuple, so that the model's parameters are not the guide's.
        self.model, self.guide, self.rounds, self.updates = (model,), guide, rounds, updates

    def start(self, image: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Every latent, with the mean shape."""
        with poutine.block():
            state = self.model[0].start(image, grid)
        return self._updated(state, image, grid, self.rounds)

    @torch.no_grad()
    @poutine.block()
    def _updated(self, state: dict[str, Tensor], image: Tensor, grid: Grid, rounds: int) -> dict[str, Tensor]:
        # Blocked: the model's sites, when it runs in here, are none of the guide's.
        for _ in range(rounds):
            state = self.model[0].em_step(state, image, grid)
        return state

    def distribution(self, state: dict[str, Tensor], image: Tensor, grid: Grid) -> Normal:
        """q(z | I), ``(L,)``, from ``start``'s latents."""
        with poutine.block():
            posterior, own = self.model[0].labels.whole(self.model[0].label_posterior(state, image, grid)), self.guide.grid
        if grid != own:
            posterior = sample(posterior, grid, own.coordinates(posterior.dtype, posterior.device), fill="edge")
        return self.guide.distribution(posterior)

    def forward(self, image: Tensor, grid: Grid) -> dict[str, Tensor]:
        state = self.start(image, grid)
        code = pyro.sample("shape_code", self.distribution(state, image, grid).to_event(1))
        state = self._updated(state | {"shape_code": code.detach()}, image, grid, self.updates)
        anatomy = [name for name in state if name not in (*self.model[0].closed_form_sites, "shape_code")]
        appearance = [name for name in ("bias", "weights", "covariances", "means") if name in state]
        for name in (*anatomy, *appearance):
            state[name] = pyro.sample(name, Delta(state[name], event_dim=state[name].ndim))
        return state | {"shape_code": code}


def check_labels(labels: Tensor, grid: Grid, classes: int) -> None:
    """
    Raises:
        ValueError: for label maps of another shape than the grid's, or other labels than 0 to ``classes`` − 1.
    """
    shape = grid.shape
    if labels.is_floating_point() or tuple(labels.shape[-len(shape) :]) != shape or labels.ndim > len(shape) + 1:
        raise ValueError(f"expected integer label maps of shape {shape} or (B, *{shape}), got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def log_likelihood(shapes: ShapeVAE, labels: Tensor, code: Tensor) -> Tensor:
    """log p(S | z), nats: labels ``(B, *shape)`` and codes ``(*draws, B, L)`` → ``(*draws, B)``."""
    log_labels, d = shapes.decode(code), shapes.grid.ndim
    index = labels.unsqueeze(-d - 1).expand(*code.shape[:-1], 1, *labels.shape[-d:])
    return log_labels.gather(-d - 1, index).flatten(-d - 1).sum(-1)


def standard_divergence(q: Normal) -> Tensor:
    """KL(q ‖ N(0, I)), nats, summed over the last axis."""
    return 0.5 * (q.loc**2 + q.scale**2 - 1 - 2 * q.scale.log()).sum(-1)


def evidence_bound(shapes: ShapeVAE, guide: ShapeGuide, labels: Tensor, weight: float = 1.0) -> Tensor:
    """The ELBO of label maps ``(B, *shape)`` from one draw of z each, ``(B,)``, nats; its KL divergence, in closed form, counts ``weight`` times."""
    check_labels(labels, shapes.grid, len(shapes.names))
    q = guide.of_labels(labels)
    return log_likelihood(shapes, labels, q.rsample()) - weight * standard_divergence(q)


@torch.no_grad()
def log_evidence(shapes: ShapeVAE, guide: ShapeGuide, labels: Tensor, draws: int = 1000, at_once: int = 50) -> Tensor:
    """log p(S) = log ∫ p(S | z) p(z) dz by importance sampling with q(z | S), ``(B,)``, nats. Low by chance more than high, less so with more draws.

    Arguments:
        labels: ``(B, *shape)``. at_once: draws decoded together.

    References: Burda et al., ICLR 2016.
    """
    check_labels(labels, shapes.grid, len(shapes.names))
    q, prior = guide.of_labels(labels), Normal(0.0, 1.0)
    logs = []
    for first in range(0, draws, at_once):
        code = q.sample((min(at_once, draws - first),))
        logs.append(log_likelihood(shapes, labels, code) + (prior.log_prob(code) - q.log_prob(code)).sum(-1))
    return torch.logsumexp(torch.cat(logs), 0) - math.log(draws)


@torch.no_grad()
def active_units(guide: ShapeGuide, labels: Tensor, least: float = 0.01) -> Tensor:
    """Codes that tell label maps ``(N, *shape)`` apart: those whose posterior mean has a variance over them above ``least``; ``(L,)`` bool."""
    return guide.of_labels(labels).loc.var(0) > least


@torch.no_grad()
def traversal(shapes: ShapeVAE, unit: int, values: Tensor, code: Tensor | None = None) -> Tensor:
    """p(S | z) along one code, the others as in ``code`` (zeros by default): ``(len(values), K, *shape)``."""
    codes = (values.new_zeros(shapes.codes) if code is None else code).repeat(len(values), 1)
    codes[:, unit] = values
    return shapes.decode(codes).exp()
