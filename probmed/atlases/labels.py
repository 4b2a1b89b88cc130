"""Class probabilities on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from probmed.grids import Grid, average_onto, resample

BACKGROUNDS = ("air", "background")
"""Class names that take label index 0."""

_COLOURS = {
    "GM": "#7f8c8d",
    "WM": "#f5f0e1",
    "CSF": "#3d85c6",
    "bone": "#e0c068",
    "soft": "#c8826e",
    "air": "#000000",
    "background": "#000000",
}
_SPARE_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#46f0f0",
    "#f032e6",
    "#bcf60c",
    "#008080",
    "#9a6324",
)


@dataclass(frozen=True, eq=False)
class LabelAtlas:
    """Class probabilities π_k(x) on a grid.

    Arguments:
        names: one per class, in the order of ``probabilities``.
        probabilities: ``(K, *shape)`` float32, in [0, 1], summing to 1 over K.
        grid: where the voxels are, millimetres.
        template: ``(*shape)`` a scan in the atlas space (intensities in [0, 1]), or None.
        brain: the names of the classes that make up the brain.
        indices: the integer that stands for each class in a label map; by default 0 for a class named "air"
            or "background" and 1, 2, … for the others in order.
        colours: ``#rrggbb`` for each class.

    Raises:
        ValueError: where names, shapes, indices or brain classes do not agree, or probabilities are negative
            or do not sum to 1.
    """

    names: tuple[str, ...]
    probabilities: Tensor
    grid: Grid
    template: Tensor | None = None
    brain: tuple[str, ...] = ("GM", "WM", "CSF")
    indices: tuple[int, ...] = ()
    colours: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        names, shape = tuple(self.names), tuple(self.probabilities.shape)
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"an atlas needs at least two classes with different names, got {names}")
        if shape != (len(names), *self.grid.shape):
            raise ValueError(f"expected probabilities of shape {(len(names), *self.grid.shape)}, got {shape}")
        if self.template is not None and tuple(self.template.shape) != self.grid.shape:
            raise ValueError(f"expected a template of shape {self.grid.shape}, got {tuple(self.template.shape)}")
        unknown = sorted(set(self.brain) - set(names))
        if unknown:
            raise ValueError(f"brain classes {unknown} are not among the classes {names}")
        if not (self.probabilities >= 0).all() or (self.probabilities.sum(0) - 1).abs().max() > 1e-3:
            raise ValueError("the probabilities of an atlas must be non-negative and sum to 1 at every voxel")
        indices = tuple(int(i) for i in self.indices) or default_indices(names)
        if len(indices) != len(names) or len(set(indices)) != len(names) or min(indices) < 0:
            raise ValueError(f"expected {len(names)} different label indices, none negative, got {indices}")
        colours = tuple(self.colours) or default_colours(names)
        if len(colours) != len(names):
            raise ValueError(f"expected {len(names)} colours, got {len(colours)}")
        for name, value in (
            ("names", names),
            ("brain", tuple(self.brain)),
            ("indices", indices),
            ("colours", colours),
        ):
            object.__setattr__(self, name, value)

    @property
    def log_probabilities(self) -> Tensor:
        """log π, ``(K, *shape)``, floored at log 1e-6 so that it stays finite where an atlas has zeros."""
        return self.probabilities.clamp_min(1e-6).log()

    @property
    def brain_probability(self) -> Tensor:
        """Probability of being brain (any of the classes in ``brain``), ``(*shape)``."""
        return self.probabilities[[self.names.index(n) for n in self.brain]].sum(0)

    @property
    def brain_mask(self) -> Tensor:
        """Where brain is likelier than not, ``(*shape)`` bool."""
        return self.brain_probability > 0.5

    @property
    def head_probability(self) -> Tensor:
        """Probability of not being air or background, ``(*shape)``; 1 everywhere for an atlas with
        neither.
        """
        outside = [k for k, n in enumerate(self.names) if n in BACKGROUNDS]
        return 1 - self.probabilities[outside].sum(0)

    def merged(self, groups: dict[str, Sequence[str]]) -> LabelAtlas:
        """An atlas whose classes are sums of this one's: new name → names to add up.

        Raises:
            ValueError: where the groups do not use each class exactly once.
        """
        used = [name for members in groups.values() for name in members]
        if sorted(used) != sorted(self.names):
            raise ValueError(f"expected groups that use each of {self.names} once, got {used}")
        members = [[self.names.index(n) for n in names] for names in groups.values()]
        names = tuple(groups)
        brain = tuple(n for n, old in groups.items() if set(old) <= set(self.brain))
        indices = tuple(0 if n in BACKGROUNDS else min(self.indices[k] for k in ks) for n, ks in zip(names, members, strict=True))
        colours = tuple(_COLOURS[n] if n in BACKGROUNDS else self.colours[ks[0]] for n, ks in zip(names, members, strict=True))
        probabilities = torch.stack([self.probabilities[ks].sum(0) for ks in members])
        return LabelAtlas(names, probabilities, self.grid, self.template, brain, indices, colours)

    def stripped(self) -> LabelAtlas:
        """The atlas of a skull-stripped scan: every class outside ``brain`` merged into one, "background",
        which comes last.
        """
        outside = [n for n in self.names if n not in self.brain]
        if outside == ["background"]:
            return self
        if not outside:
            raise ValueError(f"all classes are brain ({self.names}): nothing to merge into a background")
        return self.merged({**{n: (n,) for n in self.names if n in self.brain}, "background": outside})

    def resampled(self, spacing_mm: float | Sequence[float]) -> LabelAtlas:
        """The same field of view at another spacing: averages over the new voxels where they are larger,
        linear where they are smaller.
        """
        grid = self.grid.at_spacing(spacing_mm)
        if grid.shape == self.grid.shape:
            return self
        probabilities = average_onto(self.probabilities, self.grid, grid)
        template = None if self.template is None else average_onto(self.template[None], self.grid, grid)[0]
        return replace(self, probabilities=probabilities / probabilities.sum(0), grid=grid, template=template)

    def on(self, grid: Grid) -> LabelAtlas:
        """The atlas on the voxels of another grid in the same space (linear; the nearest voxel's values
        outside the field of view).
        """
        probabilities = resample(self.probabilities, self.grid, grid, fill="edge")
        template = None if self.template is None else resample(self.template[None], self.grid, grid, fill=0.0)[0]
        return replace(self, probabilities=probabilities / probabilities.sum(0), grid=grid, template=template)

    def to(self, device: torch.device | str) -> LabelAtlas:
        """The same atlas with its tensors on ``device``."""
        template = None if self.template is None else self.template.to(device)
        return replace(self, probabilities=self.probabilities.to(device), template=template)


def default_indices(names: Sequence[str]) -> tuple[int, ...]:
    """0 for the class named "air" or "background" (the first, where there are both), 1, 2, … for the others
    in order.
    """
    zero = next((n for n in names if n in BACKGROUNDS), None)
    count = iter(range(1, len(names) + 1))
    return tuple(0 if n == zero else next(count) for n in names)


def default_colours(names: Sequence[str]) -> tuple[str, ...]:
    """A colour for each class, ``#rrggbb``."""
    return tuple(_COLOURS.get(n, _SPARE_COLOURS[k % len(_SPARE_COLOURS)]) for k, n in enumerate(names))
