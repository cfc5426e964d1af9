"Whole runs through papermill: the short form of `make results`, its guard, its restart and its determinism."
import json
import shutil

import nbformat
import pandas as pd
import pytest

from aladin.config import InputError, RunFailed
from aladin.experiments import report, run_notebook, run_results

TEACHER = "alad-alignment-triplet"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    run_results(out, size="tiny", seed=1, configurations=(TEACHER,), say=lambda line: None)
    return out/"scenes-tiny"


def metrics_of(run):
    metrics = json.loads((run/"metrics.json").read_text())
    return {head: {d: m[d] for d in ("i2t", "t2i", "rsum")} for head, m in metrics["heads"].items()}


def test_a_run_leaves_its_record(results):
    run = results/TEACHER
    assert {p.name for p in run.iterdir()} >= {"train.ipynb", "evaluate.ipynb", "attention.ipynb", "metrics.json", "history.csv", "curves.png", "attention-1.png", "model"}
    made = json.loads((run/"metrics.json").read_text())
    assert made["seed"] == 1 and {"commit", "versions", "machine"} <= set(made["made by"]) and made["train_seconds"] > 0
    assert (results/"table.md").exists() and len(pd.read_csv(results/"table.csv")) == 1


def test_executed_notebooks_carry_no_noise(results):
    notebook = nbformat.read(results/TEACHER/"train.ipynb", 4)
    assert "papermill" not in notebook.metadata
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_done_is_not_done_again_and_force_repeats_exactly(results):
    before, told = metrics_of(results/TEACHER), []
    run_results(results.parent, size="tiny", seed=1, configurations=(TEACHER,), say=told.append)
    assert f"{TEACHER}: already there" in told
    run_results(results.parent, size="tiny", seed=1, configurations=(TEACHER,), force=True, say=lambda line: None)
    assert metrics_of(results/TEACHER) == before


def test_an_unfinished_run_is_not_reported(results):
    shutil.copytree(results/TEACHER, part := results/"other.part")
    try: assert len(report(results)) == 1
    finally: shutil.rmtree(part)


def test_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(InputError, match="did you mean folder"): run_notebook("report", tmp_path, {"foldr": "x"})
    assert not list(tmp_path.iterdir())


def test_failed_notebook_stays_with_its_error(tmp_path):
    with pytest.raises(RunFailed, match="report.failed.ipynb"): run_notebook("report", tmp_path, {"folder": str(tmp_path/"nothing")})
    assert [p.name for p in tmp_path.iterdir()] == ["report.failed.ipynb"]
    assert "InputError" in (tmp_path/"report.failed.ipynb").read_text()


def test_other_data_under_the_same_name_is_prepared_anew(results):
    told = []
    run_results(results.parent, size="tiny", seed=2, configurations=(TEACHER,), say=told.append)
    assert "scenes-tiny: preparing" in told and f"{TEACHER}: train" in told
