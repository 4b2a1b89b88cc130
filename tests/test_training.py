"""The training loop: the same numbers after an interruption, and errors that say what broke."""

from __future__ import annotations

import csv
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probmed.inference.parameters import seeded
from probmed.inference.svi import SCHEDULES, NotFinite
from probmed.inference.training import TrainingSettings, train
from probmed.volumes import UnusableInput

pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))


def batches(generator: torch.Generator) -> Tensor:
    return torch.randn(8, 3, generator=generator, dtype=torch.float64)


def run(module: nn.Module, steps: int, folder: Path | None, stop: int | None = None, **options: object) -> list[dict[str, float]]:
    count = 0

    def loss(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if stop is not None and count > stop:
            raise KeyboardInterrupt
        return ((module(x) - x.sum(1, keepdim=True)) ** 2).mean()

    settings = TrainingSettings(steps=steps, learning_rate=0.02, every=10, clip_norm=1.0)
    return train(loss, {"network": module}, batches, settings, folder=folder, **options)  # type: ignore[arg-type]


def test_a_run_that_was_killed_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, broken = network(), network()
    expected = run(whole, 50, None, validate=lambda: {"first": float(whole[0].weight.sum())})  # type: ignore[index, operator, union-attr]
    with pytest.raises(KeyboardInterrupt):
        run(broken, 50, tmp_path, stop=34, validate=lambda: {"first": float(broken[0].weight.sum())})  # type: ignore[index, operator, union-attr]
    again = network()
    found = run(again, 50, tmp_path, validate=lambda: {"first": float(again[0].weight.sum())})  # type: ignore[index, operator, union-attr]
    assert found == expected
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with (tmp_path / "log.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in expected]
    assert expected[-1]["loss"] < 0.5 * expected[0]["loss"]


def test_torch_s_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    module = network()
    torch.set_rng_state(before)
    run(module, 3, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_run_s_checkpoint_is_refused(tmp_path: Path) -> None:
    run(network(), 10, tmp_path)
    with pytest.raises(UnusableInput, match="another steps: expected 20, got 10"):
        run(network(), 20, tmp_path)
    with pytest.raises(UnusableInput, match="another scans"):
        run(network(), 10, tmp_path, described={"scans": ["a"]})


def test_what_is_not_finite_stops_the_run_before_a_parameter_moves() -> None:
    module = network()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(NotFinite, match=r"step 1 .*the loss"):
        train(lambda x: module(x).sum() * torch.nan, {"network": module}, batches)
    with pytest.raises(NotFinite, match=r"step 1 .*gradient of network\.3\.bias"):
        train(lambda x: (module(x).sum() * 0).sqrt(), {"network": module}, batches)
    for a, b in zip(before, module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_and_modules_are_checked() -> None:
    with pytest.raises(ValueError, match="steps and every"):
        TrainingSettings(steps=0)
    with pytest.raises(ValueError, match="parameters to learn"):
        train(lambda x: x.sum(), {"network": nn.Identity()}, batches)


def in_a_process(fabric: Fabric, folder: Path) -> None:
    """Of one of several: train, and say where its parameters ended."""
    module = network().eval()
    settings = TrainingSettings(steps=6, learning_rate=0.02, every=3)
    train(lambda x: ((module(x) - x.sum(1, keepdim=True)) ** 2).mean(), {"network": module}, batches, settings, folder=folder, fabric=fabric)
    save_file({name: p.detach() for name, p in module.named_parameters()}, folder / f"rank{fabric.global_rank}.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_two_processes_share_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """Each has data of its own; both end where one process does that takes the mean of both gradients."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(partial(in_a_process, folder=tmp_path))
    found = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    module = network().eval()
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    for step in range(6):
        optimiser.param_groups[0]["lr"] = 0.02 * SCHEDULES["cosine"](step / 6)
        optimiser.zero_grad()
        for rank in (0, 1):
            with seeded(2 * step + rank):
                x = batches(torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
            (((module(x) - x.sum(1, keepdim=True)) ** 2).mean() / 2).backward()
        optimiser.step()
    for name, p in module.named_parameters():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], p.detach())
    assert (tmp_path / "checkpoint.safetensors").exists() and len((tmp_path / "log.csv").read_text().splitlines()) == 3
