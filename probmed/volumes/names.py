"""Names and colours of labels, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from probmed.volumes.files import PathLike, UnusableInput, atomic_write, read_bytes


def read_label_names(path: PathLike) -> dict[int, str]:
    """Names of labels from JSON: ``{"1": "GM", ...}`` or ``{"1": {"name": "GM", "colour": "#cc4444"}, ...}``.

    Raises:
        UnusableInput: where the file cannot be read or has another form.
    """
    return {index: name for index, (name, _) in _read_label_table(Path(path)).items()}


def read_label_colours(path: PathLike) -> dict[int, str]:
    """Colours of the labels that have one, ``#rrggbb``, from the file of ``read_label_names``.

    Raises:
        UnusableInput: where the file cannot be read or has another form.
    """
    return {
        index: colour for index, (_, colour) in _read_label_table(Path(path)).items() if colour is not None
    }


def write_label_names(
    path: PathLike, names: Mapping[int, str], colours: Mapping[int, str] | None = None
) -> None:
    """Write what ``read_label_names`` and ``read_label_colours`` read.

    Raises:
        ValueError: for a colour of no label or not ``#rrggbb``.
        UnusableInput: where the file cannot be written.
    """
    colours = colours or {}
    for index, colour in colours.items():
        if index not in names or not _is_colour(colour):
            raise ValueError(f"expected a colour #rrggbb of a named label, got {colour!r} of label {index}")
    table = {
        str(i): {"name": n, "colour": colours[i]} if i in colours else n for i, n in sorted(names.items())
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_colour(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value) is not None


def _read_label_table(path: Path) -> dict[int, tuple[str, str | None]]:
    remedy = 'write {"1": "name", ...} or {"1": {"name": "name", "colour": "#rrggbb"}, ...}'
    raw = read_bytes(path)
    try:
        table = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise UnusableInput(path, f"is not JSON ({error})", "correct it") from error
    if not isinstance(table, dict):
        raise UnusableInput(path, f"holds a {type(table).__name__}, not an object", remedy)
    out: dict[int, tuple[str, str | None]] = {}
    for key, entry in table.items():
        name, colour = (entry.get("name"), entry.get("colour")) if isinstance(entry, dict) else (entry, None)
        if not re.fullmatch(r"-?\d+", key) or not isinstance(name, str):
            raise UnusableInput(path, f"has no whole number with a name at {key!r}: {entry!r}", remedy)
        if colour is not None and not _is_colour(colour):
            raise UnusableInput(path, f"has no colour #rrggbb at {key!r}: {colour!r}", remedy)
        if int(key) in out:
            raise UnusableInput(path, f"names label {int(key)} twice", "correct it")
        out[int(key)] = (name, colour)
    return out
