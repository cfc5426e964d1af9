"The package is what the notebooks export, and the notebooks are clean: exporting and cleaning a copy changes no byte."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def contents(folder):
    "Bytes of every module and notebook under `folder`, by path."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for name,ext in [("aladin",".py"), ("nbs",".ipynb")]
            for p in sorted((folder/name).rglob(f"*{ext}")) if ".ipynb_checkpoints" not in p.parts}


def run(command, folder):
    "Run one of nbdev's commands in `folder`, on the modules there and not on those of the checkout."
    # under IN_TEST nbdev_export does nothing
    env = {k:v for k,v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(folder)}
    done = subprocess.run([Path(sys.executable).parent/command], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    for name in ("nbs", "aladin"):
        shutil.copytree(root/name, folder/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(root/name, folder)
    for module in (folder/"aladin").rglob("*.py"):
        if module.name != "__init__.py": module.unlink()  # so that a module without a notebook shows
    run("nbdev_export", folder)
    run("nbdev_clean", folder)
    return folder


@pytest.mark.parametrize("kind, what, mend", [
    (".py", "exported modules", "nbdev_export"),
    (".ipynb", "clean notebooks", "nbdev_clean")])
def test_sync(copy, kind, what, mend):
    ours, made = ({k:v for k,v in contents(o).items() if k.endswith(kind)} for o in (root, copy))
    differ = sorted(k for k in ours.keys() | made.keys() if ours.get(k) != made.get(k))
    assert ours and not differ, f"{what}: run `make export` ({mend}); these differ: {differ}"


def test_style():
    done = subprocess.run([Path(sys.executable).parent/"ruff", "check", "--no-cache", "--output-format", "concise"],
                          cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_the_home_notebook():
    done = subprocess.run([sys.executable, root/".ci"/"readme.py", "--check"])
    assert done.returncode == 0, "README.md differs from nbs/index.ipynb: run make export"


def test_start_page_lists_every_notebook():
    done = subprocess.run([sys.executable, root/".ci"/"start.py", "--check"])
    assert done.returncode == 0, "nbs/start.ipynb does not list the notebooks that are there: run make export"
