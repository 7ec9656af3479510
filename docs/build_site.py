"""Builds the documentation site in site/ and checks it: `make site`.

The site also has pages outside of docs/: the results, the changelog and the guide for contributors. Pages link to each
other by their paths in the repository, so that the links work there. The program writes all pages to build/docs/ with
links that are paths of the site; a link to a file that is no page becomes the name of the file. Zensical builds the
site, and the HTML is checked: every link has a target, and no page loads anything from the network.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
SOURCES, SITE = ROOT / "build" / "docs", ROOT / "site"
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages in the root of the repository
RESULTS = (".md", ".svg")  # files of results/ that are pages or pictures of pages
ASSETS = ("result.schema.json", "tutorial.ipynb")
HOME = {"README.md": "index.md"}  # the page that stands for a file of the repository
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href"}
CSS_ADDRESS = re.compile(r"(?:@import\s*|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)")


def sources() -> dict[str, Path]:
    """Return the files of the site: path in the site -> file of the repository."""
    docs = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / "docs" / name for name in ASSETS)]
    found = {file.name: file for file in docs}
    results = [file for file in sorted((ROOT / "results").iterdir()) if file.suffix in RESULTS]
    for file in (*results, *(ROOT / name for name in PROJECT)):
        found[file.relative_to(ROOT).as_posix()] = file
    return found


def rewritten(text: str, *, source: str, place: str, pages: Iterable[str]) -> str:
    """Return a page whose links are those of the site.

    Args:
        text: the page.
        source: its path in the repository.
        place: its path in the site.
        pages: the paths of all files of the site.

    >>> rewritten("[a](../results/a.md#b) [c](../setup.cfg)", source="docs/x.md", place="x.md", pages=["results/a.md"])
    '[a](results/a.md#b) c (`setup.cfg`)'
    """
    pages = set(pages)

    def link(match: re.Match[str]) -> str:
        words, address = match.groups()
        path, _, anchor = address.partition("#")
        if not path or re.match(r"[a-z]+:", address):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = HOME.get(target, target.removeprefix("docs/"))
        if page in pages:
            relative = posixpath.relpath(page, posixpath.dirname(place) or ".")
            return f"[{words}]({relative}{'#' + anchor if anchor else ''})"
        if (ROOT / target).exists():  # a file or folder of the repository
            plain = words.replace("\\", "").strip("`").rstrip("/")
            return f"`{target}`" if target.endswith(plain) else f"{words} (`{target}`)"
        return match[0]  # the build reports it

    return outside_fences(text, lambda part: LINK.sub(link, part))


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Return a page after a change of its text outside of code blocks.

    >>> outside_fences("a\\n```\\na\\n```\\na", str.upper) == "A\\n```\\na\\n```\\nA"
    True
    """
    parts, end = [], 0
    for block in FENCE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def write_sources() -> None:
    """Write all files of the site to a new folder build/docs/."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    files = sources()
    for place, file in files.items():
        target = SOURCES / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            source = file.relative_to(ROOT).as_posix()
            text = rewritten(file.read_text(encoding="utf-8"), source=source, place=place, pages=files)
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, target)


class Page(HTMLParser):
    """An HTML page: its ids, its links, and the addresses of what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the attributes of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])
        if "mermaid" in values.get("class", "").split():
            self.loaded.append("https://unpkg.com/mermaid")  # the theme loads it for a diagram


def problems(site: Mapping[str, str]) -> list[str]:
    """Return the links without a target, and what is loaded from the network, in words.

    Args:
        site: text of each HTML and CSS file; "" for other files, which only need to exist.

    >>> problems({"a.html": '<a href="b.html#x">', "b.html": '<p id="y"><script src="https://cdn/s.js">'})
    ['a.html: no target of b.html#x', 'b.html: loads https://cdn/s.js']
    """
    found = []
    pages = {name: Page(text) for name, text in site.items() if name.endswith(".html")}
    for name, page in pages.items():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            if (
                re.match(r"[a-z]+:|//", link) or name == "404.html"
            ):  # the paths of this page depend on where it is shown
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            target = "index.html" if target == "." else target
            if target not in site or (anchor and target in pages and anchor not in pages[target].ids):
                found.append(f"{name}: no target of {link}")
        found += [f"{name}: loads {address}" for address in page.loaded if re.match(r"https?:|//", address)]
    for name, text in site.items():
        if name.endswith(".css"):
            found += [f"{name}: loads {address}" for address in CSS_ADDRESS.findall(text)]
    return found


def main() -> int:
    """Build and check. Returns 1 if a page has a problem, and the exit code of Zensical if it fails."""
    write_sources()
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=ROOT)
    if built.returncode:
        return built.returncode
    files = [file for file in sorted(SITE.rglob("*")) if file.is_file()]
    texts = {
        file.relative_to(SITE).as_posix(): file.read_text(encoding="utf-8") if file.suffix in (".html", ".css") else ""
        for file in files
    }
    found = problems(texts)
    print("\n".join(found) or f"{sum(name.endswith('.html') for name in texts)} pages, all links have a target")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
