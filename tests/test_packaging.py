"settings.ini, the lock, environment.yml, the Makefile and the manifests agree."
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from aladin.data.manifests import list_manifests, load_manifest

root = Path(__file__).resolve().parent.parent


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def pins():
    "Name -> version of every line of constraints.txt."
    lines = [o for o in (root/"constraints.txt").read_text().splitlines() if o and not o.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", o) for o in lines]
    assert all(matches), [o for o,m in zip(lines, matches) if not m]
    return {canonicalize_name(m[1]): Version(m[2]) for m in matches}


def requirements():
    return [Requirement(o)
            for key in ("requirements", "dev_requirements", "slurm_requirements", "faiss_requirements",
                        "search_requirements", "import_requirements", "evaluation_requirements", "export_requirements",
                        "serve_requirements", "server-tests_requirements", "peers_requirements", "docs_requirements")
            for o in settings()[key].split()]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_lock_satisfies_settings(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version)


def test_environment():
    environment = yaml.safe_load((root/"environment.yml").read_text())["dependencies"]
    python = next(Version(o.split("=")[1]) for o in environment if isinstance(o, str) and o.startswith("python="))
    assert python >= Version(settings()["min_python"])
    assert {"pip", "make", "git"} <= {o for o in environment if isinstance(o, str)}
    assert next(o["pip"] for o in environment if isinstance(o, dict)) == ["-c constraints.txt", "-e .[dev]"]


def test_console_scripts_are_named(): assert "aladin=aladin.cli.main:main" in settings()["console_scripts"].split()


def test_ci_uses_make_targets():
    targets = set(re.findall(r"^([a-z]+):", (root/"Makefile").read_text(), re.M))
    assert {"help", "results", "test", "docs", "lab", "export", "clean"} <= targets
    assert set(re.findall(r"\bmake ([a-z]+)", (root/".ci"/"run").read_text())) <= targets


@pytest.mark.parametrize("name", list_manifests())
def test_manifest_loads(name):
    manifest = load_manifest(name)
    paths = [f.path for f in manifest.files]
    assert paths and len(paths) == len(set(paths))


def test_manifests_that_the_package_names():
    assert {"scenes", "flickr8k", "flickr8k_source", "coco_ir", "vinvl_coco_features", "vinvl_base", "aladin_best",
            "all_minilm_l6_v2"} <= set(list_manifests())
