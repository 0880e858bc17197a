"""The table of operations: inputs, call, and FLOP count of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import flops
import torch
from configs import Config
from torch import Tensor

from wbdit import ops
from wbdit.ops import reference
from wbdit.ops.counts import INPUTS

ETA = LAM = 0.1
Values = dict[str, Tensor]


class Draw:
    """Seeded random tensors in fp64, with the sizes of a configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.d = config.model["hidden_size"]
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tokens(self) -> Tensor:
        return self.normal(self.config.batch, self.config.tokens, self.d)

    def rows(self, *names: str) -> Values:
        """Return shifts, scales and gates: one row per sample."""
        return {name: 0.5 * self.normal(self.config.batch, self.d) for name in names}

    def cells(self, *names: str) -> Values:
        return {name: self.normal(self.config.cells, 1, self.config.model["input_size"]) for name in names}

    def dictionary(self) -> Tensor:
        return self.normal(self.d, self.d) / self.d**0.5

    def counts(self) -> Values:
        """Return inputs of the count ops: 2 to 27 levels per gene, about 10 on average, and noised cells."""
        cells, genes, levels = self.config.batch, self.config.model["input_size"], 27
        drawn = {
            name: torch.rand(shape, generator=self.generator, dtype=torch.float64)
            for name, shape in (
                ("n_levels", (genes,)),
                ("mixture", (cells, genes)),
                ("target", (cells, genes)),
                ("sigma", (cells,)),
            )
        }
        counts = torch.arange(levels, dtype=torch.float64)
        n_levels = (2 - 8 * drawn["n_levels"].log()).int().clamp(max=levels)
        values = torch.log1p(counts) * (0.5 + self.normal(genes, 1).sigmoid())
        target = (drawn["target"] * n_levels).byte()
        sigma = 0.05 + 0.95 * drawn["sigma"]
        alpha = (1 - sigma**2).sqrt()
        clean = torch.take_along_dim(values, target.long().T, 1).T
        return {
            "x": alpha[:, None] * clean + sigma[:, None] * self.normal(cells, genes),
            **{
                "log_odds": 0.3 * self.normal(cells, genes),
                "mixture": drawn["mixture"],
                "alpha": alpha,
                "sigma": sigma,
            },
            **{name: self.normal(genes, levels) - 0.1 * counts for name in ("log_base0", "log_base1")},
            **{"values": values, "counts": counts, "n_levels": n_levels, "target": target},
        }

    def draws(self) -> Values:
        """Return inputs of the draw, with u in the middle of the most probable level, far from the next count."""
        values = {name: v for name, v in self.counts().items() if name != "target"}
        edges, library = values["counts"].int(), 0.5 + self.normal(self.config.batch).sigmoid()
        library = library * self.config.model["input_size"]  # about one count per gene
        given = [values[name] for name in INPUTS]
        log_ratio = values.pop("log_odds")
        _, log_scale = reference.count_draw(*given, edges, edges, log_ratio, library, rounds=4)
        given[1] = torch.nn.functional.logsigmoid(log_ratio + log_scale[:, None])
        p = reference.count_logits(*given)[0].softmax(-1)
        mass, level = p.max(-1, keepdim=True)
        u = (p.cumsum(-1).gather(-1, level) - mass / 2)[..., 0]
        return {**values, "log_ratio": log_ratio, "lowest": edges, "highest": edges, "u": u, "library": library}

    def sparse_coding(self) -> Values:
        """Return tokens whose step is not close to the threshold, where the last bit decides between two gradients."""
        folded = ops.fold(self.dictionary())
        before = self.tokens()
        before += 1e-3 * before.sign()
        step = torch.eye(self.d, dtype=torch.float64) + ETA * folded
        return {"z": torch.linalg.solve(step, before + ETA * LAM, left=False), "folded": folded}


@dataclass(frozen=True)
class Operation:
    """An operation of wbdit.ops: its inputs, its call, and the FLOPs of its products."""

    name: str
    make: Callable[[Draw], Values]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    precisions: tuple[str, ...] = ("fp32", "bf16")
    gradient: bool = True
    fixed: tuple[str, ...] = ()  # inputs without a gradient
    count: Callable[[flops.Sizes], int] | None = None
    gradient_count: Callable[[flops.Sizes], int] | None = None

    def run(self, values: Values) -> tuple[Tensor, ...]:
        out = self.call(**values)
        return out if isinstance(out, tuple) else (out,)

    def differentiate(self, values: Values) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
        """Return the outputs, and a step that computes gradients from the retained graph.

        The gradients are those of all floating-point inputs that are not `fixed`.
        """
        leaves = {
            k: v.clone().requires_grad_() if v.is_floating_point() and k not in self.fixed else v
            for k, v in values.items()
        }
        outs = self.run(leaves)
        generator = torch.Generator().manual_seed(2)
        upstream = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outs]
        wanted = [v for v in leaves.values() if v.requires_grad]
        return outs, functools.partial(torch.autograd.grad, outs, wanted, upstream, retain_graph=True)


def cast(values: Values, precision: str) -> Values:
    """Cast fp64 tensors to a precision; with bf16, the residual stream `x` is fp32 and all others are bf16."""
    low = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    types = {name: torch.float32 if name == "x" and precision == "bf16" else low for name in values}
    return {name: v.to(types[name]) if v.is_floating_point() else v for name, v in values.items()}


def mssa(w: Tensor, heads: Tensor) -> Tensor:
    return ops.mssa(w, int(heads))


def sampler_step(x: Tensor, out: Tensor, noise: Tensor) -> Tensor:
    """Return one step of ancestral DDIM."""
    return ops.sampler_step(x, out, noise=noise, a=1.01, b=-0.1, e=0.2)


def drawing_step(x: Tensor, out: Tensor, samples: Tensor) -> Tensor:
    """Return the same step with noise that the op draws itself."""
    return ops.sampler_step(x, out, a=1.01, b=-0.1, e=0.2, samples=samples, seed=7, step=1)


def normal(samples: Tensor, length: Tensor) -> Tensor:
    return ops.normal(7, samples, 1, int(length))


def ista_flops(s: flops.Sizes) -> int:
    return flops.linear(s, s.d, s.d)


def twice(count: Callable[[flops.Sizes], int]) -> Callable[[flops.Sizes], int]:
    return lambda s: 2 * count(s)


def _by_name(operations: Iterable[Operation]) -> dict[str, Operation]:
    return {operation.name: operation for operation in operations}


OPERATIONS = _by_name(
    (
        Operation(
            "adaln",
            lambda n: {"x": n.tokens(), **n.rows("shift", "scale")},
            lambda x, shift, scale: ops.adaln(x, shift, scale, dtype=shift.dtype),
        ),
        Operation(
            "gated_adaln",
            lambda n: {"x": n.tokens(), "out": n.tokens(), **n.rows("gate", "shift", "scale")},
            lambda **v: ops.gated_adaln(**v),
        ),
        Operation(
            "mssa",
            # scaled by 0.5, so that no token attends to itself alone
            lambda n: {"w": 0.5 * n.tokens(), "heads": torch.tensor(n.config.model["num_heads"])},
            mssa,
            count=flops.mssa,
            gradient_count=twice(flops.mssa),
        ),
        Operation(
            "ista",
            lambda n: n.sparse_coding(),
            lambda z, folded: ops.ista(z, folded, ETA, LAM),
            count=ista_flops,
            gradient_count=twice(ista_flops),
        ),
        Operation(
            "ista_adaln",
            lambda n: {"x": n.tokens(), **n.sparse_coding(), **n.rows("gate", "shift", "scale")},
            lambda **v: ops.ista_adaln(**v, eta=ETA, lam=LAM),
            count=ista_flops,
            gradient_count=twice(ista_flops),
        ),
        # the rest is always fp32: weights before rounding, cells, and random numbers
        Operation(
            "fold",
            lambda n: {"dictionary": n.dictionary()},
            lambda dictionary: ops.fold(dictionary),
            precisions=("fp32",),
            count=flops.fold,
            gradient_count=flops.fold,
        ),
        Operation(
            "noising",
            lambda n: {**n.cells("x0", "noise"), **{k: n.normal(n.config.cells).sigmoid() for k in ("alpha", "sigma")}},
            lambda **v: ops.noising(**v),
            precisions=("fp32",),
            gradient=False,
        ),
        Operation(
            "sampler_step",
            lambda n: n.cells("x", "out", "noise"),
            sampler_step,
            precisions=("fp32",),
            gradient=False,
        ),
        Operation(
            "sampler_step drawing",
            lambda n: {**n.cells("x", "out"), "samples": torch.arange(n.config.cells)},
            drawing_step,
            precisions=("fp32",),
            gradient=False,
        ),
        Operation(
            "count_mean",
            lambda n: {k: v for k, v in n.counts().items() if k != "target"},
            lambda **v: ops.count_mean(**v),
            precisions=("fp32",),
            gradient=False,
        ),
        Operation(
            "count_nll",
            lambda n: n.counts(),
            lambda **v: ops.count_nll(**v),
            precisions=("fp32",),
            fixed=("x", "alpha", "sigma", "values", "counts"),
        ),
        Operation(
            "count_draw",
            lambda n: n.draws(),
            lambda **v: ops.count_draw(**v),
            precisions=("fp32",),
            gradient=False,
        ),
        Operation(
            "normal",
            lambda n: {"samples": torch.arange(n.config.cells), "length": torch.tensor(n.config.model["input_size"])},
            normal,
            precisions=("fp32",),
            gradient=False,
        ),
    )
)
