"""Self-contained HTML pages from the templates in ``templates/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wbdit.errors import need_extra
from wbdit.evaluation.scores import format_value


def render_page(template: str, **values: Any) -> str:
    """Return a page as HTML.

    Parameters
    ----------
    template
        File name of the template. It may include ``page.css.j2``. It can use the filters ``svg``, which inserts markup
        without escaping, and ``number``, which formats a number.
    values
        Values of the names in the template. A name without a value is an error.

    Raises
    ------
    InputError
        If jinja2 is not installed.
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
