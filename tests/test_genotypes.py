"""PLINK files against dense NumPy: the alleles counted, filters, codings, relationships, alignment, and files that are not right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bed_reader import to_bed  # type: ignore[import-untyped]
from numpy.typing import NDArray

from probmed.kernels import GeneticRelationship
from probmed.tables import GenotypeCoding, Genotypes, aligned, plink
from probmed.volumes import UnusableInput

pytestmark = pytest.mark.usefixtures("float64")

NAN = float("nan")
Array = NDArray[np.float64]


def write(
    path: Path,
    counts: Array,
    alleles: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    chromosomes: Sequence[str] | None = None,
    people: Sequence[str] | None = None,
) -> Path:
    """A file set with counts of A1; alleles as ``"A1 A2"``."""
    n, m = counts.shape
    pairs = [pair.split() for pair in (alleles or ["A G"] * m)]
    properties = {
        "fid": [f"fam{i}" for i in range(n)],
        "iid": list(people or [f"sub{i}" for i in range(n)]),
        "sex": [1 + i % 2 for i in range(n)],
        "sid": list(names or [f"rs{j}" for j in range(m)]),
        "chromosome": list(chromosomes or ["1"] * m),
        "bp_position": list(positions or range(100, 100 * (m + 1), 100)),
        "allele_1": [one for one, _ in pairs],
        "allele_2": [two for _, two in pairs],
    }
    to_bed(path, counts, properties=properties, count_A1=True)
    return path


def random_counts(n: int, m: int, missing: float = 0.0, seed: int = 0) -> Array:
    """Of SNPs that all vary."""
    rng = np.random.default_rng(seed)
    counts = rng.binomial(2, rng.uniform(0.1, 0.6, m), (n, m)).astype(np.float64)
    counts[0], counts[1] = 0, 1
    counts[rng.random((n, m)) < missing] = NAN
    return counts


def same(tensor: torch.Tensor, array: Array) -> None:
    torch.testing.assert_close(tensor, torch.from_numpy(np.ascontiguousarray(array)), equal_nan=True, rtol=1e-12, atol=1e-12)


# Which allele is counted.

FAM = "f1 a 0 0 1 -9\nf1 b 0 0 2 -9\nf2 c a b 0 -9\nf2 d 0 0 1 -9\nf3 e 0 0 2 -9\n"
BIM = "1\trs1\t0\t1000\tA\tG\nX\t.\t0\t2000\tT\tTC\n"
# Two bits a person, from the lowest: rs1 is A1A1, missing, A1A2, A2A2 | A1A2; the other is A2A2, A2A2, A2A2, A1A1 | missing.
BED = bytes([0x6C, 0x1B, 0x01, 0b11_10_01_00, 0b00_00_00_10, 0b00_11_11_11, 0b00_00_00_01])


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    for suffix, content in ((".fam", FAM), (".bim", BIM)):
        (tmp_path / f"hand{suffix}").write_text(content)
    (tmp_path / "hand.bed").write_bytes(BED)
    return tmp_path / "hand.bed"


def test_bits_and_alleles_are_those_of_plink(by_hand: Path) -> None:
    first = Genotypes.open(by_hand, count_A1=True)
    same(first.counts(), np.array([[2, 0], [NAN, 0], [1, 0], [0, 2], [1, NAN]]))
    assert first.snps["counted"].tolist() == ["A", "T"]
    second = Genotypes.open(by_hand.with_suffix(""), count_A1=False)
    same(second.counts(), np.array([[0, 2], [NAN, 2], [1, 2], [2, 0], [1, NAN]]))
    assert second.snps["counted"].tolist() == ["G", "TC"] and second.snps["other"].tolist() == ["A", "T"]
    same(first.frequencies + second.frequencies, np.ones(2))


def test_people_and_snps_are_named(by_hand: Path) -> None:
    genotypes = Genotypes.open(by_hand, count_A1=True)
    assert genotypes.identifiers() == ("a", "b", "c", "d", "e")
    assert genotypes.identifiers("family and individual")[2] == "f2_c"
    assert genotypes.people["sex"].tolist() == ["male", "female", "unknown", "male", "female"]
    assert genotypes.snps["name"].tolist() == ["rs1", "23:2000:T:TC"]
    assert genotypes.snps["chromosome"].tolist() == ["1", "23"] and genotypes.snps["position"].tolist() == [1000, 2000]
    assert genotypes.shape == (5, 2) and len(genotypes) == 5


def test_sex_coded_otherwise_is_unknown(by_hand: Path) -> None:
    by_hand.with_suffix(".fam").write_text(FAM.replace("0 0 2 -9", "0 0 F -9"))
    with pytest.warns(UserWarning, match="sex coded as F, expected 1, 2 or 0; unknown for 2 people"):
        genotypes = Genotypes.open(by_hand, count_A1=True)
    assert genotypes.people["sex"].tolist() == ["male", "unknown", "unknown", "male", "unknown"]


def test_a_negative_position_leaves_a_snp_out_as_plink_does(by_hand: Path) -> None:
    by_hand.with_suffix(".bim").write_text(BIM.replace("1000", "-1000"))
    genotypes = Genotypes.open(by_hand, count_A1=True)
    assert genotypes.snps["name"].tolist() == ["23:2000:T:TC"]
    assert genotypes.record()["LeftOut"] == [{"What": "SNPs", "Reason": "at a negative position", "Count": 1}]
    same(genotypes.counts(), np.array([[0.0], [0.0], [0.0], [2.0], [NAN]]))


# Selections.


@pytest.mark.parametrize("size", [None, 1, 3, 100])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_chunks_are_the_whole(tmp_path: Path, n: int, size: int | None) -> None:
    counts = random_counts(n, 7, missing=0.2)
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    chunks = list(genotypes.chunks(size=size))
    same(torch.cat(chunks, 1), counts)
    assert [chunk.shape[1] for chunk in chunks] == {None: [7], 1: [1] * 7, 3: [3, 3, 1], 100: [7]}[size]
    assert next(genotypes.chunks(dtype=torch.float32)).dtype == torch.float32
    same(genotypes.counts(), counts)


def test_people_and_snps_in_the_order_asked_for(tmp_path: Path) -> None:
    counts = random_counts(6, 5)
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    some = genotypes.of_people(["sub4", "sub0", "sub2"]).of_snps(["rs3", "rs1"])
    same(some.counts(), counts[[4, 0, 2]][:, [3, 1]])
    assert some.identifiers() == ("sub4", "sub0", "sub2") and some.snps["name"].tolist() == ["rs3", "rs1"]
    assert [(each.reason, each.names) for each in some.omissions] == [("not in the list", ("rs0", "rs2", "rs4"))]
    same(genotypes.of_people(["fam5_sub5"], by="family and individual").counts(), counts[[5]])
    same(some.of_people(["sub2"]).of_snps(["rs1"]).counts(), counts[[2]][:, [1]])


def test_individuals_of_one_name_need_their_family(tmp_path: Path) -> None:
    path = write(tmp_path / "g.bed", random_counts(3, 2), people=["one", "two", "one"])
    genotypes = Genotypes.open(path, count_A1=True)
    assert genotypes.identifiers("family and individual") == ("fam0_one", "fam1_two", "fam2_one")
    with pytest.raises(UnusableInput, match="has one as individual of several people"):
        genotypes.identifiers()


def test_regions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "g.bed",
        random_counts(4, 6),
        chromosomes=["1", "1", "1", "6", "6", "X"],
        positions=[10, 20, 30, 10, 20, 10],
    )
    genotypes = Genotypes.open(path, count_A1=True)

    def names(*regions: str) -> list[str]:
        return list(genotypes.in_regions(regions).snps["name"])

    assert names("1:20-30") == ["rs1", "rs2"]
    assert names("chr1:11-20", "6") == ["rs1", "rs3", "rs4"]
    assert names("X") == names("23:1-1,000") == ["rs5"]
    assert genotypes.in_regions(["6"]).record()["LeftOut"] == [{"What": "SNPs", "Reason": "outside 6", "Count": 4}]
    for wrong in ("1:20", "1:30-20", "1:a-b", ":1-2", "1:-5-2"):
        with pytest.raises(ValueError, match="expected a region such as"):
            genotypes.in_regions([wrong])
    with pytest.raises(UnusableInput, match=re.escape("has no SNPs left (left out: 6 SNPs (outside 7))")):
        genotypes.in_regions(["7"])


def test_filters_take_people_first_and_record_why(tmp_path: Path) -> None:
    counts = np.zeros((10, 6))
    counts[:5, 0] = 1  # frequency 0.25
    counts[:2, 1] = 1  # 0.1 exactly, at the limit; as is its complement:
    counts[:, 2] = 2 - counts[:, 1]
    counts[1, 3] = 1  # 0.05, and monomorphic without person 1, who lacks many
    counts[1, [0, 1, 2]] = NAN
    counts[5:9, 4] = NAN
    counts[:2, 4] = 2
    counts[:, 5] = 2
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    same(genotypes.person_missingness, np.isnan(counts).mean(1))
    same(genotypes.missingness, np.isnan(counts).mean(0))
    same(genotypes.frequencies, np.nanmean(counts, 0) / 2)

    everyone = genotypes.filtered(min_frequency=0.05)
    assert everyone.snps["name"].tolist() == ["rs0", "rs1", "rs2", "rs3", "rs4"]
    without = genotypes.filtered(min_frequency=1 / 18, max_person_missing=0.4, max_missing=0.4)
    assert without.snps["name"].tolist() == ["rs0", "rs1", "rs2"]
    assert "sub1" not in without.identifiers() and without.shape == (9, 3)
    assert [(each.reason, each.names) for each in without.omissions] == [
        ("more than 0.4 of SNPs missing", ("fam1 sub1",)),
        ("missing in more than 0.4 of people", ("rs4",)),
        ("monomorphic", ("rs3", "rs5")),
    ]
    assert genotypes.filtered(max_person_missing=0.5).shape[0] == 10  # at the limit: three of six
    rare = genotypes.filtered(min_frequency=0.2)
    assert rare.omissions[-1].reason == "minor-allele frequency below 0.2"
    record = json.loads(json.dumps(without.record()))
    assert (record["People"], record["PeopleInFile"], record["SNPs"], record["SNPsInFile"]) == (9, 10, 3, 6)
    assert record["CountedAllele"] == "A1"
    assert without.summary().endswith(
        "9 people and 3 SNPs; left out: 1 people (more than 0.4 of SNPs missing), "
        "1 SNPs (missing in more than 0.4 of people), 2 SNPs (monomorphic)"
    )


@pytest.mark.parametrize(("k", "n"), [(1, 10), (9, 10), (3, 30), (57, 60)])
def test_a_snp_at_the_limit_stays(tmp_path: Path, k: int, n: int) -> None:
    """1 − p and 1 − observed/N round to the wrong side of some limits."""
    counts = np.zeros((n, 2))
    counts[:k, 0] = 2
    counts[:k, 1] = NAN
    counts[-1, 1] = 1
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    assert genotypes.filtered(min_frequency=min(k, n - k) / n).snps["name"].tolist()[0] == "rs0"
    assert genotypes.filtered(max_missing=k / n).snps["name"].tolist()[-1] == "rs1"


def test_what_no_one_has_is_left_out(tmp_path: Path) -> None:
    counts = random_counts(4, 2)
    counts[:, 0] = NAN
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    assert genotypes.filtered().omissions[0].reason == "no genotype of anyone"
    with pytest.raises(UnusableInput, match="has no people left"):
        genotypes.filtered(max_person_missing=0.4)
    with pytest.raises(ValueError, match="expected max_missing between 0 and 1, got 5"):
        genotypes.filtered(max_missing=5)


# Codings and relationships.


@pytest.mark.parametrize("alpha", [-1.0, -0.25, 0.0])
@pytest.mark.parametrize("spread", ["expected", "observed"])
@pytest.mark.parametrize("missing", ["mean", "keep"])
def test_standardised_is_the_dense_formula(tmp_path: Path, alpha: float, spread: Any, missing: Any) -> None:
    counts = random_counts(20, 9, missing=0.1)
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    p = np.nanmean(counts, 0) / 2
    variance = 2 * p * (1 - p) if spread == "expected" else np.nanvar(counts, 0)
    expected = (counts - 2 * p) * variance ** (alpha / 2)
    expected = np.nan_to_num(expected) if missing == "mean" else expected
    coding = genotypes.coding(alpha=alpha, spread=spread, missing=missing)
    same(genotypes.standardised(coding), expected)
    same(torch.cat(list(genotypes.chunks(coding, size=2)), 1), expected)
    same(coding.variances, variance ** (alpha + 1))
    assert json.loads(json.dumps(coding.record())) == {"SNPs": 9, "Alpha": alpha, "Spread": spread, "Missing": missing}
    if (alpha, spread, missing) == (-1.0, "expected", "mean"):
        same(genotypes.standardised(), expected)


def test_new_people_are_standardised_by_the_training_sample(tmp_path: Path) -> None:
    counts = random_counts(30, 6)
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    names = genotypes.identifiers()
    training, new = genotypes.of_people(names[:20]), genotypes.of_people(names[20:])
    coding, p = training.coding(), counts[:20].mean(0) / 2
    same(new.standardised(coding), (counts[20:] - 2 * p) / np.sqrt(2 * p * (1 - p)))
    same(new.standardised(new.coding(training.frequencies)), (counts[20:] - 2 * p) / np.sqrt(2 * p * (1 - p)))
    some = ["rs4", "rs1"]
    same(new.of_snps(some).standardised(coding.of_snps(some)), new.standardised(coding).numpy()[:, [4, 1]])
    with pytest.raises(ValueError, match="expected the 6 SNPs of the coding, in its order, got 2"):
        new.of_snps(some).standardised(coding)
    with pytest.raises(ValueError, match="expected SNPs of this coding, got 1 others, such as rs9"):
        coding.of_snps(["rs0", "rs9"])
    other = Genotypes.open(tmp_path / "g", count_A1=False)
    with pytest.raises(ValueError, match="counts of the coding's alleles, got others for 6 SNPs, such as rs0"):
        list(other.chunks(coding))
    with pytest.raises(ValueError, match="expected a frequency for each of 6 SNPs"):
        new.coding(torch.ones(3))


def test_a_snp_that_does_not_vary_has_no_coding(tmp_path: Path) -> None:
    counts = random_counts(5, 3)
    counts[:, 1] = 2
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True)
    with pytest.raises(ValueError, match="expected SNPs that vary, got 1 that do not, such as rs1"):
        genotypes.coding()
    counts[:, 1] = 1  # all heterozygous: Hardy and Weinberg's variance is one half, the observed none
    genotypes = Genotypes.open(write(tmp_path / "h.bed", counts), count_A1=True)
    assert genotypes.coding().frequencies[1] == 0.5
    with pytest.raises(ValueError, match="expected SNPs that vary"):
        genotypes.coding(spread="observed")


@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("alpha", [-1.0, 0.0])
def test_grm_streamed_is_dense(tmp_path: Path, size: int | None, alpha: float) -> None:
    counts = random_counts(12, 30, missing=0.15)
    counts[:, :10] = np.nan_to_num(counts[:, :10])
    genotypes = Genotypes.open(write(tmp_path / "g.bed", counts), count_A1=True).filtered()
    counts = counts[:, [int(name[2:]) for name in genotypes.snps["name"]]]
    p = np.nanmean(counts, 0) / 2
    variance = 2 * p * (1 - p)
    coded, known = np.nan_to_num(counts - 2 * p) * variance ** (alpha / 2), (~np.isnan(counts)).astype(float)
    weights = variance ** (alpha + 1)
    coding = genotypes.coding(alpha=alpha)
    same(genotypes.grm(coding, size=size), coded @ coded.T / ((known * weights) @ known.T))
    mean = genotypes.grm(coding, missing="mean", size=size)
    same(mean, coded @ coded.T / weights.sum())
    kernel = GeneticRelationship(coding.frequencies, (2 * coding.frequencies * (1 - coding.frequencies)) ** alpha)
    torch.testing.assert_close(mean, kernel(torch.from_numpy(counts)).to_dense())


def test_grm_warns_of_sex_chromosomes_and_refuses_people_without_shared_snps(tmp_path: Path) -> None:
    counts = np.array([[0, NAN, 1], [NAN, 1, NAN], [1, 0, 2], [2, 2, 0.0]])
    path = write(tmp_path / "g.bed", counts, chromosomes=["1", "1", "X"])
    genotypes = Genotypes.open(path, count_A1=True)
    with (
        pytest.warns(UserWarning, match="there are SNPs on X"),
        pytest.raises(UnusableInput, match="has people without a SNP that both have"),
    ):
        genotypes.grm()


# Two files.

CASES = {
    # alleles in the reference, alleles in the other file, what becomes of it
    "same": ("A G", "A G", "same"),
    "lower-case": ("A G", "a g", "same"),
    "swapped": ("A G", "G A", "swapped"),
    "other-strand": ("A G", "T C", "strand"),
    "other-strand-swapped": ("A G", "C T", "swapped strand"),
    "insertion": ("AT A", "A AT", "swapped"),
    "insertion-other-strand": ("CAT C", "ATG G", "strand"),
    "only-G-seen": ("A G", "0 G", "same"),
    "only-A-seen": ("A G", "0 A", "swapped"),
    "only-C-seen": ("A G", "0 C", "strand"),
    "reference-saw-only-G": ("0 G", "G A", "swapped"),
    "neither-saw-more-than-G": ("0 G", "G 0", "swapped"),
    "numbered": ("1 2", "2 1", "swapped"),
    "another": ("A G", "A C", "differ"),
    "half-in-letters": ("L H", "L X", "differ"),
    "nothing-known": ("A G", "0 0", "differ"),
    "nothing-known-and-one": ("0 G", "0 0", "differ"),
    "deletion-has-no-strand": ("A 0", "T <DEL>", "differ"),
    "palindromic": ("A T", "A T", "ambiguous"),
    "palindromic-swapped": ("C G", "G C", "ambiguous swapped"),
    "palindromic-one-seen": ("A T", "0 T", "ambiguous"),
    "palindromic-reference-saw-one": ("0 T", "A T", "ambiguous"),
}


def two_files(folder: Path) -> tuple[Genotypes, Genotypes, Array]:
    m = len(CASES)
    counts = random_counts(5, m, missing=0.1)
    reference = write(folder / "r.bed", random_counts(4, m, seed=1), [one for one, _, _ in CASES.values()], list(CASES))
    order = np.random.default_rng(2).permutation(m)
    new = write(
        folder / "n.bed", counts[:, order], [list(CASES.values())[j][1] for j in order], [list(CASES)[j] for j in order]
    )
    return Genotypes.open(new, count_A1=True), Genotypes.open(reference, count_A1=True), counts


@pytest.mark.parametrize("ambiguous", ["drop", "keep"])
def test_alleles_are_aligned(tmp_path: Path, ambiguous: Any, recwarn: pytest.WarningsRecorder) -> None:
    new, reference, counts = two_files(tmp_path)
    result, report = aligned(new, reference.snps, ambiguous=ambiguous)
    fates = {name: fate for name, (_, _, fate) in CASES.items()}
    kept = [name for name, fate in fates.items() if fate != "differ" and not ("ambiguous" in fate and ambiguous == "drop")]
    assert result.snps["name"].tolist() == kept
    places = [list(CASES).index(name) for name in kept]
    swapped = np.array(["swapped" in fates[name] for name in kept])
    same(result.counts(), np.where(swapped, 2 - counts[:, places], counts[:, places]))
    chosen = reference.of_snps(kept)
    assert result.snps.equals(chosen.snps)
    reasons = {each.reason: each.names for each in report.omissions}
    assert reasons["alleles differ from the reference's"] == tuple(n for n, f in fates.items() if f == "differ")
    assert report.swapped == swapped.sum() and report.other_strand == sum("strand" in fates[name] for name in kept)
    assert report.same == sum(fates[name] in ("same", "ambiguous") for name in kept)
    assert result.record()["Flipped"] == report.swapped
    if ambiguous == "drop":
        assert reasons["A/T or C/G, strand unclear"] == tuple(n for n, f in fates.items() if "ambiguous" in f)
        assert not recwarn.list
    else:
        assert "has 4 SNPs with alleles A/T or C/G" in str(recwarn.pop(UserWarning).message)
    json.dumps(report.record())
    assert "on the other strand; left out: 5 SNPs (alleles differ" in report.summary()


def test_aligned_twice_is_aligned_once(tmp_path: Path) -> None:
    """Flips are of what is counted now, not of the file."""
    new, reference, _ = two_files(tmp_path)
    once, _ = aligned(new, reference.snps)
    again, report = aligned(once, once.snps)
    assert torch.equal(once.counts().nan_to_num(9), again.counts().nan_to_num(9)) and report.swapped == 0
    back, report = aligned(once, once.snps.rename(columns={"counted": "other", "other": "counted"}))
    torch.testing.assert_close(back.counts(), 2 - once.counts(), equal_nan=True)
    assert report.same == 0


def test_a_coding_meets_a_file_that_counts_the_other_allele(tmp_path: Path) -> None:
    """The silent error: without alignment every product with training people would have the wrong sign."""
    counts = random_counts(20, 8)
    training = Genotypes.open(write(tmp_path / "t.bed", counts), count_A1=True)
    coding = training.coding()
    swapped = write(tmp_path / "s.bed", 2 - counts[:, :6], alleles=["G A"] * 6)
    new, _ = aligned(Genotypes.open(swapped, count_A1=True), coding.snps)
    shared = coding.of_snps(new.snps["name"].tolist())
    assert len(shared.snps) == 6
    same(new.standardised(shared), training.standardised(coding)[:, :6].numpy())


def test_alignment_by_position(tmp_path: Path) -> None:
    reference = write(tmp_path / "r.bed", random_counts(4, 5), positions=[10, 20, 30, 40, 40])
    new = write(
        tmp_path / "n.bed",
        random_counts(4, 5),
        ["G A", "A G", "A G", "A G", "A G"],
        [f"other{j}" for j in range(5)],
        positions=[10, 20, 20, 40, 50],
    )
    genotypes = Genotypes.open(new, count_A1=True)
    result, report = aligned(genotypes, Genotypes.open(reference, count_A1=True).snps, by="position")
    assert result.snps["name"].tolist() == ["rs0"] and report.swapped == 1
    assert {each.reason: each.names for each in report.omissions} == {
        "several at one position": ("rs1", "rs3", "rs4"),
        f"not in {tmp_path / 'n.bim'}": ("rs2",),
        "not in the reference": ("other4",),
    }


def test_files_without_a_common_snp(tmp_path: Path) -> None:
    one = Genotypes.open(write(tmp_path / "a.bed", random_counts(3, 2), names=["x", "y"]), count_A1=True)
    two = Genotypes.open(write(tmp_path / "b.bed", random_counts(3, 2)), count_A1=True)
    with pytest.raises(UnusableInput, match=r"a\.bim: shares no SNP with the reference by name"):
        aligned(one, two.snps)
    with pytest.raises(UnusableInput, match="alleles differ from the reference's"):
        aligned(one, one.snps.assign(counted="A", other="T"))
    three = Genotypes.open(write(tmp_path / "c.bed", random_counts(3, 2), ["A T"] * 2), count_A1=True)
    with pytest.raises(UnusableInput, match="A/T or C/G, strand unclear"):
        aligned(three, three.snps)


# Files that are not right.

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "short": (lambda p: p.write_bytes(BED[:-1]), "hand.bed: has 6 bytes, expected 7 for 5 people in .fam and 2 SNPs"),
    "long": (lambda p: p.write_bytes(BED + b"\0"), "hand.bed: has 8 bytes, expected 7"),
    "another fam": (lambda p: p.with_suffix(".fam").write_text(FAM[: FAM.index("f3")]), "hand.bed: has 7 bytes, expected 5"),
    "magic": (lambda p: p.write_bytes(b"PK" + BED[2:]), "hand.bed: is no PLINK 1 .bed file"),
    "empty bed": (lambda p: p.write_bytes(b""), "hand.bed: is no PLINK 1 .bed file"),
    "by person": (lambda p: p.write_bytes(BED[:2] + b"\0" + BED[3:]), "hand.bed: is stored person by person"),
    "no bed": (lambda p: p.unlink(), "hand.bed: does not exist; check the path; .bed, .bim and .fam have one stem"),
    "folder": (lambda p: p.rename(p.with_suffix(".old")).with_suffix(".bed").mkdir(), "hand.bed: cannot be read"),
    "no bim": (lambda p: p.with_suffix(".bim").unlink(), "hand.bim: does not exist"),
    "no fam": (lambda p: p.with_suffix(".fam").unlink(), "hand.fam: does not exist"),
    "empty bim": (lambda p: p.with_suffix(".bim").write_text(""), "hand.bim: is no PLINK table"),
    "five columns": (
        lambda p: p.with_suffix(".bim").write_text(BIM.replace("\t0\t", "\t")),
        "hand.bim: has 5 columns, expected 6; give lines of 6 fields: chromosome, name, cm, position, a1, a2",
    ),
    "short line": (
        lambda p: p.with_suffix(".bim").write_text(BIM.replace("\tTC", "")),
        "hand.bim: has less than 6 fields in line 2",
    ),
    "long line": (lambda p: p.with_suffix(".bim").write_text(BIM[:-1] + "\tA\n"), "hand.bim: is no PLINK table"),
    "position": (
        lambda p: p.with_suffix(".bim").write_text(BIM.replace("2000", "2kb")),
        "hand.bim: has no whole number as position (column 4) in line 2: '2kb'",
    ),
    "binary bim": (lambda p: p.with_suffix(".bim").write_bytes(b"\xff\xfe\x00"), "hand.bim: is no PLINK table"),
    "person twice": (
        lambda p: p.with_suffix(".fam").write_text(FAM.replace("f1 b", "f1 a")),
        "hand.fam: has person f1 a (FID IID) more than once",
    ),
    "SNP twice": (
        lambda p: p.with_suffix(".bim").write_text(BIM.replace(".", "rs1")),
        "hand.bim: has SNP rs1 more than once",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_not_right_are_named_in_one_line(by_hand: Path, fault: str) -> None:
    spoil, said = FAULTS[fault]
    spoil(by_hand)
    with pytest.raises(UnusableInput) as caught:
        Genotypes.open(by_hand, count_A1=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_goes_away_later(by_hand: Path) -> None:
    genotypes = Genotypes.open(by_hand, count_A1=True)
    by_hand.write_bytes(BED[:4])
    with pytest.raises(UnusableInput, match=r"hand\.bed: cannot be read"):
        genotypes.counts()
    by_hand.unlink()
    with pytest.raises(UnusableInput, match=r"hand\.bed: cannot be read"):
        genotypes.counts()


def test_who_is_not_there(by_hand: Path) -> None:
    genotypes = Genotypes.open(by_hand, count_A1=True)
    with pytest.raises(UnusableInput, match=re.escape("hand.fam: has no person z (1 such)")):
        genotypes.of_people(["a", "z"])
    with pytest.raises(UnusableInput, match=re.escape("hand.bim: has no SNP rs7 (2 such)")):
        genotypes.of_snps(["rs7", "rs8", "rs1"])


@pytest.mark.parametrize(("name", "number"), [("chr6", "6"), ("x", "23"), ("chrM", "26"), ("XY", "25"), ("GL000", "GL000")])
def test_chromosomes_have_plinks_numbers(name: str, number: str) -> None:
    assert plink.chromosome(name) == number


def test_a_coding_without_hardy_weinberg_is_checked() -> None:
    snps = pd.DataFrame({"name": ["a"], "counted": ["A"], "other": ["G"]})
    coding = GenotypeCoding.of(snps, torch.tensor([0.5]), torch.tensor([0.25]))
    same(coding(torch.tensor([[2.0], [NAN]])), np.array([[2.0], [0.0]]))
