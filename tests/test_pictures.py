"From pictures to answers: extraction with both kinds of detector, kills, broken pictures, real photographs where they are at hand."
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from aladin.cli import main
from aladin.files import InputError
from aladin.data import read_captions
from aladin.pictures import Detector, extract, find_pictures, make_detector, open_picture

photographs = Path(__file__).resolve().parent.parent.parent/"shared"/"data"/"coco_images"


def draw(folder, count=12):
    "Pictures of several sizes and forms, one turned by EXIF, one grey, one with transparency, two broken."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count): Image.fromarray(rng.integers(0, 255, (60 + 7*i, 90 - 3*i, 3), np.uint8)).save(folder/f"{i:02d}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 60), "red").save(folder/"turned.jpg", exif=exif)
    Image.new("L", (50, 80), 90).save(folder/"grey.png")
    Image.new("RGBA", (64, 64), (0, 0, 255, 90)).save(folder/"clear.png")
    (folder/"cut.jpg").write_bytes((folder/"00.jpg").read_bytes()[:600])
    (folder/"text.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    for kind in ("detr", "rt_detr"): make_detector(folder/kind, kind)
    return folder


def check_geometry(store, sizes, least, most):
    "Boxes lie in their pictures; the six numbers of each region are its box in VinVL's order, x1 y1 x2 y2 h w, relative."
    for i, size in sizes.items():
        assert store.size(i) == size
        rects, vectors = store.rects(i), store.features(i)
        assert least <= len(rects) == len(vectors) == len(store.tags(i)) <= most
        x1, y1, x2, y2 = rects.T
        assert (0 <= x1).all() and (x1 <= x2).all() and (x2 <= size[0] + 1e-3).all() and (0 <= y1).all() and (y1 <= y2).all() and (y2 <= size[1] + 1e-3).all()
        width, height = size
        np.testing.assert_allclose(vectors[:, -6:], np.stack([x1/width, y1/height, x2/width, y2/height, (y2 - y1)/height, (x2 - x1)/width], 1), atol=1e-3)
        assert (np.diff(store.confidences(i)) <= 0).all() and np.isfinite(vectors).all()


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_extract(kind, detectors, tmp_path):
    folder, lines = draw(tmp_path/"pictures"), []
    store = extract(folder, Detector(str(detectors/kind), least=3, most=8), tmp_path/"data", progress=False, report=lines.append)
    sizes = {i: open_picture(p).size for i, p in find_pictures(folder).items() if i not in ("cut", "text")}
    assert store.ids == list(sizes) and store.size("turned") == (60, 120)
    check_geometry(store, sizes, 3, 8)
    assert len(lines) == 2 and "cut.jpg" in lines[0] and "text.png" in lines[1]
    about = json.loads((tmp_path/"data"/"pictures.json").read_text())
    assert set(about["skipped"]) == {"cut", "text"} and about["files"]["turned"] == "turned.jpg"
    half = extract(folder, Detector(str(detectors/kind), least=3, most=8), tmp_path/"half", dtype="float16", progress=False, report=lines.append)
    np.testing.assert_allclose(half.features("03"), store.features("03"), atol=.01)


def test_turned_picture_is_detected_upright(detectors, tmp_path):
    "A picture stored lying and turned by EXIF gives the regions of the upright one."
    folder = tmp_path/"pictures"
    folder.mkdir()
    upright = Image.fromarray(np.random.default_rng(3).integers(0, 255, (96, 64, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder/"lying.png", exif=exif)
    upright.save(folder/"upright.png")
    assert ImageOps.exif_transpose(Image.open(folder/"lying.png")).size == upright.size != Image.open(folder/"lying.png").size
    store = extract(folder, Detector(str(detectors/"detr")), tmp_path/"data", batch_size=1, progress=False)
    np.testing.assert_array_equal(store.features("lying"), store.features("upright"))


def test_killed_extraction_goes_on(detectors, tmp_path, monkeypatch):
    folder = draw(tmp_path/"pictures")
    script = f"""
import os, signal, aladin.pictures as p
p._PART = 4
inner, count = p._extract_part, [0]
def part(*a):
    if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)
    count[0] += 1
    return inner(*a)
p._extract_part = part
p.extract({str(folder)!r}, p.Detector({str(detectors/'detr')!r}), {str(tmp_path/'data')!r}, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path/"data").exists()
    work = next(tmp_path.glob(".data.*.parts"))
    before = {p.name for p in work.glob("*.npz")}
    assert len(before) == 2
    import aladin.pictures as pictures
    made, inner = [], pictures._extract_part
    monkeypatch.setattr(pictures, "_PART", 4)
    monkeypatch.setattr(pictures, "_extract_part", lambda detector, part, path, batch_size: made.append(path.name) or inner(detector, part, path, batch_size))
    again = extract(folder, Detector(str(detectors/"detr")), tmp_path/"data", progress=False, report=lambda line: None)
    assert len(made) == 3 and not before & set(made)  # what was there was not made again
    assert not list(tmp_path.glob(".data.*"))
    whole = extract(folder, Detector(str(detectors/"detr")), tmp_path/"other", progress=False, report=lambda line: None)
    assert again.ids == whole.ids
    for i in whole.ids: np.testing.assert_array_equal(again.features(i), whole.features(i))


def test_command_trains_and_searches(detectors, tmp_path, capsys):
    "A folder of pictures with captions becomes a data set that trains; its model finds pictures."
    from aladin.experiments import prepare_data, train_run
    from aladin.graph import experiment_config
    folder = draw(tmp_path/"pictures", 20)
    rows = [f"{p.name},a picture number {p.stem},{split}" for n, p in enumerate(sorted(folder.glob("[0-9]*.jpg"))) for split in [("train", "train", "minival", "test")[n % 4]]]
    (tmp_path/"captions.csv").write_text("image,caption,split\n" + "\n".join(rows) + "\nabsent.jpg,nothing,train\n")
    assert main(["extract", "--images", str(folder), "--detector", str(detectors/"detr"), "--captions", str(tmp_path/"captions.csv"), "--out", str(tmp_path/"data")]) == 0
    assert len(read_captions(tmp_path/"data"/"train_captions.json")) == 10
    assert "1 pictures of" in capsys.readouterr().err
    prepare_data(tmp_path/"data", tmp_path/"prepared", progress=False)
    config = experiment_config("alad-alignment-and-matching-distill", "tiny", 1)
    config.training.max_steps, config.training.pretrain_steps = 2, 0
    train_run(config, tmp_path/"prepared", tmp_path/"run", progress=False)
    assert main(["index", "--model", str(tmp_path/"run"/"model"), "--data", str(tmp_path/"data"), "--out", str(tmp_path/"index")]) == 0
    assert "23 pictures, 20 captions" in capsys.readouterr().out
    assert main(["search", "a picture number 3", "--index", str(tmp_path/"index"), "--show", str(tmp_path/"page.html"), "-k", "3"]) == 0
    assert (tmp_path/"page.html").read_text().count("data:image/jpeg") == 3
    assert main(["search", "x", "--index", str(tmp_path/"nothing")]) == 2


@pytest.mark.skipif(not photographs.is_dir(), reason="the photographs lie beside the checkout of those who develop the package")
def test_photographs(detectors, tmp_path):
    "COCO's photographs with their captions: 24 of them, sizes as the files have them, captions by file name."
    about = json.loads((photographs/"annotations.json").read_text())
    (tmp_path/"captions.json").write_text(json.dumps({name: o["captions"] for name, o in about.items()}))
    store = extract(photographs, Detector(str(detectors/"rt_detr"), least=10, most=15), tmp_path/"data", captions=tmp_path/"captions.json", batch_size=4, progress=False)
    sizes = {Path(name).stem: Image.open(photographs/name).size for name in about}
    assert set(store.ids) == set(sizes)
    check_geometry(store, sizes, 10, 15)
    texts = {s: read_captions(tmp_path/"data"/f"{s}_captions.json") for s in ("train", "minival", "test")}
    assert {s: len(o) for s, o in texts.items()} == dict(train=20, minival=2, test=2)
    assert {i: c for o in texts.values() for i, c in o.items()} == {Path(name).stem: o["captions"] for name, o in about.items()}


@pytest.mark.parametrize("make, message", [(lambda p: None, "hub:NAME"), (lambda p: p.mkdir(), "object detector that transformers can load")])
def test_no_detector(tmp_path, make, message):
    make(tmp_path/"detector")
    with pytest.raises(InputError, match=message): Detector(str(tmp_path/"detector"))
