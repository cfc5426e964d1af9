"What a search imports: nothing that it does not use. Times are measured in benchmarks, never in a test."
import subprocess
import sys

import pytest

from aladin.cli.main import main
from small_inputs import write_data, write_model

NEVER = ("pandas", "pyarrow", "matplotlib", "scipy", "sklearn", "pymilvus", "snakemake", "papermill", "nbclient",
         "IPython", "tensorboard", "h5py", "requests", "fastapi", "uvicorn", "aladin.view", "aladin.runs",
         "aladin.evaluation", "aladin.training", "aladin.search.study", "aladin.search.export")
HEAVY = ("torch", "transformers", "safetensors", "accelerate", "sympy")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup")
    data, model = str(write_data(folder/"data", 4)), str(write_model(folder/"model"))
    for engine in ("exact", "faiss"):
        assert main(["index", "--model", model, "--data", data, "--out", str(folder/engine), "--engine", engine]) == 0
    return folder


def imported(folder, *words):
    "The modules that a command imports in a process of its own."
    code = (f"import sys; from aladin.cli.main import main; status = main({list(map(str, words))!r}); "
            "print('\\n' + ' '.join(sys.modules)); sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def found(modules, names): return sorted(m for m in modules if any(m == n or m.startswith(f"{n}.") for n in names))


@pytest.mark.parametrize("more", [(), ("--show", "page.html"), ("--json",)])
def test_search_with_torch(made, more):
    modules = imported(made, "search", "a red fish", "--index", made/"exact", *more)
    assert "torch" in modules and not found(modules, (*NEVER, "faiss"))


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_search_without_torch(made, engine):
    pytest.importorskip("onnxscript")
    index = made/engine
    if not (index/"encoder").exists():
        assert main(["export", "--index", str(index), "--format", "onnx", "--out", str(index/"encoder")]) == 0
    modules = imported(made, "search", "a red fish", "--index", index, "--show", f"{engine}.html")
    assert "onnxruntime" in modules and not found(modules, (*NEVER, *HEAVY))
    assert ("faiss" in modules) == (engine == "faiss")


def test_the_help_imports_no_library(made):
    code = ("import sys; from aladin.cli.main import make_parser; make_parser().format_help(); "
            "print(' '.join(sys.modules))")
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "aladin.cli.search" in modules and not found(modules, (*NEVER, *HEAVY, "numpy", "PIL"))
