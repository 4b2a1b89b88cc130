"""Scores: the gradient of each independent datum's log density in a model's latents. A model gives them, a Laplace posterior is made of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from probmed.fields import GaussianField


@dataclass(frozen=True)
class Scores:
    """Gradients of each datum's log density at the mode.

    Arguments:
        dense: ``(N, P)``.
        precision: the prior's, of the dense block: ``(P,)`` if diagonal or ``(P, P)``.
        nodes: the field's node that each datum sees, ``(N,)`` int64, flat; or None where the model has no field.
        slopes: gradient in that node's vector, ``(N, d)``.
        field: the field's prior.
    """

    dense: Tensor
    precision: Tensor
    nodes: Tensor | None = None
    slopes: Tensor | None = None
    field: GaussianField | None = None
