"""One setting for GPyTorch's linear algebra."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gpytorch import settings


@contextmanager
def exact_algebra() -> Iterator[None]:
    """Cholesky at every size inside this context.

    Above 800 rows GPyTorch silently turns to conjugate gradients that stop at a mean residual of 1, and to ten random probes for the log determinant:
    log likelihoods are then off by nats and differ between calls. What still iterates is held to a residual of 1e-10.
    """
    with settings.max_cholesky_size(sys.maxsize), settings.cg_tolerance(1e-10), settings.eval_cg_tolerance(1e-10):
        yield
