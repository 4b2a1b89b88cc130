"""Training of networks over many steps: any loss, one loop, that resumes to the same numbers.

The data of a step depend on the seed and the step's number alone, so that a run that was killed goes on where its last checkpoint was and ends in the
same bits. Several GPUs each take a part of the batch and share gradients (Lightning Fabric).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from probmed.inference.checkpoints import buffers_of, read_checkpoint, write_checkpoint
from probmed.inference.parameters import cuda_devices, seeded
from probmed.inference.svi import SCHEDULES, NotFinite
from probmed.volumes import atomic_write

Row = dict[str, float]
_REMEDY = "go on with the data and options that the run began with, or start another in another folder"


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained.

    Arguments:
        steps: of the optimiser (Adam). learning_rate: at first; schedule: one of ``svi.SCHEDULES``.
        clip_norm: greatest norm of the gradient of all parameters; None for none.
        seed: of the data's order and of every draw.
        every: steps between two rows of the log, with the mean loss since the last, a validation and a checkpoint.
    """

    steps: int = 2000
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    clip_norm: float | None = None
    seed: int = 0
    every: int = 100

    def __post_init__(self) -> None:
        if min(self.steps, self.every) < 1 or self.learning_rate <= 0 or self.schedule not in SCHEDULES:
            expected = f"steps and every >= 1, learning_rate > 0 and a schedule of {sorted(SCHEDULES)}"
            raise ValueError(f"expected {expected}, got {self.steps}, {self.every}, {self.learning_rate} and {self.schedule!r}")


def train(
    loss: Callable[[Any], Tensor],
    modules: Mapping[str, nn.Module],
    batches: Callable[[torch.Generator], Any],
    settings: TrainingSettings | None = None,
    *,
    folder: Path | None = None,
    described: Mapping[str, Any] | None = None,
    validate: Callable[[], Row] | None = None,
    fabric: Fabric | None = None,
    tell: Callable[[Row, float], None] = lambda row, share: None,
) -> list[Row]:
    """Train every parameter of some modules, in place.

    Arguments:
        loss: of a batch, to be lowered; a scalar.
        modules: by name; those that the loss uses.
        batches: draws a batch with a generator, which is seeded anew for each step and process.
        folder: where ``checkpoint.safetensors`` and ``log.csv`` are kept; a run whose checkpoint is there goes on from it.
        described: what else a run that goes on must agree in.
        validate: gives further numbers for each row of the log.
        fabric: launched; one process on the CPU by default.
        tell: called after each row with it and the share of the work done.

    Returns:
        The log: step, loss (the mean since the row before), learning rate, greatest norm of the gradient, and what ``validate`` gave.

    Raises:
        NotFinite: where loss or gradient is not finite; no parameter has moved by it.
        UnusableInput: for a checkpoint of another run.
    """
    settings = settings or TrainingSettings()
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    parameters = {f"{owner}.{name}": p for owner, module in modules.items() for name, p in module.named_parameters() if p.requires_grad}
    parameters = dict({id(p): (name, p) for name, p in reversed(parameters.items())}.values())
    if not parameters:
        raise ValueError("expected modules with parameters to learn, got none")
    buffers = buffers_of(modules)
    optimiser = torch.optim.Adam(list(parameters.values()), lr=settings.learning_rate)
    # As they come back from a file, where a tuple is a list.
    facts = json.loads(json.dumps({**asdict(settings), **(described or {}), "processes": fabric.world_size}))
    log: list[Row] = []
    losses: list[float] = []
    path = None if folder is None else folder / "checkpoint.safetensors"
    if path is not None and path.exists():
        losses = read_checkpoint(path, parameters, buffers, optimiser, facts, _REMEDY)
        log = _read_log(path.with_name("log.csv"), len(losses))
    devices = cuda_devices(parameters.values())
    greatest = 0.0
    for step in range(len(losses), settings.steps):
        rate = settings.learning_rate * SCHEDULES[settings.schedule](step / settings.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        value, norm = _gradient_step(loss, batches, parameters, optimiser, settings, step, fabric, devices)
        losses.append(value)
        greatest = max(greatest, norm)
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            since = losses[(step // settings.every) * settings.every :]
            row: Row = {"step": step + 1, "loss": sum(since) / len(since), "learning_rate": rate, "gradient_norm": greatest}
            greatest = 0.0
            if validate is not None:
                with torch.no_grad(), seeded(settings.seed, devices):
                    row |= validate()
            log.append(row)
            if path is not None and fabric.is_global_zero:
                write_checkpoint(path, parameters, buffers, optimiser, losses, facts, devices)
                _write_log(path.with_name("log.csv"), log)
            tell(row, (step + 1) / settings.steps)
    return log


def _gradient_step(
    loss: Callable[[Any], Tensor],
    batches: Callable[[torch.Generator], Any],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    settings: TrainingSettings,
    step: int,
    fabric: Fabric,
    devices: Sequence[int],
) -> tuple[float, float]:
    """One step of the optimiser on a batch of the step's own; the loss before it, and the gradient's norm.

    Raises:
        NotFinite: as ``train``.
    """
    own = (settings.seed * 1_000_003 + step) * fabric.world_size + fabric.global_rank
    with seeded(own, devices):
        # Not of the same seed: data and draws would be the same numbers.
        batch = batches(torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
        optimiser.zero_grad(set_to_none=True)
        value = loss(batch)
        if not bool(torch.isfinite(value)):
            raise NotFinite(step + 1, ["the loss"])
        fabric.backward(value)
    if fabric.world_size > 1:
        for p in parameters.values():
            p.grad = fabric.all_reduce(p.grad if p.grad is not None else torch.zeros_like(p), reduce_op="mean")  # type: ignore[assignment]
    limit = math.inf if settings.clip_norm is None else settings.clip_norm
    norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), limit))
    if not math.isfinite(norm):
        broken = [name for name, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        raise NotFinite(step + 1, [f"gradient of {', '.join(broken[:3])}{' and more' if len(broken) > 3 else ''}"])
    optimiser.step()
    return float(value.detach()), norm


def _write_log(path: Path, rows: Sequence[Row]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _read_log(path: Path, steps: int) -> list[Row]:
    """The rows up to a step; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["step"] <= steps]
