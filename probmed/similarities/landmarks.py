"""Points that correspond."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from probmed.similarities.likelihood import IncompleteImage, Similarity, both_known, check_positive, scaled_inverse_chi2


class Landmarks(Similarity):
    """Points that correspond.

    .. math:: y_i \\sim N(\\varphi(x_i), s^2 \\, sd_i^2 I), \\quad s^2 \\sim \\text{Scale-inv-}\\chi^2(n_0, 1)

    The moved "image" is φ(x), ``(N, d)``, and the fixed one y, ``(N, d)``, both mm; NaN where a landmark was not found. Site: ``landmark_scale``, s²,
    a scalar, where ``certainty`` is given; else s is one. ``update`` gives its posterior mode; the curvature, 1 / (s² sd²), is exact.

    Arguments:
        sd_mm: the accuracy with which landmarks are placed: a number, or a tensor for ``(N, d)``, as ``(N, 1)`` for one a landmark.
        certainty: n_0, in coordinates; None where the accuracy is known.
        tempering: of ``Similarity``.
    """

    sd_mm: Tensor

    def __init__(self, sd_mm: float | Tensor = 1.0, certainty: float | None = None, tempering: float = 1.0) -> None:
        super().__init__(tempering)
        sd = torch.as_tensor(sd_mm, dtype=torch.float64)
        if not bool((sd > 0).all()):
            raise ValueError(f"expected sd_mm > 0, got {sd_mm}")
        if certainty is not None:
            check_positive(certainty=certainty)
        self.certainty = certainty
        self.register_buffer("sd_mm", sd)

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        return {} if self.certainty is None else {"landmark_scale": scaled_inverse_chi2(self.certainty, 1.0, moved.new_ones(()))}

    def _sd(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """s sd, against the points."""
        sd = self.sd_mm.to(moved)
        return sd if self.certainty is None else sd * latents["landmark_scale"].sqrt()[..., None, None]

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        if moved.ndim < 2:
            raise ValueError(f"expected points of shape (*batch, N, d), got {tuple(moved.shape)}")
        missing = moved.isnan()
        return IncompleteImage(Normal(moved.masked_fill(missing, 0.0), self._sd(moved, latents)), missing, moved.ndim - 2)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """The posterior mode."""
        return self.update(moved, fixed, {})

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.certainty is None:
            return {}
        seen, m, f = both_known(moved, fixed)
        total, count = ((f - m) / self.sd_mm.to(moved)).square().sum((-2, -1)), seen.sum((-2, -1)).to(m)
        return {"landmark_scale": (self.tempering * total + self.certainty) / (self.tempering * count + self.certainty + 2)}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen, m, f = both_known(moved, fixed)
        precision = self._sd(moved, latents) ** -2
        return precision * (f - m), precision * seen
