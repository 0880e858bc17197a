"""Training log in TensorBoard format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wbdit.errors import InputError, need_extra


@contextmanager
def tensorboard_writer(folder: str | Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes one record of the training log to TensorBoard.

    Numbers become scalars under their names. A list, with one number per block, becomes one scalar per block.

    Parameters
    ----------
    folder
        Log folder, created if missing. None for a function that does nothing.

    Raises
    ------
    InputError
        If TensorBoard is not installed, or the folder cannot be written.
    """
    if folder is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise need_extra("tensorboard", "tensorboard") from None
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise InputError(f"cannot write the TensorBoard log in {folder}: {error.strerror}") from error

    def write(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, list):
                for block, one in enumerate(value):
                    writer.add_scalar(f"{name}/block {block + 1}", one, record["step"])
            elif name != "step":
                writer.add_scalar(name, value, record["step"])

    with writer:
        yield write
