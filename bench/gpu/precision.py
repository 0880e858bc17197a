"""PyTorch settings for a comparison with fp64."""

import torch


def exact_fp32() -> None:
    """Disable TF32 in fp32 products and convolutions; by default cuDNN uses it, with an error of 3e-4 against fp64."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # the older switches do not change the newer ones, which cuDNN's convolutions use
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
