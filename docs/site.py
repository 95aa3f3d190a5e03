"""The site's hook: pages beside ``docs``, files that pages link to, and feature pages grouped as in the architecture.

Every page keeps the links that hold in the repository. On the site a link to another page leads there, and one to a
file of the repository to a copy of it under ``files/``; one to a folder becomes plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
"""Pages outside ``docs``, by their place in the repository; on the site they have the same place."""
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
TABLE = re.compile(r"^## Features beside the walks\n.*?(^\|.+?)\n\n", flags=re.DOTALL | re.MULTILINE)
FEATURE = re.compile(r"\[[^\]]+\]\((features/[\w-]+\.md)\)")


def on_config(config: Any) -> Any:
    """Fill the navigation's features, a group per column of the architecture's table; anchors are as on a forge."""
    config.mdx_configs["toc"]["slugify"] = anchor
    for entry in config.nav:
        if isinstance(entry, dict) and "Features" in entry:
            entry["Features"] = feature_groups((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside ``docs`` and the files that any page links to."""
    for place in BESIDE:
        files.append(File.generated(config, place, content=(ROOT / place).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            target = resolved(page.src_uri, match[2])
            if target and (ROOT / target).is_file() and files.get_file_from_path(shown(target)) is None:
                files.append(File.generated(config, shown(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page with the links of the repository turned into those of the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = resolved(page.file.src_uri, match[2])
        if target is None:
            return match[0]
        if (ROOT / target).is_dir():
            return match[1]
        return f"[{match[1]}]({posixpath.relpath(shown(target), folder or '.')}{match[3] or ''})"

    return LINK.sub(moved, markdown)


def feature_groups(architecture: str) -> list[dict[str, list[str]]]:
    """Feature pages by the columns of the architecture's table; those that stand elsewhere are the last group."""
    found = TABLE.search(architecture)
    assert found is not None, "docs/architecture.md has no table of features"
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines())
    groups: dict[str, list[str]] = {title: [] for title in head}
    for row in rows:
        for title, cell in zip(head, row, strict=True):
            groups[title] += FEATURE.findall(cell)
    named = {page for pages in groups.values() for page in pages}
    others = sorted(f"features/{path.name}" for path in (ROOT / "docs" / "features").glob("*.md"))
    groups["more"] = [page for page in others if page not in named]
    return [{title: pages} for title, pages in groups.items() if pages]


def anchor(heading: str, separator: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def resolved(page: str, target: str) -> str | None:
    """What a page's link leads to, as a path in the repository; None if it leads out of it."""
    if re.match(r"[a-z]+:", target):
        return None
    folder = posixpath.dirname(page if page in BESIDE else f"docs/{page}")
    path = os.path.normpath(posixpath.join(folder, target)).replace(os.sep, "/")
    return path if (ROOT / path).exists() else None


def shown(target: str) -> str:
    """Where a file of the repository stands on the site."""
    if target in BESIDE:
        return target
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"
