"""Colours of the report: labels that stand out from a grey scan, and one look for all plots."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

INK = "#22303c"
FAINT = "#8a97a3"
ACCENT = "#1f6f8b"
_DISTINCT = ("#e4593b", "#f2b134", "#3d85c6", "#7a5cc7", "#2a9d6f", "#d1477f", "#6c8e23", "#a0612b")


def label_colours(names: Sequence[str], colours: Sequence[str], shown: Sequence[str]) -> dict[str, str]:
    """A colour for each shown label: the atlas's own, or another where that is a grey like the scan."""
    given = dict(zip(names, colours, strict=True))
    spare = [c for c in _DISTINCT if c not in given.values()]
    out: dict[str, str] = {}
    for name in shown:
        own = given[name]
        out[name] = spare[len(out) % len(spare)] if is_grey(own) else own
    return out


def distinct(count: int) -> list[str]:
    """Colours for classes without order, again from the first where there are many."""
    return [_DISTINCT[k % len(_DISTINCT)] for k in range(count)]


def is_grey(colour: str) -> bool:
    """Whether ``#rrggbb`` has hardly any colour."""
    red, green, blue = rgb(colour)
    _, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    return saturation * value < 0.3


def rgb(colour: str) -> tuple[float, float, float]:
    """``#rrggbb`` as three numbers in [0, 1]."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
