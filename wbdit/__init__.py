"""A fast White-Box Diffusion Transformer: real single cells in, synthetic single cells out.

For engineers: :class:`WBDiT` and :class:`DiT`, :mod:`wbdit.samplers`, :mod:`wbdit.schedule`, :mod:`wbdit.ops`.
For people with cells: :func:`fit`, :func:`load` and :class:`CellGenerator`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from wbdit import samplers
from wbdit.dit import DiT
from wbdit.errors import InputError
from wbdit.model import WBDiT
from wbdit.ops import backend
from wbdit.schedule import NoiseSchedule

if TYPE_CHECKING:
    from wbdit.generator import CellGenerator, fit, load

__all__ = [
    "CellGenerator",
    "DiT",
    "InputError",
    "NoiseSchedule",
    "WBDiT",
    "backend",
    "fit",
    "load",
    "samplers",
]

try:
    __version__ = version("wbdit")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    # anndata takes a second to import, which someone who wants the denoiser alone should not wait for
    if name in ("CellGenerator", "fit", "load"):
        return getattr(import_module("wbdit.generator"), name)
    raise AttributeError(f"module 'wbdit' has no attribute {name!r}")
