"""Links of the pages to folders of the repository become plain text: the site holds files, not folders."""

from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    if node.get("refdomain") is None and node["reftype"] == "myst":
        page = Path(app.srcdir, node["refdoc"])
        if (page.parent / node["reftarget"]).is_dir():
            return content
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
