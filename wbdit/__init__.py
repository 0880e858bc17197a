"""A fast White-Box Diffusion Transformer: real single cells in, synthetic single cells out.

For engineers: :class:`WBDiT` and :class:`DiT`, :mod:`wbdit.samplers`, :mod:`wbdit.schedule`, :mod:`wbdit.ops`.
For people with cells: :func:`fit`, :func:`load` and :class:`CellGenerator`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wbdit import samplers
from wbdit.dit import DiT
from wbdit.errors import InputError
from wbdit.model import WBDiT
from wbdit.ops import backend
from wbdit.schedule import NoiseSchedule
from wbdit.version import __version__

if TYPE_CHECKING:
    from wbdit.fitting import fit
    from wbdit.generator import CellGenerator, load

__all__ = [
    "CellGenerator",
    "DiT",
    "InputError",
    "NoiseSchedule",
    "WBDiT",
    "__version__",
    "backend",
    "fit",
    "load",
    "samplers",
]

_LATER = {"CellGenerator": "wbdit.generator", "fit": "wbdit.fitting", "load": "wbdit.generator"}


def __getattr__(name: str) -> Any:
    # anndata takes a second to import, which someone who wants the denoiser alone should not wait for
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'wbdit' has no attribute {name!r}")
