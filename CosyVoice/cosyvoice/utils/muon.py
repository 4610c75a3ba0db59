"""Muon for weight matrices, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class MuonWithAdamW(Optimizer):
    """Steps of equal size in every direction of a matrix (Muon), AdamW's elsewhere.

    Where batches are small and the clock decides, Muon learns from far fewer steps than Adam. It is defined for
    matrices, so a convolution's kernel [out, in, k] is one of [out, in * k] here, and embeddings, biases and norms are
    AdamW's. Its steps are scaled to the size of AdamW's (`match_rms_adamw`): one learning rate serves both.

    Args:
        params: groups of weights as `muon_groups` makes them: those that say `"muon": True` hold matrices and kernels
            only.
        lr: learning rate; a group may have its own.
        betas: AdamW's.
        momentum: Muon's.
        weight_decay: of both; a group may have its own.
        fused: of AdamW, see torch.optim.AdamW.

    Raises:
        ValueError: a group for Muon holds a weight with one axis.

    Source: Muon, https://kellerjordan.github.io/posts/muon; its scale, arXiv 2502.16982; both are torch.optim.Muon's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        super().__init__([{"muon": False, **group} for group in params], {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            flat = [weight for weight in group["params"] if weight.dim() < 2]
            if group["muon"] and flat:
                raise ValueError(f"Muon got a weight of shape {tuple(flat[0].shape)}, expected two axes or more")
        self._matrices = [[_as_matrix(weight) for weight in group["params"]] for group in self._of(muon=True)]
        plain = [{"params": group["params"]} for group in self._of(muon=False)]
        self._muon = self._adamw = None
        if self._matrices:
            groups = [{"params": matrices} for matrices in self._matrices]
            self._muon = torch.optim.Muon(groups, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        if plain:
            self._adamw = torch.optim.AdamW(plain, betas=betas, fused=fused)

    def _of(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the weights by their gradients, see torch.optim.Optimizer.step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, muon in ((self._muon, True), (self._adamw, False)):
            if optimizer is None:
                continue
            for inner, group in zip(optimizer.param_groups, self._of(muon), strict=True):
                inner["lr"], inner["weight_decay"] = group["lr"], group["weight_decay"]
        for matrices, group in zip(self._matrices, self._of(muon=True), strict=True):
            for matrix, weight in zip(matrices, group["params"], strict=True):
                matrix.data = _as_matrix(weight)  # again, as the weight may have been given other memory
                matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer in (self._muon, self._adamw):
            if optimizer is not None:
                optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states, and the groups' settings."""
        inner = {"muon": self._muon, "adamw": self._adamw}
        return {
            "param_groups": group_settings(self),
            **{name: None if optimizer is None else optimizer.state_dict() for name, optimizer in inner.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Args:
            state_dict: it.

        Raises:
            ValueError: it is of other groups.
        """
        for name, optimizer in (("muon", self._muon), ("adamw", self._adamw)):
            state = state_dict.get(name)
            if (state is None) != (optimizer is None):
                raise ValueError(
                    f"the state has {'no' if state is None else 'a'} part for {name}, expected the reverse"
                )
            if optimizer is not None:
                configured = group_settings(optimizer)
                optimizer.load_state_dict(state_dict[name])
                for group, settings in zip(optimizer.param_groups, configured, strict=True):
                    group.update(settings)  # momentum and betas are those of now, as lr is
        for group, settings in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(settings)


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What an optimizer does with each group of weights, without the weights.

    Args:
        optimizer: it.

    Returns:
        learning rate and the like of each group.
    """
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def muon_groups(module: nn.Module, adamw: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Part a module's trainable weights into those for Muon and those for AdamW.

    Args:
        module: embeddings in it are AdamW's, as Muon's authors advise.
        adamw: names of submodules whose weights are AdamW's too; of output layers, for example.

    Returns:
        one or two groups for `MuonWithAdamW`; none is empty.
    """
    plain = {id(weight) for part in module.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()}
    plain |= {id(weight) for name in adamw for weight in module.get_submodule(name).parameters()}
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for weight in module.parameters():
        if weight.requires_grad:
            groups[_is_matrix(weight) and id(weight) not in plain].append(weight)
    return [{"params": weights, "muon": muon} for muon, weights in groups.items() if weights]


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.detach().view(len(weight), -1)  # of the same memory


def _is_matrix(weight: Tensor) -> bool:
    return weight.dim() > 1 and weight.flatten(1).shape[1] > 1 and weight.shape[0] > 1
