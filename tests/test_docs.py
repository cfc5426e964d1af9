"What the docs' written pages claim can be found in the package."
import re
from dataclasses import fields
from pathlib import Path

import pytest

from aladin.cli.main import COMMANDS
from aladin.config import ExperimentConfig

root = Path(__file__).resolve().parent.parent
SETTINGS = {f"{group.name}.{f.name}" for group in fields(ExperimentConfig)
            if group.name in ("model", "data", "loss", "training") for f in fields(group.default_factory)}


def named(page):
    return set(re.findall(r"`((?:model|data|loss|training)\.\w+)`?",
                          (root/"docs"/"pages"/f"{page}.md").read_text(encoding="utf-8")))


def test_settings_exist():
    assert named("differences") and named("differences") <= SETTINGS, named("differences") - SETTINGS


def code_of(text):
    "Shell blocks and code spans of a page that call the program."
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines()
            if re.match(r"(\S+=\S+ )*(\.venv/bin/)?aladin ", line)] + re.findall(r"`(aladin [^`]+)`", text)


PAGES = sorted(p.stem for p in (root/"docs"/"pages").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_commands_exist(page):
    text = (root/"docs"/"pages"/f"{page}.md").read_text(encoding="utf-8")
    assert all((root/path).exists() for path in re.findall(r"`((?:tests|nbs|data_manifests|results)/[\w./]+)`", text))
    assert set(re.findall(r"aladin ([a-z][\w-]+) (?:--|[A-Z\"'a-z])", "\n".join(code_of(text)))) <= set(COMMANDS)


def test_every_quirk_says_what_becomes_of_it():
    rows = [line.split(" | ") for line in (root/"docs"/"pages"/"differences.md").read_text(encoding="utf-8").split("\n")
            if re.match(r"\| [A-Z]", line)]
    assert len(rows) > 45 and all(len(r) == 3 for r in rows), [r for r in rows if len(r) != 3]
