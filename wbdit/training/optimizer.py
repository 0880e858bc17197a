"""AdamW with clipping and a moving average of the weights, in two passes over memory on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import cpu


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient by its norm and averages the weights in the same step.

    For dense fp32 weights on a CPU, a C++ kernel does all of it: one pass for the norm, one for the rest. It leaves the
    gradients as they are. Elsewhere PyTorch's functions run. The state has the layout of :class:`torch.optim.AdamW`.

    Parameters
    ----------
    groups
        Parameter groups: `params`, and `weight_decay` and `lr` where they differ.
    averages
        Moving average of each weight, updated in place; empty for none.
    clip_norm
        Largest norm of the gradient of all weights; 0 for no limit.
    lr, betas
        Learning rate, and decays of the first and the second moment.

    Attributes
    ----------
    norm
        Norm of the gradient of all weights, a scalar on the device; None to compute it where it is needed.
    found_inf
        1 to skip the next step, else 0, a scalar on the device, as :class:`torch.amp.GradScaler` has it; None for 0. A
        skipped step changes neither the weights nor the state; the averages go on toward the weights.
    decay
        Decay of the moving average in the next step: its new value is ``decay * average + (1 - decay) * weight``.

    Examples
    --------
    >>> from wbdit.training.optimizer import AveragingAdamW
    >>> weight, average = torch.ones(2, requires_grad=True), torch.zeros(2)
    >>> optimizer = AveragingAdamW([{"params": [weight], "weight_decay": 0.0}], {weight: average}, lr=0.5)
    >>> optimizer.decay = 0.75
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.detach(), average
    (tensor([0.5000, 0.5000]), tensor([0.1250, 0.1250]))
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        averages: Mapping[Tensor, Tensor] | None = None,
        clip_norm: float = 0.0,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.averages = dict(averages or {})
        self.clip_norm = clip_norm
        self.decay = 1.0
        self.norm: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip the gradient, update the weights that have one, then all averages; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in weights]
        averages = [self.averages[p] for p in weights] if self.averages else []
        rest = self.averages
        if weights and cpu.serves(*weights, *gradients, *averages):
            self._init_state(weights)
            if self.found_inf is None or not self.found_inf:
                self._step_in_two_passes(weights, gradients, averages)
                rest = {p: average for p, average in rest.items() if p.grad is None}
        else:
            if self.clip_norm:
                norm = torch.nn.utils.get_total_norm(gradients) if self.norm is None else self.norm
                torch.nn.utils.clip_grads_with_norm_(weights, self.clip_norm, norm)
            super().step()
        if rest:
            torch._foreach_lerp_(list(rest.values()), list(rest), 1 - self.decay)
        return loss

    def _init_state(self, weights: list[Tensor]) -> None:
        for p in weights:
            if not self.state[p]:
                zero = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def _step_in_two_passes(self, weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor]) -> None:
        states = [self.state[p] for p in weights]
        torch._foreach_add_([state["step"] for state in states], 1)
        settings = {p: group for group in self.param_groups for p in group["params"]}
        groups, steps = [settings[p] for p in weights], [float(state["step"]) for state in states]
        beta1, beta2 = groups[0]["betas"]
        torch.ops.wbdit_csrc.adamw(
            weights,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            averages,
            [1 - group["lr"] * group["weight_decay"] for group in groups],
            [group["lr"] / (1 - beta1**step) for group, step in zip(groups, steps, strict=True)],
            [math.sqrt(1 - beta2**step) for step in steps],
            beta1,
            beta2,
            groups[0]["eps"],
            self.clip_norm,
            1 - self.decay,
        )
