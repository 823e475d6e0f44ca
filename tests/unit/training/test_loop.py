"""Optimisers, the supply of clips during training, and the state of an interrupted run."""

import threading
import time

import pytest
import torch
from training.loop import Budget, Optimiser, Pool
from training.muon import Muon, orthogonalised
from training.session import FOLDER
from training.settings import read_settings
from training.supply import Supply

CPU = torch.device("cpu")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_steps_equal_those_of_torch(decay):
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (8, 24)]
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        other.data.copy_(one.data)
    batched = Muon(ours, lr=0.02, weight_decay=decay)
    single = torch.optim.Muon(theirs, lr=0.02, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        batched.step()
        single.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_orthogonalised_has_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalised(torch.randn(3, 16, 40)).float())
    assert values.min() > 0.5 and values.max() < 1.3
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.blocks[0](x).relu())


def stage(**changes):
    from dataclasses import replace

    return replace(read_settings(FOLDER / "configs" / "check.yaml").dit, warmup=1, **changes)


def test_muon_has_the_blocks_matrices_and_adam_the_rest():
    net = Blocks()
    optimiser = Optimiser({"dit": net}, stage(muon_rate=0.01), Budget(1e9, 1e9, 0.0))
    (adam, _), (muon, _) = optimiser.rates
    assert [id(weight) for weight in muon.param_groups[0]["params"]] == [id(net.blocks[0].weight)]
    assert sum(len(group["params"]) for group in adam.param_groups) == 3
    optimiser.step(net(torch.ones(2, 4)).square().mean())
    assert len(Optimiser({"dit": net}, stage(muon_rate=0), Budget(1e9, 1e9, 0.0)).rates) == 1


def test_gradients_that_are_not_finite_count_as_zeros():
    net = Blocks()
    optimiser = Optimiser({"dit": net}, stage(muon_rate=0), Budget(1e9, 1e9, 0.0))
    before = [weight.detach().clone() for weight in net.parameters()]
    optimiser.step(net(torch.full((2, 4), float("nan"))).mean())
    for weight, was in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(weight, was, rtol=1e-3, atol=1e-6)


def test_the_average_is_exchanged_and_back():
    net = Blocks()
    optimiser = Optimiser({"dit": net}, stage(muon_rate=0), Budget(1e9, 1e9, 0.0))
    for _ in range(3):
        optimiser.step(net(torch.ones(2, 4)).square().mean())
    trained = net.head.weight.detach().clone()
    optimiser.average.swap()
    assert not torch.equal(net.head.weight, trained)
    optimiser.average.swap()
    assert torch.equal(net.head.weight, trained)


def taken(supply):
    for _ in range(500):
        clips = supply.take()
        if clips is not None:
            return clips
        time.sleep(0.01)
    raise AssertionError("nothing came")


def test_a_supply_makes_clips_one_ahead():
    made = []

    def make(count):
        made.append(count)
        return {"clip": torch.full((count,), float(len(made)))}

    pool = Pool(8)
    with Supply(make, 3, CPU) as supply:
        for _ in range(4):
            pool.add(taken(supply))
        assert len(made) <= 6
    assert pool.filled == 8 and not any(
        thread.name == supply._thread.name for thread in threading.enumerate()
    )
    assert pool.tensors["clip"].tolist() == [3, 4, 4, 4, 2, 2, 3, 3]


def test_a_supply_passes_errors_on():
    def make(count):
        raise RuntimeError("no more takes")

    with Supply(make, 1, CPU) as supply, pytest.raises(RuntimeError, match="no more takes"):
        taken(supply)
