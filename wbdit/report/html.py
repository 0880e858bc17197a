"""Pages of one file each, made from the templates in ``templates/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wbdit.errors import need_extra
from wbdit.evaluation.scores import format_value


def render_page(template: str, **values: Any) -> str:
    """Return a page.

    Parameters
    ----------
    template
        Name of its file. It may include ``page.css.j2``, and has the filters ``svg`` (markup as it is) and ``number``.
    values
        What it names; a name without a value is an error.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise need_extra("jinja2") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "number": format_value}
    return environment.get_template(template).render(**values)
