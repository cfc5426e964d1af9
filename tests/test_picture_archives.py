"Pictures in tar archives, Parquet and Arrow files: extraction, captions, thumbnails and hostile or damaged archives."
import io
import json
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from aladin.cli.main import main
from aladin.data.encoders import make_encoder
from aladin.data.pictures import Pictures, find_pictures, open_picture
from aladin.data.regions import RegionStore
from aladin.data.splits import open_split
from aladin.files import InputError, read_json
from small_inputs import write_picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6): write_picture(folder/f"{i:06d}.png", seed=i)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")/"vit"
    make_encoder(folder, "vit")
    return folder


def split_of(i): return ("train", "train", "train", "train", "val", "test")[i]


def write_tars(photos, out):
    "An archive for each split, as WebDataset writes them; .json knows another file name."
    out.mkdir()
    for split in ("train", "val", "test"):
        with tarfile.open(out/f"{split}-000.tar", "w") as archive:
            for i in (i for i in range(6) if split_of(i) == split):
                texts = {"txt": f"dog {i}\ncat {i}\n", "json": json.dumps(dict(filename=f"photo_{i}.jpg", split=split))}
                members = {"png": (photos/f"{i:06d}.png").read_bytes()} | {k: v.encode() for k, v in texts.items()}
                for ending, content in members.items():
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def table(photos, captions_in_rows=False):
    import pyarrow as pa
    rows = [dict(image=dict(bytes=(photos/f"{i:06d}.png").read_bytes(), path=None), filename=f"{i:06d}.png",
                 split=split_of(i), captions=[f"dog {i}", f"cat {i}"]) for i in range(6)]
    if captions_in_rows: rows = [r | dict(captions=c) for r in rows for c in r["captions"]]
    return pa.Table.from_pylist(rows)


def write_parquet(photos, out):
    import pyarrow.parquet
    out.mkdir()
    pyarrow.parquet.write_table(table(photos), out/"data.parquet", row_group_size=2)


def write_caption_rows(photos, out):
    import pyarrow.parquet
    out.mkdir()
    pyarrow.parquet.write_table(table(photos, True), out/"data.parquet", row_group_size=5)


def write_arrow(photos, out):
    import pyarrow as pa
    out.mkdir()
    with (pa.OSFile(str(out/"data-00000-of-00001.arrow"), "wb") as file,
          pa.ipc.new_stream(file, table(photos).schema) as stream):
        stream.write_table(table(photos), max_chunksize=4)


WRITERS = dict(tar=write_tars, parquet=write_parquet, caption_rows=write_caption_rows, arrow=write_arrow)


@pytest.mark.parametrize("kind", WRITERS)
def test_regions_of_archives_are_those_of_the_files(kind, photos, encoder, tmp_path, capsys):
    "Same ids, vectors and captions as from a folder; the pictures are found again; nothing is unpacked."
    WRITERS[kind](photos, tmp_path/"in")
    before = sorted(p.name for p in (tmp_path/"in").iterdir())
    for images, out, more in ((photos, "plain", []), (tmp_path/"in", "packed", ["--captions", str(tmp_path/"in")])):
        options = ["--encoder", str(encoder), "--grid", "2", "--batch-size", "2"]
        assert main(["extract", "--images", str(images), "--out", str(tmp_path/out), *options, *more]) == 0
    plain, packed = (RegionStore(tmp_path/o/"regions") for o in ("plain", "packed"))
    assert sorted(packed.ids) == plain.ids == [f"{i:06d}" for i in range(6)]  # in the order of the paths
    for i in plain.ids: np.testing.assert_array_equal(packed.features(i), plain.features(i))
    captions = {s: read_json(tmp_path/"packed"/f"{s}_captions.json") for s in ("train", "minival", "test")}
    assert captions["minival"] == {"000004": ["dog 4", "cat 4"]} and captions["test"] == {"000005": ["dog 5", "cat 5"]}
    assert list(captions["train"]) == [f"{i:06d}" for i in range(4)]
    pictures = Pictures(tmp_path/"packed")
    assert pictures.thumbnail("000003") == Pictures(tmp_path/"plain").thumbnail("000003")
    np.testing.assert_array_equal(
        np.asarray(pictures.open("000005")), np.asarray(Image.open(photos/"000005.png").convert("RGB")))
    assert sorted(p.name for p in (tmp_path/"in").iterdir()) == before


def test_extraction_trains(photos, encoder, tmp_path, capsys):
    "The data folder of archives is a data set: it is opened as a split."
    write_tars(photos, tmp_path/"in")
    assert main(["extract", "--images", str(tmp_path/"in"), "--captions", str(tmp_path/"in"), "--encoder", str(encoder),
                 "--out", str(tmp_path/"data")]) == 0
    assert main(["prepare", "--data", str(tmp_path/"data"), "--out", str(tmp_path/"prepared")]) == 0
    assert len(open_split(tmp_path/"prepared", "train")) == 8


def test_a_single_archive(photos, tmp_path):
    write_tars(photos, tmp_path/"in")
    found = find_pictures(tmp_path/"in"/"train-000.tar")
    assert list(found) == [f"{i:06d}" for i in range(4)]
    np.testing.assert_array_equal(
        np.asarray(open_picture(found["000002"])), np.asarray(open_picture(photos/"000002.png")))


def test_what_is_left_out_is_reported(photos, tmp_path):
    import pyarrow.parquet
    write_tars(photos, tmp_path/"in")
    pyarrow.parquet.write_table(pyarrow.table(dict(caption=["a dog"])), tmp_path/"in"/"texts.parquet")
    (tmp_path/"in"/"more.tar.gz").write_bytes(b"packed")
    lines = []
    assert len(find_pictures(tmp_path/"in", lines.append)) == 6
    assert any("1 Parquet and Arrow files without pictures: texts.parquet" in o for o in lines)
    assert any("1 compressed archives" in o and "more.tar.gz" in o for o in lines)


def test_one_id_in_two_archives(photos, tmp_path):
    write_tars(photos, tmp_path/"in")
    write_tars(photos, tmp_path/"in"/"copy")
    with pytest.raises(InputError, match="one file"): find_pictures(tmp_path/"in")


def test_one_name_of_two_pictures(photos, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet
    rows = [dict(image=dict(bytes=(photos/f"{i:06d}.png").read_bytes(), path="a.png")) for i in (0, 0, 1)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path/"a.parquet")
    with pytest.raises(InputError, match="rows 0 and 2"): find_pictures(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_flipped_bytes(kind, photos, tmp_path):
    "A damaged archive gives an `InputError` or other pictures, never another exception."
    WRITERS[kind](photos, tmp_path/"in")
    path = next((tmp_path/"in").iterdir())
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for n in range(60):
        damaged = bytearray(whole)
        for _ in range(8): damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        changed = tmp_path/f"{n}{path.suffix}"
        changed.write_bytes(damaged if n % 3 else damaged[:draw.randrange(len(damaged))])
        try:
            for found in find_pictures(changed).values(): open_picture(found)
        except InputError: refused += 1
        changed.unlink()
    assert refused


@pytest.mark.parametrize("name, kind", [
    ("../a.png", tarfile.REGTYPE),
    ("/a.png", tarfile.REGTYPE),
    ("a.png", tarfile.SYMTYPE),
    ("a.png", tarfile.LNKTYPE)])
def test_hostile_members(name, kind, tmp_path):
    with tarfile.open(tmp_path/"a.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
        archive.addfile(member)
    with pytest.raises(InputError, match="files inside the archive"): find_pictures(tmp_path)


def test_an_empty_cell_is_left_out_by_name(photos, encoder, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet
    rows = [dict(image=dict(bytes=(photos/"000000.png").read_bytes() if i else None, path=f"{i}.png"))
            for i in range(3)]
    rows[2]["image"]["path"] = "0b.png"
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path/"a.parquet")
    assert main(["extract", "--images", str(tmp_path), "--encoder", str(encoder), "--out", str(tmp_path/"data")]) == 0
    assert "row 0: expected a picture, found an empty cell" in capsys.readouterr().err
    assert RegionStore(tmp_path/"data"/"regions").ids == ["0b", "1"]
