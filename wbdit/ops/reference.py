"""The reference implementation of every op, in plain PyTorch.

It runs where no kernel is registered, and the tests compare every kernel with it. Sizes in the comments: batch B,
tokens N, hidden size d, heads h of width p, genes G, levels L. Inputs in low precision are computed in fp32, and the
results are cast back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASK32 = 0xFFFFFFFF


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for accumulation: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# adaptive layer norm: LN(x) * (1 + scale) + shift, Peebles and Xie 2023 (DiT)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    d = x.shape[-1]
    wide = accumulation_dtype(x.dtype)
    normed = F.layer_norm(x.to(wide), (d,), eps=eps)  # [B, N, d]
    return torch.addcmul(shift.to(wide)[:, None], normed, 1 + scale.to(wide)[:, None]).to(dtype or x.dtype)


def adaln_backward(dz: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1]
    wide = accumulation_dtype(x.dtype)
    dz_, x_ = dz.to(wide), x.to(wide)
    normed, mean, rstd = torch.native_layer_norm(x_, (d,), None, None, eps)
    dnormed = dz_ * (1 + scale.to(wide)[:, None])
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormed, x_, (d,), mean, rstd, None, None, [True, False, False]
    )
    return dx.to(x.dtype), dz_.sum(1).to(shift.dtype), (dz_ * normed).sum(1).to(scale.dtype)


# a gated residual update, then the adaptive layer norm


def gated_adaln(
    x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    step = out.to(wide) if bias is None else out.to(wide) + bias.to(wide)
    x_new = torch.addcmul(x.to(wide), gate.to(wide)[:, None], step).to(x.dtype)
    return x_new, adaln(x_new, shift, scale, eps, out.dtype)


def gated_adaln_(
    x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> None:
    x_new, z_new = gated_adaln(x, out, bias, gate, shift, scale, eps)
    x.copy_(x_new)
    out.copy_(z_new)


def gated_adaln_backward(
    dx_new: Tensor | None,
    dz_new: Tensor,
    x_new: Tensor,
    out: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dshift, dscale = adaln_backward(dz_new, x_new, shift, scale, eps)
    dx = dx if dx_new is None else dx + dx_new
    dout = gate[:, None].to(dx.dtype) * dx
    step = out.to(dx.dtype) if bias is None else out.to(dx.dtype) + bias.to(dx.dtype)
    dbias = dout.new_zeros(0) if bias is None else dout.sum((0, 1)).to(bias.dtype)
    return dx, dout.to(out.dtype), dbias, (dx * step).sum(1).to(gate.dtype), dshift, dscale


# multi-head subspace self-attention: one projection w is query, key and value, Yu et al. 2023 (CRATE)


def mssa(w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(w.dtype)
    u = w.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, h, N, p]
    scores = u @ u.mT / math.sqrt(u.shape[-1])  # [B, h, N, N], symmetric
    lse = scores.logsumexp(-1)  # [B, h, N]
    out = (scores - lse[..., None]).exp() @ u
    return out.transpose(1, 2).flatten(2).to(w.dtype), lse


def mssa_backward(dout: Tensor, w: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    wide = accumulation_dtype(w.dtype)
    u, g, o = (t.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (w, dout, out))
    root = math.sqrt(u.shape[-1])
    attention = (u @ u.mT / root - lse[..., None]).exp()  # rows sum to one
    dscores = attention * (g @ u.mT - (g * o).sum(-1, keepdim=True))
    dw = attention.mT @ g + (dscores + dscores.mT) @ u / root  # gradient as value, then as query and key
    return dw.transpose(1, 2).flatten(2).to(w.dtype)


# one step of iterative shrinkage-thresholding against the folded dictionary F = D - D^T D


def fold(dictionary: Tensor) -> Tensor:
    return dictionary - dictionary.mT @ dictionary


def fold_backward(dfolded: Tensor, dictionary: Tensor) -> Tensor:
    return dfolded - dictionary @ (dfolded + dfolded.mT)


def ista(z: Tensor, folded: Tensor, eta: float, lam: float) -> Tensor:
    # z is added outside the product, so that a low-precision product does not round it
    return _shrink(z, z.to(folded.dtype) @ folded, eta, lam).to(z.dtype)


def ista_backward(dout: Tensor, out: Tensor, z: Tensor, folded: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    g = torch.where(out > 0, dout, 0)
    low = g.to(folded.dtype)
    dz = g + eta * (low @ folded.mT).to(g.dtype)
    dfolded = eta * (z.to(folded.dtype).flatten(0, -2).mT @ low.flatten(0, -2))
    return dz, dfolded


def ista_adaln(
    x: Tensor,
    z: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float,
    lam: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    product = z.to(folded.dtype) @ folded
    out = _shrink(z, product, eta, lam)
    return *gated_adaln(x, out.to(z.dtype), None, gate, shift, scale, eps), product


def ista_adaln_(
    x: Tensor,
    z: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float,
    lam: float,
    eps: float,
) -> None:
    x_new, z_new, _ = ista_adaln(x, z, folded, gate, shift, scale, eta, lam, eps)
    x.copy_(x_new)
    z.copy_(z_new)


def ista_adaln_backward(
    dx_new: Tensor | None,
    dz_new: Tensor,
    x_new: Tensor,
    z: Tensor,
    product: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float,
    lam: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _shrink(z, product, eta, lam).to(z.dtype)
    dx, dout, _, dgate, dshift, dscale = gated_adaln_backward(dx_new, dz_new, x_new, out, None, gate, shift, scale, eps)
    dz, dfolded = ista_backward(dout, out, z, folded, eta)
    return dx, dz, dfolded, dgate, dshift, dscale


def _shrink(z: Tensor, product: Tensor, eta: float, lam: float) -> Tensor:
    wide = accumulation_dtype(z.dtype)
    return torch.relu(z.to(wide) + eta * product.to(wide) - eta * lam)


# all blocks, one after another


def run_blocks(
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    folded: list[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
) -> Tensor:
    z = adaln(x, modulations[0], modulations[1], eps, folded[0].dtype)
    for block, (projection, out, bias, dictionary) in enumerate(zip(projections, outs, biases, folded, strict=True)):
        _, _, gate1, shift2, scale2, gate2, shift, scale = modulations[6 * block : 6 * block + 8]
        attended, _ = mssa(z @ projection.mT, heads)
        x, z = gated_adaln(x, attended @ out.mT, bias, gate1, shift2, scale2, eps)
        x, z, _ = ista_adaln(x, z, dictionary, gate2, shift, scale, eta, lam, eps)
    return z


# the forward process, and the samplers' update


def noising(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (x0.ndim - 1)
    return alpha.to(x0.dtype).view(shape) * x0 + sigma.to(x0.dtype).view(shape) * noise


def sampler_step(
    x: Tensor,
    out: Tensor,
    previous: Tensor | None,
    earlier: Tensor | None,
    noise: Tensor | None,
    samples: Tensor | None,
    a: float,
    b: float,
    c: float,
    d: float,
    e: float,
    clamp_min: float | None,
    seed: int,
    step: int,
) -> Tensor:
    if samples is not None:
        noise = normal(seed, samples, step, math.prod(x.shape[1:])).view(x.shape).to(x.dtype)
    new = a * x + b * out
    for factor, term in ((c, previous), (d, earlier), (e, noise)):
        if term is not None:
            new = new + factor * term
    return new if clamp_min is None else new.clamp(min=clamp_min)


# a whole denoiser, without gradients


def embed_patches(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    cell_weight: Tensor | None = None,
    cell_bias: Tensor | None = None,
) -> Tensor:
    patch, wide = weight.shape[2] // x.shape[1], accumulation_dtype(dtype)
    padded = F.pad(x.to(dtype), (0, -x.shape[2] % patch))
    patches = padded.unflatten(2, (-1, patch)).permute(2, 0, 1, 3).flatten(2)  # [N, B, C P]
    tokens = (patches @ weight.mT.to(dtype)).transpose(0, 1) + bias.to(wide)
    if cell_weight is not None and cell_bias is not None:
        cell = x.flatten(1).to(dtype) @ cell_weight.mT.to(dtype) + cell_bias.to(wide)
        tokens = torch.cat([tokens, cell[:, None]], dim=1)
    return (tokens + positions.to(wide)).to(dtype)


def read_patches(
    z: Tensor,
    genes: int,
    patch: int,
    weight: Tensor,
    bias: Tensor,
    cell_weight: Tensor | None = None,
    cell_bias: Tensor | None = None,
) -> Tensor:
    tokens, wide = math.ceil(genes / patch), accumulation_dtype(z.dtype)
    out = (z[:, :tokens].transpose(0, 1) @ weight.mT.to(z.dtype)).transpose(0, 1) + bias.to(wide)
    out = out.unflatten(2, (patch, -1)).permute(0, 3, 1, 2).flatten(2)[..., :genes]  # [B, C', G]
    if cell_weight is None or cell_bias is None:
        return out
    return out + (z[:, tokens] @ cell_weight.mT.to(z.dtype) + cell_bias.to(wide)).view(out.shape)


def denoise(
    x: Tensor,
    modulations: list[Tensor],
    embedding: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    folded: list[Tensor],
    readout: list[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
) -> Tensor:
    tokens = embed_patches(x, folded[0].dtype, *embedding)
    z = run_blocks(tokens, modulations, projections, outs, biases, folded, heads, eta, lam, eps)
    return read_patches(z, x.shape[2], embedding[0].shape[2] // x.shape[1], *readout).to(x.dtype)


def denoise_step(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    network, update, clean = given[:11], given[11:-1], given[-1]
    out = denoise(x, *network)
    return sampler_step(x, out, *update), x.new_empty(0) if clean is None else clean[0] * x + clean[1] * out


# counts at a few levels per gene, given the noised value of the same gene


def count_mean(
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
) -> Tensor:
    logits, absent = count_logits(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels)
    return (logits.softmax(-1) * values.masked_fill(absent, 0)).sum(-1)  # [B, G]


def count_mean_step(
    x: Tensor,
    answer: Tensor,
    rates: Tensor,
    dispersion: Tensor,
    knots: Tensor,
    log_size: Tensor,
    log_mean: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    alpha: float,
    sigma: float,
    *update: Any,
) -> tuple[Tensor, Tensor]:
    *step, keep = update
    log_odds, mixture = count_terms(answer, rates, dispersion, knots, log_size, log_mean)
    levels = log_odds.new_full((len(x),), alpha), log_odds.new_full((len(x),), sigma)
    tables = log_base0, log_base1, values, counts, n_levels
    mean = count_mean(x[:, 0], log_odds, mixture, *levels, *tables)[:, None]
    return sampler_step(x, mean.to(x.dtype), *step), mean if keep else mean.new_empty(0)


def count_terms(
    answer: Tensor, rates: Tensor, dispersion: Tensor, knots: Tensor, log_size: Tensor, log_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the natural parameters and mixture weights (B, G) of a denoiser's answer (B, 1 or 2, G)."""
    wide = accumulation_dtype(answer.dtype)
    answer, rates, dispersion, knots, log_size, log_mean = (
        t.to(wide) for t in (answer, rates, dispersion, knots, log_size, log_mean)
    )
    if answer.shape[1] == 2:
        dispersion = dispersion + answer[:, 1]
    mixture = (knots + dispersion).sigmoid()
    log_ratio = answer[:, 0] + rates - (torch.lerp(log_size[0], log_size[1], mixture) - log_mean)
    return -F.softplus(-log_ratio), mixture


def count_nll(
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    target: Tensor,
) -> Tensor:
    logits, _ = count_logits(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels)
    return -logits.log_softmax(-1).gather(-1, target.long()[..., None])[..., 0]


def count_nll_backward(
    dnll: Tensor,
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, absent = count_logits(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels)
    p = logits.softmax(-1)
    at_target = target[..., None] == torch.arange(len(counts), device=target.device)
    dlogits = dnll.to(p.dtype)[..., None] * (p - at_target.to(p.dtype))  # [B, G, L]
    w = mixture.to(p.dtype)[..., None]
    dmixture = (dlogits * (log_base1 - log_base0).masked_fill(absent, 0)).sum(-1)
    dlog_base0, dlog_base1 = (dlogits * (1 - w)).sum(0), (dlogits * w).sum(0)
    dlog_odds = (dlogits * counts).sum(-1)
    return (
        dlog_odds.to(log_odds.dtype),
        dmixture.to(mixture.dtype),
        dlog_base0.to(log_base0.dtype),
        dlog_base1.to(log_base1.dtype),
    )


def count_draw(
    x: Tensor,
    log_ratio: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    lowest: Tensor,
    highest: Tensor,
    u: Tensor,
    library: Tensor,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(log_ratio.dtype)
    u, library = u.to(wide), library.to(wide)
    tables = log_base0, log_base1, values, counts, n_levels
    p, log_scale = count_probabilities(x, log_ratio, mixture, alpha, sigma, *tables, library, rounds=rounds)
    below = p.cumsum(-1)
    # the last sum is 1 up to rounding: relative to it, u = 1 selects no level without mass
    reach = (u * below[..., -1])[..., None]
    level = torch.minimum((below < reach).sum(-1), n_levels - 1)[..., None]
    # u's position within its level's probability mass gives the count's position within the bin
    share = 1 - ((below.gather(-1, level) - reach) / p.gather(-1, level))[..., 0]
    first, last = (edge[level[..., 0]] for edge in (lowest, highest))
    inside = (share.nan_to_num(0.0).clamp(0, 1) * (last - first + 1)).int()
    return torch.minimum(first + inside, last).int(), log_scale


def count_probabilities(
    x: Tensor,
    log_ratio: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    library: Tensor,
    *,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Return the levels' probabilities (B, G, L) and the factor's logarithm (B,) of :func:`wbdit.ops.count_draw`."""
    wide = accumulation_dtype(log_ratio.dtype)
    log_ratio, counts, library = (t.to(wide) for t in (log_ratio, counts, library))

    def probabilities(log_scale: Tensor) -> Tensor:
        log_odds = F.logsigmoid(log_ratio + log_scale[:, None])
        tables = log_base0, log_base1, values, counts, n_levels
        return count_logits(x, log_odds, mixture, alpha, sigma, *tables)[0].softmax(-1)

    log_scale = torch.zeros_like(library)
    for _ in range(rounds):
        log_scale = log_scale + (library / (probabilities(log_scale) @ counts).sum(1)).log()
    return probabilities(log_scale), log_scale


def count_logits(
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the logits (B, G, L), -inf at levels beyond the gene's number, and the mask of those levels (G, L)."""
    wide = accumulation_dtype(log_odds.dtype)
    x, log_odds, mixture = (t.to(wide)[..., None] for t in (x, log_odds, mixture))
    alpha, sigma = (t.to(wide)[:, None, None] for t in (alpha, sigma))
    log_base0, log_base1, values, counts = (t.to(wide) for t in (log_base0, log_base1, values, counts))
    evidence = ((x - alpha * values) / sigma).square() / 2
    logits = (1 - mixture) * log_base0 + mixture * log_base1 + log_odds * counts - evidence
    absent = torch.arange(len(counts), device=n_levels.device) >= n_levels[:, None]
    return logits.masked_fill(absent, -torch.inf), absent


# counter-based Gaussian noise: Philox4x32-10 (Salmon et al. 2011), then the Box-Muller transform


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words of 32 random bits for a counter of four words and a key (all words in int64)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 overflow keeps the low 64 bits of the product; the mask undoes the sign extension of the shift
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & MASK32) ^ c1 ^ k0,
            high & MASK32,
            ((low >> 32) & MASK32) ^ c3 ^ k1,
            low & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def normal(seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    quads = torch.arange((length + 3) // 4, device=samples.device)[None]
    # on a CPU, parts too small for PyTorch to split over threads: 150 ops would synchronize the threads 150 times
    rows = max(1, 32768 // quads.shape[1]) if samples.device.type == "cpu" else max(1, len(samples))
    parts = [_normal_rows(seed, part[:, None], quads, step) for part in samples.to(torch.int64).split(rows)]
    return torch.cat(parts)[:, :length].contiguous()  # [B, length]


def _normal_rows(seed: int, sample: Tensor, quads: Tensor, step: int) -> Tensor:
    counter = (quads, sample & MASK32, torch.full_like(quads, step & MASK32), (sample >> 32) & MASK32)
    bits = philox(counter, (seed & MASK32, (seed >> 32) & MASK32))
    # 24 bits are exact in fp32: u in (0, 1] for the radius, u in [0, 1) for the angle
    u = [(b >> 8).to(torch.float32) for b in bits]
    pairs = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r = torch.sqrt(-2 * torch.log((radius + 1) * 2.0**-24))
        phi = angle * (2 * math.pi * 2.0**-24)
        pairs += [r * torch.cos(phi), r * torch.sin(phi)]
    return torch.stack(pairs, dim=-1).flatten(1)
