"""PyTorch's switches for a comparison with fp64."""

import torch


def exact_fp32() -> None:
    """Let no fp32 product or convolution be TF32: cuDNN's are by default, and are 3e-4 off fp64."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # the older switches alone leave the newer ones, which cuDNN's convolutions go by, as they were
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
