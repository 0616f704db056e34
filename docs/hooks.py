"""Hooks of the documentation site: pages outside docs/, links that leave it, and recipes.

Every page is written for a reader of the repository, with relative links that work there.  The site
has the same pages: those of ``PAGES`` are added under a name in docs/, and each other file of the repository
that a page links to is added as a page with its text.  A link to a file that does not exist stays as it is,
and fails the strict build.  A link to a folder becomes plain text, because a site has no listing of it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Pages outside docs/ by their place in the repository, and their names on the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/census.md": "census.md",
}
LINK = re.compile(r"(?<!`)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yml": "yaml", ".toml": "toml", ".csv": "text", ".md": "markdown"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the recipes to the navigation, where there are any."""
    recipes = sorted(f"recipes/{path.name}" for path in (ROOT / "docs/recipes").glob("*.md"))
    if recipes and config.nav is not None:
        config.nav.insert(2, {"Recipes": recipes})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and every file that a page links to."""
    for place, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    for file in list(files.documentation_pages()):
        for place in _linked(file.content_string, _place(file)):
            if files.get_file_from_path(_name(place)) is None and (ROOT / place).is_file():
                listing = File.generated(config, _name(place), content=_listing(place))
                listing.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(listing)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to where its targets are on the site."""
    place, name = _place(page.file), page.file.src_uri

    def on_site(match: re.Match[str]) -> str:
        target = _target(match[1], place)
        if (ROOT / target).is_dir():
            return "]{: }"
        return f"]({posixpath.relpath(_name(target), posixpath.dirname(name) or '.')}{match[2] or ''})"

    return _outside_code(markdown, lambda text: _without_folders(LINK.sub(on_site, text)))


def _without_folders(text: str) -> str:
    """Links to folders, which were marked, as their text."""
    return re.sub(r"\[([^\[\]]*)\]\{: \}", r"\1", text)


def _outside_code(markdown: str, change: Any) -> str:
    """The page with everything changed except its fenced blocks."""
    parts, end = [], 0
    for block in FENCED.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])


def _linked(markdown: str, place: str) -> set[str]:
    """The places in the repository that a page links to."""
    return {_target(match[1], place) for match in LINK.finditer(FENCED.sub("", markdown))}


def _target(link: str, place: str) -> str:
    """Where a link of the page at ``place`` leads to, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def _place(file: File) -> str:
    """Where a page of the site lies in the repository."""
    outside = {name: place for place, name in PAGES.items()}
    return outside.get(file.src_uri, f"docs/{file.src_uri}")


def _name(place: str) -> str:
    """What a file of the repository is called on the site, from its docs folder."""
    if place in PAGES:
        return PAGES[place]
    return place.removeprefix("docs/") if place.startswith("docs/") else f"source/{place}.md"


def _listing(place: str) -> str:
    """A page that shows a file of the repository."""
    text = (ROOT / place).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(place).suffix, "text")
    head = f"---\nsearch:\n  exclude: true\n---\n# `{place}`\n\n"
    return f"{head}````{language}\n{text.rstrip()}\n````\n"
