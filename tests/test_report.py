"""The reports of a segmented scan and of a registered pair, the files of the scan: geometry, orientation, completeness, repeatability."""

from __future__ import annotations

import html.parser
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from results import TRANSLATION, tiny_atlas, tiny_result, write_tiny_scan

from probmed.atlases import LabelAtlas
from probmed.grids import Grid
from probmed.report import figures, pair_figures, registration_page, segmentation_page
from probmed.report.palette import is_grey, label_colours
from probmed.report.planes import Orientation, bounding_box, centre_of, planes_through, window
from probmed.transforms import Affine, Displacement
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan
from probmed.workflows.outputs import output_names, staged, warp_grid, write_segmentation
from probmed.workflows.propagation import propagate
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import RegistrationResult, RegistrationSettings, register
from probmed.workflows.segmentation import SegmentationResult

nib: Any = nibabel  # its classes are partly untyped


def write(result: SegmentationResult, folder: Path, samples: int = 0, page: str = "<p>") -> list[Path]:
    provenance = Provenance.of(
        "probmed segment", result.seed, [str(c.path) for c in result.channels if c.path]
    )
    return write_segmentation(result, tiny_atlas(), folder, "scan", provenance, page, samples=samples)


def page_of(result: SegmentationResult) -> str:
    return segmentation_page(result, Provenance("probmed segment a&b", 0, {"x": "0"}, {"torch": "2"}), "scan")


@pytest.mark.parametrize(
    "axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=lambda axes: "".join("xyz"[a] for a in axes)
)
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
def test_planes_show_the_world_not_the_file(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    """However the file's axes run, a voxel that lies right, front and up is found right, front and up."""
    spacing = (1.0, 2.0, 3.0)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    shape = [0, 0, 0]
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = sign * spacing[axis]
        shape[column] = (6, 7, 8)[axis]
    image = np.zeros(shape)
    corner = [
        n - 1 if affine[axis, column] > 0 else 0
        for column, (n, axis) in enumerate(zip(shape, axes, strict=True))
    ]
    image[tuple(corner)] = 1
    turn = Orientation.of(affine)
    turned = turn(image)
    assert turned.shape == (6, 7, 8)
    assert turn.spacing == pytest.approx(spacing)
    assert turned[5, 6, 7] == 1
    axial, coronal, sagittal = planes_through(
        (5, 6, 7), [slice(0, n) for n in turned.shape], turned.shape, turn.spacing
    )
    # Rows go up and columns to the right, as the edges' names say.
    assert axial.cut(turned)[-1, -1] == coronal.cut(turned)[-1, -1] == sagittal.cut(turned)[-1, -1] == 1
    assert axial.edges == coronal.edges == ("L", "R")
    assert sagittal.edges == ("P", "A")
    assert (axial.aspect, coronal.aspect, sagittal.aspect) == pytest.approx((2.0, 3.0, 1.5))
    assert axial.size == pytest.approx((6, 14))


def test_a_box_and_a_centre_of_nothing_are_the_image() -> None:
    empty = np.zeros((4, 5, 6), dtype=bool)
    assert bounding_box(empty, 3, (1, 1, 1)) == (slice(0, 4), slice(0, 5), slice(0, 6))
    assert centre_of(empty) == (2, 2, 2)
    assert window(np.zeros((2, 2))) == (0.0, 1.0)


def test_window_ignores_a_few_bright_voxels() -> None:
    values = np.random.default_rng(0).uniform(0, 1, 10_000)
    values[:10] = 1e6
    low, high = window(values)
    assert low == 0
    assert high < 1.1


def test_grey_labels_get_colours() -> None:
    atlas = tiny_atlas()
    colours = label_colours(atlas.names, atlas.colours, atlas.brain)
    assert len(set(colours.values())) == 3
    assert not any(is_grey(colour) for colour in colours.values())
    assert colours["CSF"] == dict(zip(atlas.names, atlas.colours, strict=True))["CSF"]


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    scan = write_tiny_scan(tmp_path / "scan.nii.gz")
    text = page_of(tiny_result([scan]))
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text
    for wanted in (
        "GM",
        "95 %",
        "0.70",
        "β<sub>x</sub>(c)",
        "a&amp;b",
        "torch 2",
        "&lt;angle&gt;",
        "converged",
    ):
        assert wanted in text, wanted


def test_page_of_several_channels(tmp_path: Path) -> None:
    scans = [write_tiny_scan(tmp_path / f"{name}.nii.gz") for name in ("t1", "t2")]
    text = page_of(tiny_result(scans))
    assert "Intensities of t1.nii.gz" in text
    assert "Intensities of t2.nii.gz" in text


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1)])
def test_page_of_a_slice(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "slice.nii.gz"
    values = np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 1.0, 3.0, 1.0])), path)
    result = tiny_result([path])
    view = figures.View.of(result)
    assert [plane.name for plane in view.planes] == ["axial"]
    assert figures.slices(view) is None
    assert "Axial slices" not in page_of(result)
    for written in write(result, tmp_path):
        if written.name.endswith("_dseg.nii.gz"):
            assert nib.load(written).shape == shape


def test_report_of_a_scan_without_brain(tmp_path: Path) -> None:
    scan = write_tiny_scan(tmp_path / "scan.nii.gz")
    result = tiny_result([scan])
    result.labels = torch.zeros_like(result.labels)
    result.probabilities = torch.zeros_like(result.probabilities)
    result.probabilities[3] = 1
    assert "</html>" in page_of(result)


def test_outputs_have_the_geometry_of_the_scan(tmp_path: Path) -> None:
    scan = read_scan(write_tiny_scan(tmp_path / "scan.nii.gz"))
    result = tiny_result([scan], seed=3)
    names = output_names("scan", result.brain, 1, 2)
    assert names["probability GM"] == "scan_label-GM_probseg.nii.gz"
    written = write(result, tmp_path, samples=2)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()} - {"scan.nii.gz"}
    for name in names.values():
        if name.endswith(".nii.gz") and "xfm" not in name:
            image = nib.load(tmp_path / name)
            assert image.shape == scan.shape
            np.testing.assert_allclose(image.affine, scan.affine)
    torch.testing.assert_close(read_labels(tmp_path / names["dseg"]).data, result.labels)
    torch.testing.assert_close(read_scan(tmp_path / names["probability WM"]).data, result.probabilities[1])
    torch.testing.assert_close(
        read_scan(tmp_path / names["corrected 1"]).data,
        1.1 * scan.data,
    )
    torch.testing.assert_close(read_labels(tmp_path / names["draw 2"]).data, result.draw_labels(2, 3)[1])


def test_tables_and_sidecars(tmp_path: Path) -> None:
    scan = write_tiny_scan(tmp_path / "scan.nii.gz")
    result = tiny_result([scan], seed=4)
    write(result, tmp_path)
    table = pd.read_csv(tmp_path / "scan_volumes.tsv", sep="\t")
    assert list(table) == [
        "index",
        "name",
        "volume_ml",
        "sd_ml",
        "q025",
        "q100",
        "q250",
        "q750",
        "q900",
        "q975",
    ]
    assert list(table["name"]) == ["GM", "WM", "CSF"]
    assert (table["q025"] <= table["q250"]).all()
    labels = pd.read_csv(tmp_path / "scan_dseg.tsv", sep="\t")
    assert dict(zip(labels["name"], labels["index"], strict=True))["background"] == 0
    for image in [*tmp_path.glob("scan_*.nii.gz"), tmp_path / "scan_volumes.tsv"]:
        record = json.loads((tmp_path / f"{image.name.split('.')[0]}.json").read_text())
        assert record["Description"]
        assert record["GeneratedBy"][0]["Command"] == "probmed segment"
        assert record["GeneratedBy"][0]["Seed"] == 4
        assert len(record["Sources"][0]["SHA256"]) == 64
    dseg = json.loads((tmp_path / "scan_dseg.json").read_text())
    assert dseg["Quality"]["residual"]["GM"]["sd"] is None


def test_warps_are_displacements_of_itk(tmp_path: Path) -> None:
    """In LPS axes, mm; what carries images to the atlas holds the way from the atlas's points to the scan."""
    result = tiny_result([write_tiny_scan(tmp_path / "scan.nii.gz")])
    write(result, tmp_path)
    lps = torch.tensor([-1.0, -1.0, 1.0])
    for name, expected, grid in (
        ("scan_from-scan_to-atlas_mode-image_xfm.nii.gz", -TRANSLATION * lps, tiny_atlas().grid),
        ("scan_from-atlas_to-scan_mode-image_xfm.nii.gz", TRANSLATION * lps, result.channels[0].grid),
    ):
        image = nib.load(tmp_path / name)
        assert image.shape == (*warp_grid(grid).shape, 1, 3)
        assert int(image.header["intent_code"]) == 1007
        np.testing.assert_allclose(image.affine, warp_grid(grid).affine.numpy())
        np.testing.assert_allclose(
            image.get_fdata(), np.broadcast_to(expected.numpy(), image.shape), atol=1e-4
        )


def test_same_result_same_bytes(tmp_path: Path) -> None:
    scan = write_tiny_scan(tmp_path / "scan.nii.gz")
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        result = tiny_result([scan])
        contents.append([(p.name, p.read_bytes()) for p in write(result, folder, 1, page_of(result))])
    assert contents[0] == contents[1]


def test_fewer_draws_leave_no_older_ones(tmp_path: Path) -> None:
    result = tiny_result([write_tiny_scan(tmp_path / "scan.nii.gz")])
    write(result, tmp_path, samples=3)
    write(result, tmp_path, samples=1)
    assert [p.name for p in sorted(tmp_path.glob("*draw*.nii.gz"))] == ["scan_desc-draw001_dseg.nii.gz"]
    assert [p.name for p in sorted(tmp_path.glob("*draw*.json"))] == ["scan_desc-draw001_dseg.json"]


def test_foreign_files_and_inputs_stay(tmp_path: Path) -> None:
    scan = write_tiny_scan(tmp_path / "scan.nii.gz")
    result = tiny_result([scan])
    manual = tmp_path / "scan_dseg.nii.gz"
    manual.write_bytes(b"by hand")
    with pytest.raises(UnusableInput, match="probmed segment did not write it"):
        write(result, tmp_path)
    assert manual.read_bytes() == b"by hand"
    assert {p.name for p in tmp_path.iterdir()} == {"scan.nii.gz", "scan_dseg.nii.gz"}
    manual.unlink()
    provenance = Provenance.of("x", 0, [])
    with pytest.raises(UnusableInput, match="is an input"):
        scan.rename(manual)
        write_segmentation(result, tiny_atlas(), tmp_path, "scan", provenance, "", protect=[manual])


def test_a_failed_move_takes_the_others_back(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"b\.txt: cannot be written"), staged(tmp_path, "s") as stage:
        (stage / "a.txt").write_text("a")
        (stage / "b.txt").write_text("b")
        (tmp_path / "b.txt").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path, "s") as stage:
        (stage / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_label_names_that_bids_does_not_allow() -> None:
    names = output_names("s", ["grey matter", "Grey-Matter", "β"], 1, 0)
    files = [names[f"probability {name}"] for name in ("grey matter", "Grey-Matter", "β")]
    assert files == [
        "s_label-greymatter1_probseg.nii.gz",
        "s_label-GreyMatter2_probseg.nii.gz",
        "s_label-3_probseg.nii.gz",
    ]


def test_atlas_fixture_is_an_atlas() -> None:
    assert isinstance(tiny_atlas(), LabelAtlas)


# A registered pair.


def pair(shape: tuple[int, ...], affine: np.ndarray, draws: int = 3, **settings: Any) -> RegistrationResult:
    """A ball that is the larger on the moving image, and off the middle so that a flip would be seen."""
    d = len(shape)
    grid = Grid(shape, torch.from_numpy(affine[np.ix_([*range(d), 3], [*range(d), 3])]))
    points = grid.coordinates() - torch.tensor([2.0, 1.0, 0.0][:d])
    images = [1 / (1 + torch.exp(points.norm(dim=-1) - radius)) for radius in (6.0, 5.0)]
    noise = 0.01 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    moving, fixed = (Volume(image + n, grid, affine) for image, n in zip(images, noise, strict=True))
    return register(moving, fixed, draws=draws, device="cpu", settings=RegistrationSettings(**settings))


TURNED = np.array([[0, 0, 1.2, -9], [-1.0, 0, 0, 8], [0, 1.5, 0, -10], [0, 0, 0, 1]])
FLAT = np.array([[0, 1.0, 0, -9], [-1.0, 0, 0, 10], [0, 0, 2, 0], [0, 0, 0, 1]])


def pair_page(result: RegistrationResult, **options: Any) -> str:
    return registration_page(result, Provenance("probmed register a&b", 0, {"x": "0"}, {"torch": "2"}), "m to f", **options)


@pytest.mark.parametrize(("shape", "affine"), [((18, 14, 16), TURNED), ((20, 18), FLAT)], ids=["3D", "2D"])
def test_page_of_a_pair_is_whole_and_needs_nothing_else(shape: tuple[int, ...], affine: np.ndarray) -> None:
    result = pair(shape, affine)
    labels = Volume((result.moving.data > 0.5).long() * 7, result.moving.grid, affine)
    text = pair_page(result, propagation=propagate(labels, result, {7: "<ball>"}))
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text
    for wanted in ("a&amp;b", "&lt;ball&gt;", "local correlation", "95 %", "folds", "exp(v)", "torch 2", f"{result.correlation[2]:.3f}"):
        assert wanted in text, wanted


def test_page_of_an_affine_pair_says_what_is_not_there() -> None:
    result = pair((20, 18), FLAT, draws=0, deformable=False)
    text = pair_page(result)
    assert text == pair_page(result)
    page = _Page()
    page.feed(text)
    assert page.open == [] and len(page.sources) == 2
    for wanted in ("affine map only", "No draws", "No deformation was fitted"):
        assert wanted in text, wanted


@pytest.mark.parametrize(("shape", "affine"), [((18, 14, 16), TURNED), ((20, 18), FLAT)], ids=["3D", "2D"])
def test_cuts_of_a_pair_show_what_the_whole_images_have_there(shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Whatever the order of the file's axes, every plane's pixels are those voxels of the moved image and of the warp."""
    result = pair(shape, affine)
    view = pair_figures.PairView.of(result)
    assert len(view.cuts) == (3 if len(shape) == 3 else 1)
    whole = result.moved.nan_to_num(0.0).double()
    for cut in view.cuts:
        index = tuple(cut.voxels.long().unbind(-1))
        shown = torch.from_numpy(np.nan_to_num(cut.moved[2]))
        expected = whole[index]
        assert torch.corrcoef(torch.stack([shown.flatten(), expected.flatten()]))[0, 1] > 0.999
        np.testing.assert_allclose(cut.determinant, result.determinant[index].numpy(), rtol=1e-6)
        assert cut.sd is not None and result.sd is not None
        np.testing.assert_allclose(cut.sd, result.sd.norm(dim=0)[index].numpy(), rtol=1e-5)
        # Rows and columns of the picture run along the axes that the cut names.
        for side, axis in enumerate(cut.axes):
            steps = cut.voxels.diff(dim=side)
            assert (steps[..., axis].abs() == 1).all()
            assert (steps.abs().sum(-1) == 1).all()


def test_a_warped_grid_moves_with_the_moving_image() -> None:
    """A known shift along x: where the picture shows a place of the moving image is where the deformation has brought it."""
    result = pair((20, 18), FLAT)
    grid = result.fixed.grid
    field = torch.zeros(2, *grid.shape)
    field[0] = 3.0
    result.affine = Affine.identity(2)
    result.transform = Displacement(grid, field)
    (cut,) = pair_figures.PairView.of(result).cuts
    moved = torch.from_numpy(np.asarray(cut.carried)) - cut.voxels[..., list(cut.axes)]
    # x runs along the columns of the picture, and along the second axis of the file, a voxel a millimetre.
    torch.testing.assert_close(moved[..., 1], torch.full_like(moved[..., 1], 3.0))
    torch.testing.assert_close(moved[..., 0], torch.zeros_like(moved[..., 0]))


def shown(axis: Any) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def test_beyond_the_moving_image_the_fixed_one_is_shown_alone() -> None:
    """In grey, darker, within a line; elsewhere tiles of both, and colours."""
    result = pair((20, 18), FLAT)
    view = pair_figures.PairView.of(result)
    (cut,) = view.cuts
    unknown = np.zeros(cut.fixed.shape, bool)
    unknown[:, :6] = True
    moved = tuple(np.where(unknown, math.nan, 1 - cut.fixed) for _ in cut.moved)
    view = replace(view, cuts=[replace(cut, moved=moved)])
    board, colours = pair_figures.checkerboard(view), pair_figures.blend(view)
    for axis in board.axes[:3]:
        np.testing.assert_allclose(shown(axis)[unknown], 0.55 * cut.fixed[unknown])
        tiles = shown(axis)[~unknown]
        assert set(np.unique(np.isclose(tiles, cut.fixed[~unknown]))) == {False, True}
        assert axis.collections
    for axis in colours.axes[:3]:
        np.testing.assert_allclose(shown(axis)[unknown], (0.55 * cut.fixed[unknown])[:, None].repeat(3, 1))
        np.testing.assert_allclose(shown(axis)[~unknown][:, 0], cut.fixed[~unknown])


def test_an_affine_map_has_no_stage_of_its_own_after_it() -> None:
    result = pair((18, 14, 16), TURNED)
    assert len(pair_figures.checkerboard(pair_figures.PairView.of(result)).axes) == 9
    result.velocity = None
    view = pair_figures.PairView.of(result)
    assert view.stages == ("by headers", "affine") and len(pair_figures.checkerboard(view).axes) == 6
    assert pair_figures.jacobian(view) is None


def test_folding_is_marked() -> None:
    result = pair((20, 18), FLAT)
    result.determinant[9:11, 9:11] = -1.0
    figure = pair_figures.jacobian(pair_figures.PairView.of(result))
    assert figure is not None
    black = figure.axes[0].images[1].get_array()
    assert black is not None and int((np.asarray(black)[..., 3] == 1).sum()) == 4
