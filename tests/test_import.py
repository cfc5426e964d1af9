"""Every reader gives the arrays and captions that were written; what must be refused is refused; no pickle is run; an
import resumes.

The files are generated. Real samples, and files written by an independent program, are read as well where a folder has
them (ALADIN_SHARED)."""
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import msgpack
import numpy as np
import pytest

import import_formats as formats
from aladin.cli.command import COMMANDS, comments
from aladin.cli.main import main
from aladin.data.importing import ImportOptions, import_data
from aladin.data.readers import CAPTION_READERS, FEATURE_READERS, Notes, detect
from aladin.data.regions import RegionStore, box_geometry
from aladin.files import InputError, need_package, read_json
from small_inputs import write_picture

root = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("ALADIN_SHARED", root.parent/"shared"))
EXAMPLES = int(os.environ.get("ALADIN_EXAMPLES", 0))
OF = formats.pictures()
BY_ID = {str(p.number): p for p in OF}


def run(sources, out, captions=(), **options):
    "Import quietly. Returns import.json's content, and all lines of the report."
    lines = []
    sources = sources if isinstance(sources, list) else [sources]
    captions = captions if isinstance(captions, (list, tuple)) else [captions]
    about = import_data(
        sources, out, ImportOptions(captions=list(map(str, captions)), **options), progress=False, report=lines.append)
    return about, "\n".join(lines)


def texts(folder):
    "All captions of a data folder."
    found = {}
    for split in ("train", "minival", "test"):
        path = folder/f"{split}_captions.json"
        if path.exists(): found |= read_json(path)
    return found


def folder(path, name):
    (path/name).mkdir()
    return path/name


# Features


@pytest.mark.parametrize("layout", formats.FEATURES)
def test_features(layout, tmp_path):
    "Vectors, boxes, sizes and captions of every layout; found from the content alone."
    write, reader = formats.FEATURES[layout]
    source = write(folder(tmp_path, "source"), OF)
    own = layout in formats.OWN
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")}
    about, said = run(source, tmp_path/"data", () if own else formats.write_coco(tmp_path, OF))
    store = RegionStore(tmp_path/"data"/"regions")
    assert f"taken for {reader}, because" in said and about["sources"][0]["format"] == reader
    assert ({p: (p.stat().st_size, p.stat().st_mtime_ns) for p in before if p != tmp_path}
            == {p: v for p, v in before.items() if p != tmp_path})
    assert ({p.name for p in (tmp_path/"source").rglob("*")}
            == {p.name for p in before if tmp_path/"source" in p.parents})
    assert (sorted(store.ids) == sorted(BY_ID) and store.has_boxes and not store.has_tags
            and store.box_order == "height width")
    tolerance = 2e-3 if layout in formats.HALF else 0
    for i, p in BY_ID.items():
        rows = store.features(i)
        np.testing.assert_allclose(rows[:, :-6], p.vectors, rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            rows[:, -6:], box_geometry(p.boxes, (p.width, p.height)), rtol=0, atol=tolerance or 1e-6)
        assert store.size(i) == (None if layout == "oscar" else (p.width, p.height))
    assert texts(tmp_path/"data") == {i: p.captions for i, p in BY_ID.items()}
    assert ("no tags" in said) and ("float16" in said) == (layout in formats.HALF)


@pytest.mark.parametrize("layout", formats.FEATURES)
def test_one_reader_recognises_a_layout(layout, tmp_path):
    write, reader = formats.FEATURES[layout]
    assert detect(write(folder(tmp_path, "source"), OF), FEATURE_READERS | CAPTION_READERS, "features")[0] == reader


@pytest.mark.parametrize("layout", sorted(formats.CLASSES))
def test_class_numbers(layout, tmp_path):
    "Numbers become tags by --classes; without it they are left out, and the report says so."
    source, coco = formats.FEATURES[layout][0](folder(tmp_path, "source"), OF), formats.write_coco(tmp_path, OF)
    names = ["tree", "dog,puppy", "cat", "red hat", "sky", "road"]
    (tmp_path/"names.txt").write_text("\n".join(names) + "\n")
    about, said = run(source, tmp_path/"tagged", coco, classes=str(tmp_path/"names.txt"))
    store = RegionStore(tmp_path/"tagged"/"regions")
    assert about["tags"] and store.has_tags and "no tags" not in said
    for i, p in BY_ID.items():
        assert store.tags(i) == [names[c].split(",")[0] for c in p.classes]
        np.testing.assert_array_equal(store.rects(i), p.boxes)
    _, said = run(source, tmp_path/"plain", coco)
    assert "class numbers, but no --classes: 6" in said
    (tmp_path/"names.txt").write_text("tree\n")
    with pytest.raises(InputError, match="class numbers below 1"):
        run(source, None, coco, classes=str(tmp_path/"names.txt"))


def test_oscar_labels(tmp_path):
    import torch
    source = formats.write_oscar(folder(tmp_path, "source"), OF)
    torch.save({p.number: ["dog", "tree"] for p in OF[:2]}, source/"train_labels.pt")
    run(source, tmp_path/"data")
    store = RegionStore(tmp_path/"data"/"regions")
    assert store.tags(OF[0].number) == ["dog", "tree"] and store.tags(OF[5].number) == [] and store.has_tags


def test_oscar_in_the_older_format_of_torch(tmp_path):
    "A file that cannot be mapped is read whole."
    import torch
    source = formats.write_oscar(folder(tmp_path, "source"), OF)
    run(source, tmp_path/"data")
    for path in source.glob("*_img_frcnn_feats.pt"):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    run(source, tmp_path/"older")
    one, two = RegionStore(tmp_path/"data"/"regions"), RegionStore(tmp_path/"older"/"regions")
    assert one.ids == two.ids and all(np.array_equal(one.features(i), two.features(i)) for i in one.ids)


def test_archives_with_the_same_names(tmp_path):
    "Samples of one name in two archives of a split would be joined: they are refused."
    source = formats.write_webdataset(folder(tmp_path, "source"), OF)
    shutil.copy(source/"train"/"0.tar", source/"train"/"1.tar")
    with pytest.raises(InputError, match="each name once in a split"):
        CAPTION_READERS["webdataset"](source, Notes()).read()


def test_several_sources(tmp_path):
    "Parts of one set; an image in two of them must be equal in both."
    for name in "abc": folder(tmp_path, name)
    parts = [formats.write_bottom_up(tmp_path/"a", OF[:4]), formats.write_hdf5_m2(tmp_path/"b", OF[3:])]
    coco = formats.write_coco(tmp_path, OF)
    run(parts, tmp_path/"data", coco)
    assert len(RegionStore(tmp_path/"data"/"regions")) == 6
    other = formats.pictures(seed=1)
    with pytest.raises(InputError, match="different ones"):
        run([parts[0], formats.write_hdf5_m2(tmp_path/"c", other)], None, coco)


# Captions


@pytest.mark.parametrize("layout", formats.CAPTIONS)
def test_captions(layout, tmp_path):
    "Captions of every layout, in their order, with features of another format."
    written = formats.CAPTIONS[layout](folder(tmp_path, "captions"), OF)
    paths = written if isinstance(written, list) else [written]
    features = formats.write_hdf5_m2(folder(tmp_path, "source"), OF)
    sizes = formats.write_coco(tmp_path, OF)
    name = formats.READER_OF.get(layout, layout)
    assert {detect(p, FEATURE_READERS | CAPTION_READERS, "captions")[0] for p in paths} == {name}
    for p in paths:
        found = CAPTION_READERS[name](p, Notes()).read()
        assert all(c.captions == BY_ID[str(int(re.search(r"(\d+)(\.jpg)?$", c.image)[1]))].captions for c in found)
        if name != "blip": assert len(found) == 6
    about, said = run(features, tmp_path/"data", [*paths, *([sizes] if layout != "webdataset" else [])],
                      boxes=layout != "webdataset")
    by_number = {str(int(re.search(r"\d+$", i)[0])): t for i, t in texts(tmp_path/"data").items()}
    assert by_number == {i: p.captions for i, p in BY_ID.items()}
    # random or several splits
    assert (list(by_number)[:2] == [str(p.number) for p in OF][:2]
            or layout in ("karpathy", "table", "token", "clip-csv", "results-csv"))


def test_splits_of_karpathy(tmp_path):
    of, path = formats.pictures(8), formats.write_karpathy(tmp_path, formats.pictures(8))
    features = formats.write_bottom_up(tmp_path, of)
    about, said = run(features, None, path)
    assert ({s: o["images"] for s, o in about["splits"].items()} == dict(train=4, minival=2, test=2)
            and "restval, added to train: 2" in said)
    about, said = run(features, None, path, restval="drop")
    assert about["splits"]["train"]["images"] == 2 and about["images"] == 6 and "restval, left out: 2" in said
    about, _ = run(features, None, path, split=["train=train", "test=restval,test,val"])
    assert {s: o["images"] for s, o in about["splits"].items()} == dict(train=2, test=6)
    with pytest.raises(InputError, match="no such part"): run(features, None, path, split=["train=trian"])
    formats.write_karpathy(tmp_path, of, splits=("train", "part 7"))
    with pytest.raises(InputError, match="part 7"): run(features, None, path)


def test_captions_alone(tmp_path):
    "Captions without features make caption files, for regions that aladin extract writes."
    about, said = run(formats.write_karpathy(tmp_path, OF), tmp_path/"data")
    assert (texts(tmp_path/"data").keys() == BY_ID.keys() and not (tmp_path/"data"/"regions").exists()
            and "no region features" in said)


def test_features_alone(tmp_path):
    about, said = run(formats.write_bottom_up(tmp_path, OF), tmp_path/"data")
    assert len(RegionStore(tmp_path/"data"/"regions")) == 6 and about["splits"] == {} and about["pairing"] == ""


# The twelve traps


def test_trap_1_rows_once_or_five_times(tmp_path):
    p = OF[:3]
    for name, rows in dict(equal=[0]*5 + [1]*5 + [2]*5, differ=[0]*4 + [1]*6 + [2]*5).items():
        formats.write_precomp_split(tmp_path/name, "test", p, 5, boxes=False)
        np.save(tmp_path/name/"test_ims.npy", np.stack([p[r].vectors for r in rows]))
    run(tmp_path/"equal", None)
    with pytest.raises(InputError, match="five equal rows"): run(tmp_path/"differ", None)
    formats.write_precomp_split(tmp_path/"four", "test", p, 1, boxes=False, each=4)
    with pytest.raises(InputError, match="5 captions for each image"): run(tmp_path/"four", None)
    formats.write_precomp_split(tmp_path/"rows", "test", p, 1, boxes=False)
    np.save(tmp_path/"rows"/"test_ims.npy", np.stack([p[0].vectors]*7))
    with pytest.raises(InputError, match="3 rows, one an image, or 15"): run(tmp_path/"rows", None)
    formats.write_precomp_split(tmp_path/"ids", "test", p, 1, boxes=False)
    (tmp_path/"ids"/"test_ids.txt").write_text("1\n1\n2\n3\n")
    with pytest.raises(InputError, match="every image once"): run(tmp_path/"ids", None)
    (tmp_path/"ids"/"test_ids.txt").write_text("1\n2\n1\n")
    with pytest.raises(InputError, match="two places"): run(tmp_path/"ids", None)
    (tmp_path/"ids"/"test_ids.txt").unlink()
    run(tmp_path/"ids", tmp_path/"data")
    assert list(texts(tmp_path/"data")) == ["test0", "test1", "test2"]


def test_trap_2_dev_is_imported_whole(tmp_path):
    of = OF[:1]*1002
    formats.write_precomp_split(tmp_path/"a", "dev", of, 1, boxes=False, ids=range(1002))
    about, said = run(tmp_path/"a", None)
    assert (about["splits"]["minival"]["captions"] == 5010
            and "beyond the 5,000 that other programs use, imported too: 10" in said)


def test_trap_3_test_and_testall(tmp_path):
    a = tmp_path/"a"
    formats.write_precomp_split(a, "train", OF[:2], 1)
    formats.write_precomp_split(a, "test", OF[2:3], 5)
    formats.write_precomp_split(a, "testall", OF[2:5], 5)
    about, _ = run(a, tmp_path/"data")
    numbers = [str(p.number) for p in OF]
    assert (about["splits"]["test"]["images"] == 3
            and list(read_json(tmp_path/"data"/"test_captions.json")) == numbers[2:5])
    assert (tmp_path/"data"/"test_img_keys_1k.tsv").read_text().split() == numbers[2:3]
    assert (tmp_path/"data"/"test_img_keys.tsv").read_text().split() == numbers[2:5]
    formats.write_precomp_split(a, "test", OF[5:6], 5)
    with pytest.raises(InputError, match="an image of testall too"): run(a, None)


def test_trap_3_folds(tmp_path):
    of = OF[:1]*5000
    formats.write_precomp_split(tmp_path/"a", "testall", of, 1, boxes=False, ids=range(5000))
    run(tmp_path/"a", tmp_path/"data")
    assert (tmp_path/"data"/"test_img_keys_1k.tsv").read_text().split() == [str(i) for i in range(1000)]
    assert (tmp_path/"data"/"test_img_keys_1k_fold3.tsv").read_text().split() == [str(i) for i in range(2000, 3000)]


def test_trap_4_any_number_of_captions_in_json(tmp_path):
    of = formats.pictures()
    for k, p in enumerate(of): p.captions = [f"caption {j}" for j in range(5 + k % 3)]
    about, _ = run(formats.write_bottom_up(tmp_path, of), tmp_path/"data", formats.write_coco(tmp_path, of))
    assert (sorted(len(t) for t in texts(tmp_path/"data").values()) == [5, 5, 6, 6, 7, 7]
            and about["splits"]["train"]["captions"] == 36)


def test_trap_5_places(tmp_path):
    "Flickr30k's features are named by the place in Karpathy's file; never where a file has such a name."
    source = folder(tmp_path, "bu_att")
    for k, p in enumerate(OF): np.savez(source/f"{k}.npz", feat=p.vectors)
    captions = formats.write_karpathy(tmp_path, OF, coco=False)
    about, said = run(tmp_path, tmp_path/"data", captions, boxes=False, format="teran")
    store = RegionStore(tmp_path/"data"/"regions")
    assert about["pairing"] == "place" and "paired by place" in said
    for p in OF: np.testing.assert_array_equal(store.features(p.number)[:, :-6], p.vectors)
    shutil.move(source/"0.npz", source/"31014.npz")
    with pytest.raises(InputError, match="ids or file names that agree"):
        run(tmp_path, None, captions, boxes=False, format="teran")
    shutil.move(source/"31014.npz", source/f"{OF[3].number}.npz")
    about, _ = run(tmp_path, None, captions, boxes=False, format="teran", allow_missing=True)
    assert about["pairing"] == "id" and about["images"] == 1  # rules are never mixed


def test_trap_5_other_captions_for_precomp(tmp_path):
    """Named captions take the place of the source's own, paired by place or by the file names of id_mapping.json; keys
    follow."""
    of, a = OF[:5], tmp_path/"a"
    for name, some, times in (("train", of[:2], 1), ("test", of[2:3], 5), ("testall", of[2:5], 5)):
        formats.write_precomp_split(a, name, some, times, boxes=False, ids=[of.index(p) for p in some])
    captions = formats.write_karpathy(tmp_path, of, coco=False, splits=("train", "train", "test", "test", "test"))
    for rule in ("place", "file name"):
        about, said = run(a, tmp_path/rule, captions)
        assert (about["pairing"] == rule and "captions of the features' source not used" in said
                and about["splits"]["test"]["images"] == 3)
        store = RegionStore(tmp_path/rule/"regions")
        for p in of: np.testing.assert_array_equal(store.features(p.number)[:, :-6], p.vectors)
        assert (tmp_path/rule/"test_img_keys_1k.tsv").read_text().split() == [str(of[2].number)]
        (a/"id_mapping.json").write_text(json.dumps({str(k): f"{p.number}.jpg" for k, p in enumerate(of)}))


def test_trap_6_broken_and_double_rows(tmp_path):
    rows, path = [formats.bottom_up_row(p) for p in OF], tmp_path/"a.tsv"
    path.write_text("\n".join([rows[0][:-7], *rows, rows[1]]) + "\n")
    about, said = run(path, tmp_path/"data")
    assert "damaged rows passed over" in said and "equal rows of one image" in said and about["images"] == 6
    np.testing.assert_array_equal(RegionStore(tmp_path/"data"/"regions").features(OF[0].number)[:, :-6], OF[0].vectors)
    path.write_text("\n".join([*rows[1:], rows[0][:-7]]) + "\n")
    with pytest.raises(InputError, match=f"row 5 .image {OF[0].number}"): run(path, None)
    changed = formats.pictures(seed=3)[0]
    path.write_text("\n".join([*rows, formats.bottom_up_row(changed)]) + "\n")
    with pytest.raises(InputError, match="different ones: a.tsv row 0, a.tsv row 6"): run(path, None)


def test_trap_7_padding(tmp_path):
    p = OF[0]
    def write(vectors):
        with h5py.File(tmp_path/"a.h5", "w") as f:
            f.update({"1_features": vectors,
                      "1_boxes": np.concatenate([p.boxes, np.zeros((len(vectors) - 5, 4), np.float32)])})
    zeros = np.zeros((4, formats.DIM), np.float32)
    write(np.concatenate([p.vectors, zeros]))
    about, said = run(tmp_path/"a.h5", None, boxes=False)
    assert about["regions"] == 5 and "rows of zeros at the end, dropped: 4" in said
    write(np.concatenate([p.vectors[:2], zeros[:1], p.vectors[2:]]))
    with pytest.raises(InputError, match="rows of zeros at the end only"): run(tmp_path/"a.h5", None, boxes=False)


def test_trap_8_sizes(tmp_path):
    "In order: the format, the captions, the pictures; without any, --no-boxes."
    source = formats.write_teran(folder(tmp_path, "teran"), OF)
    for k, p in enumerate(OF): write_picture(tmp_path/"pictures"/f"{p.name}.jpg", seed=k, size=(p.width, p.height))
    captions = formats.write_token(tmp_path, OF)
    with pytest.raises(InputError, match="--no-boxes"): run(source, None, captions)
    about, said = run(source, tmp_path/"plain", captions, boxes=False)
    assert (not about["boxes"] and "six zeros" in said
            and not RegionStore(tmp_path/"plain"/"regions").features(OF[0].number)[:, -6:].any())
    run(source, tmp_path/"data", captions, images=str(tmp_path/"pictures"))
    store = RegionStore(tmp_path/"data"/"regions")
    for p in OF:
        np.testing.assert_array_equal(store.features(p.number)[:, -6:], box_geometry(p.boxes, (p.width, p.height)))
    assert len(read_json(tmp_path/"data"/"pictures.json")["files"]) == 6


def test_trap_8_exchanged_sides(tmp_path):
    rows = [formats.bottom_up_row(p).split("\t") for p in OF]
    (tmp_path/"a.tsv").write_text("".join("\t".join([r[0], r[2], r[1], *r[3:]]) + "\n" for r in rows))
    with pytest.raises(InputError, match="width and height are exchanged"): run(tmp_path/"a.tsv", None)


@pytest.mark.parametrize("change, said", [
    (lambda b: b + 600, "a box inside the picture"),
    (lambda b: b[:, [2, 3, 0, 1]], "x1 <= x2"),
    (lambda b: b - 600, "a box inside the picture"),
    (lambda b: b*np.float32(np.nan), "finite boxes")])
def test_boxes_that_are_refused(change, said, tmp_path):
    p = formats.pictures()[0]
    p.boxes = change(p.boxes)
    with pytest.raises(InputError, match=said): run(formats.write_bottom_up(tmp_path, [p]), None)


def test_trap_9_no_boxes_and_no_tags_are_said(tmp_path):
    about, said = run(formats.write_precomp(tmp_path/"a", OF, boxes=False), tmp_path/"data")
    info = read_json(tmp_path/"data"/"regions"/"store.json")
    assert "no boxes" in said and "no tags" in said and info["has_boxes"] is info["has_tags"] is about["boxes"] is False


def test_trap_10_number_format(tmp_path):
    "float16 only where asked for, and then only numbers that fit."
    source, coco = formats.write_uniter(folder(tmp_path, "source"), OF), formats.write_coco(tmp_path, OF)
    for dtype in ("float32", "float16"):
        run(source, tmp_path/dtype, coco, dtype=dtype)
        assert RegionStore(tmp_path/dtype/"regions").dtype == np.dtype(dtype)
    of = formats.pictures()
    of[2].vectors = of[2].vectors*np.float32(1e6)
    with pytest.raises(InputError, match="--dtype float32"):
        run(formats.write_bottom_up(tmp_path, of), None, dtype="float16")


def test_trap_11_rows_of_hdf5(tmp_path):
    "The pickle beside the file decides which row is whose."
    source = formats.write_hdf5_fixed(folder(tmp_path, "source"), OF)
    rows = {p.number: 5 - i for i, p in enumerate(OF)}
    formats.write_rows_pickle(source/"train36_imgid2idx.pkl", OF, rows)
    run(source, tmp_path/"data")
    store = RegionStore(tmp_path/"data"/"regions")
    for p in OF: np.testing.assert_array_equal(store.features(p.number)[:, :-6], OF[rows[p.number]].vectors)
    for wrong in ({p.number: 0 for p in OF}, {p.number: i + 1 for i, p in enumerate(OF)}, [1, 2]):
        (source/"train36_imgid2idx.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(InputError): run(source, None)
    (source/"train36_imgid2idx.pkl").unlink()
    with pytest.raises(InputError, match="imgid2idx"): run(source, None)


def test_trap_12_lines(tmp_path):
    "Equal captions of different images stay apart; an empty line is named."
    of = formats.pictures()
    for p in of: p.captions = ["a dog ."]*5
    formats.write_precomp(tmp_path/"a", of)
    run(tmp_path/"a", tmp_path/"data")
    assert len(texts(tmp_path/"data")) == 6
    path = tmp_path/"a"/"train_caps.txt"
    path.write_text(path.read_text().replace("a dog .\n", "\n", 1))
    with pytest.raises(InputError, match="line 1.*empty line"): run(tmp_path/"a", None)


# What else must be refused or said


def test_images_without_partner(tmp_path):
    features, coco = formats.write_bottom_up(tmp_path, OF[:5]), formats.write_coco(tmp_path, OF[1:])
    with pytest.raises(InputError, match="1 of 5 images with features without captions.*--allow-missing"):
        run(features, None, coco)
    about, said = run(features, None, coco, allow_missing=True)
    assert (about["images"] == 4 and "features without captions, left out: 1 (first: 900)" in said
            and "captions without features, left out: 1" in said)


def test_an_image_in_two_splits(tmp_path):
    formats.write_precomp_split(tmp_path/"a", "train", OF[:2], 1)
    formats.write_precomp_split(tmp_path/"a", "test", OF[1:3], 5)
    with pytest.raises(InputError, match="it is in train too"): run(tmp_path/"a", None)
    features = formats.write_bottom_up(tmp_path, OF)
    train, _ = formats.write_blip(tmp_path, OF)
    shutil.copy(train, tmp_path/"coco_karpathy_test.json")
    with pytest.raises(InputError, match="train and test"):
        run(features, None, [train, tmp_path/"coco_karpathy_test.json"])


def test_vectors_that_are_refused(tmp_path):
    for name, change in dict(nan=np.nan, infinity=np.inf).items():
        of = formats.pictures()
        of[4].vectors[2, 3] = change
        with pytest.raises(InputError, match=f"image {of[4].number}.*finite"):
            run(formats.write_bottom_up(tmp_path, of), None)
    of = formats.pictures()
    of[4].vectors = of[4].vectors[:, 1:]
    with pytest.raises(InputError, match=r"regions, 16"): run(formats.write_bottom_up(tmp_path, of), None)
    of = formats.pictures()
    of[0].vectors -= 1
    assert "negative numbers" in run(formats.write_bottom_up(tmp_path, of), None)[1]


def test_transposed_arrays_that_are_ambiguous(tmp_path):
    np.savez(tmp_path/"a.npz", x=np.ones((4, 4), np.float32), bbox=np.ones((4, 4), np.float32), image_w=9, image_h=9)
    with pytest.raises(InputError, match="4 regions of 4 numbers"): run(tmp_path, None)


def test_two_formats_and_none(tmp_path):
    source = formats.write_teran(folder(tmp_path, "a"), OF)
    formats.write_precomp(source, OF)
    with pytest.raises(InputError, match="--from"): run(source, None)
    assert run(source, None, format="precomp")[0]["images"] == 6
    (tmp_path/"x.tsv").write_text("1\t2\tAAAA\n")
    with pytest.raises(InputError, match="a table with tabs"): run(tmp_path/"x.tsv", None)
    with pytest.raises(InputError, match="nothing there"): run(tmp_path/"none", None)
    with pytest.raises(InputError, match="unknown format"): run(source, None, format="precompute")


def test_flickr8k_lists(tmp_path):
    formats.write_token(tmp_path, OF)
    path = tmp_path/"Flickr8k.token.txt"
    path.write_text((tmp_path/"results_20130124.token").read_text() + "2258277193_586949ec62.jpg.1#0\tA man .\n")
    for split, some in dict(train=OF[:2], dev=OF[2:3], test=OF[3:5]).items():
        (tmp_path/f"Flickr_8k.{split}Images.txt").write_text("".join(f"{p.name}.jpg\n" for p in some))
    features = formats.write_bottom_up(tmp_path, OF)
    about, said = run(features, None, path)
    assert {s: o["images"] for s, o in about["splits"].items()} == dict(train=2, minival=1, test=2)
    assert "pictures that do not exist: 1" in said and "in no split, left out: 1" in said


def test_lists_as_splits(tmp_path):
    (tmp_path/"train.txt").write_text("".join(f"{p.name}.jpg\n" for p in OF[:4]))
    (tmp_path/"test.txt").write_text("".join(f"{p.number}\n" for p in OF[4:]))
    options = dict(split=[f"train={tmp_path/'train.txt'}", f"test={tmp_path/'test.txt'}"])
    about, _ = run(formats.write_bottom_up(tmp_path, OF), None, formats.write_results_csv(tmp_path, OF), **options)
    assert {s: o["images"] for s, o in about["splits"].items()} == dict(train=4, test=2)


def test_the_broken_row_of_results_csv(tmp_path):
    about, said = run(formats.write_results_csv(tmp_path, OF), None)
    assert "lost separator, repaired: 1 (first: line 31)" in said
    (tmp_path/"results.csv").write_text("image_name| comment_number| comment\n1.jpg| four a dog\n")
    with pytest.raises(InputError, match="line 2"): run(tmp_path/"results.csv", None)


# Hostile files


class Hostile:
    def __reduce__(self): return Path.touch, (Path("hostile_file_was_run"),)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working folder that must stay free of the file that hostile pickles make."
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path/"hostile_file_was_run").exists()


def objects(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize("value", [
    Hostile(),
    dict(image_w=Hostile(), image_h=1),
    dict(image_w=objects(1), image_h=1),
    os.system,
    7
], ids=["call", "in a dict", "array of objects", "name", "number"])
def test_hostile_sizes(value, here):
    formats.write_precomp(here/"a", OF)
    np.save(here/"a"/"train_ims_size.npy", objects(value, value), allow_pickle=True)
    with pytest.raises(InputError): run(here/"a", None)


@pytest.mark.parametrize("name", ["train_ims.npy", "train_ims_bbx.npy"])
def test_object_arrays(name, here):
    formats.write_precomp(here/"a", OF)
    np.save(here/"a"/name, objects(Hostile(), Hostile()), allow_pickle=True)
    with pytest.raises(InputError, match="objects, which are pickles"): run(here/"a", None)


def test_hostile_npz(here):
    formats.write_teran(folder(here, "a"), OF)
    np.savez(here/"a"/"bu_att"/f"{OF[0].number}.npz", feat=objects(Hostile()))
    with pytest.raises(InputError, match="Object arrays"): run(here/"a", None, boxes=False)


def test_hostile_info(here):
    formats.write_mmf(folder(here, "a"), OF)
    np.save(here/"a"/f"{OF[0].name}_info.npy", objects(dict(bbox=Hostile())), allow_pickle=True)
    with pytest.raises(InputError, match="could run code"): run(here/"a", None)


def test_hostile_pickles_of_hdf5_and_lmdb(here):
    source = formats.write_hdf5_fixed(folder(here, "a"), OF)
    (source/"train36_imgid2idx.pkl").write_bytes(pickle.dumps({1: Hostile()}))
    with pytest.raises(InputError, match="could run code"): run(source, None)
    for key, values in dict(value=dict(a=Hostile()), keys=dict(a=1)).items():
        listed = Hostile() if key == "keys" else [b"a"]
        path = formats.write_database(here/f"{key}.lmdb", {"a": pickle.dumps(values), "keys": pickle.dumps(listed)})
        with pytest.raises(InputError, match="could run code"): run(path, None)


def test_hostile_torch_file(here):
    import torch
    source = formats.write_oscar(folder(here, "a"), OF)
    torch.save({1: Hostile()}, source/"train_img_frcnn_feats.pt")
    with pytest.raises(InputError, match="plain values|torch file"): run(source, None)


def test_links_of_hdf5(here):
    "Links, numbers in another file, and virtual datasets are not followed."
    formats.write_hdf5_m2(folder(here, "a"), OF)
    secret = here/"secret.bin"
    np.ones((5, formats.DIM), np.float32).tofile(secret)
    layout = h5py.VirtualLayout((5, formats.DIM), "f4")
    layout[:] = h5py.VirtualSource(str(here/"a"/"coco_detections.hdf5"), f"{OF[0].number}_features", (5, formats.DIM))
    for name in ("external", "soft", "outside", "virtual"):
        with h5py.File(here/f"{name}.h5", "w") as f:
            if name == "external":
                f["1_features"] = h5py.ExternalLink(str(here/"a"/"coco_detections.hdf5"), f"{OF[0].number}_features")
            if name == "soft": f["1_features"] = h5py.SoftLink("/elsewhere")
            if name == "outside":
                f.create_dataset("1_features", (5, formats.DIM), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
            if name == "virtual": f.create_virtual_dataset("1_features", layout)
        with pytest.raises(InputError, match="a link"): run(here/f"{name}.h5", None)


def test_hostile_msgpack(here):
    hostile = {b"nd": True, b"type": "O", b"kind": b"O", b"shape": [1], b"data": pickle.dumps([Hostile()])}
    also = dict(hostile) | {b"kind": b""}
    for k, arrays in enumerate(
            (hostile, also, {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [99], b"data": b"1234"})):
        path = formats.write_database(
            here/str(k), {"a.npz": msgpack.packb({"features": arrays, "norm_bb": arrays}), "__keys__": b'["a.npz"]'})
        with pytest.raises(InputError, match="MessagePack of numbers"): run(path, None)


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "a/../../b.txt", "C:\\a.txt", "link"])
def test_paths_of_tar(name, here):
    import tarfile
    member = tarfile.TarInfo(name)
    if name == "link": member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    formats.write_tar(here/"0.tar", [("b.txt", b"a dog"), (member, b"")])
    with pytest.raises(InputError, match="files inside the archive"): run(here/"0.tar", None)


def test_ids_that_are_paths(here):
    "An id becomes part of a file name when its picture is looked up."
    row = formats.bottom_up_row(OF[0]).split("\t")
    (here/"a.tsv").write_text("\t".join(["../../secret", *row[1:]]) + "\n")
    run(here/"a.tsv", here/"data")
    assert RegionStore(here/"data"/"regions").ids == ["..__..__secret"]
    images = [dict(id=i, file_name=f"{OF[0].name}.jpg") for i in ("../../secret",)]
    (here/"c.json").write_text(
        json.dumps(dict(images=images, annotations=[dict(id=1, image_id="../../secret", caption="a dog")])))
    with pytest.raises(InputError, match="image id"): run(formats.write_bottom_up(here, OF[:1]), None, here/"c.json")
    (here/"c.json").write_text('{"a.jpg": ["half \\ud800"]}')
    with pytest.raises(InputError, match="surrogate"): run(here/"c.json", None)


# Damaged files


def changed(data, rng):
    "The same bytes with one changed, or cut off."
    if not data: return data
    at = int(rng.integers(len(data)))
    if rng.random() < .2: return data[:at]
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1:]


FLIPPED = [k for k in formats.FEATURES if not k.startswith(("hdf5", "lmdb"))] + [k for k in formats.CAPTIONS]


@pytest.mark.parametrize("layout", FLIPPED)
def test_changed_bytes(layout, tmp_path):
    "One changed byte gives a result or an InputError with all its parts."
    of, rng = OF[:3], np.random.default_rng(7)
    write = formats.FEATURES[layout][0] if layout in formats.FEATURES else formats.CAPTIONS[layout]
    written = write(folder(tmp_path, "source"), of)
    written = written[0] if isinstance(written, list) else written
    files = sorted(p for p in (tmp_path/"source").rglob("*") if p.is_file())
    kind = formats.FEATURES[layout][1] if layout in formats.FEATURES else formats.READER_OF.get(layout, layout)
    for _ in range(EXAMPLES or 12):
        path = files[int(rng.integers(len(files)))]
        before = path.read_bytes()
        path.write_bytes(changed(before, rng))
        try: run(written, None, format=kind, boxes=layout in formats.OWN, allow_missing=True)
        except InputError as e: assert all((e.path, e.where, e.expected, e.found, e.fix))
        path.write_bytes(before)
    run(written, None, format=kind, boxes=layout in formats.OWN, allow_missing=True)


@pytest.mark.parametrize("layout", ["lmdb-uniter", "lmdb-compressed", "lmdb-vilbert", "lmdb-volta"])
def test_changed_values_of_lmdb(layout, tmp_path):
    value = {"lmdb-uniter": lambda p: formats.uniter_value(p, False),
             "lmdb-compressed": lambda p: formats.uniter_value(p, True),
             "lmdb-vilbert": lambda p: pickle.dumps(formats.vilbert_value(p)),
             "lmdb-volta": lambda p: pickle.dumps(formats.volta_value(p))}[layout](OF[0])
    keys = {"__keys__": b'["a"]'} if layout in formats.HALF else {"keys": pickle.dumps([b"a"])}
    rng, kind = np.random.default_rng(5), formats.FEATURES[layout][1]
    for n in range(EXAMPLES or 25):
        path = formats.write_database(tmp_path/str(n), {"a": changed(value, rng)} | keys)
        try: run(path, None, format=kind, boxes=False)
        except InputError as e: assert all((e.path, e.where, e.expected, e.found, e.fix))


DAMAGE = """import sys
import numpy as np
from pathlib import Path
from aladin.data.importing import ImportOptions, import_data
from aladin.files import InputError
source, kind, file, count = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
rng, before = np.random.default_rng(3), file.read_bytes()
for _ in range(count):
    at, data = int(rng.integers(min(len(before), 40_000))), bytearray(before)
    data[at] ^= 1 << int(rng.integers(8))
    file.unlink()
    file.write_bytes(data)
    try: import_data([source], None, ImportOptions(kind, boxes=False), False, lambda line: None)
    except InputError as e: assert all((e.path, e.where, e.expected, e.found, e.fix))
"""


@pytest.mark.parametrize("layout", [k for k in formats.FEATURES if k.startswith("hdf5")])
def test_changed_bytes_of_hdf5(layout, tmp_path):
    "As above, in a process of its own: the library is in C, and a crash would end all tests."
    write, kind = formats.FEATURES[layout]
    source = write(folder(tmp_path, "source"), OF[:3])
    file = next(p for p in source.iterdir() if p.suffix in (".h5", ".hdf5"))
    subprocess.run([sys.executable, "-c", DAMAGE, str(source), kind, str(file), str(EXAMPLES or 40)], check=True,
                   env=os.environ | {"PYTHONPATH": str(root)})


@pytest.mark.parametrize("layout", ["lmdb-vilbert", "lmdb-volta", "mmf"])
def test_values_of_other_types(layout, tmp_path):
    "Every entry of a pickled dict replaced by something else."
    odd = [None, "x", b"x", [], {}, -1, 10**30, float("nan"), [[1, 2], [3]], np.zeros(0), np.zeros((2, 2)),
           np.array(["x"]), True]
    value = formats.volta_value(OF[0]) if layout == "lmdb-volta" else formats.vilbert_value(OF[0])
    about = dict(bbox=OF[0].boxes, num_boxes=5, objects=OF[0].classes, image_width=9, image_height=9)
    np.save(tmp_path/"a.npy", OF[0].vectors)
    for key in (about if layout == "mmf" else value):
        for n, o in enumerate([*odd, "missing"]):
            changed = ({k: v for k, v in (about if layout == "mmf" else value).items() if k != key}
                       | ({} if n == len(odd) else {key: o}))
            source = tmp_path
            if layout == "mmf": np.save(tmp_path/"a_info.npy", changed, allow_pickle=True)
            else:
                source = formats.write_database(
                    tmp_path/f"{key}{n}", {"a": pickle.dumps(changed), "keys": pickle.dumps([b"a"])})
            for boxes in (True, False):
                try: run(source, None, boxes=boxes, format="mmf" if layout == "mmf" else "lmdb-pickle")
                except InputError as e: assert all((e.path, e.where, e.expected, e.found, e.fix))


# Resuming, the command, and what follows


def test_a_killed_import_resumes(tmp_path):
    "The process is killed; rows that were changed since are not trusted; the result is the same."
    of = OF[:1]*900
    formats.write_precomp_split(tmp_path/"a", "train", of, 1, boxes=False, ids=range(900))
    run(tmp_path/"a", tmp_path/"whole")
    code = ("import sys, time; from aladin.data import array_readers, importing; old = array_readers.Precomp.read\n"
            "def slow(self, i):\n    if int(i) > 600: time.sleep(60)\n    return old(self, i)\n"
            "array_readers.Precomp.read = slow; importing.import_data([sys.argv[1]], sys.argv[2], progress=False)")
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path/"a"), str(tmp_path/"data")], stderr=subprocess.DEVNULL)
    for _ in range(600):
        parts = list(tmp_path.glob(".data.*.parts/000001.npz"))
        if parts: break
        time.sleep(.05)
    assert parts and child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    rows = parts[0].with_name("regions.npy")
    data = bytearray(rows.read_bytes())
    data[300*formats.REGIONS*(formats.DIM + 6)*4 + 500] ^= 1
    rows.write_bytes(data)
    assert not (tmp_path/"data").exists()
    run(tmp_path/"a", tmp_path/"data")
    for p in (tmp_path/"whole").rglob("*"):
        if p.is_file(): assert p.read_bytes() == (tmp_path/"data"/p.relative_to(tmp_path/"whole")).read_bytes(), p.name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_command(tmp_path, capsys):
    source = formats.write_precomp(tmp_path/"a", OF)
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(source), "--check"]) == 0 and sorted(tmp_path.iterdir()) == before
    assert "6 images, 30 regions of 22 numbers (no tags)" in capsys.readouterr().out
    for wrong in ([], ["--check", "--out", str(tmp_path/"data")]): assert main(["import", str(source), *wrong]) == 2
    assert main(["import", str(source), "--from", "precomp", "--limit", "1", "--out", str(tmp_path/"data")]) == 0
    about = read_json(tmp_path/"data"/"import.json")
    assert (about["images"] == 3 and about["options"]["limit"] == 1
            and all(len(f["sha256"]) == 64 for s in about["sources"] for f in s["files"]))
    assert main(["import", str(tmp_path/"data"), "--check"]) == 2


def test_the_help_names_every_format():
    named = set(re.findall(r"[\w-]+", comments(COMMANDS["import"].function)["sources"]))
    assert set(FEATURE_READERS) | set(CAPTION_READERS) <= named


def test_a_missing_package_names_the_extra():
    with pytest.raises(InputError, match=r"aladin\[import\]"): need_package("no_such_package_here")


def test_import_train_evaluate(tmp_path, monkeypatch):
    "An import without boxes and tags is prepared, trained and evaluated; the table says what is missing."
    from aladin.runs.graph import experiment_config
    from aladin.runs.stages import evaluate_run, prepare_data, report, train_run
    from aladin.model.model import load_model
    of = formats.pictures(30)
    run(formats.write_precomp(tmp_path/"a", of, boxes=False), tmp_path/"data")
    prepare_data(tmp_path/"data", tmp_path/"results"/"data", progress=False)
    config = experiment_config("alad-alignment-and-matching-distill", "tiny")
    config.training.epochs, config.training.max_steps, config.training.pretrain_steps = 1, 2, 1
    folder = tmp_path/"results"/config.name/"seed-88"
    train_run(config, tmp_path/"results"/"data", folder, progress=False)
    metrics = evaluate_run(folder, tmp_path/"results"/"data", "mine", progress=False)
    model = load_model(folder/"model")
    assert metrics["without"] == ["boxes", "tags"] and not model.config.has_boxes and not model.config.has_tags
    report(tmp_path/"results", compare=False)
    assert "boxes, tags" in (tmp_path/"results"/"table.md").read_text()


# Files that others have written


def need(path):
    if not path.exists(): pytest.skip(f"{path} is not there; set ALADIN_SHARED to the folder that has it")
    return path


@pytest.fixture(scope="module")
def independent(tmp_path_factory):
    "Files written by a program that shares no code with this package, from real rows."
    script, rows = (need(SHARED/"formats"/"make_formats.py"),
                    need(SHARED/"data"/"formats"/"lxmert"/"train2014_obj36_3.tsv"))
    out = tmp_path_factory.mktemp("independent")/"files"
    subprocess.run([sys.executable, str(script), str(rows), str(out)], check=True, capture_output=True)
    return out


THEIRS = ["bottom_up_tsv/trainval_resnet101_faster_rcnn_genome_36.tsv", "bottom_up_tsv/adaptive.tsv", "lxmert_tsv",
          "teran", "uniter_npz", "milvlg_npz", "openvqa_npz", "mmf_npy", "hdf5/train36.hdf5", "hdf5/train.hdf5",
          "hdf5/coco_detections.hdf5", "hdf5/flickr30k_boxes36.h5", "lmdb_pickle/vilbert.lmdb",
          "lmdb_pickle/volta.lmdb", "lmdb_uniter/feat_th0.2_max100_min10",
          "lmdb_uniter/feat_th0.2_max100_min10_compressed"]
SPLIT_FILES = ([("precomp_scan", s) for s in ("train", "dev", "test")]
               + [("precomp_once", s) for s in ("train", "dev", "test")]
               + [("oscar_pt", s) for s in ("train", "minival", "test")])


def compare(out, data, half=False, reverse=False):
    "Compare a data folder with expected.npz and expected.json. The ids of its COCO annotations count backwards."
    expected, captions = np.load(out/"expected.npz"), read_json(out/"expected.json")
    starts = np.concatenate([[0], np.cumsum(expected["counts"])])
    store = RegionStore(data/"regions")
    for i, start, size in zip(expected["ids"], starts, expected["sizes"]):
        if str(i) not in store: continue
        rows = store.features(i)
        span = slice(start, start + len(rows))
        np.testing.assert_allclose(
            rows[:, :-6], expected["vectors"][span], rtol=2e-3 if half else 0, atol=2e-3 if half else 0)
        np.testing.assert_allclose(
            rows[:, -6:], box_geometry(expected["boxes"][span], size), rtol=0, atol=2e-3 if half else 1e-6)
    assert texts(data) and all(captions[i] == t[::-1 if reverse else 1] for i, t in texts(data).items())
    return store


@pytest.mark.parametrize("source", THEIRS)
def test_independent_files(source, independent, tmp_path):
    if not (independent/source).exists(): pytest.skip(f"{source} was not written: a package is missing")
    run(independent/source, tmp_path/"data", independent/"captions"/"captions_train2014.json")
    assert len(compare(independent, tmp_path/"data", "uniter" in source, reverse=True)) == 3


@pytest.mark.parametrize("source, split", SPLIT_FILES)
def test_independent_splits(source, split, independent, tmp_path):
    "Its splits share images, which is refused; one at a time they are read."
    with pytest.raises(InputError, match="one split"): run(independent/source, None)
    only = folder(tmp_path, "only")
    for p in (independent/source).glob(f"{split}_*"): shutil.copy(p, only)
    run(only, tmp_path/"data")
    assert len(compare(independent, tmp_path/"data")) in (1, 2, 3)


@pytest.mark.parametrize("source", [
    "dataset_coco.json", "captions_train2014.json", "results_20130124.token", "results.csv", "coco_karpathy_train.json",
    "coco_karpathy_test.json"])
def test_independent_captions(source, independent, tmp_path):
    captions = read_json(independent/"expected.json")
    run(independent/"captions"/source, tmp_path/"data")
    # the ids of its COCO annotations count backwards
    found, step = texts(tmp_path/"data"), -1 if source.startswith("captions_") else 1
    assert found and all([c.replace("|", "/") for c in captions[i]] == [c.replace("|", "/") for c in t[::step]]
                         for i, t in found.items())


@pytest.mark.parametrize("source", [
    "hub/test-00000-of-00001.parquet", "hub/train-00000-of-00001.parquet",
    "hub/coco_caption_karpathy_test.arrow", "wds"])
def test_independent_hub_files(source, independent, tmp_path):
    run(need(independent/source), tmp_path/"data")
    captions = list(read_json(independent/"expected.json").values())
    assert sorted(texts(tmp_path/"data").values()) == sorted(captions)


def test_real_lxmert_rows(tmp_path):
    about, said = run(need(SHARED/"data"/"formats"/"lxmert"), tmp_path/"data")
    store = RegionStore(tmp_path/"data"/"regions")
    assert (about["images"], about["regions"], about["dim"]) == (3, 108, 2054) and store.size(store.ids[0])


def test_real_precomp_lists(tmp_path):
    "Real ids and captions of Flickr30k's dev set, with generated vectors: each id five times, 1,014 images."
    source, a = need(SHARED/"data"/"formats"/"f30k_precomp"), folder(tmp_path, "a")
    for name in ("dev_ids.txt", "dev_caps.txt"): shutil.copy(source/name, a)
    shutil.copy(source/"id_mapping_part.json", a/"id_mapping.json")
    ids = (source/"dev_ids.txt").read_text().split()
    np.save(a/"dev_ims.npy", np.repeat(np.random.default_rng(0).random((1014, 2, 4), np.float32), 5, 0))
    about, said = run(a, tmp_path/"data")
    assert about["splits"]["minival"] == dict(images=1014, captions=5070) and "imported too: 70" in said
    found = read_json(tmp_path/"data"/"minival_captions.json")
    assert (list(found) == ids[::5]
            and [c for t in found.values() for c in t]
                == [c.strip() for c in (source/"dev_caps.txt").read_text().splitlines()])


def test_real_captions_of_coco(tmp_path):
    path = need(SHARED/"data"/"formats"/"coco_captions"/"captions_train2017_mini.json")
    about, _ = run(path, tmp_path/"data")
    notes = sorted(read_json(path)["annotations"], key=lambda o: o["id"])
    found = read_json(tmp_path/"data"/"train_captions.json")
    assert about["splits"]["train"] == dict(images=80, captions=400)
    for i, t in found.items(): assert t == [o["caption"].strip() for o in notes if str(o["image_id"]) == i]


def test_real_captions_of_flickr8k(tmp_path):
    about, _ = run(need(SHARED/"data"/"formats"/"flickr8k_text"/"Flickr8k.token.txt"), tmp_path/"data")
    assert {s: o["images"] for s, o in about["splits"].items()} == dict(train=20, minival=20, test=20)


def test_real_photographs_of_flickr8k():
    about, _ = run(need(SHARED/"data"/"flickr8k"/"photos"), None)
    assert {s: o["images"] for s, o in about["splits"].items()} == dict(train=6000, minival=1000, test=1000)
