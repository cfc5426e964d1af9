"A dry run finds everything that is wrong, tells what would happen otherwise, and writes nothing."
import base64, json, shutil

import numpy as np
import pytest
import yaml

from small_inputs import with_processor
from aladin.model.configuration import model_config
from aladin.files import resource_dir
from aladin.cli.main import main
from aladin.data.text import load_tokenizer
from aladin.runs.stages import prepare_data
from aladin.runs.graph import experiment_config
from aladin.model.model import AladinModel, save_model
from aladin.runs.plan import plan
from aladin.data.regions import open_regions
from aladin.data.scenes import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")/"scenes"
    write_scenes(folder, train=24, minival=4, test=6, pictures=False, progress=False)
    return folder


@pytest.fixture
def data(scenes, tmp_path): return shutil.copytree(scenes, tmp_path/"data")


@pytest.fixture
def run(tmp_path, capsys):
    "Run `aladin plan` and give its status and the lines it printed."
    def go(data, configuration="alad-alignment-triplet", *more):
        status = main(["plan", "--configuration", str(configuration), "--settings", "tiny", "--data", str(data),
                       "--out", str(tmp_path/"runs"/"out"), "--steps", "2", *map(str, more)])
        return status,capsys.readouterr().out.splitlines()
    return go


def problems(lines): return [o for o in lines if o.startswith("problem")]


def the(lines, name): return next(o for o in lines if o.startswith(f"{name} "))


def images(data, split): return list(json.loads((data/f"{split}_captions.json").read_text()))


def test_all_well(data, tmp_path, run):
    before = sorted(tmp_path.rglob("*"))
    status,lines = run(data)
    assert status == 0 and not problems(lines) and sorted(tmp_path.rglob("*")) == before
    for name,text in dict(
            configuration="settings tiny", train="24 images, 120 captions", minival="4 images", test="6 images",
            regions="34 images, 7.7 regions an image, 70 numbers", vocabulary="vocab.txt", prepare="34 images",
            time="median of 2 measured", disk="free in").items():
        assert text in the(lines, name), name
    assert "30 steps, 3.8 epochs of 8 steps of 16 pairs: " in the(lines[5:], "train")
    assert "10 steps" in the(lines, "pre-train") and "2 times" in the(lines, "validate")


def test_student(data, run): assert run(data, "alad-alignment-and-matching-distill")[0] == 0


def test_prepared_folder(data, tmp_path, run):
    prepare_data(data, tmp_path/"prepared", progress=False)
    status,lines = run(tmp_path/"prepared")
    assert (status == 0 and not any(o.startswith("prepare ") for o in lines)
            and "region store 0.0 MB" in the(lines, "disk"))


def test_every_problem_is_told(data, run):
    (data/"minival_captions.json").unlink()
    gone = images(data, "train")[3]
    index = json.loads((data/"imageid2idx.json").read_text())
    index.pop(gone)
    (data/"imageid2idx.json").write_text(json.dumps(index))
    status,lines = run(data)
    assert status == 2 and len(problems(lines)) == 2
    assert ("minival_captions.pt" in problems(lines)[0]
            and f"features for every image, found none for 1 image: {gone}" in problems(lines)[1])


def test_unknown_configuration(data, run):
    (data/"test_captions.json").unlink()
    status,lines = run(data, "alad-alignment-tripled")
    assert (status == 2 and "did you mean alad-alignment-triplet?" in problems(lines)[0]
            and "test_captions.pt" in problems(lines)[1])
    assert not any(o.startswith("time") for o in lines)


def test_features_cut_off(data, run):
    "The last row of features.tsv is missing, and its offset with it."
    offsets = (data/"features.lineidx").read_text().split()
    (data/"features.lineidx").write_text("\n".join(offsets[:-1]) + "\n")
    (data/"features.tsv").write_bytes((data/"features.tsv").read_bytes()[:int(offsets[-1])])
    status,lines = run(data)
    assert (status == 2 and "imageid2idx.json" in problems(lines)[0]
            and "test split: expected features for every image, found none for 1 image" in problems(lines)[1])


@pytest.mark.parametrize("name", ["features.tsv", "features.lineidx", "imageid2idx.json", "predictions.tsv"])
def test_missing_region_file(data, run, name):
    (data/name).unlink()
    status,lines = run(data)
    assert status == 2 and any(name in o for o in problems(lines))


def test_damaged_row(data, run):
    row = (data/"features.tsv").read_bytes().split(b"\n")[5]
    fields = row.split(b"\t")
    (data/"features.tsv").write_bytes(
        (data/"features.tsv").read_bytes().replace(fields[0] + b"\t", b"9"*len(fields[0]) + b"\t", 1))
    status,lines = run(data)
    assert status == 2 and "features.tsv" in problems(lines)[0] and fields[0].decode() in problems(lines)[0]


def test_missing_detections(data, run):
    gone = images(data, "test")[2]
    rows = (data/"predictions.tsv").read_bytes().splitlines(keepends=True)
    (data/"predictions.tsv").write_bytes(b"".join(o for o in rows if not o.startswith(f"{gone}\t".encode())))
    (data/"predictions.lineidx").unlink()
    status,lines = run(data)
    assert status == 2 and f"detections for every image, found none for 1 image: {gone}" in problems(lines)[0]


def test_keys(data, run):
    (data/"test_img_keys.tsv").write_text("123456789\n" + images(data, "test")[0] + "\n")
    (data/"test_img_keys_1k.tsv").write_text("\n")
    status,lines = run(data)
    assert (status == 2 and "no captions for 1 image: 123456789" in problems(lines)[0]
            and "test_img_keys_1k.tsv" in problems(lines)[1])
    for name in ("test_img_keys.tsv", "test_img_keys_1k.tsv"): (data/name).unlink()
    status,lines = run(data)
    assert status == 0 and sum(o.startswith("note") for o in lines) == 2


def test_vocabulary(data, run):
    (data/"vocab.txt").write_text("a\n")
    status,lines = run(data)
    assert status == 2 and "[PAD]" in problems(lines)[0]
    (data/"vocab.txt").unlink()
    status,lines = run(data)
    assert status == 0 and "made from the training captions" in the(lines, "vocabulary")


def test_model_to_start_from(data, tmp_path, run):
    (tmp_path/"own.yaml").write_text(f"name: own\nmodel: {{init_from: {tmp_path/'none'}}}\n")
    status,lines = run(data, tmp_path/"own.yaml")
    assert status == 2 and "model.init_from" in problems(lines)[0] and len(problems(lines)) == 1
    (tmp_path/"none").mkdir()
    status,lines = run(data, tmp_path/"own.yaml")
    assert status == 2 and "a text model with" in problems(lines)[0]


def test_disk(data, tmp_path, run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    status,lines = run(data)
    assert status == 2 and "free space" in problems(lines)[0]


def test_no_such_data(tmp_path, run):
    status,lines = run(tmp_path/"nowhere")
    assert status == 2 and "nothing there" in problems(lines)[0]


def test_loss_that_is_no_number(data, run):
    rows = (data/"features.tsv").read_bytes().split(b"\n")
    for i,row in enumerate(rows[:-1]):
        head,count,code = row.rsplit(b"\t", 2)
        rows[i] = b"\t".join([head, count, base64.b64encode(
            (np.frombuffer(base64.b64decode(code), "<f4")*1e38).clip(-3e38, 3e38).astype("<f4").tobytes())])
    (data/"features.tsv").write_bytes(b"\n".join(rows))
    status,lines = run(data)
    assert status == 2 and "lower" in problems(lines)[0]


def test_from_python(data): assert plan("alad-alignment-triplet", data, "tiny", steps=1).problems == []


def test_a_frozen_student_without_its_teacher(data):
    assert any("teacher" in o and "--teacher" in o
               for o in plan("alad-matching-distill-finetune", data, "tiny").problems)
    assert any("no-model" in o
               for o in plan("alad-matching-distill-finetune", data, "tiny", teacher="no-model").problems)


@pytest.fixture(scope="module")
def teacher(scenes, tmp_path_factory):
    "A folder of prepared data and one of a teacher, not trained, of the tiny settings."
    data,folder = tmp_path_factory.mktemp("prepared")/"data",tmp_path_factory.mktemp("teacher")/"model"
    prepare_data(scenes, data, progress=False)
    config = experiment_config("alad-alignment-triplet", "tiny")
    sizes = len(load_tokenizer(data)), open_regions(data/"regions").dim
    save_model(with_processor(AladinModel(model_config(config.model, config.data, *sizes)), data), folder)
    return data,folder


def test_a_teacher_that_fits(teacher):
    data,model = teacher
    assert plan("alad-matching-distill-finetune", data, "tiny", teacher=model).problems == []


@pytest.mark.parametrize("key,value", [("hidden_size", 64), ("drop_last_word", True)])
def test_a_teacher_of_another_shape(teacher, tmp_path, key, value):
    data,model = teacher
    settings = yaml.safe_load((resource_dir("experiments")/"settings"/"tiny.yaml").read_text())
    settings["all"]["model"][key] = value
    (tmp_path/"settings.yaml").write_text(yaml.safe_dump(settings))
    assert any("teacher" in o and key in o and str(model) in o for o in plan(
        "alad-matching-distill-finetune", data, str(tmp_path/"settings.yaml"), teacher=model).problems)


def test_a_teacher_of_another_vocabulary(teacher, tmp_path):
    data,model = teacher
    words = (data/"vocab.txt").read_text().splitlines()
    (tmp_path/"vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    assert any(str(model/"vocab.txt") in o for o in plan(
        "alad-matching-distill-finetune", data, "tiny", vocabulary=tmp_path/"vocab.txt", teacher=model).problems)
