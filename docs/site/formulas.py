"""Formulas as MathML, made while the site is built: the pages need no script and no network for them."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SPACE = '<mspace width="0.17em"/>'


def to_mathml(latex: str, display: str) -> str:
    """MathML, with LaTeX's thin spaces between a function's name and its neighbours."""
    mathml = convert(latex, display=display)
    mathml = re.sub(r"(?<=</mi>)(?=<mi>[a-z]{2,}</mi>)", SPACE, mathml)
    return re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<mi>|<mfrac>|<munder>|<msub>)", rf"\1{SPACE}", mathml)


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{to_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
