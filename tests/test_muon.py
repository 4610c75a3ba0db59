"""Muon for matrices and AdamW for the rest: as torch's own do it, together, and with a state to go on from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cosyvoice.utils.muon import MuonWithAdamW, muon_groups

LR, MOMENTUM, BETAS = 0.02, 0.9, (0.8, 0.95)


class Network(nn.Module):
    """A little of everything: an embedding, a kernel, a matrix, a norm, an output layer, a weight at rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.kernel = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11)
        self.resting = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.kernel(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.out(torch.tanh(self.linear(self.norm(hidden))))


def step(network: Network, *optimizers: torch.optim.Optimizer) -> float:
    tokens = torch.arange(22).view(2, 11) % 11
    loss = nn.functional.cross_entropy(network(tokens).flatten(0, 1), tokens.roll(1, dims=1).flatten())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    network.zero_grad(set_to_none=True)
    return loss.item()


@pytest.fixture
def network() -> Network:
    torch.manual_seed(5)
    return Network()


def both(network: Network) -> MuonWithAdamW:
    return MuonWithAdamW(muon_groups(network, adamw=["out"]), lr=LR, betas=BETAS, momentum=MOMENTUM)


def test_each_weight_has_its_optimizer(network: Network) -> None:
    matrices, rest = muon_groups(network, adamw=["out"])
    assert matrices["muon"] and not rest["muon"]
    assert {id(weight) for weight in matrices["params"]} == {id(network.kernel.weight), id(network.linear.weight)}
    trained = {id(weight) for weight in network.parameters() if weight.requires_grad}
    assert {id(weight) for weight in rest["params"]} == trained - {id(weight) for weight in matrices["params"]}
    (alone,) = muon_groups(nn.LayerNorm(3))
    assert not alone["muon"]


def test_the_steps_are_those_of_torch(network: Network) -> None:
    twin = copy.deepcopy(network)
    ours = both(network)
    linear = [twin.linear.weight]
    rest = [weight for name, weight in twin.named_parameters() if name not in ("linear.weight", "kernel.weight")]
    muon = torch.optim.Muon(linear, lr=LR, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=LR, betas=BETAS, weight_decay=0.0)
    twin.kernel.requires_grad_(False), network.kernel.requires_grad_(False)  # torch's Muon takes no kernel
    for _ in range(4):
        assert step(network, ours) == step(twin, muon, adamw)
    for name, weight in network.named_parameters():
        assert torch.equal(weight, twin.get_parameter(name)), name


def test_a_kernel_is_a_matrix_of_what_it_looks_at(network: Network) -> None:
    kernel = network.kernel.weight
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = MuonWithAdamW([{"params": [kernel], "muon": True}], lr=LR, momentum=MOMENTUM)
    muon = torch.optim.Muon([matrix], lr=LR, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        kernel.grad = torch.randn(kernel.shape)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step(), muon.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_it_goes_on_from_its_state_bit_by_bit(network: Network, tmp_path: Path) -> None:
    straight = both(network)
    for _ in range(3):
        step(network, straight)
    torch.save({"model": network.state_dict(), "optimizer": straight.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Network()
    again.load_state_dict(saved["model"])
    resumed = both(again)
    resumed.load_state_dict(saved["optimizer"])
    assert [step(network, straight) for _ in range(3)] == [step(again, resumed) for _ in range(3)]
    with pytest.raises(ValueError, match="no part for muon"):
        resumed.load_state_dict({**saved["optimizer"], "muon": None})


def test_momentum_and_betas_are_those_of_now(network: Network) -> None:
    before = both(network)
    step(network, before)
    after = MuonWithAdamW(muon_groups(network, adamw=["out"]), lr=LR, betas=(0.5, 0.6), momentum=0.7)
    after.load_state_dict(before.state_dict())
    assert after._muon.param_groups[0]["momentum"] == 0.7
    assert after._adamw.param_groups[0]["betas"] == (0.5, 0.6)


def test_schedules_and_weights_that_move_are_followed(network: Network) -> None:
    optimizer = both(network)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    network.linear.weight.data = network.linear.weight.data.clone()  # as .to() does: other memory
    before = network.linear.weight.detach().clone()
    step(network, optimizer)
    assert not torch.equal(network.linear.weight, before)
    schedule.step()
    before = copy.deepcopy(network.state_dict())
    step(network, optimizer)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_a_vector_is_not_for_muon(network: Network) -> None:
    with pytest.raises(ValueError, match=r"shape \(8,\), expected two axes"):
        MuonWithAdamW([{"params": [network.linear.bias], "muon": True}])
