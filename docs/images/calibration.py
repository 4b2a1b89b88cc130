"""Makes docs/images/calibration.png, and the table beside it in docs/registration.md: `PYTHONPATH=.:tests python docs/images/calibration.py`.

The posterior of one small registration's velocity is known by dense algebra (``tests/test_calibration.py``). Each family's best posterior has its mean
and another spread, so that a central interval holds the truth with probability 2 Φ(z r) − 1, z the normal quantile and r the ratio of the two
standard deviations.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from test_calibration import exact_posterior, independent, modulated, spectral
from torch import Tensor
from torch.special import ndtr, ndtri

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
exact = exact_posterior()
every = torch.eye(len(exact.hessian))
levels = torch.linspace(0.01, 0.99, 99)


def ratios(q: object, quantities: Tensor) -> Tensor:
    with torch.no_grad():
        draws = q.rsample((50_000,)).flatten(1) @ quantities.T
    return draws.std(0) / torch.einsum("rn,nm,rm->r", quantities, exact.covariance, quantities).sqrt()


def coverage(share: Tensor, level: Tensor) -> Tensor:
    return (2 * ndtr(ndtri((1 + level) / 2)[:, None] * share) - 1).mean(1)


families = {
    "independent voxels (VoxelMorph's)": independent(exact),
    "spectrum times amplitude (networks, refine)": modulated(exact).distribution(),
    "diagonal in the cosine transform": spectral(exact, 0).distribution(),
    "the same with eight more directions": spectral(exact, 8).distribution(),
}
figure, panels = plt.subplots(1, 2, figsize=(8, 4.8), sharey=True, constrained_layout=True)
for panel, (what, quantities) in zip(panels, {"points": every, "regional means": exact.regions}.items(), strict=True):
    panel.plot([0, 100], [0, 100], color="0.7", linewidth=5, label="calibrated")
    for (name, q), colour in zip(families.items(), ("#d55e00", "#cc79a7", "#0072b2", "#000000"), strict=True):
        share = ratios(q, quantities)
        panel.plot(100 * levels, 100 * coverage(share, levels), color=colour, label=name)
        held = " / ".join(f"{100 * float(c):.0f}" for c in coverage(share, torch.tensor([0.5, 0.8, 0.95])))
        print(f"{what}: {name}: sd {float(share.min()):.2f} – {float(share.max()):.2f}, 50 / 80 / 95 % intervals hold {held} %")
    panel.set(title=what, xlabel="interval, %", xlim=(0, 100), ylim=(0, 100))
panels[0].set_ylabel("holds the truth, %")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
figure.savefig(Path(__file__).with_name("calibration.png"), dpi=100)
