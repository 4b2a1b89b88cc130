"""Image files as bytes: NIfTI-1, NIfTI-2 and MGH, to and from header, affine and voxels.

nibabel reads the headers. The voxels are taken and laid down here, so that nothing between the file and the
tensor rescales, casts or repairs them silently, and so that compression uses all cores and gives the same
bytes every time.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from torch import Tensor

from probmed.volumes.files import UnusableInput, image_suffix, read_bytes

_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # NIfTI's codes of metre and micron; 0 (unknown) and 2 are millimetres
# nibabel's classes are partly untyped.
_Nifti1Header: Any = nib.Nifti1Header
_Nifti2Header: Any = nib.Nifti2Header
_MGHImage: Any = nib.MGHImage
_NIFTI_MAGIC = ((_Nifti1Header, 344, b"n+1\0", 348), (_Nifti2Header, 4, b"n+2\0", 540))
_GEOMETRY = (
    *("pixdim", "dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
_MGH_DATA_OFFSET = 284
_MGH_TYPES = ("uint8", "int16", "int32", "float32")
_SPACINGS_MM = (1e-4, 1e4)
_FARTHEST_MM = 1e7
_GZIP_BLOCK = 1 << 20
_AGAIN = "copy or download it again"


@dataclass(frozen=True, eq=False)
class Stored:
    """What an image file holds: the value of a voxel is ``slope * raw + intercept``."""

    raw: NDArray[Any]
    slope: float
    intercept: float
    affine: NDArray[np.float64]
    header: Any


def decode(path: Path) -> Stored:
    """Read an image file whose voxels are scalars, one for each place, in two or three dimensions.

    Raises:
        UnusableInput: where this is not what the file holds, or its geometry is none.
    """
    content = unzipped(path, read_bytes(path))
    # The arithmetic of a corrupt header may overflow; what comes of it is refused in words.
    with np.errstate(all="ignore"):
        for kind, start, magic, size in _NIFTI_MAGIC:
            if content[start : start + 4] == magic:
                return _decode_nifti(path, content, kind, size)
        if image_suffix(path) in (".mgh", ".mgz") and content[:4] == b"\0\0\0\1":
            return _decode_mgh(path, content)
    raise _unknown(path, content)


def spatial_shape(file_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes without trailing ones of size 1; at least two where there are two."""
    shape = list(file_shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def unzipped(path: Path, content: bytes) -> bytes:
    """The bytes of a file, without gzip.

    Raises:
        UnusableInput: where there are none, or the stream is cut off or damaged.
    """
    if not content:
        raise UnusableInput(path, "is a file of 0 bytes", _AGAIN)
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise UnusableInput(path, "is cut off: its gzip stream ends too early", _AGAIN) from error
    except (OSError, zlib.error, struct.error) as error:
        raise UnusableInput(path, f"is damaged: its gzip stream is not valid ({error})", _AGAIN) from error


def _unknown(path: Path, content: bytes) -> UnusableInput:
    if content[128:132] == b"DICM":
        return UnusableInput(
            path, "is a DICOM file", "convert the series to NIfTI, for instance with dcm2niix"
        )
    if content[344:348] == b"ni1\0" or content[4:8] == b"ni2\0":
        return UnusableInput(path, "is one half of a NIfTI pair", "convert the pair to one .nii.gz file")
    sizes = [struct.pack(f"{order}i", size) for order in "<>" for size in (348, 540)]
    if content[:4] in sizes and len(content) < 348:
        return UnusableInput(path, "is cut off within its header", _AGAIN)
    if content[:4] in sizes:
        return UnusableInput(
            path, "is an Analyze header, which gives no orientation", "convert it to .nii.gz"
        )
    return UnusableInput(
        path, "is neither NIfTI nor MGH, or its header is corrupt", "give a .nii, .nii.gz, .mgz or .mgh file"
    )


def _corrupt(path: Path, what: object) -> UnusableInput:
    return UnusableInput(path, f"has a corrupt header ({what})", _AGAIN + ", or convert it anew")


def _decode_nifti(path: Path, content: bytes, kind: Any, size: int) -> Stored:
    if len(content) < size:
        raise UnusableInput(path, "is cut off within its header", _AGAIN)
    try:
        # Unchecked: nibabel's checks would repair zero spacing in silence.
        # Byte order by the header's own size: nibabel goes by the number of axes, which may be corrupt.
        order = "<" if content[:4] == struct.pack("<i", size) else ">"
        header = kind(content[:size], order, check=False)
        if int(header["sizeof_hdr"]) != size:
            raise _corrupt(path, f"its size is given as {int(header['sizeof_hdr'])} bytes")
        if not 1 <= int(header["dim"][0]) <= 7:
            raise _corrupt(path, f"{int(header['dim'][0])} axes")
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header["vox_offset"]) or size + 4
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, KeyError, OverflowError) as error:
        raise _corrupt(path, error) from error
    except ValueError as error:
        raise error if isinstance(error, UnusableInput) else _corrupt(path, error) from error
    if offset < size:
        raise _corrupt(path, f"voxels start at byte {offset}")
    _check_shape(path, shape)
    raw = _voxels(path, content, shape, dtype, offset)
    spacing = np.abs(header["pixdim"][1 : 1 + len(spatial_shape(shape))].astype(np.float64))
    affine = _completed(path, _nifti_affine(path, header, shape), spacing, shape)
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        warnings.warn(
            f"{path}: has neither sform nor qform, so its place and orientation are unknown; "
            "taken as centred, first axis from right to left",
            stacklevel=5,
        )
    unit = int(header["xyzt_units"]) & 7
    if unit in _MM_PER_UNIT:
        name = "metres" if unit == 1 else "microns"
        warnings.warn(f"{path}: is in {name}; converted to millimetres", stacklevel=5)
    steps = np.linalg.norm(affine[:3, : len(spacing)], axis=0)
    if not np.allclose(steps, spacing * _MM_PER_UNIT.get(unit, 1.0), rtol=0.01):
        warnings.warn(
            f"{path}: its sform has spacing {_text(steps)} mm, its pixdim {_text(spacing)}; "
            "the sform is used",
            stacklevel=5,
        )
    return Stored(
        raw,
        1.0 if slope is None else float(slope),
        0.0 if slope is None else float(intercept),
        affine,
        header,
    )


def _nifti_affine(path: Path, header: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Voxel to world in millimetres as the header has it: sform, else qform, else spacing."""
    size = np.abs(header["pixdim"][1:4].astype(np.float64))
    size[len(shape) :] = np.where(size[len(shape) :] > 0, size[len(shape) :], 1.0)
    affine = np.eye(4)
    if int(header["sform_code"]) > 0:
        affine[:3] = [header[row] for row in ("srow_x", "srow_y", "srow_z")]
    elif int(header["qform_code"]) > 0:
        clean = header.copy()
        clean["pixdim"][1:4] = size
        clean["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
        try:
            affine = np.asarray(clean.get_qform(coded=False), dtype=np.float64)
        except (HeaderDataError, ValueError) as error:
            raise UnusableInput(
                path, f"has a qform that is no rotation ({error})", "convert it anew"
            ) from error
    else:
        full = np.array([*shape, 1, 1][:3], dtype=np.float64)
        affine[:3, :3] = np.diag(size * (-1, 1, 1))
        affine[:3, 3] = -affine[:3, :3] @ ((full - 1) / 2)
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _decode_mgh(path: Path, content: bytes) -> Stored:
    if len(content) < _MGH_DATA_OFFSET:
        raise UnusableInput(path, "is cut off within its header", _AGAIN)
    sizes = struct.unpack(">4i", content[4:20])
    shape = sizes if sizes[3] != 1 else sizes[:3]
    _check_shape(path, shape)
    try:
        header = _MGHImage.header_class.from_fileobj(io.BytesIO(content), check=False)
        dtype = header.get_data_dtype()
    except (HeaderDataError, MGHError, KeyError, OverflowError, ValueError) as error:
        raise _corrupt(path, error) from error
    raw = _voxels(path, content, shape, dtype, _MGH_DATA_OFFSET)
    spacing = np.abs(header["delta"].astype(np.float64))[: len(spatial_shape(shape))]
    _check_spacing(path, spacing)
    return Stored(raw, 1.0, 0.0, _completed(path, header.get_affine(), spacing, shape), header)


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if min(shape) < 0:
        raise _corrupt(path, f"shape {shape}")
    if min(shape) == 0:
        raise UnusableInput(path, f"is empty: its shape is {shape}", "export it again")
    spatial = spatial_shape(shape)
    if len(spatial) > 3:
        fault = f"holds {math.prod(spatial[3:])} images (shape {shape}), one is needed"
        raise UnusableInput(path, fault, "split it, and give one image or the mean over time")
    if len(spatial) < 2:
        raise UnusableInput(path, f"has one axis (shape {shape})", "give an image with two or three axes")


def _check_spacing(path: Path, spacing: NDArray[np.float64]) -> None:
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise UnusableInput(
            path,
            f"has a voxel spacing of {_text(spacing)}",
            "correct pixdim in its header, or convert it anew",
        )


def _voxels(
    path: Path, content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int
) -> NDArray[Any]:
    if dtype.fields is not None:
        raise UnusableInput(
            path, "holds colours (RGB), not intensities", "convert it to one grey value a voxel"
        )
    if dtype.kind == "c":
        raise UnusableInput(path, "holds complex numbers", "give the magnitude image")
    if dtype.kind not in "iuf":
        raise UnusableInput(path, f"holds voxels of type {dtype}", "convert it to integers or floats")
    count = math.prod(shape)
    if offset + count * dtype.itemsize > len(content):
        have = max(0, len(content) - offset)
        raise UnusableInput(
            path,
            f"is cut off: it has {have} bytes of voxels, its header promises {count * dtype.itemsize}",
            _AGAIN,
        )
    return np.frombuffer(content, dtype, count, offset).reshape(shape, order="F")


def _completed(
    path: Path, affine: NDArray[np.float64], spacing: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """The affine, invertible; where a slice has no usable third column, with the plane's normal there."""
    _check_spacing(path, spacing)
    affine = np.asarray(affine, dtype=np.float64).copy()
    remedy = "correct the sform or qform in its header, or convert it anew"
    if not np.isfinite(affine[:3, : len(spacing)]).all() or not np.isfinite(affine[:3, 3]).all():
        raise UnusableInput(path, "has an affine that is not finite", remedy)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    area, sides = np.linalg.norm(normal), np.linalg.norm(affine[:3, :3], axis=0)
    singular = area <= 1e-4 * sides[0] * sides[1]
    if len(spacing) == 3:
        singular = singular or abs(normal @ affine[:3, 2]) <= 1e-4 * area * sides[2]
    elif not singular and not (
        abs(normal @ affine[:3, 2]) > 1e-4 * area * sides[2] and _SPACINGS_MM[0] < sides[2] < _SPACINGS_MM[1]
    ):
        affine[:3, 2] = normal / area
    if singular:
        raise UnusableInput(path, "has a singular affine: its voxels do not span the image's axes", remedy)
    steps = sides[: len(spacing)]
    if (
        (steps < _SPACINGS_MM[0]).any()
        or (steps > _SPACINGS_MM[1]).any()
        or np.abs(affine[:3, 3]).max() > _FARTHEST_MM
    ):
        origin = ", ".join(f"{t:.4g}" for t in affine[:3, 3])
        raise UnusableInput(
            path, f"has no plausible geometry: spacing {_text(steps)} mm, origin {origin}", remedy
        )
    return affine


def encode(
    path: Path, values: Tensor, dtype: np.dtype[Any], affine: NDArray[np.float64], header: Any
) -> bytes:
    """An image file's bytes, in the format of the suffix of ``path``.

    Arguments:
        values: ``(*file_shape)``, on the CPU, within the range of ``dtype``.
        affine: voxel to world, mm.
        header: of the file whose geometry is wanted, or None.

    Raises:
        UnusableInput: for another suffix, or a voxel type that the format lacks.
    """
    suffix = image_suffix(path)
    if not suffix:
        raise UnusableInput(
            path,
            "has no suffix of an image format that can be written",
            "name it .nii.gz, .nii, .mgz or .mgh",
        )
    # Reversed axes in C order are the file's Fortran order; torch transposes on all cores.
    voxels = values.permute(*range(values.ndim)[::-1]).contiguous().numpy().astype(dtype, copy=False)
    encoder = _encode_mgh if suffix in (".mgh", ".mgz") else _encode_nifti
    content = encoder(path, voxels, dtype, affine, header)
    return _zipped(content) if suffix in (".nii.gz", ".mgz") else content


def _encode_nifti(
    path: Path, voxels: NDArray[Any], dtype: np.dtype[Any], affine: NDArray[np.float64], header: Any
) -> bytes:
    shape = voxels.shape[::-1]
    wide = isinstance(header, _Nifti2Header) or max(shape) > np.iinfo(np.int16).max
    fresh = _Nifti2Header() if wide else _Nifti1Header()
    try:
        fresh.set_data_dtype(dtype)
    except HeaderDataError as error:
        raise UnusableInput(
            path, f"cannot hold voxels of type {dtype}", "write float32 or integers"
        ) from error
    fresh.set_data_shape(shape)
    if isinstance(header, _Nifti1Header) and _agrees(path, header, shape, affine):
        for field in _GEOMETRY:
            fresh[field] = header[field]
    else:
        # FreeSurfer's world is the scanner's; of a volume made here it is only known that others share it.
        code = "scanner" if header is not None and not isinstance(header, _Nifti1Header) else "aligned"
        fresh.set_sform(affine, code)
        fresh.set_qform(affine, code, strip_shears=True)
        if not np.allclose(fresh.get_qform(), affine, atol=1e-4):
            fresh["qform_code"] = 0
        fresh.set_xyzt_units("mm")
    fresh["scl_slope"], fresh["scl_inter"] = 1.0, 0.0
    fresh["vox_offset"] = fresh.sizeof_hdr + 4
    extensions = bytes(4)
    little = voxels.astype(dtype.newbyteorder("<"), copy=False)
    return bytes(fresh.as_byteswapped("<").binaryblock) + extensions + little.tobytes()


def _agrees(path: Path, header: Any, shape: tuple[int, ...], affine: NDArray[np.float64]) -> bool:
    own = _nifti_affine(path, header, shape)
    columns = [*range(len(spatial_shape(shape))), 3]
    return bool(np.allclose(own[:, columns], affine[:, columns], atol=1e-5))


def _encode_mgh(
    path: Path, voxels: NDArray[Any], dtype: np.dtype[Any], affine: NDArray[np.float64], header: Any
) -> bytes:
    if dtype.name not in _MGH_TYPES:
        raise UnusableInput(
            path, f"cannot hold voxels of type {dtype}", f"write {', '.join(_MGH_TYPES)}, or name it .nii.gz"
        )
    # The format has three axes, and a fourth only for several images.
    array = voxels.T
    array = array.reshape((*spatial_shape(array.shape), 1)[:3])
    fresh = header.copy() if isinstance(header, _MGHImage.header_class) else None
    image = _MGHImage(array, affine, fresh)
    image.set_data_dtype(dtype)
    return bytes(image.to_bytes())


def _zipped(content: bytes, level: int = 1) -> bytes:
    """One gzip member, its blocks deflated in parallel; the bytes depend on the content alone.

    Every block but the last ends at a byte boundary (a full flush), so that their streams can be joined (RFC
    1951, 1952; pigz).
    """
    view = memoryview(content)
    starts = range(0, max(1, len(view)), _GZIP_BLOCK)

    def deflated(start: int) -> bytes:
        packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = packer.compress(view[start : start + _GZIP_BLOCK])
        return body + packer.flush(zlib.Z_FINISH if start == starts[-1] else zlib.Z_FULL_FLUSH)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        blocks = list(pool.map(deflated, starts))
    head = b"\x1f\x8b\x08\x00" + bytes(4) + b"\x04\xff"
    return head + b"".join(blocks) + struct.pack("<II", zlib.crc32(view), len(view) & 0xFFFFFFFF)


def _text(spacing: NDArray[np.float64]) -> str:
    return " × ".join(f"{s:.4g}" for s in spacing)
