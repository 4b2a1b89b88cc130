"""Unusable input on the command line: a line with file, fault and remedy, status 2, nothing left behind."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from results import plain_page, refused, tiny_atlas, tiny_result, write_tiny_scan
from typer.testing import CliRunner, Result

from probmed import cli
from probmed.atlases import write_atlas
from probmed.cli import demo
from probmed.workflows import segmentation

nib: Any = nibabel  # its classes are partly untyped
Array = NDArray[Any]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, a small atlas, and a fit that must not be reached unless a test says so."""
    monkeypatch.setattr("probmed.cli.segment.default_atlas", tiny_atlas)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["probmed", "segment"])
    yield tmp_path
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit and a report that take no time."""
    monkeypatch.setattr("probmed.cli.segment.segmentation_page", plain_page)
    monkeypatch.setattr(
        segmentation, "segment", lambda scans, *, seed, draws, **_: tiny_result(scans, seed, draws)
    )


def save(values: Array, affine: Array | None = None, name: str = "s.nii.gz") -> None:
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), name)


def noise(*shape: int) -> Array:
    return np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)


def with_nan() -> None:
    values = noise(6, 6, 6)
    values[0, 0, 0] = np.nan
    save(values)


def with_infinity() -> None:
    values = noise(6, 6, 6)
    values[1, 2, 3] = np.inf
    save(values)


def truncated() -> None:
    save(noise(16, 16, 16))
    content = Path("s.nii.gz").read_bytes()
    Path("s.nii.gz").write_bytes(content[: len(content) // 2])


def cut_voxels() -> None:
    save(noise(8, 8, 8), name="s.nii")
    content = Path("s.nii").read_bytes()
    Path("s.nii.gz").write_bytes(gzip.compress(content[:-100]))


def colours() -> None:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(np.ones((4, 4, 4), kind))


def patched(**fields: Any) -> None:
    """A scan whose header has other values."""
    image = nib.Nifti1Image(noise(6, 6, 6), np.eye(4))
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        if name == "spacing":
            header["pixdim"][1:4] = value
        else:
            header[name] = value
    content[:348] = header.binaryblock
    Path("s.nii.gz").write_bytes(gzip.compress(bytes(content)))


FAULTS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "missing": (lambda: None, ("does not exist", "check the path")),
    "folder": (lambda: Path("s.nii.gz").mkdir(), ("is a folder",)),
    "no bytes": (lambda: Path("s.nii.gz").write_bytes(b""), ("0 bytes",)),
    "text": (lambda: Path("s.nii.gz").write_text("patient,age\n1,2\n"), ("neither NIfTI nor MGH",)),
    "truncated gzip": (truncated, ("cut off",)),
    "truncated voxels": (cut_voxels, ("cut off",)),
    "NaN": (with_nan, ("1 voxels", "NaN")),
    "infinity": (with_infinity, ("infinite",)),
    "empty": (lambda: save(np.zeros((5, 5, 5), np.float32)), ("every voxel is 0",)),
    "constant": (lambda: save(np.full((5, 5, 5), 7, np.float32)), ("constant",)),
    "4D": (lambda: save(noise(4, 4, 4, 3)), ("3 images",)),
    "RGB": (colours, ("colours",)),
    "complex": (lambda: save(np.ones((4, 4, 4), np.complex64)), ("complex",)),
    "singular sform": (lambda: patched(srow_x=[0, 0, 0, 0]), ("singular affine",)),
    "NaN sform": (lambda: patched(srow_x=[np.nan, 0, 0, 0]), ("not finite",)),
    "zero spacing": (lambda: patched(spacing=0, sform_code=0, qform_code=0), ("voxel spacing of 0",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_scan(fault: str, workplace: Path) -> None:
    make, words = FAULTS[fault]
    make()
    before = sorted(workplace.iterdir())
    refused(call("segment", "s.nii.gz", "-o", "out"), "s.nii.gz: ", *words)
    assert sorted(workplace.iterdir()) == before


def test_missing_sform_is_a_warning_and_said_in_the_report(fitted: None, workplace: Path) -> None:
    patched(sform_code=0, qform_code=0)
    result = call("segment", "s.nii.gz", "-o", "good")
    assert result.exit_code == 0, result.output
    assert "warning: s.nii.gz: has neither sform nor qform" in result.stderr
    assert "has neither sform nor qform" in (workplace / "good" / "s_report.html").read_text()


def test_channels_that_do_not_overlap() -> None:
    save(noise(10, 10, 10), name="a.nii.gz")
    far = np.eye(4)
    far[:3, 3] = 500
    save(noise(10, 10, 10), far, "b.nii.gz")
    refused(call("segment", "a.nii.gz,b.nii.gz", "-o", "out"), "b.nii.gz: does not overlap a.nii.gz")


def test_second_channel_missing() -> None:
    write_tiny_scan(Path("a.nii.gz"))
    refused(call("segment", "a.nii.gz,b.nii.gz", "-o", "out"), "b.nii.gz: does not exist")


@pytest.fixture
def atlas_folder(workplace: Path) -> Path:
    write_atlas(tiny_atlas(), workplace / "atlas")
    write_tiny_scan(workplace / "s.nii.gz")
    return workplace / "atlas"


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "atlas.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MAP = "label-GM_probseg.nii.gz"
ATLAS_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("atlas: is not a folder",)),
    "no index": (lambda f: (f / "atlas.json").unlink(), ("atlas.json: does not exist",)),
    "no JSON": (lambda f: (f / "atlas.json").write_text("{names"), ("is not JSON",)),
    "no names": (lambda f: edited(f, names=None), ("names",)),
    "unknown key": (lambda f: edited(f, labels=["GM"]), ("unknown keys",)),
    "unknown label": (lambda f: edited(f, brain=["GM", "thalamus"]), ("thalamus",)),
    "label without map": (lambda f: edited(f, names=["GM", "WM", "CSF", "x"]), ("does not exist", "'x'")),
    "missing map": (lambda f: (f / MAP).unlink(), (f"{MAP}: does not exist",)),
    "map on another grid": (lambda f: save(noise(3, 3, 3) / 100, name=str(f / MAP)), ("another grid",)),
    "no probabilities": (lambda f: save(noise(8, 8, 8), name=str(f / MAP)), ("not probabilities",)),
}


@pytest.mark.parametrize("fault", ATLAS_FAULTS)
def test_unusable_atlas(fault: str, atlas_folder: Path) -> None:
    make, words = ATLAS_FAULTS[fault]
    make(atlas_folder)
    refused(call("segment", "s.nii.gz", "-o", "out", "--atlas", "atlas"), *words)


def test_atlas_is_never_overwritten(fitted: None, atlas_folder: Path, workplace: Path) -> None:
    (workplace / "s.nii.gz").rename(atlas_folder / "s.nii.gz")
    shutil.copy(atlas_folder / "label-GM_probseg.nii.gz", atlas_folder / "s_label-GM_probseg.nii.gz")
    before = sorted(atlas_folder.iterdir())
    refused(
        call("segment", "atlas/s.nii.gz", "-o", "atlas", "--atlas", "atlas"),
        "s_label-GM_probseg.nii.gz",
        "is an input",
    )
    assert sorted(atlas_folder.iterdir()) == before


def test_unknown_model() -> None:
    refused(call("segment", "s.nii.gz", "-o", "out", "--model", "nothing"), "--model nothing", "segmentation")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there() -> None:
    refused(call("segment", "s.nii.gz", "-o", "out", "--device", "cuda"), "--device cuda", "cpu")
    refused(call("demo", "-o", "out", "--device", "cuda"), "--device cuda")


@pytest.mark.parametrize(
    "option", [("--draws", "0"), ("--seed", "-1"), ("--device", "tpu"), ("--samples", "x")]
)
def test_options_out_of_range(option: tuple[str, str]) -> None:
    result = call("segment", "s.nii.gz", "-o", "out", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr
    assert "Traceback" not in result.output


def test_out_is_a_file(workplace: Path) -> None:
    write_tiny_scan(workplace / "s.nii.gz")
    (workplace / "file").write_text("x")
    refused(call("segment", "s.nii.gz", "-o", "file"), "file: is a file, not a folder")
    refused(call("demo", "-o", "file"), "file: is a file, not a folder")


def test_out_below_a_file(workplace: Path) -> None:
    (workplace / "file").write_text("x")
    refused(call("segment", "s.nii.gz", "-o", "file/out"), "file/out: cannot be created")


def test_file_of_somebody_else_stays(fitted: None, workplace: Path) -> None:
    write_tiny_scan(workplace / "s.nii.gz")
    (workplace / "s_volumes.tsv").write_text("mine")
    before = sorted(workplace.iterdir())
    refused(
        call("segment", "s.nii.gz", "-o", "."), "s_volumes.tsv: exists already, and probmed segment did not write it"
    )
    assert sorted(workplace.iterdir()) == before


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 4 kB: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_while_writing(fitted: None, workplace: Path, request: pytest.FixtureRequest) -> None:
    write_tiny_scan(workplace / "s.nii.gz")
    request.getfixturevalue("small_disk")
    refused(call("segment", "s.nii.gz", "-o", "out"), "out: ", "cannot be written", "free space")
    assert [path.name for path in workplace.iterdir()] == ["s.nii.gz"]


def test_disk_full_leaves_the_earlier_outputs(
    fitted: None, workplace: Path, request: pytest.FixtureRequest
) -> None:
    write_tiny_scan(workplace / "s.nii.gz")
    assert call("segment", "s.nii.gz", "-o", "kept").exit_code == 0
    before = {path.name: path.read_bytes() for path in (workplace / "kept").iterdir()}
    request.getfixturevalue("small_disk")
    refused(call("segment", "s.nii.gz", "-o", "kept", "--seed", "1"), "cannot be written")
    assert {path.name: path.read_bytes() for path in (workplace / "kept").iterdir()} == before


@pytest.mark.parametrize("calls", [0, 5, 24])
def test_disk_full_at_any_file(
    fitted: None, workplace: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    write_tiny_scan(workplace / "s.nii.gz")
    left, replace = [calls], os.replace

    def fail(source: Any, target: Any) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr("probmed.workflows.outputs.os.replace", fail)
    refused(call("segment", "s.nii.gz", "-o", "out"), "No space left on device")
    assert [path.name for path in workplace.iterdir()] == ["s.nii.gz"]


def test_demo_on_a_full_disk(
    workplace: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = tiny_atlas()
    filled = type(atlas)(
        atlas.names, atlas.probabilities, atlas.grid, atlas.probabilities[0].repeat(1, 1, 1), atlas.brain
    )
    monkeypatch.setattr(demo, "default_atlas", lambda: filled)
    request.getfixturevalue("small_disk")
    monkeypatch.setattr(demo, "write_scan", lambda path, data, like: path.write_bytes(bytes(10_000)))
    refused(call("demo", "-o", "out"), "cannot be written")
    assert list(workplace.iterdir()) == []


def test_interrupt_leaves_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_scan(workplace / "s.nii.gz")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segmentation, "segment", stop)
    result = call("segment", "s.nii.gz", "-o", "out")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert [path.name for path in workplace.iterdir()] == ["s.nii.gz"]
