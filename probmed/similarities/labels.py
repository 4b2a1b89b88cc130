"""Segmentations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pyro.distributions import Beta, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probmed.similarities.likelihood import Similarity, both_known, check_channels, check_positive


class OneHotLabels(TorchDistribution):
    """Independent labels, log p(S) = Σ_{v observed} log q_v(S_v); S as zeros and a one.

    Arguments:
        probabilities: q, ``(*batch, K, *shape)``.
        missing: where they mean nothing, ``(*batch, *shape)``: draws are NaN there, and observations are ignored. So are observations that are NaN.
        batch: number of batch axes.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, probabilities: Tensor, missing: Tensor, batch: int = 0, validate_args: bool | None = None) -> None:
        self.probabilities, self.missing = probabilities, missing
        super().__init__(probabilities.shape[:batch], probabilities.shape[batch:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        labels = -len(self.event_shape)
        missing = (self.missing.unsqueeze(labels) | value.isnan().any(labels, keepdim=True)).expand(torch.broadcast_shapes(value.shape, self.shape()))
        likelihood = (value.masked_fill(missing, 1.0) * self.probabilities.masked_fill(missing, 1.0)).sum(labels)
        return likelihood.log().masked_fill(missing.select(labels, 0), 0.0).flatten(labels + 1).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        labels = -len(self.event_shape)
        weights = self.probabilities.movedim(labels, -1)
        drawn = torch.distributions.OneHotCategorical(weights, validate_args=False).sample(torch.Size(sample_shape))
        return drawn.movedim(-1, labels).masked_fill(self.missing.unsqueeze(labels), torch.nan)

    def expand(self, batch_shape: Sequence[int], _instance: OneHotLabels | None = None) -> OneHotLabels:
        batch = torch.Size(batch_shape)
        return OneHotLabels(self.probabilities.expand(batch + self.event_shape), self.missing.expand(batch + self.event_shape[1:]), len(batch), False)


class LabelAgreement(Similarity):
    """Two segmentations: the fixed one has the moved one's label, or by mistake another.

    .. math:: \\epsilon \\sim Beta(1 + n_0 e, 1 + n_0 (1 - e)), \\quad S_{fv} \\sim \\sum_k \\pi_k(v) C(k, \\cdot), \\quad
              C(k, j) = (1 - \\epsilon) [j = k] + \\frac{\\epsilon}{K - 1} [j \\ne k]

    The moved image is π, ``(K, *shape)``: label probabilities carried by the deformation, one in sum. The fixed one is S as zeros and a one,
    ``(K, *shape)``. A voxel with a NaN among its K numbers is missing. Site: ``error``, ε, a scalar, unless ``confusion`` is given. ``update`` is one
    step of EM, the mistakes being the hidden variable. The gradient is C(k, S_v) / Σ_l π_l C(l, S_v); the curvature is the expected one of each value
    alone, Σ_j C(k, j)² / Σ_l π_l C(l, j).

    Arguments:
        labels: K, two or more.
        error: e, the prior's mode of ε; certainty: n_0, voxels.
        confusion: C, ``(K, K)``, rows one in sum, positive; then nothing is learned.
        tempering: of ``Similarity``.

    References: Warfield, Zou & Wells, IEEE TMI 2004 (confusion matrices by EM).
    """

    confusion: Tensor | None

    def __init__(
        self, labels: int, error: float = 0.05, certainty: float = 100.0, confusion: Tensor | None = None, tempering: float = 1.0
    ) -> None:
        super().__init__(tempering)
        check_positive(certainty=certainty)
        if labels < 2 or not 0 < error < 1:
            raise ValueError(f"expected at least two labels and 0 < error < 1, got {labels} and {error}")
        if confusion is not None:
            if confusion.shape != (labels, labels) or not bool((confusion > 0).all()):
                raise ValueError(f"expected a positive confusion matrix of shape {(labels, labels)}, got {tuple(confusion.shape)}, {confusion}")
            if not torch.allclose(confusion.sum(-1), torch.ones_like(confusion[0]), atol=1e-5):
                raise ValueError(f"expected rows of the confusion matrix to sum to one, got {confusion.sum(-1)}")
        self.labels, self.error, self.certainty = labels, error, certainty
        self.register_buffer("confusion", confusion)

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        if self.confusion is not None:
            return {}
        one, n = moved.new_ones(()), self.certainty
        return {"error": Beta((1 + n * self.error) * one, (1 + n * (1 - self.error)) * one)}

    def confusion_matrix(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """C, ``(*batch, K, K)``."""
        if self.confusion is not None:
            return self.confusion.to(moved)
        error = latents["error"][..., None, None]
        same = torch.eye(self.labels, dtype=moved.dtype, device=moved.device)
        return (1 - error) * same + error / (self.labels - 1) * (1 - same)

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        matrix = self.confusion_matrix(moved, latents)
        batch = matrix.ndim - 2
        check_channels(moved, batch, self.labels)
        missing = moved.isnan().any(batch)
        filled = moved.masked_fill(missing.unsqueeze(batch), 1 / self.labels)
        return OneHotLabels((matrix.mT @ filled.flatten(batch + 1)).reshape(moved.shape), missing, batch)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        check_channels(moved, 0, self.labels)
        return {} if self.confusion is not None else {"error": moved.new_tensor(self.error)}

    def _flat(self, moved: Tensor, fixed: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Voxels on one axis: where both are known, ``(*batch, 1, N)``, and both, ``(*batch, K, N)``, equal probabilities where not."""
        check_channels(moved, batch, self.labels)
        seen, *_ = both_known(moved, fixed)
        seen = seen.all(batch, keepdim=True)
        return seen.flatten(batch + 1), moved.masked_fill(~seen, 1 / self.labels).flatten(batch + 1), fixed.masked_fill(~seen, 0.0).flatten(batch + 1)

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.confusion is not None:
            return {}
        matrix = self.confusion_matrix(moved, latents)
        seen, m, f = self._flat(moved, fixed, matrix.ndim - 2)
        right = (1 - latents["error"])[..., None] * (m * f).sum(-2)
        total = ((matrix.mT @ m) * f).sum(-2) + ~seen[..., 0, :]
        mistakes = ((1 - right / total) * seen[..., 0, :]).sum(-1)
        count = seen.sum((-2, -1)).to(mistakes)
        return {"error": (self.tempering * mistakes + self.certainty * self.error) / (self.tempering * count + self.certainty)}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        matrix = self.confusion_matrix(moved, latents)
        seen, m, f = self._flat(moved, fixed, matrix.ndim - 2)
        inverse = 1 / (matrix.mT @ m)
        gradient, curvature = matrix @ (f * inverse), matrix**2 @ inverse
        return (gradient * seen).reshape(moved.shape), (curvature * seen).reshape(moved.shape)
