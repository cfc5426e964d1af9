"Every notebook runs from top to bottom: their assertions are the unit tests."
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook  # renamed, or pytest would collect it as a test

root = Path(__file__).resolve().parent.parent
nbs = root/"nbs"


def is_tested(path):
    "Not a checkpoint, not a draft (_name), and no .notest in its folder or above."
    folders = [p for p in path.parents if p == nbs or nbs in p.parents]
    hidden = any(part[0] in "._" for part in path.relative_to(nbs).parts)
    return not hidden and not any((p/".notest").exists() for p in folders)


notebooks = sorted(filter(is_tested, nbs.rglob("*.ipynb")))


def test_there_are_notebooks(): assert notebooks


@pytest.mark.parametrize("path", notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
def test_notebook(path, capfd, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # nbdev sets it and leaves it set; this way it ends with the test
    config = get_config(path=root)
    passed, _ = run_notebook(path, skip_flags=config.tst_flags.split(), basepath=root)
    if not passed: pytest.fail(f"{path.name} failed\n{capfd.readouterr().err}", pytrace=False)
