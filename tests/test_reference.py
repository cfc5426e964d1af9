"The published figures: runs are compared with them, and only a maintainer's command writes them."
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aladin.cli.main import main
from aladin.files import InputError, write_json
from aladin.runs.graph import describe

root = Path(__file__).resolve().parent.parent
RUN = "alad-alignment-triplet/seed-88"


@pytest.fixture
def checkout(tmp_path):
    "A repository with the maintainers' command, the published scenes and one run of its own in results/scenes."
    for name in (".ci", "results/reference/scenes"):
        shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root/".gitignore", tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    shutil.copytree(root/"results"/"reference"/"scenes"/RUN, tmp_path/"results"/"scenes"/RUN)
    (tmp_path/"results"/"scenes"/RUN/"model").mkdir()
    (tmp_path/"results"/"scenes"/RUN/"model"/"config.json").write_text("{}")
    return tmp_path


def git(folder, *words):
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True,
                          capture_output=True, text=True).stdout


def publish(folder):
    return subprocess.run(
        [sys.executable, ".ci/reference.py", "results/scenes"], cwd=folder, capture_output=True, text=True)


def test_a_run_is_published(checkout):
    done = publish(checkout)
    assert done.returncode == 0, done.stderr
    made = checkout/"results"/"reference"/"scenes"
    assert [p.parent.relative_to(made).as_posix() for p in made.glob("*/seed-*/metrics.json")] == [RUN]
    assert not (made/RUN/"model").exists() and (made/"search.md").exists()
    assert (re.search(r"\| alad-alignment-triplet +\| alignment +\|", (made/"table.md").read_text())
            and "Compared" not in (made/"table.md").read_text())


def test_uncommitted_changes_are_refused(checkout):
    (checkout/".ci"/"new.py").write_text("")
    done = publish(checkout)
    assert done.returncode == 1 and "uncommitted" in done.stderr and ".ci/new.py" in done.stderr
    assert not git(checkout, "status", "--porcelain", "results")


def test_a_run_with_uncommitted_changes_is_refused(checkout):
    path = checkout/"results"/"scenes"/RUN/"metrics.json"
    metrics = json.loads(path.read_text())
    metrics["made by"]["uncommitted_changes"] = True
    write_json(path, metrics)
    done = publish(checkout)
    assert done.returncode == 1 and str(path.relative_to(checkout)) in done.stderr
    assert not git(checkout, "status", "--porcelain", "results")


def test_runs_are_ignored_by_git(checkout):
    for name in ("results/scenes/table.md", "results/mine/table.md", "results/benchmarks.md"):
        (checkout/name).parent.mkdir(exist_ok=True)
        (checkout/name).write_text("x")
    assert git(checkout, "status", "--porcelain") == ""


def test_reproduce(checkout, capsys):
    folder = checkout/"results"/"scenes"
    assert main(["reproduce", str(folder)]) == 0
    assert capsys.readouterr().out == "alad-alignment-triplet, seed 88, alignment head: reproduced exactly\n"
    metrics = json.loads((folder/RUN/"metrics.json").read_text())
    metrics["heads"]["alignment"]["i2t"]["r1"] -= .25
    write_json(folder/RUN/"metrics.json", metrics)
    assert main(["reproduce", str(folder)]) == 2
    assert "i2t R@1" in (said := capsys.readouterr().out) and "(-0.25)" in said and "t2i" not in said
    assert main(["reproduce", str(checkout/"results"/"nowhere")]) == 2


@pytest.mark.parametrize("name", ["reference", "../evil", "a/b", "", ".", ".hidden", "x"*300])
def test_names_of_data_sets(tmp_path, name):
    with pytest.raises(InputError, match="name"): describe(tmp_path, data=tmp_path, name=name or " /")
