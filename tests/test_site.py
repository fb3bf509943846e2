"""The documentation is a site: built without a warning, nothing fetched, no link that leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")
pytest.importorskip("latex2mathml")

DOCS = Path(__file__).parents[1] / "docs"


class Page(HTMLParser):
    """What a page links to, what it loads, and which places in it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if given.get("id"):
            self.places.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        source = given.get("src") or (given.get("href") if tag == "link" else None)
        if source:
            self.loaded.append(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return {path.resolve(): Page(path) for path in folder.rglob("*.html")}


def test_every_page_of_the_folder_is_on_the_site(site: dict[Path, Page]) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in site}
    index = next(page for path, page in site.items() if path.stem == "index")
    linked = {urlsplit(link).path.removesuffix(".html") for link in index.links}
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= linked


def test_the_page_of_results_is_on_the_site_and_linked_from_where_figures_are(site: dict[Path, Page]) -> None:
    pages = {path.stem: page for path, page in site.items()}
    assert {"index.html", "benchmarks.html", "performance.html"} <= set(pages["results"].links)
    for name in ("index", "benchmarks", "performance"):
        assert "results.html" in pages[name].links, name


def test_no_link_leads_nowhere(site: dict[Path, Page]) -> None:
    nowhere = []
    for path, page in site.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("https", "http", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = site.get(target)
            if not target.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.places):
                nowhere.append(f"{path.name}: {link}")
    assert not nowhere


def test_nothing_is_fetched_from_elsewhere(site: dict[Path, Page]) -> None:
    loaded = [source for page in site.values() for source in page.loaded]
    assert loaded and not [source for source in loaded if urlsplit(source).scheme not in ("", "data")]


def test_formulas_are_readable_without_a_script(site: dict[Path, Page]) -> None:
    text = next(path for path in site if path.stem == "api").read_text(encoding="utf-8")
    assert text.count("<math") >= 6 and "&amp;=" not in text and "<mi>&</mi>" not in text
    for name in ("LSTM", "GRUCell", "convert.convert", "functional.lstm", "explain.explain", "use_backend"):
        assert f"fused_rnn.{name}" in text or f"fused_rnn.{name.rpartition('.')[2]}" in text, name
