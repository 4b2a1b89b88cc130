"""Posteriors: draws of a model's latents, and whatever follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probmed.inference.diagnostics import load_arviz
from probmed.inference.parameters import cuda_devices, local_parameters, seeded, tensors_within
from probmed.volumes import UnusableInput, atomic_write

State = dict[str, Tensor]

FORMAT = "probmed posterior 1"


@dataclass
class Posterior:
    """Joint draws of every latent, by site.

    Arguments:
        samples: site → ``(S, ...)``.
        mode: site → the value of highest density, where it is known.
        model: the model, and data: what it was called with; needed for ``labels``, ``volumes`` and ``evaluate`` by name.
        log_evidence: nats, or a bound, where known.
        attributes: anything that JSON holds.
    """

    samples: State
    mode: State | None = None
    model: Any = None
    data: tuple[Any, ...] = ()
    log_evidence: float | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {name: len(value) for name, value in self.samples.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"expected as many draws of each site, and at least one site, got {counts}")

    @classmethod
    def from_guide(
        cls, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, draws: int = 100, seed: int | None = None, **kwargs: Any
    ) -> Posterior:
        """Draws from a fitted guide, and its centre as the mode where it has one.

        Arguments:
            args, kwargs: what the guide is called with; ``args`` become the posterior's data.
            seed: torch's generators are left as they were.
        """
        if draws < 1:
            raise ValueError(f"expected at least one draw, got {draws}")
        rows = []
        with torch.no_grad(), local_parameters(model, guide), seeded(seed, cuda_devices(tensors_within((args, kwargs)))):
            for _ in range(draws):
                trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
                # Automatic guides draw all latents at once, as an auxiliary site, and hand them to the model's sites.
                nodes: dict[str, Any] = {name: trace.nodes[name] for name in trace.stochastic_nodes}
                rows.append({name: node["value"].detach() for name, node in nodes.items() if not node["infer"].get("is_auxiliary")})
            centre = guide.median(*args, **kwargs) if hasattr(guide, "median") else {}
        mode = {name: value.detach() for name, value in centre.items()}
        complete = mode.keys() == rows[0].keys()
        return cls({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, mode if complete else None, model, args)

    @property
    def count(self) -> int:
        return len(next(iter(self.samples.values())))

    def draws(self, count: int | None = None, seed: int = 0) -> State:
        """``count`` of the draws, with replacement only where more are asked for than there are."""
        if count is None or count == self.count:
            return dict(self.samples)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.count, generator=generator)
        index = order[:count] if count <= self.count else torch.randint(self.count, (count,), generator=generator)
        return {name: value[index.to(value.device)] for name, value in self.samples.items()}

    def mean(self, site: str) -> Tensor:
        return self._site(site).mean(0)

    def sd(self, site: str) -> Tensor:
        return self._site(site).std(0)

    def quantiles(self, site: str, q: float | Sequence[float]) -> Tensor:
        value = self._site(site)
        # torch.quantile refuses more than 16 million elements: a part at a time.
        levels = torch.as_tensor(q, dtype=value.dtype, device=value.device)
        parts = value.reshape(len(value), -1).split(max(1, 10_000_000 // len(value)), dim=1)
        result = torch.cat([torch.quantile(part, levels, dim=0) for part in parts], dim=-1)
        return result.reshape((*levels.shape, *value.shape[1:]))

    def interval(self, site: str, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval of a site's elements."""
        if not 0 < mass < 1:
            raise ValueError(f"expected a mass between 0 and 1, got {mass}")
        low, high = self.quantiles(site, [(1 - mass) / 2, (1 + mass) / 2])
        return low, high

    def evaluate(self, quantity: Callable[[State], Tensor] | str) -> Tensor:
        """A derived quantity of each draw, ``(S, ...)``: a function of a state, or the name of a method of the model called with state and data."""
        function = self._method(quantity) if isinstance(quantity, str) else quantity
        with torch.no_grad():
            return torch.stack([function({name: value[i] for name, value in self.samples.items()}) for i in range(self.count)])

    @property
    def labels(self) -> Tensor:
        """p(S | data) at the mode, ``(K, *shape)``, of a model with ``label_posterior``."""
        return self._method("label_posterior")(self.mode or {name: value.mean(0) for name, value in self.samples.items()})  # type: ignore[no-any-return]

    def volumes(self, interval: float = 0.9) -> pd.DataFrame:
        """Volumes of a model's labels in ml with a central interval, a row a label, from joint draws of latents and labels."""
        if self.model is None or not hasattr(self.model, "volume_draws"):
            raise ValueError("this posterior's model has no volumes")
        draws = self.model.volume_draws(self.samples, *self.data)
        low, high = torch.quantile(draws, torch.tensor([(1 - interval) / 2, (1 + interval) / 2], dtype=draws.dtype), dim=0)
        columns = {"name": self.model.labels.names, "volume_ml": draws.mean(0).tolist(), "sd_ml": draws.std(0).tolist()}
        return pd.DataFrame(columns | {"low_ml": low.tolist(), "high_ml": high.tolist()})

    def to_xarray(self) -> xr.Dataset:
        """Variables (chain, draw, site's axes), one chain."""
        variables = {}
        for name, value in self.samples.items():
            axes = ["chain", "draw", *(f"{name}_dim_{i}" for i in range(value.ndim - 1))]
            variables[name] = (axes, value[None].cpu().numpy())
        return xr.Dataset(variables, attrs=self.attributes)

    def to_arviz(self) -> Any:
        """ArviZ's container (``InferenceData``, or a ``DataTree`` from ArviZ 1.0 on) with the group ``posterior``, one chain."""
        arviz = load_arviz()
        draws = {name: value[None].cpu().numpy() for name, value in self.samples.items()}
        # ArviZ 1.0 takes groups, earlier versions one argument for each.
        if int(arviz.__version__.split(".")[0]) >= 1:
            return arviz.from_dict({"posterior": draws})
        return arviz.from_dict(posterior=draws)

    def save(self, path: Path | str) -> None:
        """Draws, mode and attributes as safetensors; the model and the data are not saved.

        Raises:
            UnusableInput: where the file cannot be written.
        """
        tensors = {f"samples/{name}": value for name, value in self.samples.items()}
        tensors |= {f"mode/{name}": value for name, value in (self.mode or {}).items()}
        header = {"format": FORMAT, "attributes": json.dumps(self.attributes), "log_evidence": json.dumps(self.log_evidence)}
        with atomic_write(path) as temporary:
            # Copies, because safetensors refuses tensors that share memory.
            save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: Path | str, model: Callable[..., Any] | None = None, data: tuple[Any, ...] = ()) -> Posterior:
        """What ``save`` wrote; nothing is unpickled.

        Raises:
            UnusableInput: for a file that is missing, damaged or not a posterior.
        """
        groups: dict[str, State] = {"samples": {}, "mode": {}}
        remedy = "name a file written by Posterior.save"
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 – a safetensors file is no mapping
        except (SafetensorError, OSError) as error:
            raise UnusableInput(Path(path), f"cannot be read as a posterior ({error})", remedy) from error
        if metadata.get("format") != FORMAT:
            raise UnusableInput(Path(path), f"is not a posterior: expected format {FORMAT!r}, got {metadata.get('format')!r}", remedy)
        for key, value in stored.items():
            group, name = key.split("/", 1)
            groups[group][name] = value
        log_evidence = json.loads(metadata["log_evidence"])
        return cls(groups["samples"], groups["mode"] or None, model, data, log_evidence, json.loads(metadata["attributes"]))

    def _site(self, name: str) -> Tensor:
        if name not in self.samples:
            raise ValueError(f"expected one of the sites {sorted(self.samples)}, got {name!r}")
        return self.samples[name]

    def _method(self, name: str) -> Callable[[State], Tensor]:
        method = getattr(self.model, name, None)
        if method is None:
            raise ValueError(f"this posterior's model has no {name!r}")
        return lambda state: method(state, *self.data)
