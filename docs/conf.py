"""The documentation as a site: `make site` writes it to build/site. Nothing is fetched, neither by the build nor by a
reader: formulas are MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

import fused_rnn

project = "fused_rnn"
author = "the fused_rnn developers"
release = fused_rnn.__version__
html_title = f"fused_rnn {release}"
html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
templates_path: list[str] = []
exclude_patterns = ["conf.py"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "none"  # signatures have them, and docstrings say more
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "notes_style"), ("Attributes of the result", "notes_style")]


def _mathml(node: nodes.Element, display: str) -> str:
    # several lines, aligned at &
    text = node.astext()
    if display == "block" and "&" in text:
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    return str(latex2mathml.converter.convert(text, display=display))


def _inline(writer: Any, node: nodes.Element) -> None:
    writer.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.Element) -> None:
    writer.body.append(f"<div class='math'>{_mathml(node, 'block')}</div>")
    raise nodes.SkipNode


html_math_renderer = "mathml"


RESULTS = "results.html"


def _results(app: Sphinx, error: Exception | None) -> None:
    """The page of results, which is no page of Sphinx's: its links lead to sources here, and to pages on the site."""
    if error is None and app.builder.format == "html":
        text = (Path(app.srcdir) / RESULTS).read_text(encoding="utf-8")
        (Path(app.outdir) / RESULTS).write_text(
            re.sub(r'href="([\w-]+)\.md"', r'href="\1.html"', text), encoding="utf-8"
        )


def setup(app: Sphinx) -> None:
    app.connect("build-finished", _results)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
