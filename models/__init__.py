"""The zoo: every generative model, by name."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from dataclasses import dataclass

from pyro.nn import PyroModule

from probmed.models.gp_prior_vae import GPPriorVAE
from probmed.models.longitudinal import Longitudinal
from probmed.models.longitudinal_field import LongitudinalField
from probmed.models.one_shot import TransformedScan
from probmed.models.registration import Registration
from probmed.models.segmentation import Segmentation
from probmed.models.shape_vae import ShapeVAE
from probmed.models.template import Template

# The models; ZOO, Entry and entry describe them.
__all__ = ["GPPriorVAE", "Longitudinal", "LongitudinalField", "Registration", "Segmentation", "ShapeVAE", "Template", "TransformedScan"]

ZOO: dict[str, type[PyroModule]] = {
    "segmentation": Segmentation,
    "registration": Registration,
    "template": Template,
    "longitudinal": Longitudinal,
    "growth": LongitudinalField,
    "one-shot": TransformedScan,
    "gp-prior-vae": GPPriorVAE,
    "shape-vae": ShapeVAE,
}
"""Name on the command line → model."""


@dataclass(frozen=True)
class Entry:
    """What a model's own docstrings say of it.

    Arguments:
        name: on the command line.
        equation: the densities that it is made of, plain text.
        summary: one sentence.
        mathematics: LaTeX, one string a line.
        sites: names of its latent and observed variables.
        reference: where it comes from.
    """

    name: str
    equation: str
    summary: str
    mathematics: tuple[str, ...]
    sites: tuple[str, ...]
    reference: str


def entry(name: str) -> Entry:
    """The entry of a model. Its module's docstring begins ``equation: summary``, has a ``math`` directive and
    ends with ``References:``; the class's docstring lists its ``Sites:``.

    Raises:
        ValueError: for a name that is not in the zoo, or docstrings without one of these.

    >>> entry("segmentation").sites
    ('affine', 'velocity', 'bias', 'weights', 'covariances', 'means', 'image')
    """
    if name not in ZOO:
        raise ValueError(f"expected a model of {sorted(ZOO)}, got {name!r}")
    model = ZOO[name]
    story = inspect.cleandoc(sys.modules[model.__module__].__doc__ or "")
    sites = re.search(r"Sites?:(.*?)(?:\n\s*\n|\Z)", inspect.getdoc(model) or "", re.DOTALL)
    headline = re.match(r"(.+?\)): (.+?)\n", story + "\n")
    mathematics = re.search(r"\.\. math::(.*?)\n(?=\S)", story, re.DOTALL)
    references = re.search(r"References?:(.*)", story, re.DOTALL)
    if sites is None or headline is None or mathematics is None or references is None:
        raise ValueError(f"the docstrings of {model.__name__} lack an equation, sites or references")
    lines = [line.strip() for line in textwrap.dedent(mathematics[1]).split("\n")]
    return Entry(
        name,
        headline[1].strip(),
        headline[2].strip(),
        tuple(line for line in lines if line),
        tuple(dict.fromkeys(re.findall(r"``([a-z_]+)``", sites[1]))),
        " ".join(references[1].split()),
    )
