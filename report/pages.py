"""HTML pages: a Jinja2 template, with autoescape on, becomes one self-contained file."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.records import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def page(template, path, **context):
    """Renders report/templates/`template` with `context` and writes it to `path`.

    Style sheets and scripts are files of their own and are included by the template, so that the
    page needs no file beside it. The text is streamed: records may be a generator.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_atomically(path, environment.get_template(template).generate(**context))


def image_uri(image, side=384):
    """(data: URI, width, height) of a PIL image, shrunk to `side` pixels.

    It is a PNG or a JPEG, whichever is smaller.
    """
    image = image.copy()
    image.thumbnail((side, side))
    encoded = []
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        image.save(file, kind, optimize=True)
        content = base64.b64encode(file.getvalue()).decode()
        encoded.append(f"data:image/{kind.lower()};base64,{content}")
    return min(encoded, key=len), *image.size
