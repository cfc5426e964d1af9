"Pictures as people have them: turned, deep, narrow, damaged, oversized, without boxes, added, removed, of any name."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aladin.data.pictures as picture_files
from aladin.cli.main import main
from aladin.data.text import read_captions
from aladin.data.splits import open_split, open_images
from aladin.evaluation.embeddings import encode_split
from aladin.evaluation.metrics import evaluate_embeddings
from aladin.view.explorer import Explorer
from aladin.files import InputError, read_json
from aladin.model.model import load_model
from aladin.data.pictures import Pictures, find_pictures, open_picture
from aladin.data.formats import read_caption_file
from aladin.data.extract import Detector, extract, make_detector
from aladin.view.plots import Attention, plot_attention
from aladin.data.regions import open_regions
from aladin.search.index import SearchIndex
from aladin.search.page import search_page
from small_inputs import ids_of, write_data, write_model, write_picture


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")/"detr"
    make_detector(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory): return write_model(tmp_path_factory.mktemp("model")/"model", dim=38)


def extracted(tmp_path, detector, *more, name="data"):
    assert main(["extract", "--images", str(tmp_path/"pictures"), "--detector", str(detector),
                 "--out", str(tmp_path/name), *map(str, more)]) == 0
    return tmp_path/name


def indexed(data, model, out, *more):
    return main(["index", "--model", str(model), "--data", str(data), "--out", str(out), *more])


def found(index, capsys):
    capsys.readouterr()
    assert main(["search", "a red fish", "--index", str(index), "--json", "-k", "99"]) == 0
    return {h["id"]: h["picture"] for h in json.loads(capsys.readouterr().out)["hits"]}


def turned(path):
    "A picture that is 60 wide and 120 high, stored lying down; its upper half is red, its lower half blue."
    upright = Image.new("RGB", (60, 120), "blue")
    upright.paste("red", (0, 0, 60, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def damage(folder):
    "Pictures that cannot be read or used: cut, empty, text, narrow."
    write_picture(folder/"whole.jpg")
    data = (folder/"whole.jpg").read_bytes()
    (folder/"cut.jpg").write_bytes(data[:len(data)//2])
    (folder/"empty.png").write_bytes(b"")
    (folder/"text.png").write_text("no picture")
    write_picture(folder/"narrow.png", (5000, 2))
    return {"cut", "empty", "text", "narrow"}


def test_turned_pictures_stand_upright_everywhere(tmp_path, detector, model):
    "In the explorer, on the page and in figures as for the detector."
    (tmp_path/"pictures").mkdir()
    turned(tmp_path/"pictures"/"a.jpg")
    data = extracted(tmp_path, detector)
    assert open_regions(data/"regions").size("a") == (60, 120)
    pictures = Pictures(data)
    assert pictures.open("a").size == (60, 120) and pictures.thumbnail("a").ratio == .5
    attention = Attention(
        "a", "red", ["red"], np.array([[0, 0, 1, .5]], np.float32), None, np.ones((1, 1), np.float32), 1.)
    image = plot_attention(attention, tmp_path/"pictures"/"a.jpg").axes[0].images[0].get_array()
    assert image.shape[0] == 2*image.shape[1] and (image[5, 5] > 180).tolist() == [True, False, False]
    index = SearchIndex.build(load_model(model), open_all(data, model), progress=False)
    assert Explorer(index, pictures=data).look("a red fish")["pair"]["ratio"] == .5


def open_all(data, model):
    return open_images(data, load_model(model).processor)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_sixteen_bits_look_as_eight_do(tmp_path, kind):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (32, 1))
    deep = (Image.fromarray(ramp) if kind == "I;16" else Image.fromarray(ramp.astype(np.int32)) if kind == "I"
            else Image.frombytes("I;16B", (256, 32), ramp.astype(">u2").tobytes()))
    deep.save(tmp_path/"deep.tif")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path/"plain.png")
    a, b = (np.asarray(open_picture(tmp_path/n)).astype(int) for n in ("deep.tif", "plain.png"))
    assert np.abs(a - b).max() <= 1


def test_damaged_pictures_are_left_out_and_reported(tmp_path, detector, capsys):
    bad = damage(tmp_path/"pictures")
    about = read_json(extracted(tmp_path, detector, "--batch-size", "8")/"pictures.json")
    assert set(about["files"]) == {"whole"} and set(about["skipped"]) == bad
    err = capsys.readouterr().err
    assert all(f"{name}." in err for name in bad)


def test_the_others_of_a_batch_are_as_without_the_damaged_ones(tmp_path, detector):
    damage(tmp_path/"pictures")
    write_picture(tmp_path/"alone"/"whole.jpg")
    both = [extract(tmp_path/name, Detector(str(detector)), tmp_path/f"data-{name}", batch_size=1, progress=False,
                    report=lambda line: None) for name in ("pictures", "alone")]
    np.testing.assert_array_equal(*(o.features("whole") for o in both))


def test_damaged_pictures_do_not_end_an_answer(tmp_path, detector, model):
    "Of the explorer, or of the page."
    for n in range(3): write_picture(tmp_path/"pictures"/f"{n}.jpg", seed=n)
    data = extracted(tmp_path, detector)
    index = SearchIndex.build(load_model(model), open_all(data, model), progress=False)
    whole = (tmp_path/"pictures"/"1.jpg").read_bytes()
    for content in (whole[:len(whole)//2], b"", b"text"):
        (tmp_path/"pictures"/"1.jpg").write_bytes(content)
        explorer = Explorer(index, pictures=data)
        explorer.ask = dict(query="a red fish", heads=["matching"], image="1", number=7)
        assert (explorer.answer["number"] == 7 and "error" not in explorer.answer
                and len(explorer.answer["rankings"][0]["hits"]) == 3)
        assert set(explorer.answer["pictures"]) == {"0", "2"}
        search_page(tmp_path/"page.html", [("a red fish", index.search("a red fish", explain=True))], Pictures(data))
        assert (tmp_path/"page.html").read_text().count("data:image/jpeg") == 3


def test_oversized_pictures_are_refused(tmp_path, monkeypatch):
    write_picture(tmp_path/"large.png", (300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="large.png"): open_picture(tmp_path/"large.png")


def test_an_error_of_any_kind_is_an_answer(tmp_path, detector, model, monkeypatch):
    for n in range(2): write_picture(tmp_path/"pictures"/f"{n}.jpg", seed=n)
    explorer = Explorer(
        SearchIndex.build(load_model(model), open_all(extracted(tmp_path, detector), model), progress=False))
    monkeypatch.setattr(explorer, "look", lambda **o: 1/0)
    explorer.ask = dict(query="x", number=3)
    assert explorer.answer["number"] == 3 and "ZeroDivisionError" in explorer.answer["error"]


def test_a_changed_picture_is_shown_anew(tmp_path):
    write_picture(tmp_path/"1.png", (40, 20))
    first = Pictures(tmp_path).thumbnail("1")
    write_picture(tmp_path/"1.png", (20, 40))
    os.utime(tmp_path/"1.png", ns=(1, 1))
    assert Pictures(tmp_path).thumbnail("1") != first


def test_what_is_passed_over_is_reported(tmp_path, detector, capsys):
    write_picture(tmp_path/"pictures"/"fine.png")
    Image.new("RGB", (50, 40), "red").save(tmp_path/"pictures"/"saved.jfif", "JPEG")
    if ".avif" in picture_files.picture_endings():
        Image.new("RGB", (50, 40), "red").save(tmp_path/"pictures"/"new.avif")
    (tmp_path/"pictures"/"IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    write_picture(tmp_path/"elsewhere"/"linked.png")
    (tmp_path/"pictures"/"more").symlink_to("../elsewhere")
    (tmp_path/"pictures"/"loop").symlink_to(".")
    about = read_json(extracted(tmp_path, detector)/"pictures.json")
    err = capsys.readouterr().err
    assert ({"fine.png", "saved.jfif"} <= set(about["files"].values())
            and (".avif" not in picture_files.picture_endings() or "new.avif" in about["files"].values()))
    assert "cannot be read: IMG_1.HEIC" in err and "2 linked folders: loop, more" in err


def test_ids_stay_when_pictures_are_added(tmp_path, detector, model, capsys):
    "Two extractions and one index: each picture once; one that has vanished is reported, and removed on request."
    for n, name in enumerate(("cat", "dog", "tree")): write_picture(tmp_path/"pictures"/"2024"/f"{name}.png", seed=n)
    first = extracted(tmp_path, detector)
    assert indexed(first, model, tmp_path/"index") == 0
    before = found(tmp_path/"index", capsys)
    write_picture(tmp_path/"pictures"/"2025"/"cat.png", seed=9)
    assert indexed(extracted(tmp_path, detector, name="second"), model, tmp_path/"index") == 0
    now = found(tmp_path/"index", capsys)
    assert len(now) == 4 and set(before) < set(now) and all(now.values())
    (tmp_path/"pictures"/"2024"/"dog.png").unlink()
    third = extracted(tmp_path, detector, name="third")
    assert indexed(third, model, tmp_path/"index") == 0
    assert "1 pictures of the index are not in" in (err := capsys.readouterr().err) and "--prune" in err
    assert len(found(tmp_path/"index", capsys)) == 4
    assert indexed(third, model, tmp_path/"index", "--prune") == 0
    assert len(found(tmp_path/"index", capsys)) == 3 and all(found(tmp_path/"index", capsys).values())
    assert indexed(first, model, tmp_path/"index", "--prune", "--split", "test") == 2


def test_names_of_a_flat_folder_are_ids(tmp_path):
    for name in ("1.png", "große katze.jpg", "b.c.png"): write_picture(tmp_path/name)
    assert list(find_pictures(tmp_path)) == ["1", "b.c", "große katze"]


def test_long_and_odd_names(tmp_path, detector, model, capsys):
    """Ids of more than 200 bytes, spaces and letters beyond ASCII, through extraction, index and search; pictures below
    a folder of the same kind."""
    names = ["ein bild – mit Übermaß.png", "图"*70 + ".png", "x"*240 + ".png"]
    for n, name in enumerate(names): write_picture(tmp_path/"pictures"/"alle bilder"/name, seed=n)
    data = extracted(tmp_path, detector, name="meine daten")
    assert indexed(data, model, tmp_path/"in dex") == 0
    hits = found(tmp_path/"in dex", capsys)
    assert len(hits) == 3 and {Path(p).name for p in hits.values()} == set(names)


def test_two_extractions_into_one_folder(tmp_path, detector, capsys):
    write_picture(tmp_path/"pictures"/"1.png")
    command = [sys.executable, "-m", "aladin", "extract", "--images", tmp_path/"pictures", "--detector", detector,
               "--out", tmp_path/"data"]
    processes = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                 for _ in range(2)]
    messages = [p.communicate()[1] for p in processes]
    assert sorted(p.returncode for p in processes) == [0, 2] and not any("Traceback" in m for m in messages), messages
    assert len(open_regions(tmp_path/"data"/"regions")) == 1 and not list(tmp_path.glob(".data*"))


def test_extraction_into_a_linked_folder(tmp_path, detector):
    write_picture(tmp_path/"pictures"/"1.png")
    (tmp_path/"disk"/"big").mkdir(parents=True)
    (tmp_path/"data").symlink_to(Path("disk")/"big")
    (tmp_path/"data.part").mkdir()
    (tmp_path/"data.part"/"thesis.txt").write_text("mine")
    extracted(tmp_path, detector)
    assert ((tmp_path/"data").is_symlink() and (tmp_path/"disk"/"big"/"pictures.json").exists()
            and (tmp_path/"data.part"/"thesis.txt").exists())


@pytest.mark.parametrize("table, message", [
    ("image,caption\n1.png,which of them\nc.png,x\n", "2 pictures of that name"),
    ("image,caption,split\nc.png,a,train\nc.png,b,test\n", "split"),
    ("image,caption\nc.png,\n", "captions with words"),
    ("picture;text\nc.png;x\n", "image"),
    ("image,caption\nnone.png,x\n", "names of pictures"),
    ("image,caption,split\nc.png,a,trian\n", "trian")])
def test_captions_that_do_not_fit_are_refused(tmp_path, detector, capsys, table, message):
    for n, p in enumerate(("a/1.png", "b/1.png", "c.png")): write_picture(tmp_path/"pictures"/p, seed=n)
    (tmp_path/"captions.csv").write_text(table)
    assert main(["extract", "--images", str(tmp_path/"pictures"), "--detector", str(detector),
                 "--captions", str(tmp_path/"captions.csv"), "--out", str(tmp_path/"data")]) == 2
    assert "captions.csv" in (err := capsys.readouterr().err) and message in err and not (tmp_path/"data").exists()


def test_captions_under_two_names_of_one_picture_are_kept(tmp_path, detector, capsys):
    for n in range(4): write_picture(tmp_path/"pictures"/f"{n}.png", seed=n)
    (tmp_path/"captions.txt").write_text("image,caption\n0.png,first name\n0,second name\n1.png,x\n2.png,y\n")
    data = extracted(tmp_path, detector, "--captions", tmp_path/"captions.txt")
    texts = {i: c for s in ("train", "minival", "test") for i, c in read_captions(data/f"{s}_captions.json").items()}
    assert texts["0"] == ["first name", "second name"] and "3.png" not in texts
    assert "1 pictures of" in capsys.readouterr().err  # picture 3 has no captions


def test_a_caption_file_of_another_kind_is_named(tmp_path):
    (tmp_path/"captions.json").write_text(
        '{"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}], "dataset": "coco"}')
    with pytest.raises(InputError, match="Karpathy"): read_caption_file(tmp_path/"captions.json")
    (tmp_path/"captions.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(InputError, match="PNG"): read_caption_file(tmp_path/"captions.csv")
    (tmp_path/"captions.csv").write_bytes("image,caption\n1,größe\n".encode("latin-1"))
    with pytest.raises(InputError, match="line 2"): read_caption_file(tmp_path/"captions.csv")


def test_one_or_two_captioned_pictures_are_trained_on(tmp_path, detector):
    for n in range(2): write_picture(tmp_path/"pictures"/f"{n}.png", seed=n)
    (tmp_path/"captions.csv").write_text("image,caption\n0,one\n1,two\n")
    data = extracted(tmp_path, detector, "--captions", tmp_path/"captions.csv")
    assert len(read_captions(data/"train_captions.json")) == 1


def test_pictures_without_boxes_are_left_out(tmp_path, detector, capsys):
    "By extraction."
    for n in range(2): write_picture(tmp_path/"pictures"/f"{n}.png", seed=n)
    assert main(["extract", "--images", str(tmp_path/"pictures"), "--detector", str(detector), "--least", "0",
                 "--threshold", "1.1", "--out", str(tmp_path/"none")]) == 2
    assert "0.png" in (err := capsys.readouterr().err) and "Traceback" not in err and not (tmp_path/"none").exists()


def test_rows_without_boxes_are_left_out(tmp_path, capsys):
    """By preparation, encoding and indexing of a folder in the published layout, each with a report; others are as
    before."""
    data = write_data(tmp_path/"data", 5)
    rows = (data/"features.tsv").read_text().splitlines()
    rows[1] = "1001\t0\t"
    (data/"features.tsv").write_text("\n".join(rows) + "\n")
    starts = np.cumsum([0] + [len(r) + 1 for r in rows])[:-1]
    (data/"features.lineidx").write_text("".join(f"{o}\n" for o in starts))
    model = write_model(tmp_path/"model")
    assert main(["prepare", "--data", str(data), "--out", str(tmp_path/"prepared")]) == 0
    assert "1 images without regions are left out: 1001" in capsys.readouterr().err
    for folder in (data, tmp_path/"prepared"):
        out = tmp_path/f"{folder.name}.safetensors"
        assert main(["encode", "--model", str(model), "--data", str(folder), "--out", str(out)]) == 0
        assert (captured := capsys.readouterr()).out.count("4 images with 20 regions") == 1 and "1001" in captured.err
        assert indexed(folder, model, tmp_path/f"index-{folder.name}") == 0
        assert ": 4 pictures, 20 captions" in capsys.readouterr().out
    store = open_regions(tmp_path/"prepared"/"regions")
    assert store.empty == ["1001"] and store.ids == [i for i in ids_of(5) if i != "1001"]
    with pytest.raises(InputError, match="image 1001"): store.features("1001")


def test_one_region_that_is_left_out(tmp_path, capsys):
    "The published weights leave region 0 out: an image with one region has none left, and a score of 0."
    data = write_data(tmp_path/"data", 3, regions=1)
    model = write_model(tmp_path/"model")
    encoded = encode_split(load_model(model), open_split(data, "test", load_model(model).processor), progress=False)
    assert encoded.regions.lengths.tolist() == [0, 0, 0]
    assert evaluate_embeddings(encoded, ("alignment", "matching"))["alignment"]["rsum"] >= 0
    assert main(["encode", "--model", str(model), "--data", str(data), "--out", str(tmp_path/"e.safetensors")]) == 0
    assert main(["evaluate", "--embeddings", str(tmp_path/"e.safetensors"), "--head", "alignment"]) == 0
    assert indexed(data, model, tmp_path/"index") == 0
    assert len(found(tmp_path/"index", capsys)) == 3
