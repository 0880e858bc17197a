"""The published formula in eager PyTorch, on the weights of a `WBDiT`: the baseline of the benchmarks.

It reads the weights by their checkpoint names, and uses no code of the package. It follows the authors' code: three
products per dictionary, without a fold; one projection, split into heads by a copy; a separate pass for each
normalization, modulation, gate and sum. Shapes: batch B, tokens N, hidden size d, h heads of width p, genes G in
patches of P.
"""

import math

import torch
import torch.nn.functional as F

ETA = LAM = 0.1
FREQUENCIES = 256


def published_forward(model, x, t, y=None):
    """Predict from noised cells ``(B, C, G)``, timesteps ``(B,)`` and labels ``(B,)``. No label is dropped."""
    c = timestep_embedding(model.t_embedder, t)
    if model.label_sizes:
        y = torch.full_like(t, model.label_sizes[0], dtype=torch.long) if y is None else y
        c = c + F.embedding(y, model.y_embedder.embedding_table.weight)
    tokens = patch_embedding(model.x_embedder.proj, x, model.patch_size) + model.pos_embed  # [B, N, d]
    for block in model.blocks:
        tokens = block_forward(block, tokens, c, model.num_heads)
    return final_layer(model.final_layer, tokens, c, model.patch_size)[..., : model.input_size]


def block_forward(block, x, c, heads):
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, c).chunk(6, dim=1)
    x = x + gate1.unsqueeze(1) * mssa(block.attn, modulate(x, shift1, scale1), heads)
    return x + gate2.unsqueeze(1) * ista(block.mlp, modulate(x, shift2, scale2))


def mssa(attn, z, heads):
    batch, tokens, _ = z.shape
    w = F.linear(z, attn.qkv.weight).view(batch, tokens, heads, -1).transpose(1, 2)  # [B, h, N, p]
    scores = torch.matmul(w, w.transpose(-1, -2)) * w.shape[-1] ** -0.5
    out = torch.matmul(scores.softmax(dim=-1), w)
    out = out.transpose(1, 2).reshape(batch, tokens, -1)
    return out if heads == 1 else F.linear(out, attn.to_out[0].weight, attn.to_out[0].bias)


def ista(mlp, z):
    x1 = F.linear(z, mlp.weight)
    grad1 = F.linear(x1, mlp.weight.t())
    grad2 = F.linear(z, mlp.weight.t())
    return F.relu(z + ETA * (grad2 - grad1) - ETA * LAM)


def modulation(layer, c):
    linear = layer.adaLN_modulation[1]
    return F.linear(F.silu(c), linear.weight, linear.bias)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(embedder, t):
    first, second = embedder.mlp[0], embedder.mlp[2]
    half = FREQUENCIES // 2
    # always in fp32: the angles are part of the definition, whatever the model's dtype
    rates = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * rates
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(first.weight.dtype)
    return F.linear(F.silu(F.linear(waves, first.weight, first.bias)), second.weight, second.bias)


def patch_embedding(proj, x, patch):
    x = F.pad(x, (0, -x.shape[-1] % patch))
    if proj.weight.ndim == 4:  # one projection for all patches, as published
        return F.conv2d(x.unsqueeze(-1), proj.weight, proj.bias, stride=(patch, 1)).flatten(2).transpose(1, 2)
    return per_patch(proj, x.unflatten(-1, (-1, patch)).transpose(1, 2).flatten(2))


def final_layer(layer, x, c, patch):
    shift, scale = modulation(layer, c).chunk(2, dim=1)
    z, linear = modulate(x, shift, scale), layer.linear
    out = F.linear(z, linear.weight, linear.bias) if linear.weight.ndim == 2 else per_patch(linear, z)  # [B, N, P C]
    return out.unflatten(-1, (patch, -1)).permute(0, 3, 1, 2).flatten(2)


def per_patch(linear, x):
    """Apply separate weights per patch, ``(N, inputs, outputs)``; not in the paper (``shared_patches=False``)."""
    return torch.einsum("bni,nio->bno", x, linear.weight) + linear.bias.squeeze(1)
