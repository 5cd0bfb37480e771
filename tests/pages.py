"""What the tests of the HTML pages share: the tags of a page, its data, and a browser."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

POISON = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> {{style}}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


class Elements(HTMLParser):
    """Every element of a page with its attributes and the text directly in it."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict, list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(len(self.found) - 1)

    def handle_endtag(self, tag):
        if self.open and self.found[self.open[-1]][0] == tag:
            self.open.pop()

    def handle_data(self, text):
        if self.open:
            self.found[self.open[-1]][2].append(text)


def elements(html: str, tag: str) -> list[tuple[dict, str]]:
    return [(attributes, "".join(texts)) for name, attributes, texts in Elements(html).found if name == tag]


def data_of(html: str) -> dict:
    """The data that a page holds."""
    (text,) = [text for attributes, text in elements(html, "script") if attributes.get("id") == "data"]
    return json.loads(text)


def outside(html: str) -> list[str]:
    """What a page would load from elsewhere."""
    found = re.findall(r"""@import|url\([^)]*\)|\bimport\(|\bfetch\(|XMLHttpRequest|sendBeacon""", html)
    for _, attributes, _ in Elements(html).found:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or "data:"
            if not value.startswith(("data:", "#")):
                found.append(value)
    return found


def rendered(html: str, folder: Path, script: str = "") -> str:
    """The page's document after its script and then `script` have run in a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(BROWSERS)} is installed")
    file = folder / "page.html"
    file.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=1000", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
