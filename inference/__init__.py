"""Inference: from a model and data to a posterior. It knows models only as Pyro's callables."""

from probmed.inference.affine import Alignment, align
from probmed.inference.em import Mode, Round, ascend, em, log_joint
from probmed.inference.evidence import Estimate, log_evidence
from probmed.inference.gp_prior import GlobalWeights, accumulated_loss, exact_loss, forecast
from probmed.inference.gp_prior_smoothed import smoothed_forecast, smoothed_loss
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
    "Estimate",
    "FieldGuide",
    "Fit",
    "GlobalWeights",
    "Mode",
    "NotFinite",
    "Posterior",
    "Round",
    "SpectralNormal",
    "Step",
    "accumulated_loss",
    "align",
    "ascend",
    "automatic",
    "conjugate_gradients",
    "em",
    "exact_loss",
    "fit",
    "forecast",
    "infer",
    "laplace_draws",
    "log_evidence",
    "log_joint",
    "predictive_draws",
    "prior_draws",
    "smoothed_forecast",
    "smoothed_loss",
    "structured",
]
