"""One call from a model and data to a posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probmed.grids import Grid, MaskedGrid
from probmed.inference.em import em
from probmed.inference.guides import structured
from probmed.inference.laplace import laplace_draws
from probmed.inference.posterior import Posterior
from probmed.inference.svi import fit
from probmed.volumes import Volume, scaled


def infer(
    model: Any, *data: Any, draws: int = 50, seed: int = 0, steps: int = 1000, rank: int = 0, spacing_mm: float = 3.0, **options: Any
) -> Posterior:
    """The posterior of any model: block ascent and Laplace where the model has closed forms and scores, SVI with a structured guide elsewhere.

    Arguments:
        data: what the model is called with; a ``Volume`` stands for its image, ``(1, *shape)`` in units of its foreground's mean, and its grid.
        draws: joint draws of all latents.
        spacing_mm: a ``Volume`` is fitted on every n-th voxel, about this far apart; the posterior's labels and volumes are the whole scan's.
        steps, rank: of SVI, where that is used, and of its guides of fields (``FieldGuide``); options: of ``em`` or ``fit``.

    Raises:
        ValueError: for a rank where the posterior is Laplace's, whose covariance is whole.
    """
    arguments: list[Any] = []
    fitted_on: list[Any] = []
    for item in data:
        whole = _image_and_grid(item) if isinstance(item, Volume) else [item]
        arguments += whole
        fitted_on += _subsample(whole[0], whole[1], spacing_mm) if isinstance(item, Volume) else whole
    torch.manual_seed(seed)
    if hasattr(model, "em_step") and hasattr(model, "scores"):
        if rank:
            raise ValueError(f"expected no rank for a {type(model).__name__}, whose posterior is Laplace's, got {rank}")
        mode = em(model, *fitted_on, **options)
        generator = torch.Generator(next(iter(mode.state.values())).device).manual_seed(seed)
        dense, field = laplace_draws(model.scores(mode.state, *fitted_on), draws, model.tempering, generator)
        attributes = {"method": "block ascent and Laplace", "converged": mode.converged, "rounds": len(mode.rounds), "seed": seed}
        return Posterior(model.moved(mode.state, dense, field), mode.state, model, tuple(arguments), None, attributes)
    guide = structured(model, *fitted_on, rank=rank)
    fitted = fit(model, guide, *fitted_on, steps=steps, seed=seed, **options)
    posterior = Posterior.from_guide(model, guide, *fitted_on, draws=draws, seed=seed)
    posterior.data = tuple(arguments)
    posterior.log_evidence = fitted.elbo
    posterior.attributes = {"method": "SVI", "converged": fitted.converged, "steps": fitted.steps, "seed": seed}
    return posterior


def _image_and_grid(scan: Volume) -> list[Any]:
    solid = scan.as_3d()
    return [scaled(solid.data)[None], solid.grid]


def _subsample(image: Tensor, grid: Grid, spacing_mm: float) -> tuple[Tensor, MaskedGrid]:
    steps = [max(1, round(spacing_mm / h)) for h in grid.spacing]
    every = MaskedGrid(grid.subsampled(steps), torch.ones(grid.subsampled(steps).shape, dtype=torch.bool))
    return every.gather(image[(slice(None), *(slice(None, None, n) for n in steps))]), every
