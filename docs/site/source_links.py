"""Links of the pages to folders of the repository become plain text: the site has files, but no folders."""

from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx


def drop_folder_links(app: Sphinx, page: nodes.document) -> None:
    folder = Path(page["source"]).parent
    for link in list(page.findall(pending_xref)):
        if link.get("refdomain") is None and (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", drop_folder_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
