"""The pages: every link leads somewhere, every file named exists, and lists and figures given twice agree."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import ROOT, job_environment

from sparsecomm import Metrics, SparseConfig
from sparsecomm.presets import PRESETS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md"]
PAGES += sorted(DOCS.glob("*.md"))
PAGES += [ROOT / "mpi_examples" / "README.md", ROOT / "bench" / "convergence" / "README.md"]
MOST_LINES_OF_README = 120

FENCE = re.compile(r"^ *```.*?^ *```", flags=re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", flags=re.MULTILINE)
OWN_FILE = re.compile(r"(?:sparsecomm|tests|docs|bench|mpi_examples)/[\w./-]+")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(prose(page)):
        text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, count in found.items() for i in range(count)}


def links(page: Path) -> Iterator[str]:
    for target in LINK.findall(CODE.sub("", prose(page))):
        if not re.match(r"[a-z]+:", target):
            yield target


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    bad = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and (there.suffix != ".md" or anchor not in anchors(there))):
            bad.append(target)
    return bad


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    named = [code for code in CODE.findall(prose(page)) if OWN_FILE.fullmatch(code)]
    assert [code for code in named if not (ROOT / code).exists()] == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    other, page = tmp_path / "other.md", tmp_path / "page.md"
    other.write_text("# One, `two` and [three](x)\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    good = ["#here", "other.md", "other.md#one-two-and-three", "other.md#twice", "other.md#twice-1", "https://x.y/z"]
    bad = ["#there", "missing.md", "other.md#twice-2", "other.md#no-heading", "missing.png"]
    page.write_text("# Here\n" + "".join(f"[text]({target})\n" for target in good + bad) + "`[code](not-a-link)`\n")
    assert broken(page) == bad


def test_the_readme_leads_to_every_page() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.add(page)
            linked = [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
            todo += [p for p in linked if p.suffix == ".md" and p.is_file()]
    assert set(PAGES) <= seen


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < MOST_LINES_OF_README
    assert "make demo " in text
    assert "make test " in text


def test_the_readmes_figures_are_rows_of_the_results_page() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    assert [row for row in rows if row not in (DOCS / "results.md").read_text().splitlines()] == []


def test_the_readmes_snippet_runs(tmp_path: Path) -> None:
    snippet = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert snippet.count("\n...\n") == 1
    step = "\nddp(torch.ones(3, 8)).sum().backward()\n"
    script = tmp_path / "snippet.py"
    script.write_text("import torch\nmodel = torch.nn.Linear(8, 4)\n" + snippet.replace("\n...\n", step))
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=job_environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0"]
    assert (tmp_path / "comm-0.pt").exists()


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("options.md", [*(f.name for f in fields(SparseConfig)), *(f'"{preset}"' for preset in PRESETS)]),
        ("observing.md", [*(f.name for f in fields(Metrics)), "ratio", "density"]),
    ],
)
def test_a_page_that_lists_fields_lists_them_all(page: str, names: list[str]) -> None:
    text = (DOCS / page).read_text()
    assert [n for n in names if f"`{n}`" not in text] == []
