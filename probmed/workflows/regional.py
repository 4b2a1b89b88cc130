"""What explains how volumes of regions change: a region's log volume, from coefficients of deformations, as the scalar of a rate.

The coefficients are those of registrations, or decoded from codes, whose own variances say nothing of a region's: a decoder may bend and scale them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from probmed.models.longitudinal_field import FieldBasis
from probmed.tables import Genotypes, Visits
from probmed.transforms import Velocity
from probmed.workflows.growth import Body, Growth, LabelledScan, RegionWeights, with_columns
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.shape_codes import ShapeCodes

SHARES = ("share", "share_error", "share_low", "share_high", "statistic", "p")


def region_weights(basis: FieldBasis, atlas: LabelledScan) -> RegionWeights:
    """Of the atlas's labels on the basis's lattice."""
    return RegionWeights.of(Body.of_atlas(atlas), basis.grid)


def log_volumes(basis: FieldBasis, regions: RegionWeights, coefficients: Tensor) -> Tensor:
    """Logs of volumes over those at baseline, ``(N, K)``, of the regions where coefficients ``(N, J)`` are of the deformation since then."""
    found = []
    for each in coefficients:
        change = Velocity(basis.grid, basis.fields(each[None])[0]).exp(both=False)
        found.append(regions.volumes(change.jacobian_determinant(basis.grid)))
    return (torch.stack(found) / regions.weights.sum(1)).log()


def region_table(
    visits: Visits,
    rows: Tensor,
    coefficients: Tensor,
    basis: FieldBasis,
    atlas: LabelledScan,
    settings: RateSettings,
    genotypes: Genotypes | None = None,
    kernels: Mapping[str, Tensor] | None = None,
) -> pd.DataFrame:
    """A row a region and kernel: which share of the variance of the region's yearly log change the kernel explains, with its interval and test.

    Arguments:
        rows: places of the later visits, ``(N,)``. coefficients: theirs, ``(N, J)``.
        kernels: between the people, where they are known: of ``fit_rates``.
    """
    regions = region_weights(basis, atlas)
    columns = tuple(f"region_{index:04d}" for index in regions.indices)
    table = with_columns(visits, rows, log_volumes(basis, regions, coefficients), columns)
    found = []
    for index, name, column in zip(regions.indices, regions.names, columns, strict=True):
        result = fit_rates(table, replace(settings, scalar=column), genotypes, kernels=kernels)
        kernels, components = result.kernels, result.component_table()
        components = components.dropna(subset=["share"])[["component", *SHARES]]
        found.append(components.assign(index=index, name=name)[["index", "name", "component", *SHARES]])
    return pd.concat(found, ignore_index=True)


def regions_of_growth(growth: Growth, genotypes: Genotypes | None = None) -> pd.DataFrame:
    """``region_table`` of what was registered, seen through the basis."""
    visits = growth.rates.joined.visits
    table = torch.tensor(visits.table[list(growth.columns)].to_numpy(copy=True))
    later = torch.tensor(visits.table["subject"].duplicated().to_numpy()) & ~table.isnan().any(1)
    rows = later.nonzero()[:, 0]
    return region_table(visits, rows, table[rows], growth.basis, growth.atlas, growth.settings.rates, genotypes, growth.rates.kernels)


@torch.no_grad()
def regions_of_codes(codes: ShapeCodes, genotypes: Genotypes | None = None) -> pd.DataFrame:
    """``region_table`` of what is decoded from each scan's codes, as the scan alone has them: not drawn to what the kernels expect."""
    rows = (~codes.coefficients.isnan().all(1)).nonzero()[:, 0]
    mean, _ = codes.guide.encoder(codes.coefficients[rows]).chunk(2, -1)
    decoded = codes.scale * codes.model.decoder(mean)
    return region_table(codes.visits, rows, decoded, codes.basis, codes.atlas, codes.settings.growth.rates, genotypes)
