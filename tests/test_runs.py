"""Whole runs through papermill and the graph: their record, their restart, what a change makes anew, what a failure
leaves."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
import yaml

import aladin
from aladin.files import InputError, RunFailed, resource_dir
from aladin.evaluation.embeddings import load_embeddings
from aladin.evaluation.metrics import evaluate_embeddings
from aladin.runs.record import provenance
from aladin.runs.stages import report
from aladin.runs.graph import describe, run_notebook, run_results
from aladin.model.model import load_model

TEACHER, STUDENT = RUNS = ("alad-alignment-triplet/seed-1", "alad-matching-distill-finetune/seed-1")
CONFIGURATIONS = tuple(o.split("/")[0] for o in RUNS)


def run(out, **study):
    return run_results(out, say=lambda line: None, **dict(size="tiny", seed=1, configurations=CONFIGURATIONS) | study)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    run(out)
    return out/"scenes-tiny"


def metrics_of(folder):
    "The figures of every run, without times and dates."
    return {r: {h: {d: m[d] for d in ("i2t", "t2i", "rsum")}
                for h, m in json.loads((folder/r/"metrics.json").read_text())["heads"].items()}
            for r in RUNS}


def stamps(folder, name): return {r: (folder/r/name).stat().st_mtime_ns for r in RUNS}


def test_a_run_leaves_its_record(results):
    for run, head in zip(RUNS, ("alignment", "matching")):
        assert {p.name for p in (results/run).iterdir()} >= {
            "train.ipynb", "evaluate.ipynb", "metrics.json", "training.json", "history.csv", "curves.png", "model"}
        made = json.loads((results/run/"metrics.json").read_text())
        assert (made["seed"] == 1 and {"commit", "versions", "machine"} <= set(made["made by"])
                and made["train_seconds"] > 0 and set(made["heads"]) == {head})
    assert {p.name for p in (results/TEACHER).iterdir()} >= {"attention.ipynb", "attention-1.png"}
    assert (results/"table.md").exists() and len(pd.read_csv(results/"table.csv")) == 2
    taken = json.loads((results/STUDENT/"training.json").read_text())["teacher"]
    assert taken["taken"] and taken["left"] and all(o.startswith("matching.") for o in taken["left"])


def test_the_report_holds_what_the_embeddings_say(results):
    table = pd.read_csv(results/"table.csv").set_index(["configuration", "head"])
    for run, head in zip(RUNS, ("alignment", "matching")):
        m = evaluate_embeddings(load_embeddings(results/run/"embeddings.safetensors"), (head,))[head]
        row = table.loc[(run.split("/")[0], head)]
        assert ([row[f"{d} R@{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10)] + [row["rsum"]]
                == pytest.approx([m[d][f"r{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10)] + [m["rsum"]]))
    teacher, student = (table.loc[(CONFIGURATIONS[0], "alignment"), "rsum"],
                        table.loc[(CONFIGURATIONS[1], "matching"), "rsum"])
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in (results/"table.md").read_text().splitlines()]
    assert [CONFIGURATIONS[1], CONFIGURATIONS[0],
            *(f"{o:.1f}" for o in (student, teacher, teacher-student, 100*student/teacher))] in rows
    assert (results/"efficiency.png").exists()


def test_the_frozen_student_has_its_teachers_backbone(results):
    student, teacher = (load_model(results/o/"model").state_dict() for o in (STUDENT, TEACHER))
    assert all(bool((student[n] == teacher[n]).all()) for n in teacher if n.startswith("backbone."))
    assert any(bool((student[n] != teacher[n]).any()) for n in teacher if n.startswith("matching."))


def test_executed_notebooks_carry_no_noise(results):
    notebook = nbformat.read(results/TEACHER/"train.ipynb", 4)
    assert "papermill" not in notebook.metadata
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_no_part_is_left_or_reported(results):
    assert not list(results.rglob("*.part")) and not list(results.rglob("checkpoints-*"))
    part = results/"other"/".seed-1.5-0123abcd.part"
    part.mkdir(parents=True)
    (part/"metrics.json").write_text("{")
    assert len(report(results)) == 2


def test_done_is_not_done_again(results):
    before = stamps(results, "training.json"), stamps(results, "metrics.json")
    run(results.parent)
    assert before == (stamps(results, "training.json"), stamps(results, "metrics.json"))


def test_a_checkout_with_results_but_no_models_makes_them(results, tmp_path):
    "What git keeps of results/ is not taken for done."
    folder = tmp_path/"scenes-tiny"
    shutil.copytree(
        results, folder,
        ignore=shutil.ignore_patterns("model", "data", "scenes", "embeddings.safetensors", ".snakemake", "graph.json"))
    assert (folder/"table.md").exists() and (folder/TEACHER/"metrics.json").exists()
    run(tmp_path)
    assert (folder/STUDENT/"model"/"model.safetensors").exists() and metrics_of(folder) == metrics_of(results)


def changed_settings(path, **student):
    "The tiny settings with other values for the student."
    values = yaml.safe_load((resource_dir("experiments")/"settings"/"tiny.yaml").read_text())
    path.write_text(yaml.safe_dump(values | dict(configurations={CONFIGURATIONS[1]: student})))
    return str(path)


def test_a_change_makes_only_what_depends_on_it_anew(results, tmp_path):
    before, figures = stamps(results, "training.json"), metrics_of(results)
    run(results.parent, settings=changed_settings(tmp_path/"s.yaml", training=dict(max_steps=20)))
    after = stamps(results, "training.json")
    assert after[TEACHER] == before[TEACHER] and after[STUDENT] > before[STUDENT]
    run(results.parent)
    assert metrics_of(results) == figures


def test_a_failed_run_says_where_to_look_and_the_others_go_on(tmp_path):
    settings = changed_settings(tmp_path/"s.yaml", training=dict(lr=1e19, grad_clip=0.0))
    with pytest.raises(RunFailed, match="alad-matching-distill-finetune/seed-1/train.failed.ipynb"):
        run(tmp_path, settings=settings)
    folder = tmp_path/"scenes-tiny"
    assert "FloatingPointError" in (folder/STUDENT/"train.failed.ipynb").read_text()
    assert ((folder/TEACHER/"metrics.json").exists() and (folder/TEACHER/"attention.ipynb").exists()
            and not (folder/STUDENT/"training.json").exists())


def whole(folder):
    "Whatever is there under its final name can be read."
    for name in ("training.json", "metrics.json", "prepared.json"):
        for path in folder.rglob(name): json.loads(path.read_text())
    for path in folder.rglob("training.json"): load_model(path.parent/"model")


def test_killed_anywhere_it_ends_with_the_same_figures(results, tmp_path):
    """Ten kill -9 at random moments, of the whole process group or of the command alone; then the same command ends
    undisturbed."""
    choose, folder = random.Random(3), tmp_path/"scenes-tiny"
    code = ("from aladin.cli.main import main; import sys; "
            f"""sys.exit(main({['results', '--out', str(tmp_path), '--size', 'tiny', '--seed', '1']
                               + [o for c in CONFIGURATIONS for o in ('--configuration', c)]}))""")
    for kill in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(choose.uniform(2, 14))
        if process.poll() is None: (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        whole(folder)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    whole(folder)
    assert metrics_of(folder) == metrics_of(results)


def test_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(InputError, match="did you mean folder"): run_notebook("report", tmp_path, {"foldr": "x"})
    assert not list(tmp_path.iterdir())


def test_other_data_under_the_same_name_is_another_study(tmp_path):
    def digest(**study): return describe(tmp_path, size="tiny", **study)["prepare"]["digest"]
    (vocabulary := tmp_path/"vocab.txt").write_text("[PAD]\n")
    first = digest(vocabulary=str(vocabulary))
    assert first == digest(vocabulary=str(vocabulary)) != digest()
    vocabulary.write_text("[PAD]\n[UNK]\n")
    assert digest(vocabulary=str(vocabulary)) != first


def test_provenance_tells_uncommitted_changes(tmp_path, monkeypatch):
    for name in ("aladin/__init__.py", "nbs/module.ipynb", "README.md"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text("")
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)
    git("init"), git("add", "."), git("commit", "-m", "all")
    monkeypatch.setattr(aladin, "__file__", str(tmp_path/"aladin"/"__init__.py"))
    assert provenance(0)["uncommitted_changes"] is False
    (tmp_path/"README.md").write_text("no code")
    assert provenance(0)["uncommitted_changes"] is False
    (tmp_path/"nbs"/"module.ipynb").write_text("{}")
    assert provenance(0)["uncommitted_changes"] is True
