"""The default log output: messages of the logger "wbdit" go to stderr if the user has not configured logging."""

from __future__ import annotations

import logging
import sys


class DefaultHandler(logging.Handler):
    """Print messages to stderr, unless another handler receives them too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        print(record.getMessage(), file=sys.stderr)


def show_messages() -> None:
    """Show messages of level INFO and above, unless a handler or a level is set already."""
    logger = logging.getLogger("wbdit")
    if logger.hasHandlers() or logger.level != logging.NOTSET:
        return
    logger.addHandler(DefaultHandler())
    logger.setLevel(logging.INFO)
