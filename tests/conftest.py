"""One thread a process: tensors here are tiny, and pytest-xdist fills the cores."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision by default, and the same numbers for each test."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def local_parameters() -> Iterator[None]:
    """Pyro's global parameter store would hand one guide's parameters to the next."""
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.fixture
def empty_store() -> Iterator[None]:
    """The same numbers for each test, and no fit may leave anything in Pyro's global store."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    assert not list(pyro.get_param_store().keys())
