"""Generate pages of the documentation's site from sections of the README, files of the repository, and the code.

It is a hook of mkdocs (mkdocs.yml), so that the repository and the site share their texts.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Sections of the README that explain; all others say how to do something.
EXPLANATIONS = ("What is guaranteed", "How fast")
#: Sections that the site has elsewhere.
LEFT_OUT = ("More", "Settings", "The repository's own commands")
#: Files of the repository that are pages, by their names on the site.
PAGES = {
    "demo.md": "demo/README.md", "demo-data.md": "demo/DATA.md", "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md",
    "examples/index.md": "examples/README.md",
}  # fmt: skip
ELSEWHERE = {"examples/": "examples/index.md", "docs/schemas": "reference/command-line.md"}
PYTHON = """# Python

::: modelfuse.api.functions
    options:
      show_root_heading: false
      members: [merge, check, inspect, diff, verify, register]

::: modelfuse.api.drawing
    options:
      show_root_heading: false
      members: [report, draw]

::: modelfuse.api.tune
    options:
      show_root_heading: false
      members: [tune]

::: modelfuse.execution.tuning.request.Tuned

::: modelfuse.planning.plan.Plan
    options: {members: [bytes_read, bytes_written, disk_space]}

::: modelfuse.execution.result.Result

::: modelfuse.inspection.inspected_model.Inspection

::: modelfuse.inspection.diff_result.Diff

::: modelfuse.inspection.diff_measures

::: modelfuse.inspection.verify.Verification

::: modelfuse.errors
    options: {show_root_heading: false}
"""


def sections() -> dict[str, str]:
    """The README's sections by title; the first one is the start page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, *others = re.split(r"^## ", text, flags=re.MULTILINE)
    found = {part.partition("\n")[0]: part.partition("\n")[2] for part in others}
    begin = "".join(f"\n## {title}\n{found.pop(title)}" for title in ("Install", "Your first merge"))
    return {"": first + begin} | {title: f"# {title}\n{body}" for title, body in found.items()}


def slug(title: str) -> str:
    """A heading's anchor."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def pages() -> dict[str, str]:
    """The contents of all pages that are not in docs/, by name."""
    from tools import generate

    made = {"index.md" if not title else f"{slug(title)}.md": text
            for title, text in sections().items() if title not in LEFT_OUT}  # fmt: skip
    made |= {name: (ROOT / path).read_text(encoding="utf-8") for name, path in PAGES.items()}
    reference = {path.removeprefix("docs/"): text for path, text in generate.files().items() if "/reference/" in path}
    linked = {name: _linked(name, text, PAGES.get(name, "README.md")) for name, text in made.items()}
    return {**linked, **reference, "reference/python.md": PYTHON}


@cache
def _homes() -> dict[str, str]:
    """The page of each heading of the README, by its anchor."""
    return {
        slug(heading): f"{slug(title)}.md" if title else "index.md"
        for title, text in sections().items()
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    } | {"settings": "reference/settings.md"}


def _linked(name: str, text: str, source: str) -> str:
    """A page with its links changed to pages of the site.

    Args:
        name: The name of the page on the site.
        text: The text of the page.
        source: The file of the repository that it comes from.
    """
    there = {path: page for page, path in PAGES.items()} | ELSEWHERE
    folder, up = source.rpartition("/")[0], "../" * name.count("/")

    def replaced(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = re.sub(r"[^/]+/\.\./", "", f"{folder}/{target}".lstrip("/")) if target else source
        if "://" in target or (not target and source != "README.md"):
            return match[0]
        if path == "README.md":
            home = _homes().get(anchor, "index.md")
            return f"]({up}{home}" + (f"#{anchor}" if anchor and "/" not in home else "") + ")"
        if path in there:
            return f"]({up}{there[path]}{hash_}{anchor})"
        return f"]({up}{path.removeprefix('docs/')}{hash_}{anchor})" if path.startswith("docs/") else match[0]

    return re.sub(r"\]\(([^)\s]+)\)", replaced, text)


def on_config(config: Any) -> Any:
    """Set the navigation."""
    titles = [title for title in sections() if title and title not in LEFT_OUT]
    how = [{title: f"{slug(title)}.md"} for title in titles if title not in EXPLANATIONS]
    why = [{title: f"{slug(title)}.md"} for title in EXPLANATIONS]
    config.nav = [
        {"Begin": [{"First merge": "index.md"}, {"Tutorial": "tutorial.md"}, {"The demo": "demo.md"},
                   {"The demo's data": "demo-data.md"}]},
        {"How to": [*how, {"See what is in a model": "inspect.md"}, {"See how models differ": "diff.md"},
                    {"Pages and pictures": "pictures.md"},
                    {"Search settings in full": "tuning.md"}, {"Choosing a method": "choosing.md"},
                    {"Examples": "examples/index.md"}, {"Add a method": "adding_a_method.md"}]},
        {"Reference": [
            {"Settings": "reference/settings.md"}, {"Methods": "reference/methods.md"},
            {"Command line": "reference/command-line.md"}, {"Python": "reference/python.md"},
            {"The report": "report.md"}]},
        {"Explanations": [
            *why, {"Guarantees and their tests": "guarantees.md"}, {"Cost at scale": "scale.md"},
            {"Benchmarks": "benchmarks.md"},
            {"Quality of merges": "quality.md"}, {"Architecture": "architecture.md"}]},
        {"Project": [{"Changes": "changelog.md"}, {"Contributing": "contributing.md"}, {"Security": "security.md"}]},
    ]  # fmt: skip
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change the links of pages in docs/ to pages of the site."""
    name = page.file.src_uri
    return markdown if page.file.generated_by else _linked(name, markdown, f"docs/{name}")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the files that the page of the examples links to."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.is_file() and path.name != "README.md":
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
