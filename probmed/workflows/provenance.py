"""Where a result comes from: what was run, on which files, with which versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from probmed import __version__
from probmed.volumes import sha256

_PACKAGES = ("torch", "pyro-ppl", "numpy", "nibabel", "nilearn")


@dataclass(frozen=True)
class Provenance:
    """What makes a result reproducible; nothing in it depends on when it was run.

    Arguments:
        command: as typed.
        seed: of all random numbers.
        inputs: path as given → SHA-256 of the file.
        versions: package → version.
        warnings: what was doubtful about the inputs, a line each.
    """

    command: str
    seed: int
    inputs: dict[str, str]
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, command: str, seed: int, inputs: Sequence[str], warnings: Sequence[str] = ()) -> Provenance:
        """Checksums of the inputs and versions of the packages now.

        Raises:
            UnusableInput: where an input cannot be read.
        """
        checksums = {str(path): sha256(path) for path in inputs}
        return cls(command, seed, checksums, versions(), tuple(warnings))

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it, in the words of BIDS derivatives."""
        out: dict[str, Any] = {
            "GeneratedBy": [
                {"Name": "probmed", "Version": __version__, "Command": self.command, "Seed": self.seed}
            ],
            "Sources": [{"File": path, "SHA256": checksum} for path, checksum in self.inputs.items()],
            "Versions": self.versions,
        }
        if self.warnings:
            out["Warnings"] = list(self.warnings)
        return out


def versions() -> dict[str, str]:
    """Versions of probmed, Python and the packages that results depend on."""
    out = {"probmed": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[package] = "unknown"
    return out
