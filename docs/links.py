"""Check every link of a built site that leads to the site itself: files and anchors. Needs no network.

``python docs/links.py build/docs`` prints what leads nowhere and fails if anything does.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.targets.add(value)
            elif name in ("href", "src") and value and tag != "use":
                self.links.append(value)


def dead_links(site: Path) -> list[str]:
    """What leads nowhere, as ``page: link``."""
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            is_there = target.is_file() or (target.is_dir() and (target / "index.html").is_file())
            if not is_there or (anchor and target in pages and anchor not in pages[target].targets):
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead


if __name__ == "__main__":
    if found := dead_links(Path(sys.argv[1])):
        sys.exit("links that lead nowhere:\n" + "\n".join(found))
