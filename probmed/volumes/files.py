"""Files of any kind: what makes one unusable, writing one whole or not at all, checksums, names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]
_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")


class UnusableInput(ValueError):
    """A file that cannot be used: which, what is wrong with it, and what to do. Its text is one line."""

    def __init__(self, path: PathLike, fault: str, remedy: str) -> None:
        super().__init__(path, fault, remedy)
        self.path = path
        self.fault = fault
        self.remedy = remedy

    def __str__(self) -> str:
        return " ".join(f"{os.fspath(self.path)}: {self.fault}; {self.remedy}".split())


@contextlib.contextmanager
def atomic_write(path: PathLike, protect: Iterable[PathLike] = ()) -> Iterator[Path]:
    """Give a temporary path beside ``path``, with its suffix, to write to.

    At the end it becomes ``path``; after an error it is gone, and ``path`` is as it was.

    Arguments:
        protect: files that must not be replaced.

    Raises:
        UnusableInput: where ``path`` is protected, a folder, or in no folder, and for every ``OSError``
            inside.
    """
    path = Path(path)
    for other in protect:
        if path.resolve() == Path(other).resolve() or (
            path.exists() and Path(other).exists() and path.samefile(other)
        ):
            raise UnusableInput(path, "is an input and would be overwritten", "choose another output")
    if path.is_dir():
        raise UnusableInput(path, "is a folder", "give the name of a file to write")
    if not path.parent.is_dir():
        raise UnusableInput(path, "cannot be written, its folder does not exist", f"create {path.parent}")
    temporary = path.with_name(f".probmed-{secrets.token_hex(6)}{image_suffix(path) or path.suffix}")
    try:
        try:
            # Not by tempfile, whose files only their owner may read.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            _synchronise(temporary, os.O_RDWR)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        fault = f"cannot be written: {error.strerror or error}"
        raise UnusableInput(
            path, fault, "free space there, or choose a folder that you may write to"
        ) from error
    # Makes the new name durable; not every file system allows it, and the file itself is safe.
    with contextlib.suppress(OSError):
        _synchronise(path.parent, os.O_RDONLY)


def bids_stem(path: PathLike) -> str:
    """The file's name without folder and image suffix: ``sub-01_T1w`` of ``data/sub-01_T1w.nii.gz``."""
    name = Path(path).name
    suffix = image_suffix(path)
    return name[: len(name) - len(suffix)]


def sha256(path: PathLike) -> str:
    """Checksum of a file, hexadecimal.

    Raises:
        UnusableInput: where it cannot be read.
    """
    digest = hashlib.sha256()
    with _readable(Path(path)), open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_bytes(path: PathLike) -> bytes:
    """The whole file.

    Raises:
        UnusableInput: where it cannot be read.
    """
    with _readable(Path(path)):
        return Path(path).read_bytes()


def image_suffix(path: PathLike) -> str:
    """``.nii.gz``, ``.nii``, ``.mgz`` or ``.mgh`` in lower case; ``""`` of anything else."""
    name = Path(path).name.lower()
    return next((s for s in _IMAGE_SUFFIXES if name.endswith(s)), "")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UnusableInput(path, "does not exist", "check the path") from error
    except IsADirectoryError as error:
        raise UnusableInput(path, "is a folder", "give one file") from error
    except PermissionError as error:
        # Some systems refuse to open a folder in these words.
        if path.is_dir():
            raise UnusableInput(path, "is a folder", "give one file") from error
        raise UnusableInput(
            path, "cannot be read: permission denied", "ask its owner for permission"
        ) from error
    except OSError as error:
        raise UnusableInput(
            path, f"cannot be read: {error.strerror or error}", "check the disk and the path"
        ) from error


def _synchronise(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
