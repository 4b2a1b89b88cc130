"""The same people from several tables, in one order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from probmed.tables.genotypes import Genotypes, Identity
from probmed.tables.omissions import Omission, omission, summary
from probmed.tables.visits import Visits
from probmed.volumes.files import UnusableInput


@dataclass(frozen=True, eq=False)
class Joined:
    """People that every table has; each table holds these alone, in the order of ``subjects``.

    Arguments:
        subjects: P, in the order of their visits.
        visits: several rows a person, together.
        clinical: a row a person, by subject; None where none was given.
        genotypes: a row a person; None where none were given.
        omissions: people left out, by where they lack.
    """

    subjects: tuple[str, ...]
    visits: Visits
    clinical: pd.DataFrame | None
    genotypes: Genotypes | None
    omissions: tuple[Omission, ...]

    def summary(self) -> str:
        """One line."""
        return f"{len(self.subjects)} people in all tables; {summary(self.omissions)}"

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it, with the identifiers of who was left out."""
        return {"People": len(self.subjects), "Subjects": list(self.subjects), "LeftOut": [each.record() for each in self.omissions]}


def join(visits: Visits, clinical: pd.DataFrame | None = None, genotypes: Genotypes | None = None, *, by: Identity = "individual") -> Joined:
    """Keep the people that all tables have. Names are compared as text, letter by letter.

    Arguments:
        clinical: by subject, as ``read_subjects`` gives it.
        by: which identifier of the genotypes is the subject: the individual's (IID), or ``FID_IID``.

    Raises:
        UnusableInput: where no one is in all tables, or an identifier is not one person's.
        ValueError: where the clinical table has a subject twice.
    """
    tables: dict[str, tuple[str, ...]] = {"visits": visits.subjects}
    if clinical is not None:
        if clinical.index.duplicated().any():
            raise ValueError(f"expected a row a subject, got several of {clinical.index[clinical.index.duplicated()][0]!r}")
        tables["clinical table"] = tuple(clinical.index)
    if genotypes is not None:
        tables["genotypes"] = genotypes.identifiers(by)
    shared = set.intersection(*map(set, tables.values()))
    if not shared:
        examples = ", ".join(f"{names[0]} in the {table}" for table, names in tables.items())
        raise UnusableInput(visits.path, f"shares no subject with the other tables ({examples})", "name people in the same way in all tables")
    subjects = tuple(name for name in visits.subjects if name in shared)
    return Joined(
        subjects,
        visits.of_subjects(subjects),
        None if clinical is None else clinical.loc[list(subjects)],
        None if genotypes is None else genotypes.of_people(subjects, by),
        (*visits.omissions, *_lacking(tables)),
    )


def _lacking(tables: Mapping[str, tuple[str, ...]]) -> tuple[Omission, ...]:
    """Everyone who is not in all tables, by the tables that lack them."""
    everyone = dict.fromkeys(name for names in tables.values() for name in names)
    members = {table: set(names) for table, names in tables.items()}
    reasons: dict[str, list[str]] = {}
    for name in everyone:
        if lacking := [table for table, names in members.items() if name not in names]:
            reasons.setdefault(f"not in the {' and '.join(lacking)}", []).append(name)
    return tuple(each for reason, names in reasons.items() for each in omission("subjects", reason, names))
