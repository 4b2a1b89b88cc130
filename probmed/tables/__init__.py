"""Tables: visits of people over time, one row a person, and genotypes; and the same people from all of them in one order.

Read: long tables in TSV or CSV (UTF-8, a row of names), and PLINK 1 binary genotypes (``.bed``, ``.bim``, ``.fam``), which are never held in memory
as a whole. Whatever is left out, people or SNPs, is recorded with its reason as an ``Omission``, fit for a JSON sidecar.
"""

from probmed.tables.alleles import Alignment, aligned
from probmed.tables.clinical import read_with_clinical
from probmed.tables.codings import GenotypeCoding
from probmed.tables.covariates import CovariateCoding
from probmed.tables.files import check_columns, read_subjects, read_table
from probmed.tables.folds import folds, parts_of
from probmed.tables.genotypes import Genotypes
from probmed.tables.joins import Joined, join
from probmed.tables.omissions import Omission
from probmed.tables.snp_sets import SnpSet, read_snp_sets
from probmed.tables.visits import Changes, Visits

__all__ = [
    "Alignment",
    "Changes",
    "CovariateCoding",
    "GenotypeCoding",
    "Genotypes",
    "Joined",
    "Omission",
    "SnpSet",
    "Visits",
    "aligned",
    "check_columns",
    "folds",
    "join",
    "parts_of",
    "read_snp_sets",
    "read_subjects",
    "read_table",
    "read_with_clinical",
]
