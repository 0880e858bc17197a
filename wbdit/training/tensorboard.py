"""The training log for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wbdit.errors import InputError, need_extra


@contextmanager
def tensorboard_writer(folder: str | Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that writes a record of the log into a folder for TensorBoard; without one it does nothing.

    Numbers become scalars of their names, lists of a number a block scalars of name and block.

    Parameters
    ----------
    folder
        Where to write; made if need be.

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
