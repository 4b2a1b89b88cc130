"""What is left out of a table, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Omission:
    """People, SNPs or columns left out for one reason.

    Arguments:
        what: the plural of what they are, such as ``"SNPs"``.
        reason: as a phrase, such as ``"monomorphic"``.
        names: their identifiers.
    """

    what: str
    reason: str
    names: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it."""
        return {"What": self.what, "Reason": self.reason, "Count": len(self.names), "Names": list(self.names)}


def omission(what: str, reason: str, names: Iterable[object]) -> tuple[Omission, ...]:
    """One, or none where there are no names."""
    texts = tuple(str(name) for name in names)
    return (Omission(what, reason, texts),) if texts else ()


def summary(omissions: Iterable[Omission]) -> str:
    """A clause such as ``left out: 2 subjects (not in a.fam), 1 SNPs (monomorphic)``; ``nothing left out``."""
    parts = [f"{len(each.names)} {each.what} ({each.reason})" for each in omissions]
    return f"left out: {', '.join(parts)}" if parts else "nothing left out"
