"""What a page or a plot shows, as a reader of it finds it."""

from __future__ import annotations

import re
from collections import defaultdict
from html.parser import HTMLParser
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
VOID_TAGS = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A parsed page: text by section and rows by table, both by id; every tag and attribute.

    AssertionError for tags that do not close what was opened.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: defaultdict[str, list[str]] = defaultdict(list)
        self.tables: defaultdict[str, list[list[str]]] = defaultdict(list)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID_TAGS:
            return
        self._open.append((tag, dict(attrs).get("id")))
        if tag == "tr":
            self.tables[self._inside("table")].append([])
        if tag in ("td", "th"):
            self.tables[self._inside("table")][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts[self._inside("section")].append(data)
        if self._inside("table") and any(tag in ("td", "th") for tag, _ in self._open):
            self.tables[self._inside("table")][-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def section(self, name: str) -> str:
        """Return the text of a section; "" is what is in none."""
        return " ".join("".join(self.texts[name]).split())

    def ids(self, tag: str | None = None) -> list[str]:
        return [str(a["id"]) for each, a in self.tags if "id" in a and tag in (None, each)]

    def _inside(self, wanted: str) -> str:
        return next((id_ or wanted for tag, id_ in reversed(self._open) if tag == wanted), "")


def assert_loads_nothing(html: str) -> None:
    """A page runs nothing, loads nothing, forbids both, and its ids and links fit each other."""
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    keys = ("src", "href", "xlink:href")
    targets = [value for _, a in page.tags for key, value in a.items() if key in keys]
    assert targets and all(target and target.startswith("#") for target in targets)
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', html)) <= set(ids)


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
