"""What the package's pages have in common: how a template is read, and how they look."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files

import jinja2


def template(package: str, **filters: Callable[..., object]) -> jinja2.Template:
    """`page.html` of a package, which may extend `document.html`. All that is put into it is
    escaped."""
    environment = _environment()
    environment.filters |= filters
    return environment.from_string(_read(package, "page.html"))


def document(title: str, body: str) -> str:
    """A whole page that needs no network and runs no script.

    Args:
        title: as text; it is escaped.
        body: HTML, put in as it is; whoever made it has escaped what is in it.
    """
    return _environment().get_template("document.html").render(title=title, body=body)


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: _read("cme_reward.heatmap", name)),
    )
    made.globals["theme"] = lambda: _read("cme_reward.heatmap", "theme.css")
    return made


@cache
def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
