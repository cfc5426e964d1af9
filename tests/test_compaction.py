"Compaction beside readers and writers, of any history of additions, replacements and deletions."
import threading
import time

import numpy as np
import pytest

import aladin.search.segments as segments
from aladin.files import InputError
from aladin.search.segments import Items, SetStore

DIM = 8


def write(store, ids, version, source="x", **more):
    "Items whose vectors and sets say which item and version they are."
    vectors = np.array([[int(i), version, *[1]*(DIM - 2)] for i in ids], np.float32).reshape(-1, DIM)
    lengths = np.array([1 + int(i) % 3 for i in ids], np.int64)
    return store.write(
        dict(ids=ids, owners=ids, source=source, texts=[f"{i} {version}" for i in ids], **more), vectors=vectors,
        sets=np.repeat(vectors, lengths, 0).astype(np.float16), offsets=np.concatenate([[0], lengths.cumsum()]))


def content(store):
    "Version, set, text and source of each item that counts."
    items, found = Items(store), {}
    for item, place in items.find(items.ids()).items():
        segment = store.segment(place[0])
        values, lengths = store.arrays([place])
        found[item] = (segment.vectors[place[1]].tolist(), values.tolist(), lengths.tolist(),
                       segment.about["texts"][place[1]], segment.about["source"])
    return found


@pytest.mark.parametrize("seed", range(6))
def test_any_history(tmp_path, monkeypatch, seed):
    """What counts is the same before and after, to a reader that was there and to a new one; what does not count is
    gone."""
    monkeypatch.setattr(segments, "_PAUSE", 0)
    monkeypatch.setattr(segments, "_SMALL", 6)
    monkeypatch.setattr(segments, "_LARGE", 12)
    rng, store = np.random.default_rng(seed), SetStore(tmp_path/"captions", ("texts", "source"), DIM)
    reader = SetStore(store.path, ("texts", "source"), DIM)
    there = Items(reader)
    for version in range(40):
        ids = [str(i) for i in rng.choice(30, rng.integers(0, 12), replace=False)]
        gone = [str(i) for i in rng.choice(30, rng.integers(0, 4), replace=False)]
        if ids: write(store, ids, version, "xy"[rng.integers(2)], **(dict(deleted=gone) if rng.random() < .5 else {}))
        elif gone: store.write(dict(deleted=gone))
        if rng.random() < .3:
            before, order = content(store), Items(store).ids()
            store.compact()
            assert content(store) == content(SetStore(store.path, ("texts", "source"), DIM)) == before
            assert there.ids() == Items(store).ids() and sorted(there.ids()) == sorted(order)
            rows = sum(len(store.segment(name).about.get("ids", ())) for name in store.names())
            assert rows == len(before)
            folders = {p.name for p in store.path.iterdir() if p.is_dir()}
            assert folders == set(store.names()) and store.compact() == 0
    assert content(reader) == content(store)


def test_readers_and_writers_at_once(tmp_path, monkeypatch):
    """Items that count all the time are found at any time, with their sets, while others are replaced and segments are
    compacted."""
    monkeypatch.setattr(segments, "_PAUSE", .01)
    store, failures, done = SetStore(tmp_path/"captions", ("texts", "source"), DIM), [], threading.Event()
    steady = [str(i) for i in range(50)]
    write(store, steady, 0)

    def look():
        mine = SetStore(store.path, ("texts", "source"), DIM)
        items = Items(mine)
        while not done.is_set():
            def read():
                places = items.find(steady)
                assert places.keys() == set(steady)
                values, lengths = mine.arrays([places[i] for i in steady])
                assert values[np.cumsum(lengths) - 1, 0].astype(int).tolist() == list(range(50))
                assert items.matrix().shape[1] == DIM
            try: segments.steady(mine, read)
            except BaseException as e: return failures.append(e)

    def add():
        mine, version = SetStore(store.path, ("texts", "source"), DIM), 0
        while not done.is_set():
            version += 1
            try: write(mine, [str(i) for i in range(100, 140)], version, deleted=["150"])
            except BaseException as e: return failures.append(e)
            time.sleep(.005)

    threads = ([threading.Thread(target=look, daemon=True) for _ in range(2)]
               + [threading.Thread(target=add, daemon=True)])
    for t in threads: t.start()
    for _ in range(15):
        store.compact()
        time.sleep(.02)
    done.set()
    for t in threads: t.join()
    assert not failures, failures[0]
    store.compact()
    assert len(content(store)) == 90 and len(store.names()) == 1


def test_a_mapped_file_stays_readable(tmp_path):
    store = SetStore(tmp_path/"captions", ("texts", "source"), DIM)
    old = write(store, ["1", "2"], 0)
    write(store, ["1"], 1)
    mapped = SetStore(store.path, ("texts", "source"), DIM).segment(old).sets
    assert store.compact() > 0 and not (store.path/old).exists()
    assert mapped[:, 0].tolist() == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"adds": [], "replaces": [1]}', '{"adds": ["../x"], "replaces": []}',
    '{"adds": ["00000000000000000001-00000000"], "replaces": []}'])
def test_damaged_lists(tmp_path, text):
    store = SetStore(tmp_path/"captions", ("texts", "source"), DIM)
    write(store, ["1"], 0)
    (store.path/"00000000000000000002-00000000.json").write_text(text)
    with pytest.raises(InputError): SetStore(store.path).names()
