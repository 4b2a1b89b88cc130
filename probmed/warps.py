"""Transforms as files, in the convention of ITK and ANTs.

A transform file holds a map from points of the fixed (reference) world to points of the moving world, the same
direction as a ``Transform`` that ``probmed.transforms.warp`` takes: it carries *images* from moving to fixed, and
*points* from fixed to moving. ITK's world is LPS, probmed's and NIfTI's is RAS, both in mm; reading and writing
change the signs of x and y, so that nothing in memory is in LPS.

Warps
    ``.nii.gz`` or ``.nii``: at each voxel the vector to the matching point, mm, LPS, in an image of shape
    ``(nx, ny, nz, 1, 3)``, or ``(nx, ny, 1, 1, 2)`` of the axial plane, with intent vector (1007). Intent displacement
    (1006) is read as well; its vectors are RAS, as recent versions of ITK have it. ITK moves no point beyond the field, a
    ``Displacement`` moves it like the nearest edge; within half a voxel of the outermost centres they agree.

Linear transforms
    ITK's text (``.txt``, ``.tfm``) and MATLAB 4 binaries (ANTs' ``0GenericAffine.mat``): ``y = M (x - c) + c + t`` with
    ``M`` and ``t`` among the parameters and the centre ``c`` in the fixed ones. Written as ``AffineTransform`` with
    c = 0; read also as rotations by Euler angles or versors, similarities and translations.

Lists of files have the order of ``antsApplyTransforms -t A -t B``: B, given last, is the first to move the image, and A,
given first, is the first to move a point, ``x ↦ B(A(x))``. ``[FILE,1]`` stands for the inverse of a file, of a warp too.

A warp on a grid with a shear is written and read, but ITK refuses images whose axes are not orthogonal.

Reference: ITK's ``itkMatrixOffsetTransformBase``, ``itkEuler3DTransform``, ``itkVersor``, ``itkNiftiImageIO``; the MAT-File
Format of MATLAB 4.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from torch import Tensor

from probmed.grids import Grid
from probmed.transforms import Affine, Composition, Displacement, Transform
from probmed.volumes.files import PathLike, UnusableInput, atomic_write, image_suffix, read_bytes
from probmed.volumes.formats import unzipped

Array = NDArray[np.float64]

_BANNER = "#Insight Transform File V1.0"
_VECTOR, _DISPLACEMENT = 1007, 1006  # NIfTI's intents
_MM_UNITS = (0, 2)  # unknown and mm
_AGAIN = "copy or download it again"
_KINDS = "a warp (.nii.gz) or a linear transform (.txt, .tfm, .mat) of ITK or ANTs"


def write_warp(
    path: PathLike,
    transform: Transform,
    grid: Grid,
    dtype: torch.dtype = torch.float32,
    protect: Iterable[PathLike] = (),
) -> None:
    """A transform, a composition too, as one displacement field of ITK and ANTs.

    Arguments:
        path: ``.nii.gz`` or ``.nii``. The same warp gives the same bytes.
        transform: fixed world to moving world, RAS mm.
        grid: of the fixed world, where the field is sampled; a two-dimensional one is the axial plane.
        dtype: of the vectors, ``float32`` or ``float64``.
        protect: files that must not be replaced.

    Raises:
        ValueError: where transform and grid differ in their dimension, and for a batch of transforms, a dtype that is
            not floating, or vectors that are not finite.
        UnusableInput: where the file cannot be written there.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64, got {dtype}")
    if transform.ndim != grid.ndim:
        raise ValueError(f"expected a transform of {grid.ndim} dimensions, as the grid has, got {transform.ndim}")
    if image_suffix(path) not in (".nii", ".nii.gz"):
        raise UnusableInput(path, "has no suffix of a warp", "name it .nii.gz or .nii")
    d = grid.ndim
    field = transform.displacement_on(grid, dtype).field.detach().cpu().to(dtype)
    if field.ndim != d + 1:
        raise ValueError(f"expected one transform, got a batch of {field.shape[0]}")
    if not field.isfinite().all():
        raise ValueError("expected finite displacements, got NaN or infinity")
    vectors = field.movedim(0, -1) * torch.from_numpy(_to_lps(d)).to(dtype)
    affine = np.eye(4)
    affine[np.ix_([*range(d), 3], [*range(d), 3])] = grid.affine.numpy()
    shape = (*grid.shape, *[1] * (4 - d), d)
    image = nib.Nifti1Image(vectors.reshape(shape).numpy(), affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if image_suffix(path) == ".nii.gz":
        # No time in the gzip header.
        content = gzip.compress(content, compresslevel=4, mtime=0)
    with atomic_write(path, protect) as temporary:
        temporary.write_bytes(content)


def read_warp(path: PathLike) -> Displacement:
    """Read a displacement field of ITK or ANTs.

    Returns:
        Fixed world to moving world, RAS mm; float32 where the file's vectors are, else float64.

    Raises:
        UnusableInput: where the file cannot be read, is a scan or anything else, is cut off, or holds vectors that are not
            finite.
    """
    path = Path(path)
    return _decode_warp(path, unzipped(path, read_bytes(path)))


def write_affine(path: PathLike, affine: Affine, protect: Iterable[PathLike] = ()) -> None:
    """An affine map as ITK's ``AffineTransform`` in double precision, about the origin.

    Arguments:
        path: ``.txt`` or ``.tfm`` for text with all digits, ``.mat`` for ANTs' binary.
        affine: fixed world to moving world, RAS mm; one matrix.
        protect: files that must not be replaced.

    Raises:
        ValueError: for a batch of matrices, one that is not finite, singular, or not affine.
        UnusableInput: where the file cannot be written there.
    """
    if affine.matrix.ndim != 2:
        raise ValueError(f"expected one matrix, got shape {tuple(affine.matrix.shape)}")
    matrix = affine.matrix.detach().cpu().double().numpy()
    d = affine.ndim
    if not np.isfinite(matrix).all() or _is_singular(matrix[:d, :d]):
        raise ValueError(f"expected a finite, invertible matrix, got {matrix.tolist()}")
    if not np.array_equal(matrix[d], np.eye(d + 1)[d]):
        raise ValueError(f"expected 0 … 0 1 in the last row of the matrix, got {matrix[d].tolist()}")
    flip = _to_lps(d)
    parameters = np.concatenate([(flip[:, None] * matrix[:d, :d] * flip).ravel(), flip * matrix[:d, d]])
    # No negative zeros, which some parsers of text trip over.
    parameters, fixed, kind = parameters + 0.0, np.zeros(d), f"AffineTransform_double_{d}_{d}"
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", ".tfm", ".mat"):
        raise UnusableInput(path, "has no suffix of a linear transform", "name it .txt, .tfm or .mat")
    if suffix == ".mat":
        content = _mat_array(kind, parameters) + _mat_array("fixed", fixed)
    else:
        values = " ".join(repr(float(p)) for p in parameters)
        lines = [_BANNER, "#Transform 0", f"Transform: {kind}", f"Parameters: {values}"]
        content = "\n".join([*lines, "FixedParameters: " + " ".join(["0"] * d), ""]).encode("ascii")
    with atomic_write(path, protect) as temporary:
        temporary.write_bytes(content)


def read_affine(path: PathLike) -> Affine:
    """Read a linear transform of ITK or ANTs, text or MATLAB 4, recognised by content.

    Returns:
        Fixed world to moving world, RAS mm, ``(d+1, d+1)`` float64.

    Raises:
        UnusableInput: where the file cannot be read, is cut off, of another kind, holds several transforms, or a matrix that
            is singular or not finite.
    """
    path = Path(path)
    return _decode_affine(path, unzipped(path, read_bytes(path)))


def read_transform(path: PathLike) -> Displacement | Affine:
    """Read a warp or a linear transform, whichever the file holds.

    Returns:
        Fixed world to moving world, RAS mm.

    Raises:
        UnusableInput: as ``read_warp`` and ``read_affine``.
    """
    path = Path(path)
    content = unzipped(path, read_bytes(path))
    return _decode_warp(path, content) if _nifti_kind(content) else _decode_affine(path, content)


@dataclass(frozen=True)
class TransformFile:
    """A file of a list of transforms, to be inverted or not."""

    path: Path
    inverted: bool = False

    @classmethod
    def parse(cls, text: PathLike) -> TransformFile:
        """``FILE``, or ANTs' ``[FILE,1]`` for its inverse; a file of just this name is taken as it is."""
        found = re.fullmatch(r"\[\s*(.+?)\s*,\s*([01])\s*\]", str(text), re.DOTALL)
        if found is None or Path(text).exists():
            return cls(Path(text))
        return cls(Path(found[1]), found[2] == "1")

    def read(self) -> Transform:
        """Fixed world to moving world, RAS mm, after the inversion; a warp is inverted on its own grid, in float64.

        Raises:
            UnusableInput: as ``read_transform``, and for a warp that is to be inverted and folds.
        """
        transform = read_transform(self.path)
        if not self.inverted:
            return transform
        try:
            return _in_double(transform).inverse()
        except ValueError as error:
            raise UnusableInput(self.path, f"cannot be inverted ({error})", "give the file of its inverse") from error

    def inverse(self) -> TransformFile:
        return TransformFile(self.path, not self.inverted)


@dataclass(frozen=True)
class TransformList:
    """Files in the order of ``antsApplyTransforms -t FILES[0] -t FILES[1] …``, read.

    Arguments:
        transforms: of each, after an inversion that its file asks for; all of one dimension.
    """

    files: tuple[TransformFile, ...]
    transforms: tuple[Transform, ...]

    @classmethod
    def read(cls, files: Sequence[PathLike | TransformFile]) -> TransformList:
        """
        Arguments:
            files: paths, or ``"[PATH,1]"`` for the inverse of one.

        Raises:
            ValueError: for no files.
            UnusableInput: as ``read_transform``, and where two are of different dimensions or a warp has no inverse.
        """
        if not files:
            raise ValueError("expected at least one file, got none")
        parsed = [file if isinstance(file, TransformFile) else TransformFile.parse(file) for file in files]
        transforms: list[Transform] = []
        for file in parsed:
            transforms.append(file.read())
            if transforms[-1].ndim != transforms[0].ndim:
                fault = f"is {_of(transforms[-1].ndim)}, and {parsed[0].path} is {_of(transforms[0].ndim)}"
                raise UnusableInput(file.path, fault, "give transforms of one dimension")
        return cls(tuple(parsed), tuple(transforms))

    @property
    def ndim(self) -> int:
        return self.transforms[0].ndim

    @property
    def whole(self) -> Transform:
        """Fixed world to moving world, RAS mm: ``x ↦ FILES[-1](… FILES[0](x))``, so that the last one is the first to move the image."""
        return reduce(lambda before, following: following @ before, self.transforms)

    def check_place(self, points: Tensor, what: str) -> None:
        """Refuse a warp that belongs to another place: where none of the points that come to it lies in its field, it would be its edge alone.

        Arguments:
            points: ``(..., d)`` mm, of the fixed world. what: they are, in words.

        Raises:
            UnusableInput: naming the warp's file.
        """
        for file, transform in zip(self.files, self.transforms, strict=True):
            if isinstance(transform, Displacement) and points.numel() and not bool(transform.grid.holds(points).any()):
                middle = transform.grid.voxel_to_world((torch.tensor(transform.grid.shape, dtype=torch.float64) - 1) / 2)
                distance = float((points.reshape(-1, self.ndim).double().mean(0) - middle).norm())
                fault = f"is a warp of another place: its field holds nothing of {what}, whose middle is {distance:.0f} mm from its own"
                remedy = "give the warp that was made for this place, and check the order and the direction of all transforms (--invert)"
                raise UnusableInput(file.path, fault, remedy)
            points = transform(points)


def read_transforms(files: Sequence[PathLike | TransformFile]) -> Transform:
    """``TransformList.read`` as one transform, fixed world to moving world, RAS mm.

    Raises:
        ValueError, UnusableInput: as ``TransformList.read``.
    """
    return TransformList.read(files).whole


def inverse_at(transform: Transform, points: Tensor, tolerance_mm: float = 1e-5) -> Tensor:
    """Points y with ``transform(y) = x``, found at the points themselves and not on a grid.

    So points are carried the same way as images: a transform from fixed to moving world, which brings the moving image to the
    fixed grid, here brings moving points to the fixed world.

    Arguments:
        points: x, ``(..., d)`` mm, of the moving world.
        tolerance_mm: largest distance from ``transform(y)`` to x.

    Returns:
        ``(..., d)`` mm, of the fixed world, float64.

    Raises:
        ValueError: where a point has no y to that accuracy (the warp folds there).
    """
    points = points.double()
    if isinstance(transform, Composition):
        for part in transform.transforms:
            points = inverse_at(part, points, tolerance_mm)
        return points
    if isinstance(transform, Affine):
        return transform.inverse()(points)
    transform = _in_double(transform)
    found = points - (transform(points) - points)
    error = points - transform(found)
    step = torch.full_like(points[..., :1], 0.75)
    for _ in range(200):
        if not error.numel() or error.abs().max() < tolerance_mm:
            return found
        # Shorter steps where the map stretches so much that they overshoot.
        there = found + step * error
        following = points - transform(there)
        closer = following.norm(dim=-1, keepdim=True) < error.norm(dim=-1, keepdim=True)
        found, error = torch.where(closer, there, found), torch.where(closer, following, error)
        step = torch.where(closer, (1.2 * step).clamp_max(1.0), step / 2)
    raise ValueError(f"the warp has no inverse at some of the points: they are still off by {error.abs().max():.3g} mm")


def _in_double(transform: Transform) -> Transform:
    """A displacement in float64, in which fixed points settle."""
    if isinstance(transform, Composition):
        return Composition(tuple(_in_double(part) for part in transform.transforms))
    if isinstance(transform, Displacement):
        opposite = None if transform.opposite is None else transform.opposite.double()
        return Displacement(transform.grid, transform.field.double(), opposite)
    return transform


def _to_lps(d: int) -> Array:
    """Signs that turn RAS into LPS and back."""
    return np.array([-1.0, -1.0, 1.0])[:d]


def _of(d: int) -> str:
    return "two-dimensional" if d == 2 else "three-dimensional"


def _is_singular(matrix: Array) -> bool:
    sizes = np.linalg.svd(matrix, compute_uv=False)
    return bool(sizes[-1] <= 1e-9 * max(sizes[0], 1e-9))


def _nifti_kind(content: bytes) -> Any:
    """nibabel's class for the content, None where it is no NIfTI file."""
    if content[344:348] == b"n+1\0":
        return nib.Nifti1Image
    return nib.Nifti2Image if content[4:8] == b"n+2\0" else None


def _decode_warp(path: Path, content: bytes) -> Displacement:
    kind = _nifti_kind(content)
    if kind is None:
        raise UnusableInput(path, "is no NIfTI file, as a warp is", f"give {_KINDS}")
    try:
        # What a corrupt header computes is refused in words below.
        with np.errstate(all="ignore"):
            image = kind.from_bytes(content)
            header, shape = image.header, tuple(int(n) for n in image.shape)
            d, to_ras = _vectors(path, header, shape)
            values = np.asanyarray(image.dataobj)
            affine = np.asarray(image.affine, dtype=np.float64)
    except UnusableInput:
        raise
    except (HeaderDataError, ImageFileError, OSError, EOFError) as error:
        raise UnusableInput(path, f"is cut off or damaged ({error})", _AGAIN) from error
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise UnusableInput(path, f"has a corrupt header ({error})", _AGAIN) from error
    precision = np.float32 if values.dtype.kind == "f" and values.dtype.itemsize <= 4 else np.float64
    field = torch.from_numpy(np.array(values, precision, order="C")).reshape(*shape[:d], d)
    if not field.isfinite().all():
        count = field.shape[:-1].numel() - int(field.isfinite().all(-1).sum())
        fault = f"holds {count} vectors that are NaN or infinite"
        raise UnusableInput(path, fault, "replace them by zeros, or make the warp anew")
    try:
        index = [*range(d), 3]
        grid = Grid(shape[:d], torch.from_numpy(affine[np.ix_(index, index)]))
    except ValueError as error:
        raise UnusableInput(path, f"has no usable geometry ({error})", "make the warp anew") from error
    return Displacement(grid, (field * torch.from_numpy(to_ras).to(field)).movedim(-1, 0).contiguous())


def _vectors(path: Path, header: Any, shape: tuple[int, ...]) -> tuple[int, Array]:
    """The dimension of a warp, and the signs that turn its vectors into RAS."""
    intent = int(header["intent_code"])
    remedy = f"give {_KINDS}"
    if len(shape) != 5 or shape[3] != 1 or shape[4] not in (2, 3) or min(shape) < 1:
        fault = f"is no warp: its shape is {shape}, not (nx, ny, nz, 1, 3) or (nx, ny, 1, 1, 2)"
        raise UnusableInput(path, fault, remedy)
    if intent not in (_VECTOR, _DISPLACEMENT):
        fault = f"is no warp: its intent code is {intent}, not {_VECTOR} (vector)"
        raise UnusableInput(path, fault, remedy)
    d = shape[4]
    if d == 2 and shape[2] != 1:
        raise UnusableInput(path, f"is no warp: two-dimensional vectors in a volume of shape {shape}", remedy)
    if header.get_data_dtype().kind not in "iuf":
        raise UnusableInput(path, f"is no warp: its vectors are of type {header.get_data_dtype()}", remedy)
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        raise UnusableInput(path, "has neither sform nor qform, so its place is unknown", "make the warp anew")
    if int(header["xyzt_units"]) & 7 not in _MM_UNITS:
        raise UnusableInput(path, "is in metres or microns", "convert it to millimetres")
    return d, _to_lps(d) if intent == _VECTOR else np.ones(d)


def _decode_affine(path: Path, content: bytes) -> Affine:
    if content.lstrip().startswith(_BANNER.encode()):
        kind, parameters, fixed = _decode_text(path, content)
    elif content[:4] == b"\x89HDF":
        remedy = "take it apart with CompositeTransformUtil --disassemble, and give the parts"
        raise UnusableInput(path, "is a composite of ITK in HDF5", remedy)
    elif content[:6] == b"MATLAB":
        remedy = "convert it with antsApplyTransforms -o Linear[OUT.mat]"
        raise UnusableInput(path, "is a MATLAB file of version 5 or later; ITK's are of version 4", remedy)
    elif _mat_type(content, 0) is not None:
        kind, parameters, fixed = _decode_mat(path, content)
    elif _nifti_kind(content):
        raise UnusableInput(path, "is an image, not a linear transform", "give a .txt, .tfm or .mat file of ITK or ANTs")
    else:
        raise UnusableInput(path, "is no transform of ITK", f"give {_KINDS}")
    return Affine(torch.from_numpy(_ras_matrix(path, kind, parameters, fixed)))


def _decode_text(path: Path, content: bytes) -> tuple[str, Array, Array]:
    """The type, parameters and fixed parameters of ITK's text."""
    entries: dict[str, list[str]] = {"Transform": [], "Parameters": [], "FixedParameters": []}
    for line in content.decode("ascii", errors="replace").splitlines():
        key, colon, value = line.strip().partition(":")
        if colon and key in entries:
            entries[key].append(value.strip())
    count = len(entries["Transform"])
    if count > 1:
        raise UnusableInput(path, f"holds {count} transforms, one is needed", "put each into a file of its own, and give them all")
    if [len(values) for values in entries.values()] != [1, 1, 1]:
        missing = next(key for key, values in entries.items() if len(values) != 1)
        raise UnusableInput(path, f'is cut off or damaged: it has {len(entries[missing])} lines "{missing}:", one is needed', _AGAIN)
    numbers = []
    for key in ("Parameters", "FixedParameters"):
        try:
            numbers.append(np.array([float(word) for word in entries[key][0].split()], dtype=np.float64))
        except ValueError as error:
            raise UnusableInput(path, f'is damaged: "{key}:" has a word that is no number ({error})', _AGAIN) from error
    return entries["Transform"][0], numbers[0], numbers[1]


def _mat_type(content: bytes, start: int) -> tuple[str, str] | None:
    """Byte order and number type of the MATLAB 4 array that starts there, None where none of floats does."""
    for order, first in (("<", 0), (">", 1000)):
        if len(content) >= start + 20:
            code = struct.unpack_from(f"{order}i", content, start)[0] - first
            # Hundreds say how a matrix is laid out, and these are vectors.
            if code in (0, 10, 100, 110):
                return order, "f4" if code % 100 else "f8"
    return None


def _mat_array(name: str, values: Array) -> bytes:
    """A column of float64 as MATLAB 4 has it, little endian."""
    title = name.encode("ascii") + b"\0"
    return struct.pack("<5i", 0, len(values), 1, 0, len(title)) + title + values.astype("<f8").tobytes()


def _decode_mat(path: Path, content: bytes) -> tuple[str, Array, Array]:
    """The type, parameters and fixed parameters of a MATLAB 4 file."""
    cut = UnusableInput(path, "is cut off or damaged: a MATLAB file of which a part is missing", _AGAIN)
    arrays: dict[str, Array] = {}
    start = 0
    while start < len(content):
        kind = _mat_type(content, start)
        if kind is None:
            raise cut
        rows, columns, imaginary, length = struct.unpack_from(f"{kind[0]}4i", content, start + 4)
        if min(rows, columns) < 0 or rows * columns > 1000 or imaginary or not 0 < length < 1000:
            raise cut
        dtype = np.dtype("".join(kind))
        first = start + 20 + length
        start, size = first + rows * columns * dtype.itemsize, rows * columns
        if start > len(content):
            raise cut
        name = content[first - length : first].rstrip(b"\0").decode("ascii", errors="replace")
        arrays[name] = np.frombuffer(content[first:start], dtype).astype(np.float64) if size else np.zeros(0)
    fixed = arrays.pop("fixed", None)
    if len(arrays) != 1 or fixed is None:
        names = ", ".join([*arrays, *([] if fixed is None else ["fixed"])]) or "nothing"
        raise UnusableInput(path, f'is no transform of ITK: it holds {names}, not one transform and "fixed"', f"give {_KINDS}")
    ((name, parameters),) = arrays.items()
    return name, parameters, fixed


def _ras_matrix(path: Path, kind: str, parameters: Array, fixed: Array) -> Array:
    """The homogeneous matrix ``(d+1, d+1)`` in RAS of an ITK transform ``M (x - c) + c + t`` in LPS."""
    found = re.fullmatch(r"([A-Za-z0-9]+)_(?:double|float)_([23])_([23])", kind)
    if found is None or found[2] != found[3] or (found[1], int(found[2])) not in _LINEAR:
        remedy = "convert it to an AffineTransform, for instance with antsApplyTransforms -o Linear[OUT.mat]"
        raise UnusableInput(path, f"holds a transform of the type {kind[:60]!r}, which is not linear or not known here", remedy)
    d = int(found[2])
    count, build = _LINEAR[found[1], d]
    if len(parameters) != count:
        fault = f"is cut off or damaged: {kind} has {count} parameters, the file {len(parameters)}"
        raise UnusableInput(path, fault, _AGAIN)
    if len(fixed) < d and found[1] != "TranslationTransform":
        raise UnusableInput(path, f"is cut off or damaged: its centre has {len(fixed)} of {d} coordinates", _AGAIN)
    if not (np.isfinite(parameters).all() and np.isfinite(fixed).all()):
        raise UnusableInput(path, "holds parameters that are NaN or infinite", "make the transform anew")
    linear, shift = build(parameters, fixed)
    if _is_singular(linear):
        raise UnusableInput(path, "has a singular matrix, which maps the world onto a plane", "make the transform anew")
    centre = fixed[:d] if len(fixed) >= d else np.zeros(d)
    flip = _to_lps(d)
    matrix = np.eye(d + 1)
    matrix[:d, :d] = flip[:, None] * linear * flip
    matrix[:d, d] = flip * (shift + centre - linear @ centre)
    return matrix


Build = Callable[[Array, Array], tuple[Array, Array]]


def _full(d: int) -> Build:
    return lambda p, fixed: (p[: d * d].reshape(d, d), p[d * d :])


def _turn(angle: float, axis: int) -> Array:
    """Rotation about an axis of three-dimensional space."""
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    out = np.eye(3)
    out[i, i] = out[j, j] = math.cos(angle)
    out[i, j], out[j, i] = -math.sin(angle), math.sin(angle)
    return out


def _euler(p: Array, fixed: Array) -> tuple[Array, Array]:
    x, y, z = (_turn(angle, axis) for axis, angle in enumerate(p[:3]))
    # A fourth fixed parameter chooses the order.
    return (z @ y @ x if len(fixed) > 3 and fixed[3] else z @ x @ y), p[3:]


def _versor(v: Array) -> Array:
    """Rotation of a unit quaternion's vector part ``(3,)``, or of a whole quaternion ``(4,)``, scalar last."""
    scalar = math.sqrt(max(0.0, 1.0 - float(v @ v))) if len(v) == 3 else float(v[3])
    norm = math.sqrt(float(v[:3] @ v[:3]) + scalar**2) or 1.0
    x, y, z = v[:3] / norm
    w = scalar / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


_LINEAR: dict[tuple[str, int], tuple[int, Build]] = {
    **{(name, d): (d * d + d, _full(d)) for name in ("AffineTransform", "MatrixOffsetTransformBase") for d in (2, 3)},
    ("TranslationTransform", 2): (2, lambda p, fixed: (np.eye(2), p)),
    ("TranslationTransform", 3): (3, lambda p, fixed: (np.eye(3), p)),
    ("Euler2DTransform", 2): (3, lambda p, fixed: (_turn(p[0], 2)[:2, :2], p[1:])),
    ("Rigid2DTransform", 2): (3, lambda p, fixed: (_turn(p[0], 2)[:2, :2], p[1:])),
    ("Similarity2DTransform", 2): (4, lambda p, fixed: (p[0] * _turn(p[1], 2)[:2, :2], p[2:])),
    ("Euler3DTransform", 3): (6, _euler),
    ("VersorRigid3DTransform", 3): (6, lambda p, fixed: (_versor(p[:3]), p[3:])),
    ("QuaternionRigidTransform", 3): (7, lambda p, fixed: (_versor(p[:4]), p[4:])),
    ("Similarity3DTransform", 3): (7, lambda p, fixed: (p[6] * _versor(p[:3]), p[3:6])),
}
