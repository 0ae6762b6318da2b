"""The pages: the README is short and its code runs, links lead somewhere, names in ARCHITECTURE.md exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")
]
PAGES += [
    ROOT / "benchmarks/VERIFIED.md",
    ROOT / "csrc/cuda/README.md",
    ROOT / "examples/recipes/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OLD_WORDS = re.compile(r"\b(laws?|own_law|load_law|check_law|folds?|strips?|super.?tiles?|manners|teeth)\b")
NAMED = re.compile(r"((?:`\w+`,\s+)*`\w+`)\s+in\s+\[[^\]]*\]\(([^)]+)\)")  # `name`, `name` in [file](path)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    written = re.sub(r"<!-- benchmarks:begin -->.*<!-- benchmarks:end -->", "", text, flags=re.DOTALL)
    assert written != text
    assert len(written.split()) <= 900
    assert text[: text.index("pip install")].count("\n") < 20  # the first screen says how to install


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].isfinite()


@EVERY_PAGE
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):  # of the web
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@EVERY_PAGE
def test_no_word_of_the_old_vocabulary(page):
    assert OLD_WORDS.findall(page.read_text()) == []


def test_names_in_the_architecture_exist():
    """Whoever moves or renames a function corrects the page."""
    page = ROOT / "docs/ARCHITECTURE.md"
    named = NAMED.findall(page.read_text())
    assert len(named) > 50
    missing = [
        f"{name} in {path}"
        for names, path in named
        for name in re.findall(r"\w+", names)
        if not re.search(rf"\b{name}\b", (page.parent / path).read_text())
    ]
    assert missing == []
