"Codecs of region and token sets: what they keep, that answers agree, that other codecs and damaged files are refused."
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import aladin.search.index
from aladin.cli.main import main
from aladin.cli.search import Sets
from aladin.data.splits import open_split
from aladin.evaluation.embeddings import encode_split
from aladin.files import InputError
from aladin.model.alignment import set_scores
from aladin.model.model import load_model
from aladin.search.codecs import CODECS, check_codec, open_codec, train_codec, write_codec
from aladin.search.faiss import FaissEngine
from aladin.search.index import SearchIndex
from aladin.search.onnx import OnnxIndex
from aladin.search.segments import read_index, SetStore
from small_inputs import ids_of, write_data, write_model

LEARNED = [name for name, size in CODECS.items() if size]
DIM = 32  # of the small model


def unit(rng, *shape):
    values = rng.standard_normal(shape, np.float32)
    return values/np.linalg.norm(values, axis=-1, keepdims=True)


def spread(rng, rows, dim):
    "Vectors of length 1 with most of their variance in a few directions, none of which is an axis."
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((dim, dim)))[0].astype(np.float32)
    values = rng.standard_normal((rows, dim), np.float32)*np.geomspace(3, .03, dim, dtype=np.float32) @ turn
    return values/np.linalg.norm(values, axis=1, keepdims=True)


def codec_of(name, vectors):
    return train_codec(name, vectors, iterations=6) if name in LEARNED else open_codec("nowhere", name)


@pytest.mark.parametrize("name", CODECS)
def test_round_trip_and_cosines(name, tmp_path):
    "Decoding is near, cosines are those of the decoded vectors, and a codec that was written and opened is the same."
    rng = np.random.default_rng(0)
    vectors, queries = spread(rng, 1500, 100), spread(rng, 7, 100)
    codec = codec_of(name, vectors)
    codes = codec.encode(vectors)
    decoded = codec.decode(codes)
    bound = dict(float16=1e-3, int8=.02, pq32=.5, pq64=.25, pq96=.04, opq32=.09, opq64=.03, opq96=.02)[name]
    assert np.linalg.norm(decoded - vectors, axis=1).mean() < bound
    assert codes.shape == (1500, codec.width(100)) and codes.dtype == codec.dtype
    if name in LEARNED: assert codes.nbytes == 1500*CODECS[name]
    np.testing.assert_allclose(codec.cosines(codes, queries), decoded @ queries.T, atol=2e-6)
    np.testing.assert_allclose(codec.cosines(codes, queries), vectors @ queries.T, atol=2*bound)
    if name not in LEARNED: return
    np.testing.assert_allclose(codec.rotation @ codec.rotation.T, np.eye(100), atol=1e-4)
    write_codec(tmp_path/"codec", codec)
    np.testing.assert_array_equal(open_codec(tmp_path/"codec", name).encode(vectors), codes)
    assert open_codec(tmp_path/"codec", name).digest == codec.digest == train_codec(name, vectors, iterations=6).digest


def test_a_learned_rotation_pays():
    vectors = spread(np.random.default_rng(0), 2000, 64)
    errors = [((c.decode(c.encode(vectors)) - vectors)**2).sum(1).mean()
              for c in (codec_of(n, vectors) for n in ("pq32", "opq32"))]
    assert errors[1] < .5*errors[0]


@pytest.mark.parametrize("aggregation", ["MrSw", "MwSr", "symm", "MrAVGw"])
@pytest.mark.parametrize("regions", [True, False])
def test_scores_of_candidates(aggregation, regions):
    "Scores from look-up tables are those of the decoded sets, one candidate after the other."
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 5, 30)
    if regions: lengths += 1  # images without regions are done one by one
    sets, query = spread(rng, int(lengths.sum()), 48), spread(rng, 4, 48)
    codec = train_codec("opq32", np.concatenate([sets, spread(rng, 300, 48)]), iterations=3)
    codes = codec.encode(sets)
    found = set_scores(codec.cosines(codes, query), lengths, regions, aggregation)
    for at, length, score in zip(lengths.cumsum() - lengths, lengths, found):
        cosines = codec.decode(codes[at:at + length]) @ query.T
        table = cosines if regions else cosines.T
        by_token, by_region = (np.maximum(table.max(axis, initial=-1), 0) for axis in (0, 1))
        expected = dict(MrSw=by_token.sum(), MwSr=by_region.sum(), symm=by_token.sum() + by_region.sum(),
                        MrAVGw=by_token.sum()/max(1, len(by_token)))
        assert abs(score - expected[aggregation]) < 1e-5


def test_names_and_widths():
    assert Sets.__args__ == tuple(CODECS)
    for name in ("zip", None, 3, "opq48"):
        with pytest.raises(InputError, match="opq64"): check_codec("x", name)
    check_codec("x", "pq64", 64)
    with pytest.raises(InputError, match="at most 63 bytes"): check_codec("x", "pq64", 63)
    with pytest.raises(InputError, match="finite vectors"): train_codec("pq32", np.full((300, 40), np.nan, np.float32))


# Stores

def write(store, rng, ids, **more):
    "Items with sets of up to four rows."
    lengths = rng.integers(0, 5, len(ids))
    sets = spread(rng, int(lengths.sum()), DIM)
    store.write(dict(ids=ids, owners=ids, source="x", texts=ids) | more, vectors=unit(rng, len(ids), DIM), sets=sets,
                offsets=np.cumsum([0, *lengths]))
    return {i: sets[end - n:end] for i, n, end in zip(ids, lengths, lengths.cumsum())}


@pytest.mark.parametrize("name", ["float16", "int8", "opq32"])
@pytest.mark.parametrize("engine", [None, FaissEngine])
def test_a_store_keeps_its_codec(tmp_path, name, engine):
    "Through additions, replacements, deletions and compaction; codes are moved as they are."
    rng, store = np.random.default_rng(2), SetStore(tmp_path/"captions", ("texts", "source"), DIM, name)
    if store.needs_training(): store.learn(spread(rng, 1000, DIM))
    there, other = {}, engine and engine(store)
    for part in range(4): there |= write(store, rng, [str(i) for i in range(20*part, 20*part + 30)])
    store.write(dict(deleted=["5", "41"]))
    there.pop("5"), there.pop("41")
    def content(store):
        return {i: (n, s)
                for o in store.live() for i, n, s in zip(o.ids, o.lengths, np.split(o.sets, o.lengths.cumsum()[:-1]))}
    before = content(store)
    assert store.compact() > 0 and len(store.names()) == 1
    again = content(SetStore(store.path, ("texts", "source"), DIM, name))
    assert before.keys() == again.keys() == there.keys()
    for item, rows in there.items():
        np.testing.assert_allclose(again[item][1], before[item][1], atol=1e-6)
        assert (np.linalg.norm(again[item][1] - rows, axis=1) < (.6 if name == "opq32" else .02)).all()
    if other: assert sorted(other.find(list(there))) == sorted(there)


def test_one_codec_whoever_learns_it(tmp_path):
    rng = np.random.default_rng(3)
    first, second = (SetStore(tmp_path/"images", dim=DIM, sets="pq32") for _ in range(2))
    first.learn(spread(rng, 400, DIM))
    digest = first.codec.digest
    second.learn(spread(rng, 400, DIM))
    assert second.codec.digest == digest and not (tmp_path/"images"/"codec.part").exists()
    with pytest.raises(InputError, match="float16 or int8"):
        SetStore(tmp_path/"empty", dim=DIM, sets="pq32").learn(np.zeros((0, DIM), np.float32))
    assert not (tmp_path/"empty").exists()


def damage(folder, how):
    path = folder/"images"/"codec"
    about = json.loads((path/"codec.json").read_text())
    if how == "gone": shutil.rmtree(path)
    if how == "no json": (path/"codec.json").write_text("{")
    if how in ("version", "format", "name"): (path/"codec.json").write_text(json.dumps(about | {how: 2}))
    if how == "shape": np.save(path/"centroids.npy", np.zeros((32, 255, 1), np.float32))
    if how == "type": np.save(path/"rotation.npy", np.zeros((DIM, DIM)))
    if how == "cut": (path/"rotation.npy").write_bytes((path/"rotation.npy").read_bytes()[:-8])
    if how == "bit":
        found = bytearray((path/"centroids.npy").read_bytes())
        found[-3] ^= 1
        (path/"centroids.npy").write_bytes(found)
    if how == "narrow":
        np.save(path/"rotation.npy", np.zeros((DIM - 1, DIM), np.float32))
    if how == "other":
        codec = train_codec("opq32", spread(np.random.default_rng(9), 300, DIM), iterations=1)
        shutil.rmtree(path)
        write_codec(path, codec)


# Indexes

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A model, a split, and an index of it with opq32."
    folder = tmp_path_factory.mktemp("codecs")
    data, model = write_data(folder/"data", 30), write_model(folder/"model")
    assert main(["index", "--model", str(model), "--data", str(data), "--out", str(folder/"opq32"),
                 "--sets", "opq32"]) == 0
    return folder


@pytest.mark.parametrize("how", [
    "gone", "no json", "version", "format", "name", "shape", "type", "cut", "bit", "narrow", "other"])
def test_damage_is_refused(made, tmp_path, how):
    shutil.copytree(made/"opq32", tmp_path/"index")
    damage(tmp_path/"index", how)
    with pytest.raises(InputError, match={
            "version": "update aladin", "no json": "write the file again"}.get(how, "build it again")):
        SearchIndex.open(tmp_path/"index", load_model(made/"model")).search("a red fish")


def test_the_command_and_what_it_refuses(made, tmp_path, capsys):
    words = ["index", "--model", str(made/"model"), "--data", str(made/"data"), "--out"]
    assert read_index(made/"opq32")["sets"] == "opq32"
    assert main([*words, str(made/"opq32"), "--sets", "int8"]) != 0
    assert "the codec of this index" in capsys.readouterr().err
    assert main([*words, str(made/"opq32")]) == 0  # keeps its own
    assert main([*words, str(tmp_path/"wide"), "--sets", "opq64"]) != 0
    assert "at most 32 bytes" in capsys.readouterr().err and not (tmp_path/"wide"/"index.json").exists()
    with pytest.raises(SystemExit): main([*words, str(tmp_path/"other"), "--sets", "zip"])
    with pytest.raises(InputError, match="choose one of these"):
        SearchIndex.create(tmp_path/"other", load_model(made/"model"), sets="zip")
    assert main(["search", "a red fish", "--index", str(made/"opq32"), "--show", str(tmp_path/"page.html")]) == 0


@pytest.mark.parametrize("name", ["float16", "int8", "opq32", "pq32"])
@pytest.mark.parametrize("encoded", [False, True])
def test_answers_of_an_index(made, monkeypatch, name, encoded):
    "Answers are near those of exact sets; explanations, pairs and look-up tables agree; pictures come and go."
    monkeypatch.setattr(aladin.search.index, "_SEGMENT", 8)
    model = load_model(made/"model")
    test = open_split(made/"data", "test", model.processor)
    index = SearchIndex.build(model, model.encode_images(test) if encoded else test, progress=False, sets=name)
    assert index.info["sets"] == name and [s.needs_training() for s in index.stores.values()] == [False, False]
    e = encode_split(model, test, progress=False)
    def check():
        for hit in index.search(test.captions[3], k=8, rerank=30, explain=True):
            row = test.image_ids.index(hit.id)
            exact = float(model.alignment_of(e.regions[[row]], e.words[[3]]))
            assert abs(hit.score - exact) < .3
            assert abs(hit.score - np.maximum(hit.alignment.cosines.max(0), 0).sum()) < 1e-4
            assert abs(hit.score - index.pair(test.captions[3], hit.id).score) < 1e-4
        for hit in index.search_captions(test.image_ids[2], k=5, rerank=150):
            caption = 5*test.image_ids.index(hit.image_id) + int(hit.id.split("#")[1])
            assert abs(hit.score - float(model.alignment_of(e.regions[[2]], e.words[[caption]]))) < .4
    check()
    index.delete(ids_of(30)[:11])
    assert index.compact() > 0 and index.add(test, progress=False) == 11
    check()
    assert len(SearchIndex.open(index.folder, model)) == 30


def test_other_aggregations_decode(made, monkeypatch):
    "An aggregation that pads sets to one length gets them decoded, and scores as the model does."
    model = load_model(made/"model")
    model.config.aggregation = model.alignment.aggregation = "mean"
    test = open_split(made/"data", "test", model.processor)
    index = SearchIndex.build(model, test, progress=False, sets="opq32")
    monkeypatch.setattr(SetStore, "cosines", None)
    hit = index.search(test.captions[0], k=1, rerank=30)[0]
    e = encode_split(model, test, progress=False)
    row = test.image_ids.index(hit.id)
    assert abs(hit.score - float(model.alignment_of(e.regions[[row]], e.words[[0]]))) < .05


def test_without_torch(made):
    "The index without torch gives the answers of the one with it."
    pytest.importorskip("onnxscript")
    for name in ("int8", "opq32"):
        folder = made/f"onnx-{name}"
        assert main(["index", "--model", str(made/"model"), "--data", str(made/"data"), "--out", str(folder),
                     "--sets", name]) == 0
        if name == "int8":
            assert main(["export", "--index", str(folder), "--format", "onnx", "--out", str(made/"encoder")]) == 0
        one, other = OnnxIndex(folder, made/"encoder"), SearchIndex.open(folder)
        for text in ("a red fish", "two small dogs"):
            ours, theirs = one.search(text, 6, explain=True), other.search(text, 6, explain=True)
            assert [h.id for h in ours] == [h.id for h in theirs]
            np.testing.assert_allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-4)
            np.testing.assert_allclose(ours[0].alignment.cosines, theirs[0].alignment.cosines, atol=1e-4)
        ours, theirs = one.search_captions("1003", 6), other.search_captions("1003", 6)
        np.testing.assert_allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-4)
        assert abs(one.pair("a fish", "1003").score - other.pair("a fish", "1003").score) < 1e-4


def test_an_older_index_is_read_as_float16(made, tmp_path):
    "index.json of version 1 has no codec, segment.json neither."
    model = load_model(made/"model")
    test = open_split(made/"data", "test", model.processor)
    index = SearchIndex.build(model, test, tmp_path/"index", progress=False, sets="float16")
    before = [(h.id, h.score) for h in index.search("a red fish")]
    path = tmp_path/"index"/"index.json"
    about = json.loads(path.read_text())
    assert about.pop("sets") == "float16" and about["version"] == 2
    path.write_text(json.dumps(about | dict(version=1)))
    assert not any("codec" in json.loads(p.read_text()) for p in (tmp_path/"index").glob("*/*/segment.json"))
    old = SearchIndex.open(tmp_path/"index", model)
    assert [(h.id, h.score) for h in old.search("a red fish")] == before
    old.delete(ids_of(30)[:3])
    assert SearchIndex.build(model, test, tmp_path/"index", progress=False).compact() > 0
    assert sorted(h.id for h in old.search("a red fish", k=30)) == sorted(test.image_ids)


def test_captions_that_come_later(made):
    "An index of pictures without captions learns the captions' codec when the first of them are added."
    model = load_model(made/"model")
    test = open_split(made/"data", "test", model.processor)
    index = SearchIndex.build(model, test, progress=False, sets="opq32")
    digest = index.stores["images"].codec.digest
    shutil.rmtree(index.folder/"captions")
    later = SearchIndex.open(index.folder, model)
    assert later.stores["captions"].needs_training() and later.search_captions("1001") == []
    later.delete(ids_of(30))
    assert later.add(test, progress=False) == 30
    assert later.stores["images"].codec.digest == digest and not later.stores["captions"].needs_training()
    assert len(later.search_captions("1001", k=7)) == 7


def test_export_has_decoded_sets(made, tmp_path):
    h5py = pytest.importorskip("h5py")
    assert main(["export", "--index", str(made/"opq32"), "--out", str(tmp_path), "--format", "hdf5"]) == 0
    model = load_model(made/"model")
    e = encode_split(model, open_split(made/"data", "test", model.processor), progress=False)
    with h5py.File(tmp_path/"index.h5") as f: sets = f["images"]["sets"][:]
    assert sets.shape == e.regions.values.shape
    assert np.linalg.norm(sets - e.regions.values.float().numpy(), axis=1).mean() < .2


@pytest.fixture
def benchmark(monkeypatch):
    "The benchmark's module, with its processes replaced by calls."
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent/"benchmarks")
    import region_sets
    monkeypatch.setattr(region_sets, "in_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(region_sets, "CANDIDATES", 10)
    return region_sets


def test_benchmark_of_codecs(made, tmp_path, benchmark):
    """A small run writes the table and the figure; int8 keeps what float16 finds, and a row takes the bytes of its
    codec."""
    for name in ("one", "two"):
        benchmark.codecs(Namespace(model=made/"model", data=made/"data", name=name, out=tmp_path, scratch=None,
                                   threads=1, seed=0, queries=5, note="A note."))
    found = json.loads((tmp_path/"codecs_benchmark.json").read_text())
    rows = {row["codec"]: row for row in found["one"]["codecs"]}
    assert list(found) == ["one", "two"] and list(rows) == ["float16", "int8", "pq32", "opq32"]
    assert (rows["opq32"]["vector_bytes"] == 32 and rows["float16"]["vector_bytes"] == 64
            and rows["opq32"]["codec_bytes"] > 0)
    assert abs(rows["int8"]["t2i scanned R@10"] - rows["float16"]["t2i scanned R@10"]) < 5
    text = (tmp_path/"codecs_benchmark.md").read_text()
    assert ("A note." in text and text.count("| opq32 |") == 2
            and (tmp_path/"codecs_benchmark.png").stat().st_size > 10_000)


def test_benchmark_of_a_collection(tmp_path, benchmark):
    "A small run finds the pictures that its queries were made of, and leaves nothing but the table."
    (tmp_path/"scratch").mkdir()
    common = dict(regions=13, dim=48, clusters=50, queries=8, sets="opq32", seed=0, note="", build_threads=1,
                  scratch=tmp_path/"scratch", out=tmp_path)
    for pictures in (60, 90): benchmark.collection(Namespace(pictures=pictures, **common))
    found = json.loads((tmp_path/"collection_benchmark.json").read_text())
    m = found["90 pictures, opq32"]
    assert len(found) == 2 and m["queries"] == 8 and m["right_candidates"] == 100 and m["right_first"] >= 50
    assert 90*13*32 <= m["disk"]["sets"] < 90*13*32 + 200 and m["disk"]["vectors"] >= 90*48*4
    assert (not list((tmp_path/"scratch").iterdir())
            and "| 90 | opq32 |" in (tmp_path/"collection_benchmark.md").read_text())
