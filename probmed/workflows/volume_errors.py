"""How far true volumes are from what a network's probabilities add up to, on scans that its training has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t
from torch import Tensor

LEAST = 3
"""Scans that have to have each label, for errors to be learned."""


@dataclass(frozen=True)
class VolumeErrors:
    """The logarithm of true volume over sum of probabilities is normal for each label; that of a further scan, given n of them, has a t distribution:

    .. math:: (e - m) / (s \\sqrt{1 + 1/n}) \\sim t_{n-1}

    Arguments:
        means, sds, counts: m, s and n of each label but the background.

    References: Gelman et al., Bayesian Data Analysis, 3rd edition, section 3.2.
    """

    means: tuple[float, ...]
    sds: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.means) == len(self.sds) == len(self.counts) or min(self.sds) <= 0 or min(self.counts) < LEAST:
            raise ValueError(f"expected as many means as sds > 0 and counts >= {LEAST}, got {self.means}, {self.sds} and {self.counts}")

    @classmethod
    def of(cls, found: Tensor, true: Tensor) -> VolumeErrors | None:
        """From sums of probabilities and true volumes of scans, ``(N, K)`` in one unit; None where too few scans have a label, or do not differ.

        A scan that lacks a label says nothing of it.
        """
        errors = [(b / a).log() for a, b in ((x[y > 0], y[y > 0]) for x, y in zip(found.double().mT, true.double().mT, strict=True))]
        if not errors or min(len(e) for e in errors) < LEAST or min(float(e.std()) for e in errors) <= 0:
            return None
        return cls(tuple(float(e.mean()) for e in errors), tuple(float(e.std()) for e in errors), tuple(len(e) for e in errors))

    @classmethod
    def read(cls, rows: Sequence[Sequence[float]] | None) -> VolumeErrors | None:
        """Of rows mean, sd and count, as ``rows`` has them.

        Raises:
            ValueError: for rows that no errors have.
        """
        if rows is None:
            return None
        means, sds, counts = zip(*rows, strict=True)
        return cls(tuple(map(float, means)), tuple(map(float, sds)), tuple(map(int, counts)))

    @property
    def rows(self) -> list[tuple[float, float, int]]:
        return list(zip(self.means, self.sds, self.counts, strict=True))

    def medians(self, found: Tensor) -> Tensor:
        """Of true volumes, of sums of probabilities ``(*batch, K)``, in their unit."""
        return found * torch.tensor(self.means, dtype=found.dtype).exp()

    def quantiles(self, found: Tensor, levels: Tensor) -> Tensor:
        """Of true volumes, at levels ``(*batch, K)`` within (0, 1); where these are drawn evenly, draws of true volumes."""
        spread, freedom = self._scales()
        return self.medians(found) * (torch.from_numpy(t.ppf(levels.numpy(), freedom.numpy())) * spread).exp().to(found)

    def levels(self, found: Tensor, volumes: Tensor) -> Tensor:
        """Probability of smaller volumes than these, ``(*batch, K)``; evenly distributed where the errors are as they were."""
        spread, freedom = self._scales()
        distance = (volumes.double() / self.medians(found.double())).log() / spread
        return torch.from_numpy(t.cdf(distance.numpy(), freedom.numpy()))

    def _scales(self) -> tuple[Tensor, Tensor]:
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return torch.tensor(self.sds, dtype=torch.float64) * (1 + 1 / counts).sqrt(), counts - 1
