"""One tiny instance of every component and model, for the conformance suite.

A new component or model gets its case here: `test_models.py` fails where one has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from probmed.appearances import BiasField, GaussianMixture
from probmed.atlases import LabelAtlas
from probmed.field_priors import FieldPrior, FlowPrior, PrincipalAffine, PrincipalField, SmoothField
from probmed.grids import Grid
from probmed.models.gp_prior_vae import (
    CodePrior,
    Cohort,
    GPPriorGuide,
    GPPriorVAE,
    Intercept,
    Linear,
    PixelNormal,
    Slope,
)
from probmed.models.longitudinal import BASELINES, Longitudinal
from probmed.models.longitudinal_field import LongitudinalField
from probmed.models.one_shot import TransformedScan
from probmed.models.registration import Registration, RegistrationGuide
from probmed.models.segmentation import Segmentation
from probmed.models.shape_vae import ImageShapeGuide, ShapeGuide, ShapeVAE
from probmed.models.template import Template
from probmed.network_priors import LikelihoodRatio, NetworkPrior
from probmed.networks import VelocityNetwork
from probmed.priors import (
    AffinePrior,
    AffineVelocity,
    DeformableAtlas,
    DeformationPrior,
    FixedAtlas,
    LabelPrior,
    MarkovField,
    SmoothVelocity,
)
from probmed.shape_networks import ShapeDecoder, ShapeEncoder
from probmed.similarities import (
    ConditionalMixture,
    GaussianNoise,
    LabelAgreement,
    Landmarks,
    LocalCorrelation,
    Similarity,
    StudentNoise,
)
from probmed.slopes import DenseKernels, FollowUps
from probmed.transforms import Affine

NAMES = ("GM", "WM", "air")


def oblique_grid(d: int = 3, size: int = 6, spacing_mm: Sequence[float] = (4.0, 6.0, 9.0), centre_mm: float = 1.5) -> Grid:
    """Anisotropic, turned, with a reversed axis, its centre at ``centre_mm`` along each axis of the world."""
    shape, spacing = (size, size - 1, size - 2)[:d], torch.tensor(spacing_mm[:d], dtype=torch.float64)
    angles = [0.3, -0.2, 0.4] if d == 3 else [0.5]
    turn = Affine.exp(torch.tensor([0.0] * d + angles, dtype=torch.float64), d).matrix[:d, :d]
    flip = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)[:d]
    affine = torch.eye(d + 1, dtype=torch.float64)
    affine[:d, :d] = turn * (flip * spacing)
    affine[:d, d] = centre_mm - affine[:d, :d] @ ((torch.tensor(shape, dtype=torch.float64) - 1) / 2)
    return Grid(shape, affine)


def tiny_atlas(d: int = 3, size: int = 7, spacing_mm: float = 5.0, sharpness: float = 1.0) -> LabelAtlas:
    """Three nested, smooth labels on an axis-aligned grid that covers ``oblique_grid``."""
    spacing = (spacing_mm, 1.1 * spacing_mm, 1.2 * spacing_mm)[:d]
    grid = Grid.from_spacing((size, size + 1, size - 1)[:d], spacing)
    x = grid.coordinates(torch.get_default_dtype())
    radius = (x**2).sum(-1).sqrt()
    # Nothing is symmetric, so that every direction of a deformation has a gradient.
    bump = 0.05 * x[..., 0] + 0.3 * torch.sin(0.2 * x[..., 1] + 0.1 * x[..., -1])
    logits = torch.stack([-(((radius - 9) / 4) ** 2) / 2, 1 - radius / 6 + bump, radius / 7 - 2 + 0.3 * bump])
    return LabelAtlas(NAMES, (sharpness * logits).softmax(0), grid, brain=("GM", "WM"))


def velocity_grid(d: int = 3) -> Grid:
    return Grid.from_spacing((4, 4, 3)[:d], 11.0)


def principal_velocity() -> FlowPrior:
    """Of three velocities."""
    generator = torch.Generator().manual_seed(1)
    fields = torch.randn(3, 3, *velocity_grid().shape, generator=generator, dtype=torch.get_default_dtype())
    return FlowPrior(velocity_grid(), PrincipalField.fit(2 * fields, site="velocity_scores"))


def principal_affine() -> PrincipalAffine:
    """Of three maps."""
    generator = torch.Generator().manual_seed(3)
    sd = torch.tensor([2.0] * 3 + [0.1] * 3 + [0.05] * 6)
    return PrincipalAffine.fit([Affine.exp(sd * torch.randn(12, generator=generator, dtype=sd.dtype)) for _ in range(3)], torch.ones(3))


def smooth_field(channels: int = 1, site: str = "field") -> SmoothField:
    grid = oblique_grid()
    mean = torch.linspace(-1, 1, channels * grid.numel, dtype=torch.get_default_dtype()).reshape(channels, *grid.shape)
    return SmoothField(mean, grid.spacing, 0.3, 8.0, site=site)


def transformed_scan(appearance: Callable[[], FieldPrior] | None) -> TransformedScan:
    shares = tiny_atlas().on(oblique_grid()).probabilities
    return TransformedScan(shares[:1], shares, oblique_grid(), principal_velocity(), None if appearance is None else appearance())


def tiny_shapes() -> ShapeVAE:
    atlas = tiny_atlas()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        decoder = ShapeDecoder(2, len(atlas.names), atlas.grid.shape, 2)
    return ShapeVAE(atlas.names, atlas.grid, decoder, 2, atlas.probabilities.to(torch.get_default_dtype()).log())


def parted_shapes() -> ShapeVAE:
    """The first label in two parts."""
    plain = tiny_shapes()
    parts = torch.stack([torch.linspace(-2, 2, plain.grid.numel), torch.zeros(plain.grid.numel)]).log_softmax(0).reshape(2, *plain.grid.shape)
    return ShapeVAE(plain.names, plain.grid, plain.decoder, plain.codes, plain.location, parts=parts)


def deformable_shapes() -> ShapeVAE:
    """Shapes moved by an affine map after a velocity."""
    plain = tiny_shapes()
    deformation = AffineVelocity(similarity_prior(2.0), SmoothVelocity(velocity_grid()))
    return ShapeVAE(plain.names, plain.grid, plain.decoder, plain.codes, plain.location, deformation)


def image_shape_guide(model: PyroModule) -> PyroModule:
    assert isinstance(model, Segmentation) and isinstance(model.labels, ShapeVAE)
    shapes = model.labels
    return ImageShapeGuide(model, ShapeGuide(shapes, ShapeEncoder(2, len(shapes.names), shapes.grid.shape, 2)))


def similarity_prior(translation_mm: float = 20.0) -> AffinePrior:
    """About a start that is not the identity."""
    return AffinePrior(count=7, start=Affine.exp(torch.full((6,), 0.05)).matrix, translation_mm=translation_mm)


@dataclass(frozen=True)
class Case:
    """How to build a component and call it.

    Arguments:
        build: makes it, in the default dtype.
        arguments: what ``forward`` is called with.
        sites: its latent sites.
        observed: the argument that holds the data, where it is a model, by keyword.
        plates: whether its sites may be in a plate, one result for each member; ``arguments`` is then
            given the plate's size.
        guide: makes the guide that belongs to a model, from it.
    """

    build: Callable[[], PyroModule]
    arguments: Callable[[int], tuple[Any, ...]]
    sites: frozenset[str]
    observed: str | None = None
    plates: bool = False
    guide: Callable[[PyroModule], PyroModule] | None = None


def nothing(_: int) -> tuple[Any, ...]:
    return ()


def on_grid(d: int = 3) -> Callable[[int], tuple[Any, ...]]:
    return lambda _: (oblique_grid(d),)


def log_prior(channels: int) -> Callable[[int], tuple[Any, ...]]:
    """Arguments of an appearance: log π ``(*batch, K, *shape)`` and log β."""

    def arguments(size: int) -> tuple[Tensor, Tensor]:
        lead = (size,) if size else ()
        shape = (4, 3, 2)
        generator = torch.Generator().manual_seed(size)
        options = {"generator": generator, "dtype": torch.get_default_dtype()}
        prior = torch.randn(*lead, len(NAMES), *shape, **options).log_softmax(len(lead))  # type: ignore[call-overload]
        return prior, 0.1 * torch.randn(*lead, channels, *shape, **options)  # type: ignore[call-overload]

    return arguments


def log_prior_alone(size: int) -> tuple[Tensor]:
    """Arguments of an appearance without a bias field."""
    return log_prior(1)(size)[:1]  # type: ignore[return-value]


def tiny_ratio() -> LikelihoodRatio:
    """Of a network whose logits are lines through the intensity, trained where labels are unequally frequent."""
    slopes = torch.linspace(-1, 1, len(NAMES), dtype=torch.get_default_dtype()).reshape(-1, 1, 1, 1)
    return LikelihoodRatio(lambda images: slopes * images, torch.tensor([0.5, 0.3, 0.2], dtype=slopes.dtype))


APPEARANCE_SITES = frozenset({"weights", "covariances", "means"})

LABEL_PRIORS: dict[str, tuple[Callable[[], LabelPrior], frozenset[str]]] = {
    "fixed": (lambda: FixedAtlas(tiny_atlas()), frozenset()),
    "moved": (
        lambda: FixedAtlas(
            tiny_atlas(),
            Affine.exp(torch.tensor([2.0, -1.0, 1.0, 0.1, 0.0, 0.1], dtype=torch.get_default_dtype())),
        ),
        frozenset(),
    ),
    "affine": (lambda: DeformableAtlas(tiny_atlas()), frozenset({"affine"})),
    "shape": (tiny_shapes, frozenset({"shape_code"})),
    "velocity": (
        lambda: DeformableAtlas(tiny_atlas(), None, SmoothVelocity(velocity_grid())),
        frozenset({"velocity"}),
    ),
    "deformable": (
        lambda: DeformableAtlas(tiny_atlas(), similarity_prior(), SmoothVelocity(velocity_grid())),
        frozenset({"affine", "velocity"}),
    ),
    "markov": (lambda: MarkovField(FixedAtlas(tiny_atlas()), 0.3, sweeps=20), frozenset()),
    "markov_deformable": (
        lambda: MarkovField(
            DeformableAtlas(tiny_atlas(), "default", SmoothVelocity(velocity_grid())), 0.3, sweeps=20
        ),
        frozenset({"affine", "velocity"}),
    ),
}

APPEARANCES: dict[str, tuple[Callable[[], GaussianMixture], int]] = {
    "one_gaussian": (lambda: GaussianMixture([1, 1, 1], outlier=0.0), 1),
    "several_gaussians": (lambda: GaussianMixture.for_labels(NAMES, outlier=0.0), 1),
    "outliers": (lambda: GaussianMixture({"GM": 2, "WM": 1, "air": 2}, outlier=0.02), 1),
    "two_channels": (lambda: GaussianMixture([2, 1, 1], channels=2), 2),
}

DEFORMATIONS: dict[str, tuple[Callable[[], DeformationPrior], frozenset[str]]] = {
    "rigid": (lambda: AffinePrior(3, 6, translation_mm=2.0), frozenset({"affine"})),
    "velocity": (lambda: SmoothVelocity(velocity_grid()), frozenset({"velocity"})),
    "principal": (principal_velocity, frozenset({"velocity_scores"})),
    "affine_velocity": (
        lambda: AffineVelocity(similarity_prior(2.0), SmoothVelocity(velocity_grid())),
        frozenset({"affine", "velocity"}),
    ),
}

SIMILARITIES: dict[str, tuple[Callable[[], Similarity], frozenset[str]]] = {
    "gaussian": (lambda: GaussianNoise(tempering=0.5), frozenset({"noise"})),
    "student": (lambda: StudentNoise(certainty=4.0), frozenset({"noise"})),
    "correlation": (lambda: LocalCorrelation(1), frozenset()),
    "mixture": (lambda: ConditionalMixture(8, (-0.2, 1.2)), frozenset({"class_means", "class_variances"})),
}


def images(channels: int) -> Callable[[int], tuple[Any, ...]]:
    """Arguments of a similarity: the moved image, ``(*batch, C, *shape)``."""

    def arguments(size: int) -> tuple[Tensor]:
        lead = (size,) if size else ()
        generator = torch.Generator().manual_seed(size)
        return (torch.rand(*lead, channels, 4, 3, 5, generator=generator, dtype=torch.get_default_dtype()),)

    return arguments


def label_maps(size: int) -> tuple[Any, ...]:
    (weights,) = images(3)(size)
    return (weights / weights.sum(-4, keepdim=True),)


def points(size: int) -> tuple[Any, ...]:
    return (images(1)(size)[0].flatten(-4).unflatten(-1, (-1, 3)),)


def smooth_image(d: int = 3) -> tuple[Tensor, Grid]:
    """An image without symmetries ``(1, *shape)`` on a grid that covers ``oblique_grid``."""
    atlas = tiny_atlas(d)
    return atlas.probabilities[:2].sum(0, keepdim=True) + 0.5 * atlas.probabilities[:1], atlas.grid


def tiny_template(similarity: Callable[[], Similarity], covariates: int = 0) -> Template:
    return Template(oblique_grid(), SmoothVelocity(oblique_grid().at_spacing(12.0)), similarity(), covariates)


def cohort(covariates: int, _: int = 0) -> tuple[Any, ...]:
    """Covariates of three scans."""
    values = torch.tensor([[-1.0, 0.3], [0.2, 1.1], [0.8, -1.4]], dtype=torch.get_default_dtype())
    return (values[:, :covariates],)


def followed_people(_: int = 0) -> tuple[Any, ...]:
    """Design, kernels and visits of six people, one of whom was not seen again."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.get_default_dtype()}
    design = torch.stack([torch.ones(6), torch.randn(6, **options)], 1)
    features = torch.randn(2, 6, 3, **options)
    subject = torch.tensor([0, 0, 1, 2, 2, 2, 3, 5])
    visits = FollowUps(0.5 + 2 * torch.rand(8, **options), subject, 6)
    return design, DenseKernels(features @ features.mT), visits


def scanned_people(_: int = 0) -> tuple[Any, ...]:
    """Three people with two visits, one and three, genotypes and times."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.get_default_dtype()}
    subject = torch.tensor([0, 0, 1, 2, 2, 2])
    genetics = torch.randn(3, 4, **options)[subject]
    return (Cohort.of(subject, {"genetics": genetics, "time": torch.randn(6, 1, **options)}),)


def tiny_autoencoder() -> GPPriorVAE:
    components = {"genetics": Linear(), "level": Intercept(), "time": Slope()}
    return GPPriorVAE(CodePrior(2, components), torch.nn.Linear(2, 5), PixelNormal())


def code_guide(model: PyroModule) -> PyroModule:
    assert isinstance(model, GPPriorVAE)
    return GPPriorGuide(model, torch.nn.Linear(5, 4))


def pair(_: int) -> tuple[Any, ...]:
    return (*smooth_image(), oblique_grid())


def amortised_guide(model: PyroModule) -> PyroModule:
    assert isinstance(model, Registration)
    posterior = "diagonal" if isinstance(model.similarity, GaussianNoise) else "smooth"
    network = VelocityNetwork(features=(4, 4, 4, 4, 4, 4))
    # Not the identity, at which the last layer starts: there the gradients of all others vanish.
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return RegistrationGuide(model, network, posterior)


def bias_field(channels: int) -> BiasField:
    return BiasField(cutoff_mm=30.0, channels=channels)


def _components() -> dict[str, Case]:
    cases = {
        "AffinePrior": Case(AffinePrior, nothing, frozenset({"affine"}), plates=True),
        "AffinePrior_rigid_2d": Case(lambda: AffinePrior(2, 3), nothing, frozenset({"affine"}), plates=True),
        "SmoothVelocity": Case(
            lambda: SmoothVelocity(velocity_grid()), nothing, frozenset({"velocity"}), plates=True
        ),
        "SmoothVelocity_2d": Case(
            lambda: SmoothVelocity(velocity_grid(2)), nothing, frozenset({"velocity"}), plates=True
        ),
        "SmoothVelocity_learned": Case(
            lambda: SmoothVelocity(velocity_grid(), learn=True), nothing, frozenset({"velocity"}), plates=True
        ),
        "SmoothVelocity_splines": Case(
            lambda: SmoothVelocity(velocity_grid(2), on=velocity_grid(2).at_spacing(4.0), splines=True),
            nothing,
            frozenset({"velocity"}),
            plates=True,
        ),
        "BiasField": Case(lambda: bias_field(1), on_grid(), frozenset({"bias"}), plates=True),
        "BiasField_2d": Case(lambda: bias_field(2), on_grid(2), frozenset({"bias"}), plates=True),
        "FixedAtlas_2d": Case(lambda: FixedAtlas(tiny_atlas(2)), on_grid(2), frozenset()),
        "DeformableAtlas_2d": Case(
            lambda: DeformableAtlas(tiny_atlas(2), "default", SmoothVelocity(velocity_grid(2))),
            on_grid(2),
            frozenset({"affine", "velocity"}),
        ),
    }
    for name, (prior, sites) in LABEL_PRIORS.items():
        cases[f"{type(prior()).__name__}_{name}"] = Case(prior, on_grid(), sites)
    for name, (appearance, channels) in APPEARANCES.items():
        cases[f"GaussianMixture_{name}"] = Case(
            appearance, log_prior(channels), APPEARANCE_SITES, plates=True
        )
    cases["ShapeVAE_deformable"] = Case(deformable_shapes, on_grid(), frozenset({"shape_code", "affine", "velocity"}))
    cases["ShapeVAE_parts"] = Case(parted_shapes, on_grid(), frozenset({"shape_code"}))
    cases["NetworkPrior"] = Case(lambda: NetworkPrior(NAMES, tiny_atlas().probabilities, tiny_atlas().grid), on_grid(), frozenset())
    cases["LikelihoodRatio"] = Case(tiny_ratio, log_prior_alone, frozenset())
    cases["PrincipalField"] = Case(lambda: principal_velocity().velocity, nothing, frozenset({"velocity_scores"}), plates=True)
    cases["SmoothField"] = Case(smooth_field, nothing, frozenset({"field"}), plates=True)
    cases["FlowPrior"] = Case(principal_velocity, nothing, frozenset({"velocity_scores"}), plates=True)
    cases["PrincipalAffine"] = Case(principal_affine, nothing, frozenset({"affine"}))
    cases["AffineVelocity_learned"] = Case(
        lambda: AffineVelocity(principal_affine(), principal_velocity()), nothing, frozenset({"affine", "velocity_scores"})
    )
    cases["AffineVelocity"] = Case(
        DEFORMATIONS["affine_velocity"][0], nothing, frozenset({"affine", "velocity"}), plates=True
    )
    for name, (similarity, sites) in SIMILARITIES.items():
        cases[f"{type(similarity()).__name__}_{name}"] = Case(similarity, images(1), sites, plates=True)
    cases["LabelAgreement"] = Case(lambda: LabelAgreement(3), label_maps, frozenset({"error"}), plates=True)
    cases["Landmarks"] = Case(lambda: Landmarks(2.0), points, frozenset(), plates=True)
    return cases


def _models() -> dict[str, Case]:
    """Every label prior with every appearance, with and without a bias field; every deformation prior with every similarity."""
    cases = {}
    for move, (deformation, moves) in DEFORMATIONS.items():
        for like, (similarity, noises) in SIMILARITIES.items():

            def build_pair(
                deformation: Callable[[], DeformationPrior] = deformation,
                similarity: Callable[[], Similarity] = similarity,
            ) -> Registration:
                return Registration(deformation(), similarity())

            # The amortised guide is of velocities alone.
            guide = None if move != "velocity" else amortised_guide
            cases[f"Registration_{move}_{like}"] = Case(build_pair, pair, moves | noises, "fixed", guide=guide)
    for count in (0, 2):
        for like, (similarity, noises) in SIMILARITIES.items():
            changed = frozenset({"template", "velocity"} | ({"effects"} if count else set()))
            cases[f"Template_{count}_{like}"] = Case(
                partial(tiny_template, similarity, count), partial(cohort, count), changed | noises, "images"
            )
    for look, made in (("none", None), ("smooth", smooth_field)):
        latents = frozenset({"velocity_scores"} | ({"field"} if made else set()))
        cases[f"TransformedScan_{look}"] = Case(partial(transformed_scan, made), nothing, latents, "image")
    for baseline in BASELINES:
        free = {"baseline_noise"} if baseline == "free" else set()
        cases[f"Longitudinal_{baseline}"] = Case(
            partial(Longitudinal, baseline=baseline),
            followed_people,
            frozenset({"coefficients", "components", "noise"} | free),
            "change",
        )
    columns = frozenset({"coefficients", "scales", "components", "noise"})
    cases["LongitudinalField"] = Case(partial(LongitudinalField, 3), followed_people, columns, "change")
    cases["GPPriorVAE"] = Case(
        tiny_autoencoder, scanned_people, frozenset({"weights", "codes"}), "images", guide=code_guide
    )
    for label, (prior, sites) in LABEL_PRIORS.items():
        guide = image_shape_guide if label == "shape" else None
        for look, (appearance, channels) in APPEARANCES.items():
            for biased in (False, True):

                def build(
                    prior: Callable[[], LabelPrior] = prior,
                    appearance: Callable[[], GaussianMixture] = appearance,
                    channels: int = channels,
                    biased: bool = biased,
                ) -> Segmentation:
                    return Segmentation(
                        prior(), appearance(), bias_field(channels) if biased else None, tempering=0.5
                    )

                name = f"Segmentation_{label}_{look}{'_bias' * biased}"
                latents = sites | APPEARANCE_SITES | ({"bias"} if biased else set())
                cases[name] = Case(build, lambda _: (None, oblique_grid()), latents, "image", guide=guide)
    return cases


COMPONENTS = _components()
MODELS = _models()
CASES = COMPONENTS | MODELS
