import re
import runpy
import shlex
from pathlib import Path

import pytest

from cosyvoice.utils.settings import find_constants, parse_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CosyVoice/README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("model_code.py", "utt2text_and_feature.py", "setup_cosyvoice.py", "json/make_manifest.py")
ELSEWHERE = {"STAGE1_TRAIN"}  # a folder of the published code


def commands(page: Path) -> list[list[str]]:
    """The words of the Python commands that a page shows, with continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()] + re.findall(r"`(python [^`]+)`", text.replace("\n", " "))
    return [shlex.split(line, comments=True) for line in lines if re.match(r"python \S+\.py", line)]


SHOWN = [(page.relative_to(ROOT), words) for page in PAGES for words in commands(page)]


def test_commands_are_found():
    assert len(SHOWN) > 25
    assert {words[1] for _, words in SHOWN} >= set(SCRIPTS)


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page}-{number}" for number, (page, _) in enumerate(SHOWN)])
def test_a_command_that_a_page_shows_has_flags_that_its_script_knows(page, words):
    script = ROOT / words[1]
    parse_settings(str(script), runpy.run_path(str(script), run_name="shown"), words[2:])  # exits where it does not


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_setting_that_a_page_names_is_one(page):
    known = {*ELSEWHERE}
    for script in SCRIPTS:
        path = ROOT / script
        values = runpy.run_path(str(path), run_name="shown")
        known |= {constant.name for constant in find_constants(path.read_text(encoding="utf-8"), values)}
    named = re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?: = [^`]+)?`", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_file_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
