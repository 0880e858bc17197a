"""Triton kernels, installed as ``wbdit.kernels``.

One module an op, with passes that have the names and arguments of those in ``csrc/``, imported only when one first runs
on a GPU, so that ``import wbdit`` needs no triton. They enter through :mod:`wbdit.ops.triton`. See
``kernels/README.md``.
"""
