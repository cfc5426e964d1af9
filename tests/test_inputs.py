"""ALADIN-2.0's inputs on the scenes: every configuration trains, evaluates and encodes; what is missing or does not fit
is reported."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from aladin.data.splits import open_split
from aladin.data.processor import AladinProcessor
from aladin.cli.main import main
from aladin.config import DataSettings, config_from_dict
from aladin.files import InputError, resource_dir
from aladin.data.clip import ClipReader
from aladin.runs.stages import evaluate_run, needs_teacher, prepare_data, prepare_scenes, train_run
from aladin.runs.graph import experiment_config
from aladin.model.model import load_model
from aladin.runs.plan import plan
from aladin.view.plots import attend
from aladin.data.regions import open_regions

CONFIGURATIONS = ("alad-alignment-triplet_2_det_clip-labels", "alad-alignment-triplet_4_det+fast_clip-labels",
                  "alad-alignment-triplet_5_det+fast_clip-labels_clip-captions", "experiment6_det-padded_clip-labels",
                  "experiment8", "alad-alignment-and-matching-distill-det_lab+fast-clip_label")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    prepare_scenes(folder/"scenes", "tiny", progress=False)
    prepare_data(folder/"scenes", folder/"data", progress=False)
    return folder/"data"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(name, data, tmp_path):
    "Trained, evaluated, and encoded again from the command line: the model folder knows what it reads."
    config = experiment_config(name, "tiny", 1)
    config.training.max_steps, config.training.pretrain_steps = 4, 2
    assert not needs_teacher(config)
    train_run(config, data, tmp_path/"run", progress=False)
    evaluate_run(tmp_path/"run", data, "scenes-tiny", progress=False)
    assert main(["encode", "--model", str(tmp_path/"run"/"model"), "--data", str(data), "--keys", "test_img_keys.tsv",
                 "--out", str(tmp_path/"e.safetensors")]) == 0
    ours, again = (load_file(p) for p in (tmp_path/"run"/"embeddings.safetensors", tmp_path/"e.safetensors"))
    for key in ("regions", "words", "caption_matching", "region_offsets"):
        assert torch.equal(ours[key], again[key]), key
    model = load_model(tmp_path/"run"/"model")
    test = open_split(data, "test", AladinProcessor.from_pretrained(data, config.data))
    regions = test.regions
    counts = [min(regions.num_regions(i), config.data.max_regions) - 1 for i in test.image_ids]
    assert ours["region_offsets"].diff().tolist() == counts
    shown = attend(model, test, 0, 0)
    # the six box numbers are found wherever they stand
    assert shown.boxes.min() >= 0 and (shown.boxes[:, 2:] > shown.boxes[:, :2]).all()
    found = plan(name, data, "tiny", steps=1)
    assert not found.problems and any("parameters" in line for line in found.lines)


def test_tags_are_read_once(data, tmp_path):
    "A tag goes through CLIP once for a data set; a caption once for a split."
    tags = [open_regions(data/"detic").tags(i) for i in open_regions(data/"detic").ids]
    reader = ClipReader(data/"clip", tmp_path)
    first = [reader.tags(tags)[i].copy() for i in range(len(tags))]
    assert reader.texts_read == len({t for o in tags for t in o}) + 1 < sum(map(len, tags))
    again = ClipReader(data/"clip", tmp_path)
    for a, b in zip(first, again.tags(tags)): np.testing.assert_array_equal(a, b)
    assert again.texts_read == 0
    longer = [again.captions(["a red cup"]*3, most) for most in (6, 4)]
    assert again.texts_read == 6 and [len(o[0]) for o in longer] == [5, 4]


def test_both_merges(data):
    "The published merge pairs other vectors with the boxes."
    aligned, published = (
        open_split(data, "test", AladinProcessor.from_pretrained(data, DataSettings(detections="det+fast", merge=m)))
        for m in ("aligned", "published"))
    assert aligned.regions.fingerprint != published.regions.fingerprint
    i = aligned.image_ids[0]
    assert sorted(aligned.regions.tags(i)) == sorted(published.regions.tags(i))
    assert aligned.regions.origins(i) != published.regions.origins(i)


def test_missing_inputs(data, tmp_path):
    for name in ("detic", "clip"):
        folder = tmp_path/name
        shutil.copytree(data, folder, ignore=shutil.ignore_patterns(name, "clip_cache"))
        with pytest.raises(InputError, match=f"{name}.*{'convert-detections' if name == 'detic' else 'make-clip'}"):
            open_split(folder, "test",
                       AladinProcessor.from_pretrained(folder, DataSettings(detections="det", tag_reader="clip")))
        assert any(name in p for p in plan(CONFIGURATIONS[0], folder, "tiny", steps=1).problems)
    with pytest.raises(InputError, match="make-clip"): ClipReader(tmp_path/"nothing")
    wide = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=99, hidden_size=32, projection_dim=16,
                                                      intermediate_size=32, num_hidden_layers=1, num_attention_heads=1))
    shutil.copytree(data/"clip", tmp_path/"wide")
    wide.save_pretrained(tmp_path/"wide")
    with pytest.raises(InputError, match="projection_dim"): ClipReader(tmp_path/"wide")


def test_images_without_detections(data, tmp_path, capsys):
    "They are left out and reported by name."
    folder = tmp_path/"data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("detic", "clip_cache"))
    names = json.loads((data/"test_captions.json").read_text())
    store = shutil.copytree(data/"detic", folder/"detic")
    ids = json.loads((store/"ids.json").read_text())
    (store/"ids.json").write_text(json.dumps([f"other{i}" if i in list(names)[:2] else i for i in ids]))
    info = json.loads((store/"store.json").read_text())
    info["files"]["ids.json"] = (store/"ids.json").stat().st_size
    (store/"store.json").write_text(json.dumps(info))
    split = open_split(folder, "test", AladinProcessor.from_pretrained(folder, DataSettings(detections="det")))
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1 and all(i in told[0] for i in list(names)[:2])
    assert split.image_ids == list(names)[2:]


def test_a_teacher_that_reads_otherwise(data, tmp_path):
    "A frozen student must read what its teacher read."
    teacher = experiment_config(CONFIGURATIONS[0], "tiny", 1)
    teacher.training.max_steps = teacher.training.pretrain_steps = 2
    train_run(teacher, data, tmp_path/"teacher", progress=False)
    student = experiment_config("alad-matching-distill-finetune", "tiny", 1)
    student.training.max_steps = 2
    with pytest.raises(InputError, match="detections det instead of fast"):
        train_run(student, data, tmp_path/"student", tmp_path/"teacher"/"model", progress=False)
    student.data = teacher.data
    assert train_run(student, data, tmp_path/"student", tmp_path/"teacher"/"model", progress=False)["teacher"]["taken"]


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match="count_tags"): config_from_dict(dict(data=dict(count_tags=True)))


def test_settings_on_top_of_others(tmp_path):
    config = experiment_config(CONFIGURATIONS[1], "scenes_published", 1)
    assert (config.data.merge == "published"
            and config.model.hidden_size == experiment_config(CONFIGURATIONS[1], "scenes", 1).model.hidden_size)
    (tmp_path/"s.yaml").write_text(yaml.safe_dump(dict(base="scenes_publishd")))
    with pytest.raises(InputError, match="did you mean scenes_published"):
        experiment_config(CONFIGURATIONS[1], str(tmp_path/"s.yaml"), 1)
    assert (resource_dir("experiments")/"settings"/"scenes_published.yaml").exists()


def test_small_clip_from_the_command(data, tmp_path, capsys):
    assert main(["make-clip", "--data", str(data), "--out", str(tmp_path/"clip"), "--dim", "32", "--layers", "1"]) == 0
    reader = ClipReader(tmp_path/"clip")
    assert reader.dim == 32 and len(reader.captions(["a red cup left of a blue kite"], 20)[0]) > 4
    assert reader.pieces("a red cup", 20) == ["a", "red", "cup"]


def test_length_sweep(data, tmp_path, capsys):
    "One run for each border between tags and regions; a second call trains nothing."
    command = ["lengths", "--configuration", CONFIGURATIONS[1], "--settings", "tiny", "--data", str(data),
               "--out", str(tmp_path), "--total", "12", "--tags", "4", "8", "--steps", "2"]
    assert main(command) == 0 and "rsum" in capsys.readouterr().out
    table = pd.read_csv(tmp_path/"lengths.csv")
    assert table[["tags", "regions"]].to_numpy().tolist() == [[4, 8], [8, 4]] and (tmp_path/"lengths.png").exists()
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/training.json")}
    for path in made:
        run = json.loads(path.read_text())
        assert run["config"]["data"]["max_tags"] + run["config"]["data"]["max_regions"] == 12
        assert (run["minival"]["alignment"]["rsum"]
                == pytest.approx(table.set_index("tags").loc[run["config"]["data"]["max_tags"], "rsum"], rel=1e-4))
    assert main(command) == 0 and made == {p: p.stat().st_mtime_ns for p in made}
    assert main([*command[:-4], "4", "12"]) == 2 and "2 to 11" in capsys.readouterr().err
