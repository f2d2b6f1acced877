"""Pages from templates: everything that they show is escaped, and nothing is loaded."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (
        (_TEMPLATES / name).read_text("utf-8").strip() for name in ("page.css", "page.js")
    )
    # The page's own script may run, and no other, whatever a prompt or a spec holds.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
    }
    return environment


def render(template: str, **context: Any) -> str:
    """A page that stands alone: its style and script are in it.

    Args:
        template: a file of `templates/`; `base.html` is what others extend.
        context: what it names; a name that is not given is an error.
    """
    return _environment().get_template(template).render(**context)
