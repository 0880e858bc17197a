"""Docstrings as the site shows them: roles as code, and a result's prose below its type.

The docstrings are written for `help()` and Sphinx. mkdocstrings does not know roles such as :class:, and it takes the
first line of a Returns section for a type.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?\.?([^`]+)`")
RETURNS = re.compile(r"(Returns\n-------\n)(.*?)(?=\n\n[A-Z]\w+\n-+\n|\Z)", re.DOTALL)


class NumpyDoc(griffe.Extension):
    """Rewrite each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is None:
            return
        text = ROLE.sub(r"`\1`", obj.docstring.value)
        if isinstance(obj, griffe.Function):
            result = str(obj.returns or "object")
            text = RETURNS.sub(lambda found: f"{found[1]}{result}\n{_indented(found[2])}", text)
        obj.docstring.value = text


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in text.strip("\n").split("\n"))
