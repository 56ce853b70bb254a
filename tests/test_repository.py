"""Pages and comments name only what is in the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = (
    *("bench", "bundle", "estimators", "examples", "export", "k8s", "loadtest"),
    *("protos", "scripts", "serve", "tandem", "tests"),
)

ELSEWHERE = ("runs/", "work/", "my/")
"""What a reader's own run or overlay holds: a load test's output, an export's stages."""


def without_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", without_blocks(page), re.M)}


def is_named_path(word: str) -> bool:
    """Whether `word` reads as `folder/file.ext` or `folder/`, perhaps with a `*`."""
    return re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/([\w.*-]+\.\w+)?", word) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_only_paths_that_exist(page: Path) -> None:
    spans = re.findall(r"`([^`]+)`", without_blocks(page))
    words = {word for span in spans for word in span.split() if is_named_path(word)}
    missing = {word for word in words if not any(ROOT.glob(word))}
    assert {word for word in missing if not word.startswith(ELSEWHERE)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_only_to_headings_and_files_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs_only_modules_that_exist(page: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        is_module = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert is_module or not (ROOT / module.split(".")[0]).is_dir(), module


@pytest.mark.parametrize("room", ROOMS)
def test_comments_name_only_pages_that_exist(room: str) -> None:
    sources = [
        path for path in (ROOT / room).rglob("*") if path.suffix in {"", ".proto", ".py", ".yaml"}
    ]
    texts = [path.read_text(encoding="utf-8") for path in sources if path.is_file()]
    named = {name for text in texts for name in re.findall(r"docs/[\w./-]+?\.md", text)}
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_decision_records_are_listed_once_and_have_four_parts() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    records = sorted(folder.glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d{3}-[\w-]+\.md)\)", index) == [record.name for record in records]
    for number, record in enumerate(records, start=1):
        assert record.name.startswith(f"{number:03}-")
        text = record.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 100, record.name
        parts = re.findall(r"^## (.*)$", text, re.M)
        assert parts == ["Context", "Decision", "Evidence", "Consequence"], record.name
