"""Networks and priors joined: a network's prediction as a prior p(S), and a network's posterior as a likelihood to which any prior is attached.

.. math:: p(S \\mid I) \\propto \\frac{p_{net}(S \\mid I)}{p_{train}(S)} \\, p(S)

References: Bourlard & Morgan, Connectionist speech recognition, 1994 (scaled likelihoods); Saerens et al., Neural Computation 2002 (changed priors).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from probmed.atlases import LabelAtlas
from probmed.distributions import Coupling
from probmed.grids import Grid
from probmed.priors import FLOOR, FixedAtlas
from probmed.transforms import Transform


class NetworkPrior(FixedAtlas):
    """p(S) of one scan from what a network makes of it, log probabilities with a floor. No sites.

    ``Segmentation(NetworkPrior(names, trained.probabilities(scan), scan.grid), GaussianMixture.for_labels(names))`` looks at the same scan twice
    where the network has read the image that is then observed; its evidence is honest where the network has read another contrast, or another scan.

    Arguments:
        names: of the labels. probabilities: ``(K, *grid.shape)``, calibrated.
        transform: from the world in which the prior is used to the grid's.
        floor: added to every probability before they are normalised again.

    Raises:
        ValueError: for probabilities of another shape, negative ones, or sums other than one.
    """

    def __init__(
        self, names: Sequence[str], probabilities: Tensor, grid: Grid, transform: Transform | None = None, floor: float = FLOOR
    ) -> None:
        super().__init__(LabelAtlas(tuple(names), probabilities, grid, brain=()), transform, floor)


class RatioMixture(TorchDistribution):
    """An image given label probabilities, by ratios r_k(I)_v = p_net(S_v = k | I) / p_train(S_v = k), the labels summed out.

    .. math:: \\log p(I \\mid \\pi) = \\sum_v \\log \\sum_k \\pi_{vk} r_k(I)_v + \\text{a number that no } \\pi \\text{ changes}

    That number is left out: densities compare between priors, not between images. There is nothing to draw images from.

    Arguments:
        log_prior: log π, ``(*batch, K, *shape)``.
        log_ratio: an image ``(C, *shape)`` to log r, ``(K, *shape)``.
        ndim: number of axes in shape. channels: C.
        coupling: as ``LabelMixture``'s.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self, log_prior: Tensor, log_ratio: Callable[[Tensor], Tensor], ndim: int, channels: int = 1, coupling: Coupling | None = None
    ) -> None:
        self.log_prior, self.log_ratio, self.ndim, self.coupling = log_prior, log_ratio, ndim, coupling
        super().__init__(log_prior.shape[: -ndim - 1], torch.Size((channels, *log_prior.shape[-ndim:])), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def _unary(self, image: Tensor) -> Tensor:
        return self.log_prior + self.log_ratio(image)

    def log_prob(self, value: Tensor) -> Tensor:
        unary, label = self._unary(value), -self.ndim - 1
        if self.coupling is not None:
            return self.coupling.bound(unary, label)
        return torch.logsumexp(unary, label).flatten(-self.ndim).sum(-1)

    @torch.no_grad()
    def posterior(self, image: Tensor) -> Tensor:
        """p(S_v = k | I), ``(*batch, K, *shape)``; with a coupling, the mean field's marginals."""
        unary, label = self._unary(image), -self.ndim - 1
        return unary.softmax(label) if self.coupling is None else self.coupling.mean_field(unary, label)

    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        raise NotImplementedError("a network gives labels of images, and no images: give the model an image")


class LikelihoodRatio(PyroModule):
    """A network's posterior as an appearance, for any label prior: an atlas, deformed or not, shapes, a Markov field. No sites.

    ``LikelihoodRatio(network, trained_on)(prior(grid)).posterior(image)`` is the network's answer with another prior; ``Segmentation(prior,
    LikelihoodRatio(network, trained_on))`` is the program whose other latents (affine, velocity, shape code) gradients find.

    Arguments:
        network: images ``(1, C, *shape)`` to logits ``(1, K, *shape)``. It is held as it is: what learns are the priors.
        trained_on: p_train(S = k), ``(K,)``, or of each voxel, ``(K, *shape)``.
        temperature: by which the logits are divided.
        channels: C.
        floor: added to both probabilities, so that neither rules a label out.

    Raises:
        ValueError: for training probabilities that are negative or do not sum to one, or a temperature that is not positive.
    """

    log_trained: Tensor

    def __init__(
        self, network: Callable[[Tensor], Tensor], trained_on: Tensor, temperature: float = 1.0, channels: int = 1, floor: float = FLOOR
    ) -> None:
        super().__init__()
        if not bool((trained_on >= 0).all()) or float((trained_on.sum(0) - 1).abs().max()) > 1e-3:
            raise ValueError("the probabilities that a network was trained on must be non-negative and sum to 1 over labels")
        if temperature <= 0 or floor < 0:
            raise ValueError(f"expected temperature > 0 and floor >= 0, got {temperature} and {floor}")
        # In a tuple, so that the network's parameters are not the model's.
        self.network, self.temperature, self.channels, self.floor = (network,), temperature, channels, floor
        self.register_buffer("log_trained", self._floored(trained_on).log())

    def _floored(self, probabilities: Tensor) -> Tensor:
        return (probabilities + self.floor) / (1 + len(probabilities) * self.floor)

    @torch.no_grad()
    def log_ratio(self, image: Tensor) -> Tensor:
        """log p_net(S_v = k | I) − log p_train(S_v = k), ``(C, *shape)`` → ``(K, *shape)``.

        Raises:
            ValueError: where network, training probabilities and image do not agree in shape.
        """
        logits, expected = self.network[0](image[None])[0], (len(self.log_trained), *image.shape[1:])
        if tuple(logits.shape) != expected:
            raise ValueError(f"expected logits of shape {expected} from the network, got {tuple(logits.shape)}")
        log_trained = self.log_trained.reshape(-1, *[1] * (image.ndim - 1)) if self.log_trained.ndim == 1 else self.log_trained
        if log_trained.ndim != logits.ndim or any(n not in (1, m) for n, m in zip(log_trained.shape, expected, strict=True)):
            raise ValueError(f"expected training probabilities (K,) or of shape {expected}, got {tuple(self.log_trained.shape)}")
        return self._floored((logits / self.temperature).softmax(0)).log() - log_trained

    def forward(self, log_prior: Tensor, log_bias: Tensor | None = None, coupling: Coupling | None = None) -> RatioMixture:
        """
        Arguments:
            log_prior: ``(K, *shape)`` on the whole grid of the image. log_bias: none: a network has its own way with them.
        """
        if log_bias is not None:
            raise ValueError("expected no bias field: the network reads the image as it is")
        if len(log_prior) != len(self.log_trained):
            raise ValueError(f"expected a prior of {len(self.log_trained)} labels, got {len(log_prior)}")
        return RatioMixture(log_prior, self.log_ratio, log_prior.ndim - 1, self.channels, coupling)
