"""Inference: from a model and data to a posterior. It knows models only as Pyro's callables."""

from probmed.inference.affine import Alignment, align
from probmed.inference.em import Mode, Round, ascend, em, log_joint
from probmed.inference.guides import MAP, CompositeGuide, FieldGuide, SpectralNormal, automatic, structured
from probmed.inference.infer import infer
from probmed.inference.laplace import conjugate_gradients, laplace_draws
from probmed.inference.posterior import Posterior
from probmed.inference.predict import predictive_draws, prior_draws
from probmed.inference.svi import Fit, NotFinite, Step, fit

__all__ = [
    "MAP",
    "Alignment",
    "CompositeGuide",
    "FieldGuide",
    "Fit",
    "Mode",
    "NotFinite",
    "Posterior",
    "Round",
    "SpectralNormal",
    "Step",
    "align",
    "ascend",
    "automatic",
    "conjugate_gradients",
    "em",
    "fit",
    "infer",
    "laplace_draws",
    "log_joint",
    "predictive_draws",
    "prior_draws",
    "structured",
]
