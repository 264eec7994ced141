"""The built site: the size of its pages, and how a browser shows them, wide and narrow, light and dark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from helpers.browser import FLAGS, chromium, needs_browser
from helpers.shared import made_once

pytest.importorskip("furo")
pytest.importorskip("myst_parser")
ROOT = Path(__file__).parents[2]
LIMIT = 2_000_000  # bytes of a page with its pictures, scripts and styles

# Runs before the scripts of a page, and collects what a reader would see in the console.
PROBE = """<script>
window.found = [];
addEventListener("error", (e) => found.push(e.message || `${e.target.tagName} ${e.target.src || e.target.href}`), true);
addEventListener("unhandledrejection", (e) => found.push(String(e.reason)));
console.error = (...words) => found.push(words.join(" "));
</script>"""

# Loads each page once, and measures it in both themes and both widths.
HARNESS = """<!doctype html><body><script>
const frame = document.body.appendChild(document.createElement("iframe"));
const painted = () => new Promise((done) => setTimeout(done, 0));
const load = (page) => new Promise((done) => { frame.onload = done; frame.src = page; });
(async () => {
  const problems = [], grounds = {};
  for (const page of PAGES) {
    frame.style.cssText = "width: 1400px; height: 900px";
    await load(page);
    const page_ = frame.contentDocument, report = (text) => problems.push(`${page}: ${text}`);
    for (const picture of page_.images) if (!picture.naturalWidth) report(`broken image ${picture.src}`);
    for (const entry of frame.contentWindow.performance.getEntriesByType("resource"))
      if (!entry.name.startsWith(location.origin)) report(`external ${entry.name}`);
    for (const theme of ["light", "dark"]) {
      page_.body.dataset.theme = theme;
      grounds[theme] = getComputedStyle(page_.body).backgroundColor;
      const shown = [...page_.images].filter((picture) => picture.className.includes("only-") && picture.offsetWidth);
      for (const picture of shown)
        if (!picture.classList.contains(`only-${theme}`)) report(`${theme} shows ${picture.src}`);
      for (const width of [1400, 400]) {
        frame.style.width = `${width}px`;
        await painted();
        const wide = page_.documentElement.scrollWidth - page_.documentElement.clientWidth;
        if (wide > 0) report(`${theme}, ${width} px wide: scrolls sideways by ${wide} px`);
      }
    }
    for (const text of frame.contentWindow.found) report(text);
  }
  await fetch("/found", { method: "POST", body: JSON.stringify({ problems, grounds, pages: PAGES.length }) });
})();
</script></body>"""


def build(folder: Path) -> None:
    if built := os.environ.get("SITE"):  # by `.ci/run docs`
        (folder / "site").symlink_to(built)
        return
    # In its own process, since Sphinx changes global state.
    command = ["-m", "sphinx", "-q", "-W", "-d", str(folder / "trees"), str(ROOT / "docs"), str(folder / "site")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "site", build) / "site"


def local(site: Path, page: Path, link: str) -> Path:
    path = unquote(re.split(r"[?#]", link)[0])
    return (page.parent / path).resolve() if not path.startswith("/") else site / path[1:]


@pytest.mark.slow
def test_pages_are_small_and_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r'<(?:script|img|source|iframe)\b[^>]*\bsrc="([^"]+)"', text)
        links += re.findall(r'<link\b[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="([^"]+)"', text)
        links = [link for link in links if not link.startswith("data:")]
        assert [link for link in links if re.match(r"(https?:)?//", link)] == [], page
        files = {local(site, page, link) for link in links}
        assert [file for file in files if not file.is_file()] == [], page
        size = page.stat().st_size + sum(file.stat().st_size for file in files)
        assert size < LIMIT, f"{page.relative_to(site)} has {size} bytes"


@pytest.mark.slow
def test_links_inside_the_site_lead_to_pages_and_anchors(site: Path) -> None:
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    broken = set()
    for page, text in pages.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            if not re.match(r"\w+:", link):
                target = page if link.startswith("#") else local(site, page, link)
                anchor = unquote(link.partition("#")[2])
                if not (target.is_file() and (not anchor or anchor in anchors.get(target.resolve(), set()))):
                    broken.add((page.name, link))
    assert sorted(broken) == []


@pytest.mark.slow
def test_each_public_name_is_in_the_reference(site: Path) -> None:
    names = {
        name
        for page in site.rglob("*.html")
        for name in re.findall(r'\bid="(lit_tricks\.[\w.]+)"', page.read_text("utf-8"))
    }
    public = {f"lit_tricks.{name}" for name in ("Trick", "Classifier", "Detector", "Segmenter", "predict")}
    for module in ("callbacks", "commands", "commands.data", "data", "functional", "models", "utils.batch"):
        public |= {f"lit_tricks.{module}.{name}" for name in import_module(f"lit_tricks.{module}").__all__}
    assert sorted(public - names) == ["lit_tricks.commands.data"]  # a package


class Server(SimpleHTTPRequestHandler):
    """Serves the site with the probe in each page, and receives what the browser found."""

    def __init__(
        self, *args: Any, found: dict[str, Any], done: threading.Event, pages: list[str], **kwargs: Any
    ) -> None:
        self.found, self.done, self.pages = found, done, pages
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.path == "/harness":
            self.answer(HARNESS.replace("PAGES", json.dumps(self.pages)))
        elif path.suffix == ".html" and path.is_file():
            self.answer(path.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1))
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.found.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer("")
        self.done.set()

    def answer(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Any]:
    """Return a function that lets a browser measure pages of a folder, and returns what it found."""
    browsers: list[subprocess.Popen[bytes]] = []

    def run(folder: Path, pages: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        done = threading.Event()
        handler = partial(Server, found=found, done=done, pages=pages, directory=str(folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            command = [chromium(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,1000"]
            address = f"http://127.0.0.1:{server.server_port}/harness"
            # Keeps headless Chromium open until it is ended.
            command += ["--remote-debugging-port=0", address]
            browsers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            finished = done.wait(timeout=300)
            server.shutdown()
        assert finished, "the browser sent nothing"
        return found

    yield run
    for browser in browsers:
        browser.terminate()
        browser.wait(timeout=30)


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_every_page(site: Path, browse: Any) -> None:
    pages = sorted(f"/{path.relative_to(site).as_posix()}" for path in site.rglob("*.html"))
    found = browse(site, pages)
    assert found["problems"] == []
    assert found["pages"] == len(pages)
    assert found["grounds"]["light"] != found["grounds"]["dark"]


@needs_browser
def test_buttons_show_the_tricks_of_a_goal_and_a_budget(tmp_path: Path) -> None:
    script = (ROOT / "docs" / "_static" / "filter.js").read_text(encoding="utf-8")
    tags = {"A": "goal-speed budget-short", "B": "goal-speed budget-long", "C": "goal-small-data budget-long"}
    cards = "".join(f"<div class='sd-col'><p class='trick-card {tag}'>{name}</p></div>" for name, tag in tags.items())
    click = """addEventListener("load", () => {
      const found = [];
      for (const text of ["speed", "long", "small data", "any"]) {
        [...document.querySelectorAll("button")].find((button) => button.textContent === text).click();
        const cards = [...document.querySelectorAll(".trick-card")];
        const shown = cards.filter((card) => card.parentNode.style.display !== "none");
        found.push(`${text}: ${shown.map((card) => card.textContent).join("")}`);
      }
      document.title = `${found.join("; ")}; ${document.querySelector("output").textContent}`;
    });"""
    (tmp_path / "page.html").write_text(
        "<!doctype html><body><div class='trick-filter' data-goal='goal-speed goal-small-data' "
        f"data-budget='budget-short budget-long'></div>{cards}<script>{script}</script><script>{click}</script></body>"
    )
    command = [chromium(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*command, str(tmp_path / "page.html")], capture_output=True, text=True, timeout=120).stdout
    assert "<title>speed: AB; long: B; small data: C; any: BC; 2 of 3 tricks</title>" in shown


@needs_browser
def test_faults_of_a_page_are_found(tmp_path: Path, browse: Any) -> None:
    (tmp_path / "page.html").write_text(
        "<!doctype html><html><head></head><body><img src='none.png'><div style='width: 500px'>wide</div>"
        "<script>missing()</script><script>console.error('logged')</script></body></html>"
    )
    problems = browse(tmp_path, ["/page.html"])["problems"]
    text = "\n".join(problems)
    for part in ("broken image", "missing is not defined", "logged", "light, 400 px wide", "dark, 400 px wide"):
        assert part in text
    assert "1400 px" not in text
