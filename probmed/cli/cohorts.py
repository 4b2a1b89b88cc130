"""What commands that read a cohort share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from probmed.atlases import default_atlas
from probmed.tables import SnpSet, read_snp_sets
from probmed.volumes import UnusableInput, read_scan
from probmed.workflows.growth import LabelledScan
from probmed.workflows.propagation import read_moving_labels


class TimeUnit(str, Enum):
    """Of the column of time."""

    years = "years"
    days = "days"


class Genetic(str, Enum):
    """``workflows.genetic_kernels.KINDS``."""

    grm = "grm"
    ibs = "ibs"
    gaussian = "gaussian"


AtlasImageOption = Annotated[Path | None, typer.Option(help="Image to which scans are brought; MNI152 by default.", show_default=False)]
AtlasLabelsOption = Annotated[Path | None, typer.Option(help="Its label map, on the same voxels; names in a .tsv beside it.", show_default=False)]
SpacingOption = Annotated[
    float | None, typer.Option(min=0.01, help="Of the fields of change, mm; 3 by default, less for a small atlas.", show_default=False)
]
GenotypesOption = Annotated[Path | None, typer.Option(help="PLINK .bed file of the same people, with .bim and .fam beside it.", show_default=False)]
FrequencyOption = Annotated[float, typer.Option(min=0, max=0.5, help="Of the rarer allele of SNPs that are used.")]
MissingOption = Annotated[float, typer.Option(min=0, max=1, help="Share of people without the genotype, above which a SNP is not used.")]
GeneticOption = Annotated[
    Genetic, typer.Option(help="Kernel of genotypes: relationship matrix, alleles identical by state, or Gaussian of standardised counts.")
]
RegionsOption = Annotated[
    Path | None,
    typer.Option(help="Table of sets of SNPs, a kernel each: region, and snp, or chromosome, start and end.", show_default=False),
]
ClinicalTableOption = Annotated[
    Path | None, typer.Option(help="Table with some of the covariates, a row a person, in the same column of people.", show_default=False)
]
MeanOption = Annotated[str, typer.Option(metavar="NAMES", help="Columns, with commas, whose effect on the rate is linear.", show_default=False)]
ClinicalOption = Annotated[str, typer.Option(metavar="NAMES", help="Columns of the clinical kernel.", show_default=False)]
PhenotypeOption = Annotated[str, typer.Option(metavar="NAMES", help="Columns of the phenotype kernel.", show_default=False)]
CategoricalOption = Annotated[str, typer.Option(metavar="NAMES", help="Which of these columns hold levels, not numbers.", show_default=False)]
SubjectOption = Annotated[str, typer.Option(help="Column with the person.")]
TimeOption = Annotated[str, typer.Option(help="Column with the time of the visit.")]
TimeUnitOption = Annotated[TimeUnit, typer.Option(help="Its unit.")]


def names_in(text: str) -> tuple[str, ...]:
    """Columns, with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def read_sets(regions: Path | None, genotypes: Path | None) -> tuple[SnpSet, ...]:
    """
    Raises:
        UnusableInput: where there are sets and no genotypes, or as ``read_snp_sets``.
    """
    if regions is None:
        return ()
    if genotypes is None:
        raise UnusableInput(regions, "is of no use without genotypes", "give --genotypes as well")
    return read_snp_sets(regions)


def read_atlas(image: Path | None, labels: Path | None) -> LabelledScan:
    """
    Raises:
        UnusableInput: where one is given without the other, or as ``read_moving_labels``.
    """
    if image is None and labels is None:
        return LabelledScan.of(default_atlas())
    if image is None or labels is None:
        raise UnusableInput(str(image or labels), "is an atlas's image or labels alone", "give both --atlas-image and --atlas-labels, or neither")
    scan = read_scan(image)
    return LabelledScan(scan, *read_moving_labels(labels, scan))
