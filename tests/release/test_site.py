"""The site that `make docs` has built: in a headless browser, and the names that it documents."""

import functools
import http.server
import importlib
import re
import shutil
import threading
from pathlib import Path

import pytest

import dml_cuda
from benchmarks.losses import LOSSES

sync_api = pytest.importorskip("playwright.sync_api")
inventory = pytest.importorskip("sphinx.util.inventory")
pytestmark = pytest.mark.release

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build/site"
MODULES = (
    "dml_cuda",
    *(f"dml_cuda.{name}" for name in ("custom", "distributed", "functional", "pml", "reference")),
)
# Chromium's own connections, which a closed network refuses.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    assert (SITE / "index.html").is_file(), "no site in build/site: run `make docs` first"
    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "no Chromium: run `make browser` first"
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-quic", *QUIET]
        )
        yield launched
        launched.close()


@pytest.fixture
def page(browser, address):
    """A page; afterwards, that nothing failed on it and that it asked nobody else."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    opened.on(
        "console", lambda message: message.type in ("error", "warning") and problems.append(message.text)
    )
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(  # the next page aborts what the one before still loads
        "requestfailed",
        lambda request: request.failure == "net::ERR_ABORTED" or problems.append(f"failed: {request.url}"),
    )
    opened.on(
        "response",
        lambda response: response.status >= 400 and problems.append(f"{response.status}: {response.url}"),
    )
    elsewhere: list[str] = []
    opened.on(
        "request", lambda request: request.url.startswith((address, "data:")) or elsewhere.append(request.url)
    )
    yield opened
    opened.close()
    assert problems == []
    assert elsewhere == []


# Of the first fraction: its numerator's and denominator's boxes.
FRACTION = """() => {
    const [above, below] = [...document.querySelector("mfrac").children].map(x => x.getBoundingClientRect());
    return {above: above.bottom, below: below.top, height: above.height, width: above.width};
}"""


def test_home(page, address):
    page.goto(address)
    assert page.title().startswith("dml_cuda")
    assert page.locator("h1").inner_text().startswith("dml_cuda")
    assert page.locator("pre", has_text="pip install").first.is_visible()
    menu = page.locator(".sidebar-tree")
    for entry in ("Install", "Which loss", "Recipes", "Losses, miners and options", "API reference"):
        assert menu.get_by_role("link", name=entry, exact=True).is_visible()
    page.get_by_role("link", name="docs/losses.md").first.click()
    assert "Losses" in page.locator("h1").inner_text()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(page, address, name):
    page.goto(f"{address}/docs/losses/{name}.html")
    assert page.locator(f'[id="dml_cuda.{LOSSES[name].__name__}"]').is_visible()
    picture = page.locator('img[src*="_images"]').first
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 300
    assert page.locator("div.formula math").first.bounding_box()["height"] > 15


def test_formulas_are_laid_out(page, address):
    page.goto(f"{address}/docs/losses/multi_similarity.html")
    fraction = page.evaluate(FRACTION)
    assert fraction["above"] <= fraction["below"] + 1
    assert fraction["height"] > 4
    assert fraction["width"] > 4
    assert "\\" not in page.locator("div.formula").first.inner_text()  # no LaTeX is left


def test_api(page, address):
    page.goto(f"{address}/docs/api.html")
    assert page.locator('[id="dml_cuda.functional.pair_weights"]').is_visible()
    assert page.locator("math").count() > 0
    page.get_by_role("link", name="CircleLoss", exact=True).first.click()
    assert "losses/circle.html" in page.url


def test_search(page, address):
    page.goto(f"{address}/search.html?q=circle")
    page.wait_for_selector("ul.search li a")
    assert "Circle loss" in page.locator("ul.search").inner_text()


def test_dark_and_narrow(page, address):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{address}/docs/losses/circle.html")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_public_name_is_documented():
    found = inventory.InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, names in found.data.items() if kind.startswith("py:") for name in names}
    objects = [resolve(name) for name in documented]
    missing = []
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if f"{module.__name__}.{name}" not in documented and not any(value is other for other in objects):
                missing.append(f"{module.__name__}.{name}")
    assert [name for name in missing if name not in MODULES] == []


def resolve(name: str) -> object:
    value: object = dml_cuda
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    return value


def test_no_page_loads_from_elsewhere():
    loaded = re.compile(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]+\"")
    assert {path.name: loaded.findall(path.read_text()) for path in SITE.rglob("*.html")} == {
        path.name: [] for path in SITE.rglob("*.html")
    }
