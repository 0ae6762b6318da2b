"""The menu of the site, added to pages that are read on their own too, and a front page named index.html."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

MENU = {
    "README": {
        "Start": ["docs/install", "docs/choosing", "examples/recipes/README", "docs/from_pml"],
        "Guide": [
            "docs/losses",
            "docs/two_towers",
            "docs/miners",
            "docs/memory",
            "docs/heads",
            "docs/several_gpus",
            "docs/custom_loss",
            "docs/limits",
        ],
        "Reference": ["docs/api", "benchmarks/README", "benchmarks/VERIFIED", "CHANGELOG"],
        "Project": ["docs/ARCHITECTURE", "csrc/cuda/README", "CONTRIBUTING", "examples/README"],
    },
    "docs/losses": {"Each loss": ["docs/pair_weights", "docs/losses/*"]},
    "docs/miners": {"More": ["docs/sampling"]},
}


def add_menu(app: Sphinx, page: str, text: list[str]) -> None:
    for caption, entries in MENU.get(page, {}).items():
        lines = ["", "```{toctree}", f":caption: {caption}", ":hidden:", ":glob:", ":titlesonly:", ""]
        text[0] += "\n".join([*lines, *(f"/{entry}" for entry in entries), "```", ""])


def add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        out = Path(app.outdir)
        shutil.copyfile(out / f"{app.config.root_doc}.html", out / "index.html")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_menu)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
