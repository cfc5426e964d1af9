"""The engine with faiss beside exact search: additions, replacements and deletions in any order, damage, other
processes, kills."""
import hashlib
import json
import os
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("faiss")
import aladin.search.faiss as coded  # noqa: E402
from aladin.cli.main import main  # noqa: E402
from aladin.files import InputError  # noqa: E402
from aladin.search.engines import ExactEngine  # noqa: E402
from aladin.search.faiss import FaissEngine  # noqa: E402
from aladin.search.index import SearchIndex  # noqa: E402
from aladin.search.segments import SetStore  # noqa: E402
from small_inputs import write_data, write_model  # noqa: E402

DIM = 24
SPREAD = .4 # of the vectors around their centres


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    "Codes from 300 items on, a tail of at most 100 beside them."
    monkeypatch.setattr(coded, "FLAT", 300)
    monkeypatch.setattr(coded, "TAIL", 100)


def vectors_of(ids, version=0):
    "A vector of length 1 for each id and version, always the same, near one of twenty centres."
    def one(item):
        seed = int.from_bytes(hashlib.sha256(f"{item} {version}".encode()).digest()[:8], "little")
        rng = np.random.default_rng(seed)
        return np.random.default_rng(seed % 20).standard_normal(DIM) + SPREAD*rng.standard_normal(DIM)
    v = np.array([one(i) for i in ids], np.float32).reshape(-1, DIM)
    return v/np.linalg.norm(v, axis=1, keepdims=True)


def write(store, ids, version=0, **more):
    vectors = vectors_of(ids, version)
    about = dict(ids=ids, owners=[i.split("#")[0] for i in ids], source="x", **more)
    return store.write(about, vectors=vectors, sets=vectors.astype(np.float16), offsets=np.arange(len(ids) + 1))


def captions(first, last): return [f"{i//3}#{i % 3}" for i in range(first, last)]


def filled(folder, count=1000):
    store = SetStore(folder/"captions")
    for at in range(0, count, 250): write(store, captions(at, min(at + 250, count)))
    engine = FaissEngine(store)
    engine.settle()
    return store, engine


def same_as_exact(engine, store, queries, k=10):
    "Everything but the search is equal; the search finds nearly all of the nearest, with their places and scores."
    exact = ExactEngine(SetStore(store.path))
    ids = exact.ids()
    assert sorted(engine.ids()) == sorted(ids) and len(engine) == len(ids)
    some = [*ids[::17], "lost", "0#0", "1#1"]
    assert engine.find(some) == exact.find(some)
    owners = sorted({i.split("#")[0] for i in ids})[::7] + ["lost", "0"]
    assert sorted(engine.owned(owners)) == sorted(exact.owned(owners))
    found, shared = engine.search(queries, k), 0
    import torch
    for ours, theirs in zip(found, exact.search(torch.from_numpy(queries), len(ids))):
        known = {i: (score, place) for i, score, place in theirs}
        assert len(ours) == min(k, len(ids)) == len({o[0] for o in ours})
        for i, score, place in ours: assert place == known[i][1] and score == pytest.approx(known[i][0], abs=1e-3)
        assert [o[1] for o in ours] == sorted([o[1] for o in ours], reverse=True)
        shared += len({o[0] for o in ours} & {o[0] for o in theirs[:k]})/min(k, len(ids))
    assert shared/len(queries) > .95
    [everything] = engine.search(queries[:1], len(ids) + 5)
    assert {o[0] for o in everything} == set(ids)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_changes(tmp_path, seed):
    """Items are added, replaced and deleted, codes are written now and then, and the engine is opened again now and
    then."""
    rng, store = np.random.default_rng(seed), SetStore(tmp_path/"captions")
    engine, queries, last = FaissEngine(store), vectors_of([f"query {i}" for i in range(20)]), 0
    for step in range(14):
        new = captions(last, last := last + int(rng.integers(60, 250)))
        there = engine.ids()
        chosen = ([str(i) for i in rng.choice(there, min(len(there), int(rng.integers(0, 90))), replace=False)]
                  if there else [])
        cut = len(chosen)//2
        engine.put(write(store, new + chosen[:cut], step, deleted=chosen[cut:]))
        if rng.random() < .5: engine.settle()
        if rng.random() < .2: engine = FaissEngine(SetStore(store.path))
        if step % 3 == 2: same_as_exact(engine, store, queries)
    engine.settle()
    assert engine._tail.codes is not None
    same_as_exact(engine, store, queries)


def test_lists(tmp_path, monkeypatch):
    """Many vectors are divided into lists; how many of them are read is chosen so that nearly all of the nearest are
    found."""
    monkeypatch.setattr(coded, "LISTS", 2000)
    monkeypatch.setattr(coded, "_POOLS", (200, 300))  # fewer than half of the vectors, all of which would be compared
    store, engine = filled(tmp_path, 1900)
    assert not hasattr(engine._tail.codes.index, "nlist")
    write(store, captions(1900, 2200))
    engine.settle()
    codes = engine._tail.codes
    assert codes.index.nlist == 64 and codes.about["probes"] <= 8 and codes.about["recall"] >= coded.AIM
    same_as_exact(engine, store, vectors_of([f"query {i}" for i in range(20)]))


def test_lists_that_do_not_help(tmp_path, monkeypatch):
    "Where the nearest are scattered over many lists, there are none."
    monkeypatch.setattr(coded, "LISTS", 2000)
    monkeypatch.setattr(coded, "_POOLS", (200, 300))  # fewer than half of the vectors, all of which would be compared
    monkeypatch.setattr(sys.modules[__name__], "SPREAD", 1000.)
    store, engine = filled(tmp_path, 2200)
    codes = engine._tail.codes
    assert not hasattr(codes.index, "nlist") and codes.about["recall"] > 95
    write(store, captions(2200, 2400))
    engine.settle()
    assert len(engine._tail.codes) == 2400 and engine._tail.codes.ids.rows("0#0") == [0]
    same_as_exact(engine, store, vectors_of([f"query {i}" for i in range(20)]))


def test_rows_keep_their_numbers(tmp_path):
    store, engine = filled(tmp_path)
    before = [engine._tail.codes.ids[row] for row in range(1000)]
    write(store, [*captions(1000, 1150), *captions(0, 30)], 1)
    engine.settle()
    codes = engine._tail.codes
    assert [codes.ids[row] for row in range(1000)] == before and len(codes) == 1180
    assert np.flatnonzero(codes.dead).tolist() == list(range(30))
    assert codes.ids.rows("0#0") == [0, 1150] and [o.name for o in engine.folder.iterdir()] == [codes.folder.name]


def test_many_deletions(tmp_path):
    "The codes are trained anew without what was deleted; where few items are left, the codes go."
    store, engine = filled(tmp_path)
    store.write(dict(deleted=captions(0, 400)))
    assert len(engine) == 600
    engine.settle()
    assert len(engine._tail.codes) == 600 and not engine._tail.dead.any()
    store.write(dict(deleted=captions(400, 990)))
    engine.settle()
    assert engine._names() == [] and len(engine) == len(FaissEngine(store)) == 10
    assert {o[0] for o in engine.search(vectors_of(["query"]), 20)[0]} == set(captions(990, 1000))


def test_another_process_writes_first(tmp_path):
    """Of two segments with the same number the one with the later name counts, also when codes have been made of it
    already."""
    store, engine = filled(tmp_path)
    name = store.names()[-1]
    store.next_name = lambda: f"{name[:20]}-00000000"
    write(store, [*captions(998, 1000), "new#0"], 5)
    same_as_exact(engine, store, vectors_of([f"query {i}" for i in range(5)]))
    same_as_exact(FaissEngine(store), store, vectors_of([f"query {i}" for i in range(5)]))
    del store.next_name
    write(store, captions(1000, 1200))
    engine.settle()  # not in the order of the names, so everything is made anew
    same_as_exact(engine, store, vectors_of([f"query {i}" for i in range(5)]))


def damaged_codes(tmp_path):
    store, engine = filled(tmp_path, 400)
    return store, engine._tail.codes.folder, vectors_of(["query"])


def test_damaged_bytes_are_found(tmp_path):
    """A changed, missing or shorter file is an error before faiss reads it; a changed vector changes no more than its
    own score."""
    store, folder, query = damaged_codes(tmp_path)
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        if path.name in ("vectors.npy", "about.json"): continue
        for data in (
                b"", whole[:-1], whole + b"x",
                *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:] for at in rng.integers(len(whole), size=3))):
            path.write_bytes(data)
            with pytest.raises(InputError, match="remove this folder"): FaissEngine(store)
        path.unlink()
        with pytest.raises(InputError, match="remove this folder"): FaissEngine(store)
        path.write_bytes(whole)
    assert len(FaissEngine(store).search(query, 5)[0]) == 5
    path, vectors = folder/"vectors.npy", np.load(folder/"vectors.npy")
    np.save(path, np.full_like(vectors, np.nan))
    with pytest.raises(InputError, match="NaN"): FaissEngine(store).search(query, 5)
    np.save(path, vectors)
    opened = FaissEngine(store)
    os.truncate(path, 200)
    with pytest.raises(InputError, match="found the end"): opened.search(query, 5)
    np.save(path, vectors[:-1])
    with pytest.raises(InputError, match="shape"): FaissEngine(store)


@pytest.mark.parametrize("key", [
    "format", "version", "rows", "dim", "trained", "segments", "pool", "probes", "recall", "digests"])
def test_damaged_description(tmp_path, key):
    "Any value in about.json is an error or leaves the answers right."
    store, folder, query = damaged_codes(tmp_path)
    about, expected = json.loads((folder/"about.json").read_text()), FaissEngine(store).search(query, 5)
    for value in (None, -1, 0, 1, 10**30, "x", [], [1], ["x"], {}, {"codes.faiss": 3}, 1.5, True,
                  about["segments"][:1]):
        (folder/"about.json").write_text(json.dumps(about | {key: value}))
        try: found = FaissEngine(store).search(query, 5)
        except InputError: continue
        assert [o[0] for o in found[0]] == [o[0] for o in expected[0]], value


def test_removed_codes_are_made_again(tmp_path):
    "As the message of an error advises."
    import shutil
    store, folder, query = damaged_codes(tmp_path)
    (folder/"codes.faiss").write_bytes(b"damaged")
    shutil.rmtree(folder)
    engine = FaissEngine(store)
    engine.settle()
    assert len(engine._tail.codes) == 400


def test_without_faiss(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"aladin\[faiss\]"): FaissEngine(SetStore(tmp_path/"images"))


def test_searches_beside_writers(tmp_path):
    """Two engines search while another one adds and replaces items and writes codes: what counts all the time is always
    found."""
    store, engine = filled(tmp_path, 600)
    steady, failures, done = captions(0, 200), [], threading.Event()
    queries = vectors_of(steady[:20])

    def look():
        mine = FaissEngine(SetStore(store.path))
        while not done.is_set():
            try:
                assert ([o[0][0] for o in mine.search(queries, 1)] == steady[:20]
                        and mine.find(steady).keys() == set(steady))
            except BaseException as e: return failures.append(e)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for t in lookers: t.start()
    for step in range(8):
        engine.put(write(store, [*captions(600 + 60*step, 660 + 60*step), *captions(400, 470)], step + 1,
                         deleted=captions(300 + step, 301 + step)))
        engine.settle()
    done.set()
    for t in lookers: t.join()
    assert not failures, failures[0]
    assert len(engine._names()) == 1


# Whole indexes

def test_command(tmp_path, monkeypatch, capsys):
    """`--approximate` takes faiss; pictures are added, pruned and found; the engine is changed without encoding
    anything."""
    monkeypatch.setattr(coded, "FLAT", 16)
    monkeypatch.setattr(coded, "TAIL", 2)
    model, out = str(write_model(tmp_path/"model")), str(tmp_path/"index")
    first, all_ = str(write_data(tmp_path/"first", 18)), str(write_data(tmp_path/"all", 22))
    assert main(["index", "--model", model, "--data", first, "--out", out, "--approximate"]) == 0
    assert "vectors as codes of faiss" in capsys.readouterr().err
    assert SearchIndex.open(out, model).info["engine"] == "faiss"
    assert main(["index", "--model", model, "--data", all_, "--out", out]) == 0
    assert main(["index", "--out", out, "--delete", "1003"]) == 0
    capsys.readouterr()
    def answers():
        assert main(["search", "a red fish", "--index", out, "--json", "-k", "30"]) == 0
        return [(h["id"], round(h["score"], 3)) for h in json.loads(capsys.readouterr().out)["hits"]]
    found = answers()
    assert len(found) == 21 and "1003" not in dict(found)
    assert main(["index", "--model", model, "--data", all_, "--out", out, "--engine", "exact", "--prune"]) == 0
    assert len(SearchIndex.open(out, model)) == 22
    assert main(["index", "--out", out, "--delete", "1003"]) == 0
    capsys.readouterr()
    assert answers() == found


def test_engine_by_size(tmp_path, monkeypatch, capsys):
    import aladin.search.index as index
    monkeypatch.setattr(index, "FLAT", 6)
    model, data = str(write_model(tmp_path/"model")), str(write_data(tmp_path/"data", 8))
    assert main(["index", "--model", model, "--data", data, "--out", str(tmp_path/"index")]) == 0
    assert "8 pictures: the engine is faiss" in capsys.readouterr().err
    monkeypatch.setattr(index, "find_spec", lambda name: None)
    assert main(["index", "--model", model, "--data", data, "--out", str(tmp_path/"other")]) == 0
    assert "the engine is exact; pip install 'aladin[faiss]'" in capsys.readouterr().err
