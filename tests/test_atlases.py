"""Atlases: the default one, its cache, arithmetic on classes, folders on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from probmed.atlases import (
    AtlasRecipe,
    LabelAtlas,
    cache_folder,
    default_atlas,
    read_atlas,
    write_atlas,
)
from probmed.atlases.mni152 import Packed, _digest, _read_cached, _write_cached
from probmed.grids import Grid, average_onto
from probmed.volumes import UnusableInput


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "cache"


@pytest.fixture(scope="module")
def coarse(cache: Path) -> LabelAtlas:
    """Built here, and kept in ``cache``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROBMED_CACHE", str(cache))
        return default_atlas(spacing_mm=6.0)


@pytest.fixture
def small() -> LabelAtlas:
    """Three classes on an oblique, anisotropic grid."""
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor([[2.0, 0.3, 0.0], [-0.3, 2.0, 0.0], [0.0, 0.0, 3.0]])
    affine[:3, 3] = torch.tensor([-5.0, 4.0, 1.0])
    logits = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    template = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(1))
    return LabelAtlas(("a", "b", "air"), logits.softmax(0), Grid((6, 5, 4), affine), template, brain=("a", "b"))


def at(atlas: LabelAtlas, x: float, y: float, z: float) -> dict[str, float]:
    i, j, k = (int(v) for v in atlas.grid.world_to_voxel(torch.tensor([x, y, z], dtype=torch.float64)).round())
    return dict(zip(atlas.names, atlas.probabilities[:, i, j, k].tolist(), strict=True))


def test_default_atlas_covers_a_head(coarse: LabelAtlas) -> None:
    assert coarse.names == ("GM", "WM", "CSF", "bone", "soft", "air")
    assert coarse.indices == (1, 2, 3, 4, 5, 0)
    assert torch.allclose(coarse.probabilities.sum(0), torch.ones(coarse.grid.shape), atol=1e-5)
    assert coarse.probabilities.min() > 5e-5
    litres = coarse.probabilities.flatten(1).sum(-1) * coarse.grid.voxel_volume / 1e6
    volumes = dict(zip(coarse.names, litres.tolist(), strict=True))
    assert 0.9 < volumes["GM"] < 1.1 and 0.6 < volumes["WM"] < 0.75 and 0.3 < volumes["CSF"] < 0.55
    assert at(coarse, 25, -20, 30)["WM"] > 0.7
    assert at(coarse, 0, -10, 116)["air"] > 0.9
    assert at(coarse, 0, 30, -100)["soft"] > 0.4  # the mouth
    # Going up through the vertex: brain, bone, scalp, air.
    column = [max(p, key=lambda n: p[n]) for p in (at(coarse, 0, -20, z) for z in range(40, 120, 4))]
    order = [name for k, name in enumerate(column) if k == 0 or column[k - 1] != name]
    assert order[-1] == "air" and order[-2] == "soft" and "bone" in order


def test_template_and_masks(coarse: LabelAtlas) -> None:
    assert coarse.template is not None and coarse.template.min() >= 0 and coarse.template.max() <= 1
    inside = coarse.template[coarse.brain_mask].mean()
    assert inside > 5 * coarse.template[~coarse.brain_mask].mean()
    assert (coarse.head_probability >= coarse.brain_probability - 1e-5).all()


def test_stripped_merges_everything_outside(coarse: LabelAtlas) -> None:
    stripped = coarse.stripped()
    assert stripped.names == ("GM", "WM", "CSF", "background") and stripped.indices == (1, 2, 3, 0)
    assert torch.allclose(stripped.probabilities[3], coarse.probabilities[3:].sum(0))
    assert torch.allclose(stripped.brain_probability, coarse.brain_probability)
    assert stripped.stripped() is stripped


def test_cache_gives_the_same_atlas(coarse: LabelAtlas, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    monkeypatch.setenv("PROBMED_CACHE", str(cache))
    atlas = default_atlas(6.0)
    assert file.suffix == ".safetensors" and file.stat().st_mtime_ns == before
    assert torch.equal(coarse.probabilities, atlas.probabilities) and coarse.grid == atlas.grid
    assert atlas.template is not None and coarse.template is not None
    assert torch.equal(coarse.template, atlas.template)


@pytest.fixture
def packed() -> Packed:
    maps = {"probabilities": torch.rand(6, 4, 3, 2).half(), "template": torch.rand(4, 3, 2).half()}
    return maps, Grid.from_spacing((4, 3, 2), 1.5)


def test_a_damaged_cache_counts_as_none(packed: Packed, tmp_path: Path) -> None:
    path = tmp_path / "new" / "atlas.safetensors"
    assert _read_cached(path) is None
    _write_cached(path, *packed)
    back = _read_cached(path)
    assert back is not None and back[1] == packed[1]
    assert all(torch.equal(back[0][name], packed[0][name]) for name in packed[0])
    for damage in (b"", path.read_bytes()[:-10], b"\x00" * 64):
        path.write_bytes(damage)
        assert _read_cached(path) is None


def test_an_unwritable_cache_is_no_reason_to_fail(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _write_cached(tmp_path / "file" / "atlas.safetensors", *packed)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_cache_folder_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROBMED_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.sep, "c"))
    assert cache_folder() == Path(os.sep, "c", "probmed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert "probmed" in cache_folder().parts
    one = _digest(AtlasRecipe(), {"t1": b"a"})
    assert one != _digest(AtlasRecipe(spacing_mm=2.0), {"t1": b"a"}) and one != _digest(AtlasRecipe(), {"t1": b"b"})


@pytest.mark.parametrize("spacing", [0.1, -1.0, float("nan"), 50.0])
def test_default_atlas_refuses_odd_spacings(spacing: float) -> None:
    with pytest.raises(ValueError, match="spacing between"):
        default_atlas(spacing)


def test_average_onto_keeps_the_mean_and_linear_functions() -> None:
    grid = Grid.from_spacing((12, 10, 9), (1.0, 1.5, 2.0))
    image = torch.rand(2, 12, 10, 9, dtype=torch.float64)
    for spacing in ((2.0, 3.0, 6.0), (1.7, 2.2, 4.1)):
        target = grid.at_spacing(spacing)
        assert torch.allclose(average_onto(image, grid, target).mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-12)
    blocks = average_onto(image, grid, grid.at_spacing((2.0, 3.0, 6.0)))
    assert torch.allclose(blocks[0, 0, 0, 0], image[0, :2, :2, :3].mean())
    ramp = grid.coordinates(torch.float64).movedim(-1, 0)
    for spacing, inner in (((3.0, 3.0, 6.0), slice(None)), ((0.5, 0.5, 0.5), slice(2, -2))):
        target = grid.at_spacing(spacing)
        want = target.coordinates(torch.float64).movedim(-1, 0)
        got = average_onto(ramp, grid, target)
        assert torch.allclose(got[:, inner, inner, inner], want[:, inner, inner, inner], atol=1e-9)


def test_resampled_and_on(small: LabelAtlas) -> None:
    fine, coarse = small.resampled(1.0), small.resampled(4.0)
    for atlas in (fine, coarse):
        assert torch.allclose(atlas.probabilities.sum(0), torch.ones(atlas.grid.shape), atol=1e-5)
        assert atlas.template is not None and tuple(atlas.template.shape) == atlas.grid.shape
        assert atlas.names == small.names and atlas.brain == small.brain
    assert small.resampled(small.grid.spacing) is small
    assert torch.allclose(small.on(small.grid).probabilities, small.probabilities, atol=1e-5)
    assert small.to("cpu").probabilities.device.type == "cpu"


def test_merged_asks_for_each_class_once(small: LabelAtlas) -> None:
    merged = small.merged({"ab": ("a", "b"), "air": ("air",)})
    assert torch.allclose(merged.probabilities[0], small.probabilities[:2].sum(0)) and merged.brain == ("ab",)
    with pytest.raises(ValueError, match="each of"):
        small.merged({"a": ("a",)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a", "a", "air")}, "different names"),
        ({"names": ("a", "air")}, "expected probabilities of shape"),
        ({"brain": ("c",)}, "not among"),
        ({"indices": (1, 1, 0)}, "label indices"),
        ({"colours": ("#000000",)}, "colours"),
        ({"template": torch.zeros(2, 2, 2)}, "template of shape"),
    ],
)
def test_atlas_refuses_what_does_not_fit(small: LabelAtlas, change: dict[str, object], message: str) -> None:
    given = {
        "names": small.names,
        "probabilities": small.probabilities,
        "grid": small.grid,
        "brain": small.brain,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        LabelAtlas(**given)  # type: ignore[arg-type]


def test_atlas_refuses_what_is_no_probability(small: LabelAtlas) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        LabelAtlas(small.names, small.probabilities * 1.1, small.grid, brain=())


def test_folder_round_trip(small: LabelAtlas, tmp_path: Path) -> None:
    write_atlas(small, tmp_path / "mine")
    back = read_atlas(tmp_path / "mine")
    assert back.names == small.names and back.brain == small.brain and back.indices == small.indices
    assert back.colours == small.colours and back.grid == small.grid
    assert torch.allclose(back.probabilities, small.probabilities, atol=1e-6)
    assert back.template is not None and back.template.min() == 0 and back.template.max() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    with pytest.raises(UnusableInput, match="exists already"):
        write_atlas(small, tmp_path / "mine")


def folder_with(path: Path, index: object, maps: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    if index is not None:
        (path / "atlas.json").write_text(index if isinstance(index, str) else json.dumps(index))
    for name, values in maps.items():
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), path / name)
    return path


def ramp(scale: float = 1.0) -> np.ndarray:
    return scale * np.linspace(0, 1, 60).reshape(3, 4, 5)


def test_a_rest_becomes_background(tmp_path: Path) -> None:
    index = {"names": ["GM", "WM"], "maps": {"GM": "gm.nii.gz"}, "indices": {"GM": 3, "WM": 41}}
    maps = {"gm.nii.gz": ramp(0.4), "label-WM_probseg.nii.gz": ramp(0.6)}
    atlas = read_atlas(folder_with(tmp_path / "a", index, maps))
    assert atlas.names == ("GM", "WM", "background") and atlas.indices == (3, 41, 0) and atlas.brain == ("GM", "WM")
    assert torch.allclose(atlas.probabilities[2], 1 - torch.from_numpy(ramp()).float(), atol=1e-5)


GM = {"label-GM_probseg.nii.gz": ramp()}
TWO = {**GM, "label-air_probseg.nii.gz": ramp()[::-1, ::-1, ::-1]}


@pytest.mark.parametrize(
    ("index", "maps", "file", "fault"),
    [
        (None, {}, "atlas.json", "does not exist"),
        ("{", {}, "atlas.json", "not JSON"),
        ([1], {}, "atlas.json", "holds a list"),
        ({"names": []}, {}, "atlas.json", "no list of names"),
        ({"names": ["GM", "GM"]}, GM, "atlas.json", "twice"),
        ({"names": ["GM"], "colour": {}}, GM, "atlas.json", "unknown keys"),
        ({"names": ["GM"], "brain": ["WM"]}, GM, "atlas.json", "brain"),
        ({"names": ["GM"], "indices": {"GM": "one"}}, GM, "atlas.json", "indices"),
        ({"names": ["GM"], "indices": {"WM": 1}}, GM, "atlas.json", "lacks"),
        ({"names": ["GM", "air"], "indices": {"GM": 0}}, TWO, "atlas.json", "label indices"),
        ({"names": ["GM", "WM"]}, GM, "label-WM_probseg.nii.gz", "does not exist"),
        ({"names": ["GM"]}, {"label-GM_probseg.nii.gz": ramp(255)}, "label-GM", "not probabilities"),
        ({"names": ["GM", "WM"]}, {**GM, "label-WM_probseg.nii.gz": ramp()}, "a", "sum reaches 2"),
        ({"names": ["GM", "WM"]}, {**GM, "label-WM_probseg.nii.gz": ramp()[:2]}, "label-WM", "another grid"),
        ({"names": ["GM"], "template": "t.nii.gz"}, {**GM, "t.nii.gz": ramp()[:2]}, "t.nii.gz", "grid"),
    ],
)  # fmt: skip
def test_bad_folders_say_what_is_wrong(tmp_path: Path, index: object, maps: dict[str, np.ndarray], file: str, fault: str) -> None:
    path = folder_with(tmp_path / "a", index, maps)
    with pytest.raises(UnusableInput) as caught:
        read_atlas(path)
    message = str(caught.value)
    assert file in message and fault in message and "\n" not in message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="nowhere"):
        read_atlas(tmp_path / "nowhere")


def test_two_dimensional_atlas_works_in_memory() -> None:
    grid = Grid.from_spacing((8, 6), (1.0, 2.0))
    atlas = LabelAtlas(("x", "background"), torch.full((2, 8, 6), 0.5), grid, brain=("x",))
    assert atlas.resampled(3.0).grid.ndim == 2
