"""From pictures to answers: extraction with both kinds of detector, kills, broken pictures, real photographs where they
are at hand."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from aladin.model.model import load_model
from aladin.cli.main import main
from aladin.data.text import read_captions
from aladin.data.splits import open_split
from aladin.view.explorer import Explorer
from aladin.files import InputError, locked, read_json
from aladin.data.pictures import picture_endings
from aladin.data.extract import Detector, extract, make_detector
from aladin.data.pictures import find_pictures, open_picture
from aladin.view.plots import Attention, plot_attention
from aladin.data.regions import TsvFile, TsvRegions, convert_regions
from aladin.model.alignment import Alignment
from aladin.search.index import Hit, SearchIndex
from aladin.data.pictures import Pictures
from aladin.search.page import search_page
from small_inputs import write_data, write_model, write_picture

photographs = Path(__file__).resolve().parent.parent.parent/"shared"/"data"/"coco_images"


def draw(folder, count=12):
    "Pictures of several sizes and forms, one turned by EXIF, one grey, one with transparency, two broken."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (60 + 7*i, 90 - 3*i, 3), np.uint8)).save(folder/f"{i:02d}.jpg")
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
    """Boxes lie in their pictures; the six numbers of each region are its box in VinVL's order, x1 y1 x2 y2 h w,
    relative."""
    for i, size in sizes.items():
        assert store.size(i) == size
        rects, vectors = store.rects(i), store.features(i)
        assert least <= len(rects) == len(vectors) == len(store.tags(i)) <= most
        x1, y1, x2, y2 = rects.T
        assert ((0 <= x1).all() and (x1 <= x2).all() and (x2 <= size[0] + 1e-3).all() and (0 <= y1).all()
                and (y1 <= y2).all() and (y2 <= size[1] + 1e-3).all())
        width, height = size
        np.testing.assert_allclose(
            vectors[:, -6:],
            np.stack([x1/width, y1/height, x2/width, y2/height, (y2 - y1)/height, (x2 - x1)/width], 1), atol=1e-3)
        assert (np.diff(store.confidences(i)) <= 0).all() and np.isfinite(vectors).all()


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_extract(kind, detectors, tmp_path):
    folder, lines = draw(tmp_path/"pictures"), []
    store = extract(folder, Detector(str(detectors/kind), least=3, most=8), tmp_path/"data", progress=False,
                    report=lines.append)
    sizes = {i: open_picture(p).size for i, p in find_pictures(folder).items() if i not in ("cut", "text")}
    assert store.ids == list(sizes) and store.size("turned") == (60, 120)
    check_geometry(store, sizes, 3, 8)
    assert len(lines) == 2 and "cut.jpg" in lines[0] and "text.png" in lines[1]
    about = json.loads((tmp_path/"data"/"pictures.json").read_text())
    assert set(about["skipped"]) == {"cut", "text"} and about["files"]["turned"] == "turned.jpg"
    half = extract(folder, Detector(str(detectors/kind), least=3, most=8), tmp_path/"half", dtype="float16",
                   progress=False, report=lines.append)
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
    assert (ImageOps.exif_transpose(Image.open(folder/"lying.png")).size == upright.size
            != Image.open(folder/"lying.png").size)
    store = extract(folder, Detector(str(detectors/"detr")), tmp_path/"data", batch_size=1, progress=False)
    np.testing.assert_array_equal(store.features("lying"), store.features("upright"))


def test_killed_extraction_goes_on(detectors, tmp_path, monkeypatch):
    folder = draw(tmp_path/"pictures")
    script = f"""
import os, signal, aladin.data.extract as p
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
    import aladin.data.extract as pictures
    made, inner = [], pictures._extract_part
    monkeypatch.setattr(pictures, "_PART", 4)
    monkeypatch.setattr(
        pictures, "_extract_part",
        lambda detector, part, path, *others: made.append(path.name) or inner(detector, part, path, *others))
    again = extract(folder, Detector(str(detectors/"detr")), tmp_path/"data", progress=False, report=lambda line: None)
    assert len(made) == 3 and not before & set(made)  # what was there was not made again
    assert not list(tmp_path.glob(".data.*"))
    whole = extract(folder, Detector(str(detectors/"detr")), tmp_path/"other", progress=False, report=lambda line: None)
    assert again.ids == whole.ids
    for i in whole.ids: np.testing.assert_array_equal(again.features(i), whole.features(i))


def test_command_trains_and_searches(detectors, tmp_path, capsys):
    "A folder of pictures with captions becomes a data set that trains; its model finds pictures."
    from aladin.runs.stages import prepare_data, train_run
    from aladin.runs.graph import experiment_config
    folder = draw(tmp_path/"pictures", 20)
    rows = [f"{p.name},a picture number {p.stem},{split}" for n, p in enumerate(sorted(folder.glob("[0-9]*.jpg")))
            for split in [("train", "train", "minival", "test")[n % 4]]]
    (tmp_path/"captions.csv").write_text("image,caption,split\n" + "\n".join(rows) + "\nabsent.jpg,nothing,train\n")
    assert main(["extract", "--images", str(folder), "--detector", str(detectors/"detr"),
                 "--captions", str(tmp_path/"captions.csv"), "--out", str(tmp_path/"data")]) == 0
    assert len(read_captions(tmp_path/"data"/"train_captions.json")) == 10
    assert "1 pictures of" in capsys.readouterr().err
    prepare_data(tmp_path/"data", tmp_path/"prepared", progress=False)
    config = experiment_config("alad-alignment-and-matching-distill", "tiny", 1)
    config.training.max_steps, config.training.pretrain_steps = 2, 0
    train_run(config, tmp_path/"prepared", tmp_path/"run", progress=False)
    assert main(["index", "--model", str(tmp_path/"run"/"model"), "--data", str(tmp_path/"data"),
                 "--out", str(tmp_path/"index")]) == 0
    assert "23 pictures, 20 captions" in capsys.readouterr().out
    assert main(["search", "a picture number 3", "--index", str(tmp_path/"index"), "--show", str(tmp_path/"page.html"),
                 "-k", "3"]) == 0
    assert (tmp_path/"page.html").read_text().count("data:image/jpeg") == 3
    assert main(["search", "x", "--index", str(tmp_path/"nothing")]) == 2


@pytest.mark.skipif(
    not photographs.is_dir(), reason="the photographs lie beside the checkout of those who develop the package")
def test_photographs(detectors, tmp_path):
    "COCO's photographs with their captions: 24 of them, sizes as the files have them, captions by file name."
    about = json.loads((photographs/"annotations.json").read_text())
    (tmp_path/"captions.json").write_text(json.dumps({name: o["captions"] for name, o in about.items()}))
    store = extract(photographs, Detector(str(detectors/"rt_detr"), least=10, most=15), tmp_path/"data",
                    captions=tmp_path/"captions.json", batch_size=4, progress=False)
    sizes = {Path(name).stem: Image.open(photographs/name).size for name in about}
    assert set(store.ids) == set(sizes)
    check_geometry(store, sizes, 10, 15)
    texts = {s: read_captions(tmp_path/"data"/f"{s}_captions.json") for s in ("train", "minival", "test")}
    assert {s: len(o) for s, o in texts.items()} == dict(train=20, minival=2, test=2)
    assert ({i: c for o in texts.values() for i, c in o.items()}
            == {Path(name).stem: o["captions"] for name, o in about.items()})


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "hub:NAME"),
    (lambda p: p.mkdir(), "object detector that transformers can load")])
def test_no_detector(tmp_path, make, message):
    make(tmp_path/"detector")
    with pytest.raises(InputError, match=message): Detector(str(tmp_path/"detector"))


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_a_failing_picture_leaves_its_batch_alone(kind, detectors, tmp_path, monkeypatch):
    "Narrow ones among them; the others' regions are those of an extraction without it."
    for n in range(5): write_picture(tmp_path/"all"/f"{n}.png", seed=n)
    write_picture(tmp_path/"all"/"narrow.png", (5000, 2))
    detector, inner, calls = Detector(str(detectors/kind)), Detector.__call__, []
    def fails_on_narrow(self, some):
        calls.append(len(some))
        if any(p.size == (5000, 2) for p in some): raise RuntimeError("too narrow")
        return inner(self, some)
    monkeypatch.setattr(Detector, "__call__", fails_on_narrow)
    lines = []
    store = extract(tmp_path/"all", detector, tmp_path/"data", progress=False, report=lines.append)
    (tmp_path/"all"/"narrow.png").unlink()
    alone = extract(tmp_path/"all", detector, tmp_path/"alone", progress=False)
    assert (store.ids == alone.ids == list("01234") and len(lines) == 1 and "narrow.png" in lines[0]
            and "too narrow" in lines[0])
    for i in store.ids: np.testing.assert_array_equal(store.features(i), alone.features(i))
    assert "too narrow" in read_json(tmp_path/"data"/"pictures.json")["skipped"]["narrow"]
    assert calls == [6, 1, 1, 1, 1, 1, 1, 5, 5]


def test_pictures_of_every_kind(detectors, tmp_path):
    "First frames, CMYK, palettes, transparency, one bit, 16 bits: each is extracted as its RGB form."
    folder = tmp_path/"pictures"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8))
    noise.convert("P").save(folder/"film.gif", save_all=True, append_images=[Image.new("P", (60, 50))])
    noise.convert("CMYK").save(folder/"print.jpg")
    noise.convert("P").save(folder/"palette.png", transparency=3)
    noise.convert("RGBA").save(folder/"clear.webp", lossless=True)
    noise.convert("1").save(folder/"bits.tif")
    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60)*20).save(folder/"deep.png")
    if ".avif" in picture_endings(): noise.save(folder/"new.AVIF")
    found = find_pictures(folder)
    assert (len(found) == len(list(folder.iterdir()))
            and all((o := open_picture(p)).mode == "RGB" and o.size == (60, 50) for p in found.values()))
    assert open_picture(folder/"film.gif").getextrema() != ((0, 0),)*3
    np.testing.assert_array_equal(np.asarray(open_picture(folder/"clear.webp")), np.asarray(noise))
    assert len(extract(folder, Detector(str(detectors/"detr")), tmp_path/"data", progress=False)) == len(found)


@pytest.mark.parametrize("limit", [1000, 5000])
def test_oversized_pictures_are_left_out_everywhere(detectors, tmp_path, monkeypatch, limit):
    "Extraction, page and explorer resume with the others; a picture at which Pillow warns is read."
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    write_picture(tmp_path/"pictures"/"small.png", (30, 30))
    write_picture(tmp_path/"pictures"/"large.png", (90, 90))
    store = extract(tmp_path/"pictures", Detector(str(detectors/"detr")), tmp_path/"data", progress=False,
                    report=lambda line: None)
    left_out = ["large"] if limit == 1000 else []
    assert set(store.ids) == {"small", "large"} - set(left_out)
    assert list(read_json(tmp_path/"data"/"pictures.json")["skipped"]) == left_out
    hits = [Hit(i, i, 1., .5, None,
                Alignment(["a"], np.array([[0, 0, 1, 1]], np.float32), None, np.ones((1, 1), np.float32)))
            for i in ("small", "large")]
    search_page(tmp_path/"page.html", [("a", hits)], Pictures(tmp_path/"pictures"))
    assert ((page := (tmp_path/"page.html").read_text()).count("data:image/jpeg") == 2
            and page.count('<p class="note">') == len(left_out))


def test_figures_of_narrow_and_damaged_pictures(tmp_path):
    "Both directions are drawn; a damaged picture raises an error that names it."
    pair = Attention("1", "a", ["a"], np.array([[.1, 0, .4, .5]], np.float32), None, np.ones((1, 1), np.float32), 1.)
    for size in ((5000, 2), (2, 5000)):
        write_picture(tmp_path/"narrow.png", size)
        assert max(plot_attention(pair, tmp_path/"narrow.png").axes[0].images[0].get_array().shape) == 320
    (tmp_path/"narrow.png").write_bytes((tmp_path/"narrow.png").read_bytes()[:99])
    with pytest.raises(InputError, match="narrow.png"): plot_attention(pair, tmp_path/"narrow.png")


def test_pictures_without_boxes_are_recorded(detectors, tmp_path, monkeypatch):
    "The others are written; index and encode do not see them."
    for n in range(3): write_picture(tmp_path/"pictures"/f"{n}.png", seed=n)
    inner = Detector.__call__
    def nothing_in_the_second(self, some):
        return [{k: v[:0] for k, v in o.items()} if n == 1 else o for n, o in enumerate(inner(self, some))]
    monkeypatch.setattr(Detector, "__call__", nothing_in_the_second)
    (tmp_path/"captions.csv").write_text("image,caption,split\n0,one,train\n1,two,train\n2,three,test\n")
    lines = []
    store = extract(tmp_path/"pictures", Detector(str(detectors/"detr")), tmp_path/"data", tmp_path/"captions.csv",
                    progress=False, report=lines.append)
    assert (store.ids == ["0", "2"] and "boxes" in read_json(tmp_path/"data"/"pictures.json")["skipped"]["1"]
            and "1.png" in lines[0])
    assert list(read_captions(tmp_path/"data"/"train_captions.json")) == ["0"]


def test_a_count_of_zero_beside_vectors_is_an_error(tmp_path):
    "And so is a row of another image; neither is taken for an image without regions."
    data = write_data(tmp_path/"data", 3)
    content = (data/"features.tsv").read_bytes()
    (data/"features.tsv").write_bytes(content.replace(b"1001\t6", b"1001\t0"))
    with pytest.raises(InputError, match="image 1001"): convert_regions(data, tmp_path/"store", progress=False)
    assert TsvRegions(data).empty == [] and not (tmp_path/"store").exists()


def test_looking_for_empty_rows_reads_only_short_ones(tmp_path, monkeypatch):
    data, read = write_data(tmp_path/"data", 30), []
    monkeypatch.setattr(
        TsvFile, "_line",
        (lambda inner: lambda self, i, limit=None: read.append(i) or inner(self, i, limit))(TsvFile._line))
    assert len(TsvRegions(data)) == 30 and set(read) == {0}  # the first row gives the width


def test_every_image_without_regions(tmp_path):
    data = write_data(tmp_path/"data", 2)
    (data/"features.tsv").write_text("1000\t0\t\n1001\t0\t\n")
    (data/"features.lineidx").write_text("0\n8\n")
    with pytest.raises(InputError, match="at least one with regions"): TsvRegions(data)


def test_sets_of_size_zero_are_searched_and_explored(tmp_path):
    "Images of one region, which the model leaves out, beside others: a score of 0, and every view of them works."
    data = write_data(tmp_path/"data", 3, regions=1)
    model = write_model(tmp_path/"model")
    index = tmp_path/"index"
    assert main(["index", "--model", str(model), "--data", str(data), "--out", str(index)]) == 0
    assert main(["search", "a red fish", "--index", str(index), "--show", str(tmp_path/"page.html")]) == 0
    assert main(["search", "--image", "1000", "--index", str(index)]) == 0
    opened = SearchIndex.open(index)
    assert [h.score for h in opened.search("a red fish", explain=True)] == [0, 0, 0]
    assert opened.pair("a red fish", "1000").alignment.cosines.shape == (0, 3)
    explorer = Explorer(opened)
    explorer.ask = dict(query="a red fish", heads=["alignment"], image="1001", number=4)
    assert ("error" not in explorer.answer and explorer.answer["pair"]["score"] == 0
            and explorer.answer["pair"]["regions"] == [])
    json.dumps(explorer.answer, allow_nan=False)


@pytest.mark.parametrize("engine", ["exact", "faiss", "milvus"])
def test_long_ids_in_each_engine(tmp_path, engine):
    """Up to 500 bytes, spaces, quotes and non-ASCII characters; beyond, a refusal before anything is written. Vanished
    ones are pruned."""
    if engine == "milvus": pytest.importorskip("milvus_lite")
    odd = ["a b \"c\" 'd' \\ é", "図"*166, "x"*500]
    data, model = write_data(tmp_path/"data", ids=odd), load_model(write_model(tmp_path/"model"))
    index = SearchIndex.build(
        model, open_split(data, "test", model.processor), tmp_path/"index", engine, progress=False)
    assert {h.id for h in index.search("a red fish", k=9)} == set(index.image_ids()) == set(odd)
    index.delete([odd[1]])
    assert set(index.image_ids()) == {odd[0], odd[2]} and len(index) == 2
    index.close()
    long = write_data(tmp_path/"long", ids=["1", "y"*501])
    with pytest.raises(InputError, match="at most 500 bytes"):
        SearchIndex.build(model, open_split(long, "test", model.processor), tmp_path/"other", progress=False)
    assert not (tmp_path/"other"/"images").exists()


def test_names_that_are_too_long_are_refused(detectors, tmp_path):
    write_picture(tmp_path/"pictures"/("a"*200)/("b"*200)/f"{'c'*100}.png")
    with pytest.raises(InputError, match="at most 500 bytes"): find_pictures(tmp_path/"pictures")


class Untouched:
    "A detector that must not be asked."
    fingerprint = "x"
    def __call__(self, pictures): raise AssertionError("asked")


@pytest.mark.parametrize("spoil", [
    lambda out: (out.mkdir(), (out/"notes.txt").write_text("mine")),
    lambda out: out.write_text("mine")])
def test_the_output_is_checked_before_the_work(tmp_path, spoil):
    write_picture(tmp_path/"pictures"/"1.png")
    spoil(tmp_path/"data")
    with pytest.raises(InputError, match="output folder"):
        extract(tmp_path/"pictures", Untouched(), tmp_path/"data", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "pictures"]


def test_a_second_extraction_names_the_first(tmp_path):
    "Also where the second names the folder by a link."
    write_picture(tmp_path/"pictures"/"1.png")
    (tmp_path/"data").mkdir()
    (tmp_path/"link").symlink_to("data")
    with locked(tmp_path/".data.lock", "writing to it"):
        for name in ("data", "link"):
            with pytest.raises(InputError, match=f"process {os.getpid()} "):
                extract(tmp_path/"pictures", Untouched(), tmp_path/name, progress=False)


def test_neighbours_stay(detectors, tmp_path):
    "Files and folders of the user with names like those of work folders, also a work folder of another output."
    write_picture(tmp_path/"pictures"/"1.png")
    others = [".data.notes.parts", ".data.0123.parts", ".data2.0123456789abcdef.parts", "data.part",
              ".data.part", "data.parts"]
    for name in others:
        (tmp_path/name).mkdir()
        (tmp_path/name/"thesis.txt").write_text("mine")
    extract(tmp_path/"pictures", Detector(str(detectors/"detr")), tmp_path/"data", progress=False)
    assert all((tmp_path/name/"thesis.txt").read_text() == "mine" for name in others)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "data", "pictures"])


def test_read_only_pictures(detectors, tmp_path):
    "Pictures in a folder that nobody may write to are extracted, indexed and searched; the folder is left as it was."
    folder = tmp_path/"read only – bilder"
    for n in range(2): write_picture(folder/"höhe"/f"bild {n}.png", seed=n)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for p in (*before, folder): p.chmod(0o555 if p.is_dir() else 0o444)
    model = write_model(tmp_path/"model", dim=38)
    try:
        for words in (["extract", "--images", folder, "--detector", detectors/"detr", "--out", tmp_path/"daten ä"],
                      ["index", "--model", model, "--data", tmp_path/"daten ä", "--out", tmp_path/"index ü"],
                      ["search", "a red fish", "--index", tmp_path/"index ü", "--show", tmp_path/"seite ö.html"]):
            assert main([str(w) for w in words]) == 0
        assert ((tmp_path/"seite ö.html").read_text().count("data:image/jpeg") == 2
                and "höhe__bild 1" in (tmp_path/"seite ö.html").read_text())
        assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    finally:
        for p in (folder, folder/"höhe"): p.chmod(0o755)


def test_a_page_replaces_pages_only(tmp_path, capsys):
    "Another file is refused before the index is opened."
    (tmp_path/"notes.html").write_text("<p>mine")
    assert main(["search", "x", "--index", str(tmp_path/"no index"), "--show", str(tmp_path/"notes.html")]) == 2
    assert "notes.html" in capsys.readouterr().err and (tmp_path/"notes.html").read_text() == "<p>mine"
    for _ in range(2): search_page(tmp_path/"page.html", [], Pictures(tmp_path))
    assert '<meta name="generator" content="aladin">' in (tmp_path/"page.html").read_text()


def test_small_models_replace_their_like_only(tmp_path, capsys):
    data, out = write_data(tmp_path/"data", 4), tmp_path/"clip"
    command = ["make-clip", "--data", str(data), "--out", str(out)]
    assert main(command) == 0 and main(command) == 2 and main([*command, "--force"]) == 0
    (out/"notes.txt").write_text("mine")
    assert (main([*command, "--force"]) == 2 and "notes.txt" in capsys.readouterr().err
            and (out/"model.safetensors").exists())
    with pytest.raises(InputError, match="choose another folder"): make_detector(out)
    make_detector(tmp_path/"detr")
    assert main(["make-clip", "--data", str(data), "--out", str(tmp_path/"detr"), "--force"]) == 2
