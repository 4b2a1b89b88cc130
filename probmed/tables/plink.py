"""PLINK 1 binary genotypes on disk: the tables beside them, and whether all three fit together.

``.bed``: bytes 6c 1b, then 01 for SNP by SNP, then ⌈N/4⌉ bytes for each SNP; two bits a person from the lowest: 00 homozygous A1, 01 missing,
10 heterozygous, 11 homozygous A2. ``.bim``: chromosome, SNP, centimorgans, base pair, A1, A2. ``.fam``: family, individual, father, mother, sex
(1 male, 2 female, 0 unknown), phenotype.

Reference: PLINK 1.9, File format reference (cog-genomics.org/plink/1.9/formats).
"""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path

import pandas as pd

from probmed.volumes.files import PathLike, UnusableInput, read_bytes

_MAGIC, _SNP_MAJOR = b"\x6c\x1b", b"\x01"
_SEX = {"1": "male", "2": "female", "0": "unknown"}
_CHROMOSOMES = {"X": "23", "Y": "24", "XY": "25", "M": "26", "MT": "26"}


def bed_path(path: PathLike) -> Path:
    """``DATA.bed`` of ``DATA`` or ``DATA.bed``, as PLINK names a file set by its stem."""
    path = Path(path)
    return path if path.suffix == ".bed" else path.with_name(path.name + ".bed")


def read_fam(path: Path) -> pd.DataFrame:
    """Columns family, individual, father, mother (``"0"``: unknown) and sex (male, female, unknown).

    Sex coded otherwise counts as unknown, as in PLINK, with a warning.

    Raises:
        UnusableInput: where the file is not that, or a person is in it twice.
    """
    table = _fields(path, ["family", "individual", "father", "mother", "sex", "phenotype"]).drop(columns="phenotype")
    repeated = table[table.duplicated(["family", "individual"])]
    if len(repeated):
        family, individual = repeated.iloc[0][["family", "individual"]]
        raise UnusableInput(path, f"has person {family} {individual} (FID IID) more than once", "rename or remove all but one")
    other = ~table["sex"].isin(_SEX)
    if other.any():
        codes = ", ".join(sorted(table["sex"][other].unique())[:3])
        warnings.warn(f"{path}: has sex coded as {codes}, expected 1, 2 or 0; unknown for {int(other.sum())} people", stacklevel=3)
    return table.assign(sex=table["sex"].map(_SEX).fillna("unknown"))


def read_bim(path: Path) -> pd.DataFrame:
    """Columns chromosome (PLINK's numbers, 23 for X), name, position (base pairs, from 1), a1 and a2 (``"0"``: not known).

    A SNP named ``.`` has the name chromosome:position:A1:A2.

    Raises:
        UnusableInput: where the file is not that, or a SNP is in it twice.
    """
    table = _fields(path, ["chromosome", "name", "cm", "position", "a1", "a2"]).drop(columns="cm")
    position = pd.to_numeric(table["position"], errors="coerce")
    wrong = position.isna() | (position % 1 != 0)
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise UnusableInput(path, f"has no whole number as position (column 4) in line {row + 1}: {table['position'][row]!r}", "correct the line")
    table["position"] = position.astype("int64")
    table["chromosome"] = table["chromosome"].map({name: chromosome(name) for name in table["chromosome"].unique()})
    unnamed = table["name"] == "."
    table.loc[unnamed, "name"] = table[unnamed].astype(str)[["chromosome", "position", "a1", "a2"]].agg(":".join, axis=1)
    repeated = table["name"][table["name"].duplicated()]
    if len(repeated):
        raise UnusableInput(path, f"has SNP {repeated.iloc[0]} more than once ({len(repeated)} such lines)", "rename or remove all but one")
    return table


def chromosome(name: str) -> str:
    """PLINK's number of a chromosome: ``"6"`` of ``chr6``, ``"23"`` of ``X``; other names as they are."""
    plain = name[3:] if name.lower().startswith("chr") else name
    return _CHROMOSOMES.get(plain.upper(), plain)


def check_bed(path: Path, people: int, snps: int) -> None:
    """Raises UnusableInput where the file does not hold this many people and SNPs, SNP by SNP."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(3)
    except FileNotFoundError as error:
        raise UnusableInput(path, "does not exist", "check the path; .bed, .bim and .fam have one stem") from error
    except OSError as error:
        raise UnusableInput(path, f"cannot be read: {error.strerror or error}", "check the path and its permissions") from error
    if head[:2] != _MAGIC:
        raise UnusableInput(path, "is no PLINK 1 .bed file: its first bytes are others", "make one, for instance with plink --make-bed")
    if head[2:] != _SNP_MAJOR:
        raise UnusableInput(path, "is stored person by person, not SNP by SNP", "rewrite it with plink --make-bed")
    expected = 3 + -(-people // 4) * snps
    if size != expected:
        fault = f"has {size} bytes, expected {expected} for {people} people in .fam and {snps} SNPs in .bim"
        raise UnusableInput(path, fault, "copy all three files again, from one place")


def _fields(path: Path, names: list[str]) -> pd.DataFrame:
    """A file without a row of names, fields between blanks or tabs, as text."""
    remedy = f"give lines of {len(names)} fields: {', '.join(names)}"
    try:
        text = read_bytes(path).decode("utf-8")
        table = pd.read_csv(io.StringIO(text), sep=r"\s+", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    except UnusableInput:
        raise
    except ValueError as error:  # pandas's errors and those of the encoding are of this kind
        raise UnusableInput(path, f"is no PLINK table ({error})", remedy) from error
    if table.shape[1] != len(names):
        raise UnusableInput(path, f"has {table.shape[1]} columns, expected {len(names)}", remedy)
    short = (table.iloc[:, -1] == "").to_numpy()
    if short.any():
        raise UnusableInput(path, f"has less than {len(names)} fields in line {int(short.argmax()) + 1}", remedy)
    return table.set_axis(names, axis=1)
