"""What a real machine brings: second processes, full disks, umasks, homes and folders that cannot be written, links,
odd names, terminals and pipes."""
import inspect, io
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aladin.cli.command import COMMANDS, parser_of
from aladin.cli.main import main
from aladin.data.clip import ClipReader, make_clip
from aladin.evaluation.embeddings import load_embeddings
from aladin.runs.stages import train_run
from aladin.files import InputError, locked, read_json
from aladin.runs.graph import _with_home, experiment_config, run_results
from aladin.search.index import SearchIndex
from small_inputs import write_data, write_model

COMMAND = [sys.executable, "-m", "aladin"]


def run(*words, **options): return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, **options)


def said(capsys): return "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A data folder, a model, a prepared folder, embeddings and an index, to be read only."
    folder = tmp_path_factory.mktemp("made")
    write_data(folder/"data", 4)
    write_model(folder/"model")
    assert main(["prepare", "--data", str(folder/"data"), "--out", str(folder/"prepared")]) == 0
    assert main(["encode", "--model", str(folder/"model"), "--data", str(folder/"data"),
                 "--out", str(folder/"e.safetensors")]) == 0
    assert main(["index", "--model", str(folder/"model"), "--data", str(folder/"data"),
                 "--out", str(folder/"index")]) == 0
    return folder


def encode(made, out, *more):
    return main(["encode", "--model", str(made/"model"), "--data", str(made/"data"), "--out", str(out), *more])


def search(index, *more): return main(["search", "--index", str(index), "-k", "2", *more])


# Two processes

def test_a_second_run_on_the_same_results_is_refused(tmp_path, capsys):
    command = ["results", "--size", "tiny", "--out", str(tmp_path), "--configuration", "alad-alignment-triplet"]
    part = tmp_path/"scenes-tiny"/"alad-alignment-triplet"/"seed-88"/".train.1-0123abcd.part"
    part.mkdir(parents=True)
    with locked(tmp_path/"scenes-tiny"/".lock", "writing there"):
        assert main(command) == 2
    message = said(capsys)
    assert f"process {os.getpid()}" in message and ".lock" in message
    assert part.exists() and not (tmp_path/"scenes-tiny"/"graph.json").exists()


def test_a_lock_of_snakemake_that_no_killed_run_left_is_kept(tmp_path):
    lock = tmp_path/"scenes-tiny"/".snakemake"/"locks"/"0.output.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("table.md")
    with pytest.raises(InputError, match="no Snakemake at work"):
        run_results(tmp_path, size="tiny", configurations=["alad-alignment-triplet"], say=lambda line: None)
    assert lock.exists()


def test_a_training_is_not_replaced_unasked(made, tmp_path):
    config = experiment_config("alad-alignment-triplet", "tiny", 1)
    config.training.max_steps, config.training.pretrain_steps = 1, 0
    for options in ({}, dict(force=True), dict(resume="auto")):
        train_run(config, made/"prepared", tmp_path/"run", progress=False, **options)
    (tmp_path/"run"/"notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in (tmp_path/"run").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="--resume auto .* --force"):
        train_run(config, made/"prepared", tmp_path/"run", progress=False)
    assert before == {p: p.read_bytes() for p in before}
    config.seed = 2
    train_run(config, made/"prepared", tmp_path/"run", progress=False, force=True)
    assert (read_json(tmp_path/"run"/"training.json")["config"]["seed"] == 2
            and (tmp_path/"run"/"notes.txt").read_text() == "mine")


@pytest.mark.parametrize("command", [
    "convert", "encode", "make-clip", "convert-detections", "prepare", "index", "evaluate", "train", "extract"])
def test_files_that_aladin_did_not_write_stay(made, tmp_path, command, capsys):
    "Whatever --force says."
    golden = Path(__file__).parent/"golden"
    words = dict(convert=["--checkpoint", golden/"v1"/"checkpoint.pth.tar", "--oscar", golden/"v1"/"oscar_ckpt"],
                 encode=["--model", made/"model", "--data", made/"data"], prepare=["--data", made/"data"],
                 index=["--model", made/"model", "--data", made/"data"],
                 evaluate=["--embeddings", made/"e.safetensors"],
                 train=["--configuration", "alad-alignment-triplet", "--settings", "tiny", "--data", made/"prepared"],
                 extract=["--images", tmp_path, "--detector", tmp_path])
    words |= {"make-clip": ["--data", made/"data"], "convert-detections": ["--shelve", golden/"none"]}
    file = command in ("encode", "evaluate")
    (mine := tmp_path/("thesis.txt" if file else "folder/thesis.txt")).parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    out = mine if file else mine.parent
    force = ["--force"] if command in ("convert", "encode", "convert-detections", "prepare") else []
    status = (main([command, *map(str, words[command]),
                    "--json" if command == "evaluate" else "--out", str(out), *force])
              if command != "train" else 2)
    assert status == 2 and mine.read_text() == "mine", said(capsys)


@pytest.mark.parametrize("words, name", [
    (["export", "--format", "hdf5", "parquet", "--index", "{made}/index"], "index.h5"),
    (["search-study", "--model", "{made}/model", "--data", "{made}/data"], "search.json")])
def test_exports_and_studies_are_not_replaced_unasked(made, tmp_path, capsys, words, name):
    (tmp_path/name).write_text("mine")
    assert main([*(w.format(made=made) for w in words), "--out", str(tmp_path)]) == 2
    assert name in said(capsys) and (tmp_path/name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_called_part_beside_the_output_stays(made, tmp_path):
    for name in ("prepared.part", "model.part"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"thesis.txt").write_text("mine")
    golden = Path(__file__).parent/"golden"/"v1"
    assert main(["prepare", "--data", str(made/"data"), "--out", str(tmp_path/"prepared")]) == 0
    assert main(["convert", "--checkpoint", str(golden/"checkpoint.pth.tar"), "--oscar", str(golden/"oscar_ckpt"),
                 "--out", str(tmp_path/"model")]) == 0
    assert all((tmp_path/name/"thesis.txt").read_text() == "mine" for name in ("prepared.part", "model.part"))


def test_two_encodings_of_one_file(made, tmp_path, capsys):
    "The second is refused while the first is at work; afterwards it finds the file done; another model needs --force."
    out = tmp_path/"e.safetensors"
    with locked(tmp_path/".e.safetensors.lock", "writing there"):
        assert encode(made, out) == 2
    assert f"process {os.getpid()}" in said(capsys) and not out.exists()
    assert encode(made, out) == 0
    before = out.stat().st_mtime_ns
    assert encode(made, out) == 0 and out.stat().st_mtime_ns == before
    assert encode(made, out, "--dtype", "float16") == 2 and "--force" in said(capsys)
    assert (encode(made, out, "--dtype", "float16", "--force") == 0
            and str(load_embeddings(out).regions.values.dtype) == "torch.float16")


def test_an_unfinished_file_that_is_not_aladins_stays(made, tmp_path):
    (tmp_path/".e.safetensors.part").write_text("mine")
    assert encode(made, tmp_path/"e.safetensors") == 2 and (tmp_path/".e.safetensors.part").read_text() == "mine"


def test_two_processes_read_the_same_captions_through_clip(tmp_path):
    "Both get the vectors, whoever writes them into the cache."
    texts = [f"a {colour} fish" for colour in ("red", "blue", "green")]*20
    make_clip(tmp_path/"clip", texts)
    code = ("import sys, numpy as np; from aladin.data.clip import ClipReader; "
            "r = ClipReader(sys.argv[1], sys.argv[2]); "
            f"np.save(sys.argv[3], np.concatenate(list(r.captions({texts!r}, 20)))); "
            f"np.save(sys.argv[4], r.sentences({texts[:3]!r})[{texts[0]!r}])")
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path/"clip", tmp_path/"cache",
                                   tmp_path/f"c{n}.npy", tmp_path/f"s{n}.npy"])
                 for n in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    expected = np.concatenate(list(ClipReader(tmp_path/"clip").captions(texts, 20)))
    for n in range(3): np.testing.assert_array_equal(np.load(tmp_path/f"c{n}.npy"), expected)
    assert not [p for p in (tmp_path/"cache").iterdir() if p.name.startswith(".")]


def test_two_processes_build_one_index(made, tmp_path):
    command = [*COMMAND, "index", "--model", made/"model", "--data", made/"data", "--out", tmp_path/"index"]
    processes = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                 for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    index = SearchIndex.open(tmp_path/"index", made/"model")
    assert len(index) == 4 and len(index.engines["captions"]) == 20


def test_segments_are_ordered_by_number_and_not_by_the_clock(made, tmp_path, monkeypatch):
    index = SearchIndex.open(shutil.copytree(made/"index", tmp_path/"index"), made/"model")
    index.delete(["1000"])
    monkeypatch.setattr("time.time_ns", lambda: 0)
    monkeypatch.setattr("time.time", lambda: 0.)
    index.delete(["1001"])
    assert [len(SearchIndex.open(tmp_path/"index", made/"model")), len(index)] == [2, 2]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "notes", "00000000000000000001-copy"])
def test_foreign_files_in_an_index_are_ignored(made, tmp_path, name):
    shutil.copytree(made/"index", tmp_path/"index")
    (tmp_path/"index"/"images"/name).write_text("x")
    (tmp_path/"index"/"captions"/f"{name} folder").mkdir()
    assert search(tmp_path/"index", "a red fish") == 0 and len(SearchIndex.open(tmp_path/"index", made/"model")) == 4


# Disk, permissions, environment

def unshared(script, **options):
    "Run a shell script with mounts of its own."
    done = subprocess.run(["unshare", "-rm", "sh", "-c", "true"], capture_output=True)
    if done.returncode: pytest.skip("this machine allows no mounts of one's own")
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, **options)


def test_a_full_disk_ends_encoding_with_a_message(made, tmp_path):
    write_data(tmp_path/"data", 300)
    (tmp_path/"small").mkdir()
    encoding = (f"'{sys.executable}' -m aladin encode --model '{made/'model'}' --data '{tmp_path/'data'}' "
                f"--out '{tmp_path/'small'/'e.safetensors'}'")
    done = unshared(f"mount -t tmpfs -o size=600k tmpfs '{tmp_path/'small'}' && "
                    f"{{ {encoding}; status=$?; ls -A '{tmp_path/'small'}'; exit $status; }}")
    assert (done.returncode == 2 and "e.safetensors" in done.stderr and "room for" in done.stderr
            and "Traceback" not in done.stderr), done.stderr
    assert done.stdout.strip() == ""  # nothing is left


def test_input_folders_may_be_read_only(made, tmp_path):
    "Also where a cache would be kept beside the data."
    shutil.copytree(made/"prepared", tmp_path/"data")
    aladin = f"'{sys.executable}' -m aladin"
    done = unshared(f"""mount --bind '{tmp_path/'data'}' '{tmp_path/'data'}' &&
        mount -o remount,ro,bind '{tmp_path/'data'}' &&
        {aladin} encode --model '{made/'model'}' --data '{tmp_path/'data'}' --out '{tmp_path/'e.safetensors'}' &&
        {aladin} index --model '{made/'model'}' --data '{tmp_path/'data'}' --out '{tmp_path/'index'}'""")
    assert done.returncode == 0, done.stderr
    assert len(load_embeddings(tmp_path/"e.safetensors").image_ids) == 4


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(made, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_model(tmp_path/"model")
        assert encode(made, tmp_path/"e.safetensors") == 0
        assert main(["index", "--model", str(made/"model"), "--data", str(made/"data"),
                     "--out", str(tmp_path/"index")]) == 0
        config = experiment_config("alad-alignment-triplet", "tiny", 1)
        config.training.max_steps, config.training.pretrain_steps = 1, 0
        train_run(config, made/"prepared", tmp_path/"run", progress=False)
    finally: os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(p.suffix == ".safetensors" for p in files) >= 4
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in files} == {p.name: oct(mode) for p in files}


def test_results_without_a_home(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"} | dict(HOME="/proc/none")
    done = run("results", "--size", "tiny", "--configuration", "alad-matching-triplet-e2e", "--jobs", "2",
               "--out", tmp_path, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (tmp_path/"scenes-tiny"/"table.md").exists()


def test_a_home_of_the_run_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")
    assert Path(_with_home(tmp_path)["HOME"]) == tmp_path/".home" and (tmp_path/".home").is_dir()
    monkeypatch.delenv("HOME")  # then the system's own record of it counts
    may_be_written = os.access(pwd.getpwuid(os.getuid()).pw_dir, os.W_OK | os.X_OK)
    assert ("HOME" in _with_home(tmp_path)) == (not may_be_written)


COMMANDS_THAT_WRITE = {
    "prepare": ["--data", "{made}/data", "--out"],
    "encode": ["--model", "{made}/model", "--data", "{made}/data", "--out"],
    "index": ["--model", "{made}/model", "--data", "{made}/data", "--out"],
    "evaluate": ["--embeddings", "{made}/e.safetensors", "--json"],
    "search": ["a red fish", "--index", "{made}/index", "--show"],
    "make-clip": ["--data", "{made}/data", "--out"],
    "train": ["--configuration", "alad-alignment-triplet", "--settings", "tiny", "--data", "{made}/prepared", "--out"],
    "results": ["--size", "tiny", "--out"]}


@pytest.mark.parametrize("command", COMMANDS_THAT_WRITE)
def test_an_output_that_cannot_be_is_a_message(made, tmp_path, command, capsys):
    "A file where a folder must be; status 2 and the path."
    (tmp_path/"file").write_text("mine")
    out = tmp_path/"file"/"below"
    assert main([command, *(w.format(made=made) for w in COMMANDS_THAT_WRITE[command]), str(out)]) == 2
    assert str(tmp_path/"file") in (message := said(capsys)) and "Fix:" in message
    assert (tmp_path/"file").read_text() == "mine"


@pytest.mark.parametrize("error, words", [
    (PermissionError(13, "Permission denied", "/x/y"),
     ["/x/y", "Permission denied", "choose a place that you may use"]),
    (OSError(28, "No space left on device", "/x/y"), ["/x/y", "make room"]),
    (IsADirectoryError(21, "Is a directory", "/x/y"), ["/x/y", "name a file"]),
    (MemoryError("Unable to allocate 9 TiB"), ["9 TiB", "--batch-size"]),
    (ConnectionError("gone"), ["gone"])
], ids=lambda o: type(o).__name__)
def test_errors_of_the_system_are_messages(monkeypatch, capsys, error, words):
    def fail(*_, **__): raise error
    monkeypatch.setattr("aladin.data.manifests.verify", fail)
    assert main(["verify", "scenes", "."]) == 2
    message = said(capsys)
    assert all(w in message for w in words) and message.startswith("aladin verify: ")


def test_a_folder_where_a_file_is_expected(made, tmp_path, capsys):
    for words in (["evaluate", "--embeddings", str(tmp_path)],
                  ["evaluate", "--embeddings", str(made/"e.safetensors"), "--keys", str(tmp_path)],
                  ["evaluate", "--embeddings", str(made/"e.safetensors"), "--json", str(tmp_path)],
                  ["search", "x", "--index", str(made/"index"), "--show", str(tmp_path)]):
        assert main(words) == 2 and str(tmp_path) in said(capsys), words


def test_a_stage_of_something_else(tmp_path, capsys):
    (tmp_path/"graph.json").write_text('{"a": 1}')
    assert main(["stage", "--graph", str(tmp_path/"graph.json"), "report"]) == 2 and "graph.json" in said(capsys)


def test_links_as_outputs(made, tmp_path):
    "What is written lies where the link points to, and the link stays."
    golden = Path(__file__).parent/"golden"/"v1"
    (tmp_path/"disk").mkdir()
    for name in ("prepared", "model", "index"):
        (tmp_path/"disk"/name).mkdir()
        (tmp_path/name).symlink_to(Path("disk")/name)
    (tmp_path/"e").symlink_to(Path("disk")/"e.safetensors")
    assert main(["prepare", "--data", str(made/"data"), "--out", str(tmp_path/"prepared")]) == 0
    assert main(["convert", "--checkpoint", str(golden/"checkpoint.pth.tar"), "--oscar", str(golden/"oscar_ckpt"),
                 "--out", str(tmp_path/"model")]) == 0
    assert encode(made, tmp_path/"e") == 0
    assert main(["index", "--model", str(made/"model"), "--data", str(made/"data"),
                 "--out", str(tmp_path/"index")]) == 0
    assert all((tmp_path/name).is_symlink() for name in ("prepared", "model", "index", "e"))
    found = {p.relative_to(tmp_path/"disk").as_posix() for p in (tmp_path/"disk").rglob("*")}
    assert {"prepared/prepared.json", "model/config.json", "e.safetensors", "index/index.json"} <= found


def test_odd_names_and_another_working_folder(made, tmp_path, monkeypatch, capsys):
    "Spaces, letters beyond ASCII and relative paths; and the index is moved before it is searched from elsewhere."
    folder = tmp_path/"ein Ordner – mit Übermaß 图"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_data(Path("meine daten"), 3, ids=["id mit blank", "größe", "1"])
    write_model(Path("das modell"))
    assert main(["prepare", "--data", "meine daten", "--out", "vorbe reitet"]) == 0
    assert main(["encode", "--model", "das modell", "--data", "vorbe reitet", "--out", "e e.safetensors"]) == 0
    assert main(["evaluate", "--embeddings", "e e.safetensors", "--json", "m.json"]) == 0
    assert main(["index", "--model", "das modell", "--data", "vorbe reitet", "--out", "in dex"]) == 0
    (folder/"in dex").rename(tmp_path/"moved")
    (tmp_path/"elsewhere").mkdir()
    monkeypatch.chdir(tmp_path/"elsewhere")
    capsys.readouterr()
    # one or the other
    assert main(["search", "a red fish", "--index", "../moved", "--json", "--show", "pa ge.html"]) == 2
    assert main(["search", "a red fish", "--index", "../moved", "--json"]) == 0
    assert {h["id"] for h in json.loads(capsys.readouterr().out)["hits"]} == {"id mit blank", "größe", "1"}
    assert (main(["search", "a red fish", "--index", "../moved", "--show", "pa ge.html"]) == 0
            and (tmp_path/"elsewhere"/"pa ge.html").exists())


# Queries, terminals, pipes

def ask(monkeypatch, text, index, *more):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    return search(index, *more)


def test_queries_that_cannot_be_read_are_reported_and_the_others_answered(made, monkeypatch, capsys):
    text = ("a red fish\n".encode() + "ein gr\u00f6\u00dferer fisch\n".encode("latin-1") + b"\n"
            + "a blue fish \u56fe\n".encode())
    assert ask(monkeypatch, text, made/"index", "--json") == 2
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [len(o["hits"]) for o in lines] == [2, 0, 2] and ["error" in o for o in lines] == [False, True, False]
    assert "query 2" in err and "UTF-8" in err and "line 3 of the queries is empty" in err
    assert ask(monkeypatch, b"\xef\xbb\xbfa red fish\r\n", made/"index", "--json") == 0
    assert json.loads(capsys.readouterr().out)["query"] == "a red fish"
    assert search(made/"index", "") == 2 and "empty query" in said(capsys)
    assert search(made/"index", "--image", "1000", "none", "1001") == 2
    assert (text := said(capsys)).count("a red fish") == 2 and "image none" in text


@pytest.mark.parametrize("query", ["\u200b", "a", "?"*5000, "\U0001f41f", "\ufffd", "x"*100_000])
def test_odd_queries(made, query):
    assert search(made/"index", query) in (0, 2)


def test_a_terminal_that_knows_ascii_alone(made, tmp_path):
    environment = os.environ | dict(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    done = run("search", "größe", "--index", made/"index", "--json", env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["query"] == "größe", done.stderr
    done = run("search", "größe", "--index", made/"index", env=environment)
    assert done.returncode == 0 and b"gr\\xf6\\xdfe" in done.stdout, done.stderr


def test_a_closed_pipe_ends_the_command_quietly(made, tmp_path):
    (tmp_path/"queries.txt").write_text("a red fish\n"*300)
    command = (f"'{sys.executable}' -m aladin search --index '{made/'index'}' --json < '{tmp_path/'queries.txt'}' "
               "| head -n 1")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == "" and json.loads(done.stdout)["query"] == "a red fish"


# Options

def options():
    "Every option that takes a number, with its command."
    for name, made in COMMANDS.items():
        for action in parser_of(made)._actions:
            if action.option_strings and action.type: yield name, action.option_strings[-1]


@pytest.mark.parametrize("command, option", list(options()))
def test_numbers_out_of_range_are_refused_by_name(command, option, capsys):
    "Before anything is read: the other options that are needed are missing."
    (action,) = (a for a in parser_of(COMMANDS[command])._actions if option in a.option_strings)
    lowest = inspect.getclosurevars(action.type).nonlocals["lowest"]
    for value in (lowest - 1, "much", "nan"):
        with pytest.raises(SystemExit) as stop: main([command, option, str(value)])
        assert (stop.value.code == 2
                and f"argument {option}" in said(capsys).replace("argument -k", f"argument {option}"))


def test_no_queries(made): assert SearchIndex.open(made/"index", made/"model").search_all([]) == []


def test_there_are_numbers(): assert len(list(options())) > 20


def test_version():
    done = run("--version", text=True)
    assert done.returncode == 0 and done.stdout.startswith("aladin ")
