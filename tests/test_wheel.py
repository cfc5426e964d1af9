"The wheel and the source archive work without a checkout: in an environment and a folder of their own."
import json, os, subprocess, sys, sysconfig, tarfile, venv, zipfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def run(*command, cwd, check=True, **environment):
    "Run a command outside the checkout, with nothing of it on the path."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST")} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=env)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A wheel and a source archive, made from a copy of what git has, as a build server would."
    out, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("copy")
    for name in subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                               capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (root/name).is_file() and not name.startswith(("tests/", "docs/")):
            (copy/name).parent.mkdir(parents=True, exist_ok=True)
            (copy/name).write_bytes((root/name).read_bytes())
    build = f"import setuptools.build_meta as b; print(b.build_sdist({str(out)!r})); print(b.build_wheel({str(out)!r}))"
    run(sys.executable, "-c", build, cwd=copy)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "An environment that has the wheel, and the dependencies of this one."
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars=dict(base=str(folder), platbase=str(folder))))
    # a .pth there is not followed: the checkout stays hidden
    (site/"dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", folder/"bin"/"python", "install", "--quiet", "--no-deps",
        "--no-index", built[0], cwd=folder)
    return folder/"bin"


def test_the_archive_can_be_built_again(built):
    names = tarfile.open(built[1]).getnames()
    top = names[0].split("/")[0]
    for name in ("settings.ini", "data_manifests/coco_ir.yaml", "nbs/experiments/Snakefile",
                 "nbs/experiments/configurations/alad-alignment-triplet.yaml",
                 "results/reference/demo/model/model.safetensors"):
        assert f"{top}/{name}" in names, name


def test_views_are_installed(built):
    names = zipfile.ZipFile(built[0]).namelist()
    for name in ("search/pair.js", "search/pair.css", "search/service.html", "search/service.js", "search/service.css",
                 "view/explorer.js", "view/explorer.css"):
        assert f"aladin/{name}" in names, name


def test_no_pickles_and_no_notebook_of_a_module(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert not [n for n in names if n.endswith((".pt", ".pkl", ".bin"))]
    assert not [n for n in names if n.endswith(".ipynb") and "resources/experiments" not in n]


def test_the_package_is_the_installed_one(installed, tmp_path):
    where = run(installed/"python", "-c", "import aladin; print(aladin.__file__)", cwd=tmp_path).stdout
    assert str(installed.parent) in where


def test_start_is_quick(installed, tmp_path):
    "No large library is imported for a help page."
    code = ("import sys; from aladin.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'numpy', 'transformers', 'pandas', 'yaml'} & set(sys.modules)))")
    assert run(installed/"python", "-c", code, cwd=tmp_path).stdout.strip().endswith("[]")


def test_results(installed, tmp_path):
    "A study runs in an empty folder, with a configuration of the user's own beside those of the package."
    run(installed/"aladin", "results", "--size", "tiny", "--jobs", "2",
        "--configuration", "alad-alignment-triplet", cwd=tmp_path)
    found = [p.parent.parent.name for p in tmp_path.glob("results/scenes-tiny/*/seed-*/metrics.json")]
    assert found == ["alad-alignment-triplet"] and (tmp_path/"results"/"scenes-tiny"/"table.md").exists()
    (tmp_path/"mine.yaml").write_text(
        "name: mine\nmodel: {hidden_size: 32, attention_heads: 4, layers: 1}\ntraining: {max_steps: 4}\n")
    data = tmp_path/"results"/"scenes-tiny"/"data"
    run(installed/"aladin", "train", "--configuration", "mine", "--data", data, "--out", "trained", cwd=tmp_path,
        ALADIN_DEVICE="cpu")
    assert json.loads((tmp_path/"trained"/"training.json").read_text())["config"]["name"] == "mine"
    assert run(installed/"aladin", "plan", "--configuration", "mine",
               "--data", data, cwd=tmp_path).stdout.startswith("configuration mine")


def test_manifests(installed, tmp_path):
    done = run(installed/"aladin", "verify", "coco_ir", tmp_path, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "test_captions" in done.stdout


def test_demo(installed, tmp_path):
    first = run(installed/"aladin", "demo", "a red fish above a green cactus", "-k", "3", cwd=tmp_path)
    again = run(installed/"aladin", "demo", "a red fish above a green cactus", "-k", "3", cwd=tmp_path)
    assert first.stdout == again.stdout and len(first.stdout.splitlines()) == 6
    assert (tmp_path/"aladin-demo"/"answers.html").read_text().count("data:image/jpeg") == 3
    code = "from aladin import demo; d = demo(progress=False); print(len(d.index), len(d.images.image_ids))"
    assert run(installed/"python", "-c", code, cwd=tmp_path).stdout.split() == ["1000", "1000"]
