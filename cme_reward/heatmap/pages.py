"""What the package's pages have in common: how a template is read, and how they look."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files

import jinja2


def template(package: str, **filters: Callable[..., object]) -> jinja2.Template:
    """`page.html` of a package. All that is put into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    page = files(package).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(page)


@cache
def theme() -> str:
    """Colours, letters and measure of every page, as CSS."""
    return files("cme_reward.heatmap").joinpath("theme.css").read_text(encoding="utf-8")


def document(title: str, body: str) -> str:
    """A whole page that needs no network and runs no script.

    Args:
        title: as text; it is escaped.
        body: HTML, put in as it is; whoever made it has escaped what is in it.
    """
    page = files("cme_reward.heatmap").joinpath("document.html").read_text(encoding="utf-8")
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(page)
    return made.render(title=title, body=body, theme=theme())
