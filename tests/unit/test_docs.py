"""What the documentation says is there: its files, commands, keys and recipes."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_ft import cli
from dist_ft.config import Recipe
from dist_ft.recipe import packaged_recipes
from tests.integration.test_readme import keys_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def _blocks(page: Path, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_navigation_names_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}


def test_links_and_snippets_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+\.md)[^)]*\)", text):
            assert (page.parent / link).is_file(), (page.name, link)
        # A formatter of code takes a snippet in a block of Python for an expression, and parts it.
        assert not re.search(r"--8 ?<(?!--)", text), page.name
        for name, _, section in re.findall(r'^--8<-- "([^":]+)(:([\w-]+))?"', text, re.MULTILINE):
            source = (ROOT / name).read_text()
            assert not section or f"[start:{section}]" in source, (page.name, name, section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in _blocks(page, "bash") for line in block.splitlines()]
    lines += re.findall(r"`(dist-ft [^`]+)`", page.read_text())
    for line in lines:
        if not line.startswith("dist-ft "):
            continue
        words = line.split()[1:]
        grouped = words[0] in ("data", "kernels", "recipes") and len(words) > 1
        command = words[:2] if grouped else words[:1]
        assert cli.main([*command, "--help"]) == 0, line
        said = capsys.readouterr().out
        assert all(w in said for w in words if re.fullmatch(r"--[a-z-]+", w)), line


def test_keys_of_recipes_are_known() -> None:
    known = {key for section in _sections() for key in section}
    seen = 0
    for page in PAGES:
        for block in _blocks(page, "yaml"):
            for part in re.split(r"(?m)^(?=freezing:)", block):
                body = yaml.safe_load(part)
                for section, value in (body or {}).items():
                    assert section in Recipe.model_fields, (page.name, section)
                    for key in value if isinstance(value, dict) else ():
                        assert key in known, (page.name, section, key)
                        seen += 1
    assert seen > 20


def _sections() -> list[set[str]]:
    from dist_ft.recipe.schema import ROOT as SCHEMA

    return [keys_of(SCHEMA)]


def test_every_packaged_recipe_is_listed() -> None:
    listed = set(re.findall(r"`([a-z][\w.-]+)`", (DOCS / "recipes.md").read_text()))
    assert set(packaged_recipes()) <= listed


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(m) for m in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the extra [docs] is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fine_tune" in (tmp_path / "api" / "index.html").read_text()
    shown = (tmp_path / "how-to" / "python" / "index.html").read_text()
    for name in ("FocalClassification", "middle_out", "confidence_penalty"):
        assert name in shown
    for page in tmp_path.rglob("index.html"):
        assert "--8" not in page.read_text(), page
