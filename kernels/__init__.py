"""Triton kernels, installed as ``wbdit.kernels``.

One module an op, named as in :mod:`wbdit.ops.reference`, imported only when the op first runs on a GPU, so that
``import wbdit`` needs no triton. A kernel enters by :func:`wbdit.ops.register_kernel`. There are none yet: on a GPU
every op runs its PyTorch reference.
"""
