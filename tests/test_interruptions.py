"""A failure at any write, rename, fsync or unlink leaves the old result or the new one, and the same command then ends
well.

Every command is run once to count its calls to the file system, then again with a failure at each of them (at some of
them, for commands that take longer; at all with ALADIN_EXHAUSTIVE=1)."""
import argparse
import builtins
import errno
import hashlib
import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import aladin.training.checkpoints
import aladin.data.text
import aladin.data.clip
import aladin.evaluation.embeddings
import aladin.files
import aladin.runs.graph as graph
from aladin.cli.main import main
from aladin.data.text import load_torch_file
from aladin.evaluation.embeddings import load_embeddings
from aladin.runs.graph import describe, experiment_config, run_stage
from aladin.files import InputError, remove_if_stale
from aladin.runs.stages import prepare_data, train_run
from aladin.model.model import load_model
from aladin.data.extract import make_detector
from aladin.data.regions import open_regions
from aladin.search.index import SearchIndex
from small_inputs import ids_of, write_data, write_model, write_picture

golden = Path(__file__).parent/"golden"/"v1"
CALLS = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "posix_fallocate", "pwrite",
         "ftruncate", "chmod")


class Faults:
    "Counts what changes files below a folder, in the main thread, and fails at the nth call."
    def __init__(self, folder, at, monkeypatch):
        self.folder, self.at, self.count, self.hit = str(folder), at, 0, ""
        for name in CALLS: self.wrap(monkeypatch, os, name)
        self.wrap(monkeypatch, aladin.files, "exchange")
        for module in (aladin.training.checkpoints, aladin.data.text, aladin.data.clip, aladin.evaluation.embeddings):
            self.wrap(monkeypatch, module, "save_file")
        for module in (builtins, io): self.wrap_open(monkeypatch, module)

    def step(self, name):
        if threading.current_thread() is not threading.main_thread(): return
        self.count += 1
        if self.count == self.at:
            self.hit = name
            raise OSError(errno.EIO, f"injected at {name}")

    def wrap(self, monkeypatch, module, name):
        inner = getattr(module, name)
        def call(*arguments, **options):
            self.step(name)
            return inner(*arguments, **options)
        monkeypatch.setattr(module, name, call)

    def wrap_open(self, monkeypatch, module):
        inner = module.open
        def call(file, mode="r", *arguments, **options):
            if set(mode) & set("wax+") and str(file).startswith(self.folder): self.step("open")
            return inner(file, mode, *arguments, **options)
        monkeypatch.setattr(module, "open", call)


def tree(folder):
    "Digest of every file below a folder, or of a file; None where there is none."
    folder = Path(folder)
    if folder.is_file(): return hashlib.sha256(folder.read_bytes()).hexdigest()
    if not folder.exists(): return None
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def complete(check, where):
    try: check(where, ended=True)
    except (AssertionError, InputError): return False
    return True


def failures(run, reset, check, folder, whole=True, most=25):
    """Count the calls of `run`, then fail at each: `reset` makes the state before, `check` looks at what is left.

    After each failure the command is given again and must end well."""
    reset()
    with pytest.MonkeyPatch.context() as m:
        counter = Faults(folder, 0, m)
        assert run() in (0, None)
    total, step = counter.count, 1
    assert total > 3
    if not whole and not os.environ.get("ALADIN_EXHAUSTIVE"): step = max(1, total//most)
    for at in range(1, total + 1, step):
        reset()
        with pytest.MonkeyPatch.context() as m:
            faults = Faults(folder, at, m)
            try: status = run()
            except OSError: status = 1
        where = f"call {at} of {total}, {faults.hit}"
        assert faults.hit, where
        check(where)
        # else the failure came after the result, or was of a cache
        if status and not complete(check, where): assert run() in (0, None), where
        check(where, ended=True)
    return total


def old_or_new(path, old, new):
    "A check that `path` is whole, the old one or the new one, with nothing unknown beside it."
    path = Path(path)
    def check(where, ended=False):
        found = tree(path)
        assert found == new if ended else found in (old, new), (
            f"{where}: {sorted(found) if isinstance(found, dict) else found}")
        if not ended: return
        parts = list(path.parent.glob(f".{path.name}.*.part"))
        for part in parts: remove_if_stale(part)  # what a failing unlink has left is removed by the next call
        assert not [p for p in parts if p.exists()], where
    return check


def run_main(*words): return lambda: main([str(w) for w in words])


def made(tmp_path, *commands):
    "What the commands write, each to a path of its own."
    found = []
    for number, (words, out) in enumerate(commands):
        out = tmp_path/f"expected-{number}"/out
        assert main([str(w) for w in (*words, "--out", out)]) == 0
        found.append(out)
    return found


def put_back(source, target):
    "Make `target` a copy of `source`, or nothing, with nothing of an earlier call beside it."
    for path in target.parent.glob(f"*{target.name}*"): shutil.rmtree(path) if path.is_dir() else path.unlink()
    if source is None: return
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def test_prepare(tmp_path):
    a, b, out = write_data(tmp_path/"a", 3), write_data(tmp_path/"b", 4, seed=1), tmp_path/"work"/"out"
    old, new = made(tmp_path, (("prepare", "--data", a), "out"), (("prepare", "--data", b), "out"))
    out.parent.mkdir()
    failures(run_main("prepare", "--data", b, "--out", out, "--force"), lambda: put_back(old, out),
             old_or_new(out, tree(old), tree(new)), tmp_path/"work", whole=False, most=60)
    assert len(open_regions(out/"regions")) == 4


def test_extract(tmp_path):
    for n in range(3): write_picture(tmp_path/"pictures"/f"{n}.png", seed=n)
    make_detector(tmp_path/"detr")
    words, out = ("extract", "--images", tmp_path/"pictures", "--detector", tmp_path/"detr"), tmp_path/"work"/"out"
    [new] = made(tmp_path, (words, "out"))
    out.parent.mkdir()
    failures(run_main(*words, "--out", out), lambda: put_back(None, out), old_or_new(out, None, tree(new)),
             tmp_path/"work", whole=False)


def test_convert(tmp_path):
    saved = load_torch_file(golden/"checkpoint.pth.tar", allow=(argparse.Namespace,))
    saved["model"] = {k: 2*v for k, v in saved["model"].items()}
    torch.save(saved, tmp_path/"other.pth.tar")
    words = ("convert", "--oscar", golden/"oscar_ckpt", "--checkpoint")
    out = tmp_path/"work"/"out"
    old, new = made(tmp_path, ((*words, golden/"checkpoint.pth.tar"), "out"),
                    ((*words, tmp_path/"other.pth.tar"), "out"))
    out.parent.mkdir()
    failures(run_main(*words, tmp_path/"other.pth.tar", "--out", out, "--force"), lambda: put_back(old, out),
             old_or_new(out, tree(old), tree(new)), tmp_path/"work")


def test_encode(tmp_path):
    data, models = write_data(tmp_path/"data", 4), [write_model(tmp_path/f"model-{n}", n) for n in range(2)]
    out = tmp_path/"work"/"e.safetensors"
    old, new = made(tmp_path, *((("encode", "--model", m, "--data", data), "e.safetensors") for m in models))
    out.parent.mkdir()
    check = old_or_new(out, tree(old), tree(new))
    failures(run_main("encode", "--model", models[1], "--data", data, "--out", out, "--force"),
             lambda: put_back(old, out), check, tmp_path/"work")
    assert len(load_embeddings(out).image_ids) == 4


def test_index(tmp_path):
    "Pictures are added to an index: those that were there are found after any failure, the others all or none."
    model, out = write_model(tmp_path/"model"), tmp_path/"work"/"index"
    first, all_ = write_data(tmp_path/"first", 3), write_data(tmp_path/"all", 5)
    assert main(["index", "--model", str(model), "--data", str(first), "--out", str(tmp_path/"index")]) == 0
    out.parent.mkdir()

    def check(where, ended=False):
        index = SearchIndex.open(out, model)
        found = {h.id for h in index.search("a red fish", k=10)}
        assert found in ([set(ids_of(5))] if ended else [set(ids_of(3)), set(ids_of(5))]), (where, found)
        assert all(len(index.search_captions(i, k=50)) in (15, 25) for i in found), where
    failures(run_main("index", "--model", model, "--data", all_, "--out", out), lambda: put_back(tmp_path/"index", out),
             check, tmp_path/"work")


def test_new_index(tmp_path):
    model, data, out = write_model(tmp_path/"model"), write_data(tmp_path/"data", 3), tmp_path/"work"/"index"
    out.parent.mkdir()

    def check(where, ended=False):
        if ended or (out/"index.json").exists():
            assert len(SearchIndex.open(out, model)) in ((3,) if ended else (0, 3)), where
    failures(run_main("index", "--model", model, "--data", data, "--out", out), lambda: put_back(None, out),
             check, tmp_path/"work")


def test_delete_from_an_index(tmp_path):
    model, data, out = write_model(tmp_path/"model"), write_data(tmp_path/"data", 3), tmp_path/"work"/"index"
    assert main(["index", "--model", str(model), "--data", str(data), "--out", str(tmp_path/"index")]) == 0
    out.parent.mkdir()

    def check(where, ended=False): assert len(SearchIndex.open(out, model)) in ((2,) if ended else (2, 3)), where
    failures(run_main("index", "--out", out, "--delete", "1000"), lambda: put_back(tmp_path/"index", out),
             check, tmp_path/"work")


def test_index_with_codes(tmp_path, monkeypatch):
    "Codes that are extended, then made anew because of deletions: after any failure everything that counts is found."
    pytest.importorskip("faiss")
    monkeypatch.setattr("aladin.search.faiss.FLAT", 20)
    monkeypatch.setattr("aladin.search.faiss.TAIL", 2)
    model, out, old = write_model(tmp_path/"model"), tmp_path/"work"/"index", tmp_path/"index"
    first, all_, few = (write_data(tmp_path/f"{n}", n) for n in (21, 24, 22))
    assert main(["index", "--model", str(model), "--data", str(first), "--out", str(old), "--engine", "faiss"]) == 0
    assert list((old/"images.faiss").iterdir())
    out.parent.mkdir()

    def check_with(counts, last):
        def check(where, ended=False):
            index = SearchIndex.open(out, model)
            found = {h.id for h in index.search("a red fish", k=40)}
            assert len(found) in ((last,) if ended else counts) and found == set(index.image_ids()), where
            assert len(index.engines["captions"]) in {5*c for c in counts}, where
        return check
    failures(run_main("index", "--model", model, "--data", all_, "--out", out), lambda: put_back(old, out),
             check_with((21, 24), 24), tmp_path/"work", whole=False, most=16)
    monkeypatch.setattr("aladin.search.faiss.FLAT", 16)
    failures(run_main("index", "--model", model, "--data", few, "--out", out, "--prune"), lambda: put_back(old, out),
             check_with((21, 22), 22), tmp_path/"work", whole=False, most=8)


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_compaction(tmp_path, monkeypatch, engine):
    """After any failure everything that counts is found, by an index that was open before and by one opened then; at
    the end nothing else is left."""
    if engine == "faiss": pytest.importorskip("faiss")
    monkeypatch.setattr("aladin.search.faiss.FLAT", 16)
    monkeypatch.setattr("aladin.search.segments._PAUSE", 0)
    model, out, old = write_model(tmp_path/"model"), tmp_path/"work"/"index", tmp_path/"index"
    for number, count in enumerate((18, 20)):
        assert main(["index", "--model", str(model),
                     "--data", str(write_data(tmp_path/f"data-{number}", count, seed=number)), "--out", str(old),
                     "--engine", engine]) == 0
    assert main(["index", "--out", str(old), "--delete", "1003", "1004"]) == 0
    out.parent.mkdir()
    put_back(old, out)
    loaded = load_model(model)
    def answers(index):
        return [[(h.id, round(h.score, 4)) for h in index.search("a red fish", k=40)],
                [h.id for h in index.search_captions("1005", k=200, rerank=0)]]
    expected, opened = answers(SearchIndex(out, loaded)), []
    assert len(expected[0]) == 18 and len(expected[1]) == 90

    def reset():
        put_back(old, out)
        opened[:] = [SearchIndex(out, loaded)]

    def check(where, ended=False):
        for index in (*opened, SearchIndex(out, loaded)): assert answers(index) == expected, where
        if not ended: return
        SearchIndex(out, loaded).compact()  # what a failing unlink has left is removed by the next call
        segments = [p for p in (out/"images").iterdir() if p.is_dir() and not p.name.startswith(".")]
        assert len(segments) == 1 and len(np.load(segments[0]/"vectors.npy")) == 18, where
    failures(run_main("index", "--out", out, "--compact"), reset, check, tmp_path/"work", whole=False, most=30)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    prepare_data(write_data(folder/"data", 4), folder/"prepared", progress=False)
    return folder/"prepared"


def train(prepared, out, seed, **options):
    config = experiment_config("alad-alignment-triplet", "tiny", seed)
    config.training.max_steps, config.training.validate_every, config.training.pretrain_steps = 2, 1, 0
    train_run(config, prepared, out, progress=False, **options)


def state(run):
    "Seed of the training that the folder says it holds, and digest of its model."
    about = run/"training.json"
    return (json.loads(about.read_text())["config"]["seed"] if about.exists() else None,
            tree(run/"model"/"model.safetensors"))


def test_train_anew(prepared, tmp_path):
    "With --force the old training stays until the new one has ended."
    for seed in (1, 2): train(prepared, tmp_path/f"seed-{seed}", seed)
    expected = [state(tmp_path/f"seed-{seed}") for seed in (1, 2)]
    out = tmp_path/"work"/"run"
    out.parent.mkdir()

    def check(where, ended=False):
        assert state(out) in (expected[1:] if ended else expected), where
        load_model(out/"model")
    failures(lambda: train(prepared, out, 2, force=True), lambda: put_back(tmp_path/"seed-1", out), check,
             tmp_path/"work", whole=False, most=20)


def test_train(prepared, tmp_path):
    "A training that failed is not taken for one that has ended, and resumes to the same end."
    train(prepared, tmp_path/"seed-1", 1)
    expected, out = state(tmp_path/"seed-1"), tmp_path/"work"/"run"
    out.parent.mkdir()

    def check(where, ended=False):
        found = state(out)
        assert found == expected if ended or found[0] else found[0] is None, where
        if (out/"model").exists(): load_model(out/"model")
    failures(lambda: train(prepared, out, 1, resume="auto"), lambda: put_back(None, out), check, tmp_path/"work",
             whole=False, most=20)


@pytest.mark.parametrize("stage, files", [
    ("train", ["model/weights", "history.csv", "training.json", "train.ipynb"]),
    ("evaluate", ["metrics.json", "embeddings.safetensors"]),
    ("prepare", ["data/prepared.json", "data/regions/x", "scenes/x", "prepare.ipynb"]),
    ("report", ["table.md", "table.csv", "report.ipynb"])])
def test_results(tmp_path, monkeypatch, stage, files):
    "A stage of the graph: what it makes takes the place of what was there as a whole."
    study = describe(tmp_path/"work", size="tiny", configurations=["alad-alignment-triplet"], seed=1)
    run = "" if stage in ("prepare", "report") else next(iter(study["runs"]))
    folder = Path(study["folder"])/run

    def write(text):
        def notebook(name, part, parameters):
            for file in files:
                (Path(part)/file).parent.mkdir(parents=True, exist_ok=True)
                (Path(part)/file).write_text(text)
        return notebook

    def reset():
        shutil.rmtree(folder, ignore_errors=True)
        monkeypatch.setattr(graph, "run_notebook", write("old"))
        run_stage(study, stage, run, say=lambda line: None)
        (folder/"mine.txt").write_text("notes of the user")
        monkeypatch.setattr(graph, "run_notebook", write("new"))

    def check(where, ended=False):
        assert (folder/"mine.txt").read_text() == "notes of the user"
        found = {(folder/f).read_text() for f in files if (folder/f).exists()}
        assert found == {"new"} if ended else found in ({"old"}, {"new"}), (where, found)
        assert all((folder/f).exists() for f in files), where
    failures(lambda: run_stage(study, stage, run, say=lambda line: None) and None, reset, check, tmp_path/"work")
