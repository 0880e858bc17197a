"""Triton kernels, installed as ``wbdit.kernels``.

Their functions have the names and arguments of those in ``csrc/``, and :mod:`wbdit.ops.triton` calls them. A module is
imported when one of its functions first runs on a GPU, so ``import wbdit`` does not need triton. See
``kernels/README.md``.
"""
