"Damaged region folders and stores: each error names the file and the row or image, and none passes in silence."
import base64, json, pickle
from multiprocessing import get_context

import numpy as np
import pytest

from aladin.files import InputError
from aladin.data.regions import RegionStore, TsvRegions, convert_regions, open_regions

ids = [str(100+i) for i in range(12)]


def vectors(i): return np.random.default_rng(i).normal(size=(2+i%4, 14)).astype("<f4")


def encoded(i, spoil=None):
    block = vectors(i)
    if spoil is not None: block[1, 3] = spoil
    return base64.b64encode(block.tobytes())


@pytest.fixture
def folder(tmp_path):
    "Twelve images in the published layout."
    path = tmp_path/"regions"
    path.mkdir()
    features = [f"{o}\t{len(vectors(i))}\t{encoded(i).decode()}\n" for i,o in enumerate(ids)]
    objects = [[{"class": f"thing {j}", "rect": [0, 0, 10+j, 20], "conf": .5} for j in range(1+i%3)] for i in range(12)]
    predictions = [f"{o}\t{json.dumps(found if i%4 == 3 else dict(image_h=40, image_w=30, objects=found))}\n"
                   for i,(o,found) in enumerate(zip(ids, objects))]
    for name,rows in dict(features=features, predictions=predictions).items():
        (path/f"{name}.tsv").write_text("".join(rows))
        (path/f"{name}.lineidx").write_text("".join(f"{sum(map(len, rows[:i]))}\n" for i in range(12)))
    (path/"imageid2idx.json").write_text(json.dumps({o:i for i,o in enumerate(ids)}))
    return path


@pytest.fixture
def store(folder, tmp_path): return convert_regions(folder, tmp_path/"store", progress=False)


def change(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def fails(action, *names):
    "`action` raises an InputError whose message holds every name and says how to mend it."
    with pytest.raises(InputError) as error: action()
    for name in (*names, "Fix:"): assert name in str(error.value)


def read_all(path):
    regions = open_regions(path)
    return [regions.features(o).sum() + len(regions.tags(o)) for o in regions.ids]


@pytest.mark.parametrize("name", ["features.tsv", "features.lineidx", "imageid2idx.json", "predictions.tsv"])
def test_missing_file(folder, name):
    (folder/name).unlink()
    fails(lambda: open_regions(folder), "regions", name)
    fails(lambda: TsvRegions(folder), name)


@pytest.mark.parametrize("name", ["features.tsv", "predictions.tsv"])
@pytest.mark.parametrize("cut", [1, 60, 900])
def test_truncated_tsv(folder, name, cut):
    data = (folder/name).read_bytes()
    (folder/name).write_bytes(data[:-cut])
    fails(lambda: open_regions(folder), name, "row")


@pytest.mark.parametrize("name", ["features.tsv", "predictions.tsv"])
def test_truncated_at_a_row_break(folder, name):
    rows = (folder/name).read_bytes().splitlines(keepends=True)
    (folder/name).write_bytes(b"".join(rows[:-1]))
    fails(lambda: open_regions(folder), name, "row 11")


def test_lineidx_shifted(folder):
    offsets = (folder/"features.lineidx").read_text().split()
    (folder/"features.lineidx").write_text("\n".join(offsets[:5] + [str(int(o)+1) for o in offsets[5:]]) + "\n")
    fails(lambda: read_all(folder), "features.tsv", "row 4")


def test_lineidx_lacks_a_row(folder):
    offsets = (folder/"features.lineidx").read_text().split()
    (folder/"features.lineidx").write_text("\n".join(offsets[:5] + offsets[6:]) + "\n")
    fails(lambda: read_all(folder), "imageid2idx.json", "image 111")


@pytest.mark.parametrize("old, new, where", [
    (b"0\n", b"", "row 0"),
    (b"\n", b"\nx\n", "offsets"),
    (b"\n", b"\n0\n", "row 1")])
def test_lineidx_broken(folder, old, new, where):
    change(folder/"features.lineidx", old, new)
    fails(lambda: open_regions(folder), "features.lineidx", where)


def test_image_without_features(folder, store):
    change(folder/"imageid2idx.json", b', "111": 11', b"")
    fails(lambda: open_regions(folder).features(111), "imageid2idx.json", "image 111")
    fails(lambda: store.features("999"), "store", "image 999")


def test_image_without_detections(folder, tmp_path):
    change(folder/"predictions.tsv", b"105\t", b"905\t")
    fails(lambda: open_regions(folder).tags(105), "predictions.tsv", "image 105")
    fails(lambda: convert_regions(folder, tmp_path/"bad", progress=False), "predictions.tsv", "image 105")
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(folder, tmp_path, value):
    change(folder/"features.tsv", encoded(6), encoded(6, value))
    fails(lambda: open_regions(folder).features(106), "features.tsv", "image 106", "region 1")
    fails(lambda: convert_regions(folder, tmp_path/"bad", progress=False), "features.tsv", "image 106", "region 1")
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize("old, new, names", [
    (b"106\t4", b"106\t3", ["image 106"]),
    (b"106\t4", b"106\tx", ["image 106"]),
    (b"106\t4", b"107\t4", ["row 6", "image 107"]),
    (encoded(6)[:4], b"!!!!", ["image 106"])])
def test_damaged_row(folder, old, new, names):
    change(folder/"features.tsv", old, new)
    fails(lambda: open_regions(folder).features(106), "features.tsv", *names)


@pytest.mark.parametrize("old, new", [
    (b"\t", b" "),
    (b'"objects"', b'"things_"'),
    (b'"class"', b'"klass"'),
    (b"[0, 0, 10, 20]", b"[0, 0, 10]    "),
    (b"0.5", b"nul")])
def test_malformed_detections(folder, old, new):
    change(folder/"predictions.tsv", old, new)
    fails(lambda: open_regions(folder), "predictions.tsv", "row 0")


@pytest.mark.parametrize("name", ["regions.npy", "offsets.npy", "rects.npy", "tag_codes.npy", "ids.json", "tags.json"])
def test_truncated_or_missing_store_file(store, name):
    data = (store.path/name).read_bytes()
    (store.path/name).write_bytes(data[:-1])
    fails(lambda: RegionStore(store.path), name, "file size")
    (store.path/name).unlink()
    fails(lambda: RegionStore(store.path), name, "nothing there")


@pytest.mark.parametrize("old, new, where", [
    (b"aladin-regions", b"other-regions!", "format"),
    (b'"version": 1', b'"version": 2', "version"),
    (b'"dtype"', b'"dtyp_"', "dtype"),
    (b"{", b"[", "file")])
def test_foreign_or_newer_store(store, old, new, where):
    change(store.path/"store.json", old, new)
    fails(lambda: open_regions(store.path), "store.json", where)


def test_store_with_a_foreign_array(store):
    data = (store.path/"regions.npy").read_bytes()
    (store.path/"regions.npy").write_bytes(bytes(len(data)))
    fails(lambda: RegionStore(store.path), "regions.npy", "header")


def test_conversion_leaves_other_folders_alone(folder, tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.txt").write_text("dear")
    for overwrite in (False, True):
        fails(lambda: convert_regions(folder, tmp_path/"mine", overwrite=overwrite, progress=False),
              "mine", "output folder")
    assert (tmp_path/"mine"/"thesis.txt").read_text() == "dear"


def test_conversion_is_deterministic(folder, store, tmp_path):
    again = convert_regions(folder, tmp_path/"again", progress=False)
    for p in store.path.iterdir(): assert p.read_bytes() == (again.path/p.name).read_bytes(), p.name


def _sum(source, image_id): return float(source.features(image_id).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_reading_processes(folder, store, method):
    expected = [float(vectors(i).sum()) for i in range(12)]*4
    with get_context(method).Pool(2) as pool:
        for source in (open_regions(folder), store):
            source.features(ids[0])  # open in the parent first
            assert pool.starmap(_sum, [(source, o) for o in ids*4], chunksize=3) == expected


def test_pickle(folder, store):
    for source in (open_regions(folder), store):
        copy = pickle.loads(pickle.dumps(source))
        assert copy.fingerprint == source.fingerprint and copy.ids == source.ids == ids
