"""Long tables, covariates as numbers, and joins by subject."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bed_reader import to_bed  # type: ignore[import-untyped]

from probmed.tables import CovariateCoding, Genotypes, Visits, join, read_subjects, read_table
from probmed.volumes import UnusableInput

NAN = float("nan")
TABLE = """Subject ID,MR Delay,Age,Sex,Site,nWBV,eTIV,Hand
b,365.25,71,F,rome,0.70,1400,R
b,0,70,F,rome,0.72,1410,R
a,0,80,M,,0.68,,R
c,1461,66,F,oslo,0.80,1500,R
c,0,,F,oslo,NA,1480,R
c,730.5,64,F,oslo,0.82,1490,R
"""
ROLES: dict[str, Any] = {
    "subject": "Subject ID",
    "time": "MR Delay",
    "time_unit": "days",
    "scalars": ["nWBV", "eTIV"],
    "covariates": ["Age"],
    "categorical": ["Sex", "Site", "Hand"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "visits.csv").write_text(TABLE)
    return tmp_path / "visits.csv"


@pytest.fixture
def visits(path: Path) -> Visits:
    return Visits.read(path, **ROLES)


def same(tensor: torch.Tensor, values: object) -> None:
    expected = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(tensor, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


def faulty(path: Path, text: str, said: str, **changes: Any) -> None:
    """This table is refused in one line with these words."""
    path.write_text(text)
    with pytest.raises(UnusableInput) as caught:
        Visits.read(path, **(ROLES | changes))
    line = str(caught.value)
    assert line.startswith(str(path)) and said in line and "; " in line and "\n" not in line


# Visits.


def test_subjects_as_they_come_and_visits_by_time(visits: Visits) -> None:
    assert visits.subjects == ("b", "a", "c") and len(visits) == 6
    assert visits.table["subject"].tolist() == ["b", "b", "a", "c", "c", "c"]
    same(visits.years_since_baseline, [0, 1, 0, 0, 2, 4])
    assert visits.person.tolist() == [0, 0, 1, 2, 2, 2]
    assert visits.seen_once == ("a",)
    assert visits.baseline.index.tolist() == ["b", "a", "c"]
    assert visits.baseline["Age"].tolist()[:2] == [70, 80] and np.isnan(visits.baseline["Age"]["c"])
    assert visits.summary().endswith("6 visits of 3 people, 1 of them seen once")


def test_changes_are_from_the_first_visit(visits: Visits) -> None:
    changes = visits.changes()
    assert changes.subjects == ("b", "a", "c") and changes.scalars == ("nWBV", "eTIV")
    assert changes.person.tolist() == [0, 2, 2]
    same(changes.years, [1, 2, 4])
    same(changes.differences, [[0.70 - 0.72, -10], [NAN, 10], [NAN, 20]])
    same(changes.baseline, [[0.72, 1410], [0.68, NAN], [NAN, 1480]])
    same(visits.changes(["eTIV"]).differences, [[-10], [10], [20]])


def test_people_seen_once_have_a_baseline_alone(visits: Visits) -> None:
    alone = visits.of_subjects(["a"]).changes()
    assert alone.differences.shape == (0, 2) and alone.years.shape == (0,) and alone.baseline.shape == (1, 2)


def test_time_in_years_may_start_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "v.tsv"
    path.write_text("subject\ttime\ty\n01\t72.5\t1\n1\t71\t2\n01\t70\t4\n")
    visits = Visits.read(path, time_unit="years", scalars=["y"])
    assert visits.subjects == ("01", "1")
    same(visits.years_since_baseline, [0, 2.5, 0])
    same(visits.changes().differences, [[-3]])
    with pytest.raises(ValueError, match="expected time in years or days, got 'months'"):
        Visits.read(path, time_unit="months")  # type: ignore[arg-type]


def test_people_in_another_order(visits: Visits) -> None:
    some = visits.of_subjects(["c", "b"])
    assert some.subjects == ("c", "b") and some.table["nWBV"].tolist()[3:] == [0.72, 0.70]
    same(some.years_since_baseline, [0, 2, 4, 0, 1])
    with pytest.raises(UnusableInput, match=re.escape("has no subject x (2 such)")):
        visits.of_subjects(["x", "a", "y"])


def test_record(visits: Visits) -> None:
    record = json.loads(json.dumps(visits.record()))
    assert (record["Visits"], record["People"], record["SeenOnce"]) == (6, 3, 1)
    assert record["Missing"] == {"nWBV": 1, "eTIV": 1, "Age": 1, "Sex": 0, "Site": 1, "Hand": 0}


def test_scans_are_relative_to_the_table(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("one.nii.gz", "two.nii.gz"):
        (tmp_path / "scans" / name).touch()
    path = tmp_path / "v.tsv"
    text = f"subject\ttime\tT1\na\t0\tscans/one.nii.gz\na\t1\t{tmp_path}/scans/two.nii.gz\nb\t0\tn/a\n"
    path.write_text(text)
    table = Visits.read(path, time_unit="years", scans=["T1"]).table
    assert table["T1"].tolist()[:2] == [str(tmp_path / "scans" / name) for name in ("one.nii.gz", "two.nii.gz")]
    assert pd.isna(table["T1"][2])
    path.write_text(text.replace("one.", "three."))
    with pytest.raises(UnusableInput, match=r"scans/three.nii.gz: does not exist \(.*v.tsv, column T1, row 1\)"):
        Visits.read(path, time_unit="years", scans=["T1"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("b,0,", "b,365.25,", "has two visits of subject b at one time (row 2; 1 such rows)"),
        ("b,0,", "b,soon,", "has no number in column MR Delay, row 2: 'soon'"),
        ("b,0,", "b,,", "has no number in column MR Delay, row 2: none"),
        ("b,0,", "b,inf,", "has no number in column MR Delay, row 2: 'inf'"),
        ("a,0,80", ",0,80", "has no subject in column Subject ID, row 3"),
        ("0.68", "0.6B", "has no number in column nWBV, row 3: '0.6B'; correct it, or name the column as categorical"),
        ("Age", "age", "has no column 'Age'; it has Subject ID, MR Delay, age"),
        ("eTIV", "nWBV", "has several columns 'nWBV'"),
        ("eTIV", "", "has no name for column 7"),
        ("1410,R", "1410,R,1", "has 9 entries in row 2, and 8 names"),
        ("1410,R", "1410", "has 7 entries in row 2, and 8 names"),
    ],
)
def test_rows_that_are_not_right(path: Path, old: str, new: str, said: str) -> None:
    assert old in TABLE
    faulty(path, TABLE.replace(old, new), said)


def test_tables_that_are_not_right(path: Path, tmp_path: Path) -> None:
    rows = TABLE.splitlines()
    faulty(path, rows[0] + "\n", "has no rows below a row of names")
    faulty(path, "", "has no rows below a row of names")
    faulty(path, TABLE.replace("rome", "NA").replace("oslo", ""), "has no entry in column Site; leave the column out")
    faulty(path, TABLE, "has its column 'Age' asked for in two roles", scalars=["Age"])
    faulty(path, TABLE.replace("nWBV", "years"), "has a column 'years' that is asked for as", scalars=["years"])
    faulty(path, TABLE + '"open', "is no table (")
    path.write_bytes(TABLE.encode("utf-16"))
    with pytest.raises(UnusableInput, match="is no table"):
        read_table(path)
    for name, said in (("none.csv", "does not exist"), ("table.xlsx", "is no table by its suffix")):
        with pytest.raises(UnusableInput, match=said):
            read_table(tmp_path / name)


def test_text_is_kept_as_it_is_but_for_blanks_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffa,b\r\n 007 ,"x, y"\r\n\r\nNone,N/A\r\n'.encode())
    table = read_table(path)
    assert table.columns.tolist() == ["a", "b"] and table["a"].tolist() == ["007", "None"]
    assert table["b"].tolist()[0] == "x, y" and pd.isna(table["b"][1])


# Covariates.


def test_covariates_keep_gaps_or_fill_them(visits: Visits) -> None:
    kept = visits.covariate_coding()
    assert kept.constant == ("Hand",) and [each.reason for each in kept.omissions] == ["constant"]
    assert kept.numeric["Age"] == pytest.approx((75.0, 50**0.5))
    assert kept.levels["Sex"] == {"F": pytest.approx(2 / 3), "M": pytest.approx(1 / 3)}
    assert kept.levels["Site"] == {"oslo": 0.5, "rome": 0.5} and kept.with_gaps == ("Age", "Site")
    numbers = kept.numbers(visits.baseline)
    assert numbers.columns.tolist() == ["Age", "Sex", "Site"] == list(kept.names)
    np.testing.assert_array_equal(numbers, [[70, 0, 1], [80, 1, NAN], [NAN, 0, 0]])
    design = kept.design(visits.baseline)
    assert design.columns.tolist() == ["Age", "Sex=M", "Site=rome"]
    np.testing.assert_array_equal(design, [[70, 0, 1], [80, 1, NAN], [NAN, 0, 0]])

    filled = visits.covariate_coding("impute")
    np.testing.assert_array_equal(filled.numbers(visits.baseline), [[70, 0, 1], [80, 1, 0], [75, 0, 0]])
    design = filled.design(visits.baseline)
    assert design.columns.tolist() == ["Age", "Sex=M", "Site=rome", "Age missing", "Site missing"]
    np.testing.assert_array_equal(design, [[70, 0, 1, 0, 0], [80, 1, 0, 0, 1], [75, 0, 0, 1, 0]])
    assert (design.dtypes == np.float64).all() and design.index.tolist() == ["b", "a", "c"]


def test_new_people_are_coded_by_the_training_levels_and_means() -> None:
    training = pd.DataFrame({"age": [60.0, 80.0, NAN, 70.0], "site": ["x", "z", "z", "y"], "sex": ["F", "M", None, "F"]})
    training["scanner"] = ["s", None, "s", "s"]
    coding = CovariateCoding.fit(training, ["site", "sex", "scanner"], missing="impute")
    new = pd.DataFrame({"sex": [None, "M"], "site": [None, "z"], "age": [NAN, 50.0], "more": [1, 2]})
    design = coding.design(new)
    assert design.columns.tolist() == ["age", "site=y", "site=z", "sex=M", "age missing", "sex missing"]
    np.testing.assert_array_equal(design, [[70, 0, 1, 0, 1, 1], [50, 0, 1, 1, 0, 0]])
    with pytest.raises(UnusableInput, match=r"^new.tsv: has level 'w' in column site, training people have x, y, z;"):
        coding.numbers(new.assign(site=["w", "x"]), "new.tsv")
    with pytest.raises(UnusableInput, match="has no column 'site', which the training table has"):
        coding.design(new.drop(columns="site"))
    again = CovariateCoding.from_record(json.loads(json.dumps(coding.record())))
    pd.testing.assert_frame_equal(again.design(new), design)
    assert again.missing == "impute" and again.with_gaps == coding.with_gaps and again.constant == ("scanner",)
    with pytest.raises(UnusableInput, match="has no entry in column age"):
        CovariateCoding.fit(training.assign(age=NAN), ["site", "sex", "scanner"])


# A row a person.


def test_subjects_have_one_row(tmp_path: Path) -> None:
    path = tmp_path / "clinical.tsv"
    path.write_text("who\tage\tsex\nc\t70\tF\na\tn/a\t\n")
    table = read_subjects(path, subject="who", numeric=["age"], categorical=["sex"])
    assert table.index.tolist() == ["c", "a"] and table["age"]["c"] == 70 and np.isnan(table["age"]["a"])
    assert table["sex"]["c"] == "F" and pd.isna(table["sex"]["a"])
    path.write_text("who\tage\tsex\nc\t70\tF\nc\t71\tF\n")
    with pytest.raises(UnusableInput, match="has several rows of subject 'c'"):
        read_subjects(path, subject="who", numeric=["age"])


# Joins.


def genotypes(folder: Path, names: list[str]) -> Genotypes:
    counts = np.arange(len(names), dtype=float)[:, None] % 3 * np.ones(4)
    properties = {"fid": ["f"] * len(names), "iid": names, "sid": ["rs1", "rs2", "rs3", "rs4"]}
    to_bed(folder / "g.bed", counts, properties=properties, count_A1=True)
    return Genotypes.open(folder / "g.bed", count_A1=True)


def test_joined_tables_are_in_one_order_and_say_who_is_not(visits: Visits, tmp_path: Path) -> None:
    clinical = pd.DataFrame({"apoe": [1.0, 2.0, 3.0]}, index=pd.Index(["c", "b", "x"]))
    joined = join(visits, clinical, genotypes(tmp_path, ["z", "a", "c", "b", "x"]))
    assert joined.subjects == joined.visits.subjects == ("b", "c")
    assert joined.clinical is not None and joined.clinical["apoe"].tolist() == [2, 1]
    assert joined.genotypes is not None and joined.genotypes.identifiers() == ("b", "c")
    assert joined.genotypes.counts(torch.float64)[:, 0].tolist() == [0, 2]
    assert {each.reason: each.names for each in joined.omissions} == {
        "not in the clinical table": ("a",),
        "not in the visits": ("x",),
        "not in the visits and clinical table": ("z",),
    }
    assert joined.summary() == (
        "2 people in all tables; left out: 1 subjects (not in the clinical table), 1 subjects (not in the visits), "
        "1 subjects (not in the visits and clinical table)"
    )
    record = json.loads(json.dumps(joined.record()))
    assert record["People"] == 2 and record["LeftOut"][0] == {
        "What": "subjects",
        "Reason": "not in the clinical table",
        "Count": 1,
        "Names": ["a"],
    }


def test_join_of_some_tables(visits: Visits, tmp_path: Path) -> None:
    alone = join(visits)
    assert alone.subjects == ("b", "a", "c") and alone.clinical is None and alone.genotypes is None
    assert alone.summary() == "3 people in all tables; nothing left out"
    by_both = visits.path.read_text().replace("\nb,", "\nf_b,")
    visits.path.write_text(by_both)
    renamed = Visits.read(visits.path, **ROLES)
    joined = join(renamed, genotypes=genotypes(tmp_path, ["b", "q"]), by="family and individual")
    assert joined.subjects == ("f_b",) and joined.genotypes is not None and len(joined.genotypes) == 1


def test_join_without_shared_subjects(visits: Visits, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput) as caught:
        join(visits, genotypes=genotypes(tmp_path, ["sub-a", "sub-b"]))
    assert "shares no subject with the other tables (b in the visits, sub-a in the genotypes)" in str(caught.value)
    with pytest.raises(ValueError, match="expected a row a subject, got several of 'b'"):
        join(visits, pd.DataFrame({"y": [1, 2]}, index=["b", "b"]))
