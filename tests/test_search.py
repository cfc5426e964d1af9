"""Search against a Milvus server and against kills: what was acknowledged stays, several clients agree, another model
is refused."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aladin.search.engines as engines
from small_inputs import with_processor
from aladin.files import InputError
from aladin.data.splits import open_split
from aladin.search.engines import ExactEngine, MilvusEngine
from aladin.search.segments import SetStore
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel, load_model, save_model
from aladin.data.scenes import write_scenes
from aladin.search.index import SearchIndex

DIM = 24


class Server:
    "A Milvus Lite server on loopback over a folder, to be killed and started again."
    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [Path(sys.executable).parent/"milvus-lite", "server", "--data-dir", self.folder,
                   "--host", "127.0.0.1", "--port", self.port]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0: return
            time.sleep(.1)
        raise RuntimeError("the server does not answer")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def write(store, ids, seed):
    "A segment of random vectors of length 1, with a set of two rows for each."
    rng = np.random.default_rng(seed)
    vectors = F.normalize(torch.from_numpy(rng.standard_normal((len(ids), DIM), np.float32)), dim=-1).numpy()
    return (store.write(dict(ids=ids, owners=ids, source="x"), vectors=vectors,
                        sets=np.repeat(vectors, 2, 0).astype(np.float16), offsets=2*np.arange(len(ids) + 1)), vectors)


def test_server_answers_as_memory_does(server, tmp_path):
    store = SetStore(tmp_path/"images")
    milvus, exact = MilvusEngine(store, server.uri, "same", DIM, "m"), ExactEngine(store)
    for part in range(3):
        name, _ = write(store, [f"{part}-{i}" for i in range(70)], part)
        milvus.put(name)
    name, _ = write(store, ["0-3", odd := "odd \"id\"'s \\ 中"], 9)  # replaces one, adds one with a name to be quoted
    milvus.put(name)
    store.write(dict(deleted=["1-5"]))
    milvus.drop(["1-5"])
    assert milvus.find([odd]) == exact.find([odd]) != {}
    assert milvus.owned([odd, "1-5"]) == [odd]
    queries = F.normalize(torch.randn(20, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    for ours, theirs in zip(exact.search(queries, 12), milvus.search(queries, 12)):
        assert [(o[0], o[2]) for o in ours] == [(o[0], o[2]) for o in theirs]
        np.testing.assert_allclose([o[1] for o in ours], [o[1] for o in theirs], atol=1e-5)
    assert len(milvus) == len(exact) == 210
    with pytest.raises(InputError, match="search with the model"):
        MilvusEngine(store, server.uri, "same", DIM, "another")


def test_approximate_search_finds_most(server, tmp_path):
    store = SetStore(tmp_path/"images")
    graph, exact = MilvusEngine(store, server.uri, "graph", DIM, "m", approximate=True), ExactEngine(store)
    graph.put(write(store, [str(i) for i in range(3000)], 1)[0])
    queries = F.normalize(torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    shared = [len({o[0] for o in a} & {o[0] for o in b})/10
              for a, b in zip(exact.search(queries, 10), graph.search(queries, 10))]
    assert np.mean(shared) > .9
    assert MilvusEngine(store, server.uri, "graph", DIM, "m").approximate  # as the collection says


def test_several_clients_at_once(server, tmp_path):
    "Four clients insert into one collection, each its own pictures and one picture they share, while others search."
    failures, done = [], threading.Event()
    MilvusEngine(SetStore(tmp_path/"images"), server.uri, "many", DIM, "m")

    def insert(client):
        store = SetStore(tmp_path/"images")
        engine = MilvusEngine(store, server.uri, "many", DIM, "m")
        for part in range(5):
            name, vectors = write(store, [f"{client}-{part}-{i}" for i in range(30)] + ["shared"], 10*client + part)
            engine.put(name)
            found = engine.search(torch.from_numpy(vectors[:5]), 1)
            # acknowledged, so found at once
            assert [o[0][0] for o in found] == [f"{client}-{part}-{i}" for i in range(5)]
        engine.close()

    def look():
        store = SetStore(tmp_path/"images")
        engine = MilvusEngine(store, server.uri, "many", DIM, "m")
        while not done.is_set():
            # whatever is found has its set
            for hits in engine.search(F.normalize(torch.randn(3, DIM), dim=-1), 10):
                store.read([o[2] for o in hits]) if hits else None
        engine.close()

    def guarded(run, *arguments):
        try: run(*arguments)
        except BaseException as e: failures.append(e)

    lookers, writers = ([threading.Thread(target=guarded, args=(look,)) for _ in range(2)],
                        [threading.Thread(target=guarded, args=(insert, c)) for c in range(4)])
    for t in lookers + writers: t.start()
    for t in writers: t.join()
    done.set()
    for t in lookers: t.join()
    assert not failures, failures[0]
    assert len(MilvusEngine(SetStore(tmp_path/"images"), server.uri, "many", DIM, "m")) == 4*5*30 + 1


def test_killed_server_loses_nothing_acknowledged(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_PATIENCE", 2)
    server = Server(tmp_path/"data")
    store = SetStore(tmp_path/"images")
    engine = MilvusEngine(store, server.uri, "killed", DIM, "m")
    acknowledged, given, enough = {}, {}, threading.Event()

    def insert():
        for part in range(10_000):
            ids = [f"{part}-{i}" for i in range(20)]
            name, vectors = write(store, ids, part)
            given.update(zip(ids, vectors))
            try: engine.put(name)
            except Exception: return  # not acknowledged
            acknowledged.update(zip(ids, vectors))
            if part == 15: enough.set()

    writer = threading.Thread(target=insert)
    writer.start()
    assert enough.wait(60)
    server.kill()  # in the midst of inserts
    writer.join(60)
    assert not writer.is_alive() and len(acknowledged) >= 320
    with pytest.raises(InputError, match="Milvus, .*: expected an answer.*give the command again"): engine.find(["0-0"])
    server.start()
    try:
        again = MilvusEngine(store, server.uri, "killed", DIM, "m")
        assert again.find(list(acknowledged)).keys() == acknowledged.keys()
        ids = list(acknowledged)
        assert [o[0][0] for o in again.search(torch.from_numpy(np.stack([acknowledged[i] for i in ids])), 1)] == ids
        store.read(list(again.find(ids).values()))
        for name in store.names(): again.put(name)  # the client continues
        assert len(again) == len(given)
    finally: server.kill()


def test_token_comes_from_the_environment(monkeypatch, tmp_path):
    import pymilvus
    seen = {}

    def client(uri, **options):
        seen.update(options, uri=uri)
        raise RuntimeError("no such server")

    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("ALADIN_MILVUS_TOKEN", "user:secret")
    with pytest.raises(InputError, match="check the address") as e:
        MilvusEngine(SetStore(tmp_path), "https://cluster:443", "c", DIM, "m")
    assert seen["token"] == "user:secret" and "secret" not in str(e.value)


def test_without_pymilvus(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(InputError, match=r"aladin\[search\]"): MilvusEngine(SetStore(tmp_path), "x.db", "c", DIM, "m")


# Whole indexes, on the scenes with a small model.

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder/"data", train=4, minival=4, test=48, seed=2, progress=False)
    test = open_split(folder/"data", "test")
    torch.manual_seed(0)
    config = AladinConfig(vocab_size=len(test.processor.tokenizer), hidden_size=32, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=64, region_dim=test.regions.dim, max_tokens=40)
    save_model(with_processor(AladinModel(config), folder/"data"), folder/"model")
    return folder


def opened(scenes):
    model = load_model(scenes/"model")
    return model, open_split(scenes/"data", "test", model.processor)


def answers(index, test):
    return [[(h.id, round(h.score, 4)) for h in hits] for hits in index.search_all(test.captions[::7], k=10, rerank=30)]


@pytest.mark.parametrize("engine", ["exact", "faiss", "milvus"])
def test_killed_build_goes_on(scenes, tmp_path, engine, monkeypatch):
    """A build that is killed at once after a part: what it wrote stays, the next one encodes the rest, and the answers
    are those of a build in one go."""
    script = f"""
import os, signal, aladin.search.index as s
from aladin.data.splits import open_split
from aladin.model.model import load_model
s._SEGMENT = 10
put, count = s.SearchIndex._put_images, [0]
def killed(self, *a):
    # captions of the third part are written, its pictures are not
    if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)
    count[0] += 1
    put(self, *a)
s.SearchIndex._put_images = killed
model = load_model({str(scenes/'model')!r})
images = open_split({str(scenes/'data')!r}, "test", model.processor)
s.SearchIndex.build(model, images, {str(tmp_path/'index')!r}, {engine!r}, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, test = opened(scenes)
    monkeypatch.setattr("aladin.search.faiss.FLAT", 30)
    half = SearchIndex(tmp_path/"index", model)
    assert len(half) == 20 and all(i in half for i in test.image_ids[:20])
    assert half.add(test, progress=False) == 28
    assert answers(half, test) == answers(SearchIndex.build(model, test, progress=False), test)
    assert len(half.engines["captions"]) == len(test)
    half.close()


def test_index_on_a_server(scenes, server, tmp_path):
    model, test = opened(scenes)
    memory, index = (SearchIndex.build(model, test, progress=False),
                     SearchIndex.build(model, test, tmp_path/"index", server.uri, progress=False))
    assert answers(index, test) == answers(memory, test)
    second = SearchIndex.open(tmp_path/"index", scenes/"model")  # another client
    second.delete([test.image_ids[0]])
    assert test.image_ids[0] not in index and len(index.engines["captions"]) == len(test) - 5
    other = AladinModel(model.config)
    other.processor = model.processor
    with pytest.raises(InputError, match="search with that model"): SearchIndex(tmp_path/"index", other)


def test_pictures_from_other_data_replace(scenes, tmp_path):
    "The same ids from another detector, or with fewer captions: the old ones go."
    model, test = opened(scenes)
    index = SearchIndex.build(model, test, tmp_path/"index", progress=False)
    write_scenes(tmp_path/"other", train=4, minival=4, test=48, seed=3, progress=False)
    other = open_split(tmp_path/"other", "test", test.processor)
    other.captions, other.caption_image = other.captions[:3], other.caption_image[:3]
    other.caption_tokens = other.caption_inputs = other.caption_tokens[:3]
    assert other.image_ids == test.image_ids and index.add(other, progress=False) == 48
    assert len(index) == 48 and len(index.engines["captions"]) == 3
    fresh = SearchIndex.build(model, other, progress=False)
    assert answers(index, test) == answers(fresh, test)


@pytest.mark.parametrize("damage, message", [
    (lambda p: (p/"index.json").unlink(), "index.json"),
    (lambda p: (p/"index.json").write_text("[]"), "choose the folder of an index"),
    (lambda p: (p/"index.json").write_text(json.dumps(json.loads((p/"index.json").read_text()) | dict(version=9))),
     "update aladin")])
def test_damaged_index(scenes, tmp_path, damage, message):
    model, test = opened(scenes)
    SearchIndex.build(model, test, tmp_path/"index", progress=False)
    damage(tmp_path/"index")
    with pytest.raises(InputError, match=message): SearchIndex.open(tmp_path/"index", scenes/"model")


def test_lost_segment(scenes, tmp_path):
    model, test = opened(scenes)
    index = SearchIndex.build(model, test, tmp_path/"index", progress=False)
    index.search("a tree")
    place = index.engines["images"].find([test.image_ids[0]])[test.image_ids[0]]
    os.rename(tmp_path/"index"/"images", tmp_path/"gone")
    again = engines.SetStore(tmp_path/"index"/"images")
    with pytest.raises(InputError, match="copy the folder of the index whole"): again.read([place])
