"""Search at a Milvus standalone server: the answers of exact search, what a process has written, limits, a wrong token,
compaction, and a restart.

The server comes from the package milvus (extra `server-tests`), is started once, and is ended by its process id.
tests/test_search.py has Milvus Lite."""
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
import milvus_server
from aladin.cli.main import main
from aladin.files import InputError
from aladin.search.engines import CONSISTENCY, ExactEngine, MilvusEngine, TOKEN
from aladin.search.index import SearchIndex
from aladin.search.segments import SetStore
from test_search import answers, DIM, opened, scenes, write  # noqa: F401 (scenes is a fixture)


class Server:
    "A standalone server in a folder; a second start has the same address and data."
    def __init__(self, folder):
        self.folder = folder
        self.uri = f"http://127.0.0.1:{milvus_server.ports_of(folder)['proxy']}"
        self.process = None

    def start(self):
        script = Path(milvus_server.__file__).resolve()
        with open(self.folder/"log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, script, self.folder], stdout=log, stderr=subprocess.STDOUT)

    def wait(self, seconds=120):
        "Until a client can connect."
        import pymilvus
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            try:
                with engines._quiet():
                    return pymilvus.MilvusClient(self.uri, token=milvus_server.TOKEN, timeout=5, dedicated=True).close()
            except pymilvus.MilvusException: time.sleep(.3)
        raise RuntimeError(f"the server does not answer: {(self.folder/'log').read_text(errors='replace')[-2000:]}")

    def kill(self):
        if not self.process: return
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip(
        "milvus", reason="no package milvus with a server for Linux on x86_64: pip install 'aladin[server-tests]'")
    server = Server(tmp_path_factory.mktemp("milvus"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, milvus_server.TOKEN)
        try:
            server.start()
            server.wait()
            yield server
        finally: server.kill()


def unit(count, dim, seed):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert [(o[0], o[2]) for o in a] == [(o[0], o[2]) for o in b]
        np.testing.assert_allclose([o[1] for o in a], [o[1] for o in b], atol=1e-5)


def test_flat_equals_exact(server, tmp_path):
    store = SetStore(tmp_path/"images")
    milvus, exact = MilvusEngine(store, server.uri, "flat", DIM, "m"), ExactEngine(store)
    for part in range(3): milvus.put(write(store, [f"{part}-{i}" for i in range(300)], part)[0])
    odd = "odd \"id\"'s \\ 中"
    milvus.put(write(store, ["0-3", odd], 9)[0])  # replaces one, adds one
    store.write(dict(deleted=["1-5"]))
    milvus.drop(["1-5"])
    queries = unit(300, DIM, 0)
    same(exact.search(queries, 12), milvus.search(queries, 12))
    assert len(milvus) == len(exact) == 900
    assert (milvus.find([odd, "1-5"]) == exact.find([odd, "1-5"]) and milvus.place(odd) == exact.place(odd)
            and milvus.place("1-5") is None)
    assert milvus.owned([odd, "1-5"]) == [odd]
    with pytest.raises(InputError, match="search with the model"):
        MilvusEngine(store, server.uri, "flat", DIM, "another")


def test_a_process_finds_what_it_has_written(server, tmp_path):
    store = SetStore(tmp_path/"images")
    engine = MilvusEngine(store, server.uri, "session", DIM, "m")
    for part in range(2):
        name, vectors = write(store, [f"{part}-{i}" for i in range(10)], part)
        engine.put(name)
        assert engine.search(torch.from_numpy(vectors[:1]), 1)[0][0][0] == f"{part}-0"
        assert engine.place(f"{part}-9") == (name, 9)
        engine.drop([f"{part}-0"])
        assert engine.search(torch.from_numpy(vectors[:1]), 1)[0][0][0] != f"{part}-0"
        assert engine.place(f"{part}-0") is None


@pytest.fixture(scope="module")
def fifty(server, tmp_path_factory):
    "A collection of fifty vectors."
    store = SetStore(tmp_path_factory.mktemp("fifty")/"images")
    engine = MilvusEngine(store, server.uri, "fifty", DIM, "m")
    engine.put(write(store, [str(i) for i in range(50)], 0)[0])
    assert len(engine) == 50  # applied
    return engine


@pytest.mark.parametrize("level", [None, "bounded", "strong", "eventually"])
def test_reads_before_writes_are_strong(fifty, monkeypatch, level):
    engine = fifty
    if level: monkeypatch.setenv(CONSISTENCY, level)
    monkeypatch.setattr(engine, "consistency", engines._consistency())
    levels = []
    for name in ("search", "query"):
        method = getattr(engine.client._client, name)
        def call(*args, method=method, **options):
            levels.append(options["consistency_level"])
            return method(*args, **options)
        monkeypatch.setattr(engine.client._client, name, call)
    assert (len(engine.find(["7"])), engine.owned(["7"]), len(engine)) == (1, ["7"], 50)
    assert levels == ["Strong"]*3
    levels.clear()
    assert len(engine.search(unit(1, DIM, 0), 1)[0]) == 1 and engine.place("7")[1] == 7
    assert levels == [(level or "session").capitalize()]*2


def test_limit_of_answers(fifty, monkeypatch):
    engine = fifty
    assert len(engine.search(unit(1, DIM, 0), 10**6)[0]) == 50  # all of them
    # the server's own limit
    with pytest.raises(InputError, match="16384"): engine._search(unit(1, DIM, 0), engines._MOST + 1, "Session")
    assert len(engine._search(unit(1, DIM, 0), engines._MOST, "Session")[0]) == 50
    monkeypatch.setattr(engines, "_MOST", 40)
    with pytest.raises(InputError, match="k and rerank: expected at most 40, the limit of a Milvus server, found 41"):
        engine.search(unit(1, DIM, 0), 41)


def test_wrong_token(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: None)
    for token, found in (("root:secret", "another token"), ("", "no token")):
        monkeypatch.setenv(TOKEN, token)
        with pytest.raises(InputError,
                           match=f"token: expected the token of a user.*found {found}.*set ALADIN_MILVUS_TOKEN") as e:
            MilvusEngine(SetStore(tmp_path/"images"), server.uri, "token", DIM, "m")
        assert "secret" not in str(e.value)
    assert "Traceback" not in capfd.readouterr().err


def test_small_approximate_collection_is_exact_and_a_large_one_has_a_graph(server, tmp_path, monkeypatch):
    store, dim = SetStore(tmp_path/"images"), DIM
    engine, other, exact = (MilvusEngine(store, server.uri, "small", dim, "m", approximate=True),
                            MilvusEngine(store, server.uri, "small", dim, "m"), ExactEngine(store))
    engine.put(write(store, [str(i) for i in range(3000)], 1)[0])
    queries = unit(100, dim, 0)
    same(exact.search(queries, 10), engine.search(queries, 10))
    engine.settle()
    same(exact.search(queries, 10), engine.search(queries, 10))
    assert engine._index() == "FLAT" and other.approximate
    monkeypatch.setattr(engines, "GRAPH", 3000)
    engine.settle()
    assert engine._index() == "HNSW"
    for each in (engine, other):
        shared = [len({o[0] for o in a} & {o[0] for o in b})/10
                  for a, b in zip(exact.search(queries, 10), each.search(queries, 10))]
        assert np.mean(shared) > .95
    engine.settle()  # nothing to do


def test_compaction(server, scenes, tmp_path, monkeypatch):  # noqa: F811
    model, test = opened(scenes)
    index, memory = (SearchIndex.build(model, test, tmp_path/"index", server.uri, progress=False),
                     SearchIndex.build(model, test, progress=False))
    monkeypatch.setenv(CONSISTENCY, "eventually")
    second = SearchIndex.open(tmp_path/"index", scenes/"model")  # another client, open meanwhile
    for each in (index, memory): each.delete(test.image_ids[1:5])
    monkeypatch.setattr("aladin.search.segments._PAUSE", 0)
    before = set(index.stores["images"].names())
    assert main(["index", "--out", str(tmp_path/"index"), "--model", str(scenes/"model"), "--compact"]) in (0, None)
    assert before.isdisjoint(second.stores["images"].names())
    assert answers(second, test) == answers(memory, test)  # also where the node has not applied the new places yet
    assert answers(index, test) == answers(memory, test)
    assert ([h.id for h in second.search_captions(test.image_ids[0], k=5)]
            == [h.id for h in memory.search_captions(test.image_ids[0], k=5)])
    for each in (index, second): each.close()


def test_kill_and_restart(server, tmp_path, capfd):
    "An open client resumes after its server was killed during its inserts, and no acknowledged insert is lost."
    store = SetStore(tmp_path/"images")
    engine, reader = (MilvusEngine(store, server.uri, "killed", DIM, "m"),
                      MilvusEngine(store, server.uri, "killed", DIM, "m"))
    acknowledged, failures, enough, stop = {}, [], threading.Event(), threading.Event()

    def insert():
        for part in range(10_000):
            if stop.is_set(): return
            ids = [f"{part}-{i}" for i in range(20)]
            name, vectors = write(store, ids, part)
            try: engine.put(name)
            except Exception as e: return failures.append(e)
            acknowledged.update(zip(ids, vectors))
            if part == 15: enough.set()
            time.sleep(.02)

    writer = threading.Thread(target=insert)
    writer.start()
    assert enough.wait(60)
    server.kill()
    before = dict(acknowledged)
    server.start()
    ids = list(before)[::7]
    found = reader.search(torch.from_numpy(np.stack([before[i] for i in ids])), 1)  # waits for the server
    stop.set()
    writer.join(120)
    assert not writer.is_alive() and not failures, failures
    assert [o[0][0] for o in found] == ids
    assert (f"{server.uri}: waiting for Milvus, 90 s at most" in (told := capfd.readouterr().err)
            and "Traceback" not in told)
    assert reader.find(list(acknowledged)).keys() == acknowledged.keys() and len(reader) == len(acknowledged)
    store.read(list(reader.find(ids).values()))
