"""A fast White-Box Diffusion Transformer: real single cells in, synthetic single cells out.

For people with cells: :func:`fit`, :func:`load`, :class:`CellGenerator`, :func:`evaluate`, :func:`explain`.
For engineers: :class:`WBDiT` and :class:`DiT`, :mod:`wbdit.samplers`, :class:`NoiseSchedule`, :mod:`wbdit.ops`.
For people with the authors' scripts: :mod:`wbdit.compat`; with a CRATE network: :func:`accelerate`.

Messages go to the logger "wbdit", and to stderr if logging is not configured. To silence them:
``logging.getLogger("wbdit").setLevel(logging.WARNING)``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wbdit import samplers
from wbdit._log import show_messages
from wbdit._version import __version__
from wbdit.errors import InputError
from wbdit.nn.dit import DiT
from wbdit.nn.wbdit import WBDiT
from wbdit.ops import backend
from wbdit.schedule import NoiseSchedule

if TYPE_CHECKING:
    from wbdit import datasets, pl
    from wbdit.augmentation import augment
    from wbdit.crate import accelerate
    from wbdit.data.split import split
    from wbdit.emission import emit, emit_to
    from wbdit.evaluation.evaluate import evaluate
    from wbdit.example_run import example
    from wbdit.generator import CellGenerator, load
    from wbdit.streaming import join
    from wbdit.training.config import Preset
    from wbdit.training.fit import fit
    from wbdit.whitebox.explain import explain

__all__ = [
    "CellGenerator",
    "DiT",
    "InputError",
    "NoiseSchedule",
    "Preset",
    "WBDiT",
    "__version__",
    "accelerate",
    "augment",
    "backend",
    "datasets",
    "emit",
    "emit_to",
    "evaluate",
    "example",
    "explain",
    "fit",
    "join",
    "load",
    "pl",
    "samplers",
    "split",
]

_LATER = {
    "accelerate": "wbdit.crate",
    "augment": "wbdit.augmentation",
    "CellGenerator": "wbdit.generator",
    "emit": "wbdit.emission",
    "emit_to": "wbdit.emission",
    "evaluate": "wbdit.evaluation.evaluate",
    "example": "wbdit.example_run",
    "explain": "wbdit.whitebox.explain",
    "fit": "wbdit.training.fit",
    "join": "wbdit.streaming",
    "load": "wbdit.generator",
    "Preset": "wbdit.training.config",
    "split": "wbdit.data.split",
}


show_messages()


def __getattr__(name: str) -> Any:
    # anndata takes a second to import, which someone who wants the denoiser alone should not wait for
    if name in ("datasets", "pl"):
        return import_module(f"wbdit.{name}")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'wbdit' has no attribute {name!r}")
