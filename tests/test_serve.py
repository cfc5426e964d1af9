"""`aladin serve`: its answers are those of the index, wrong requests are refused with a message, and nothing is lost
when the index changes, when the service is told to stop, or when it is killed and started again."""
import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from aladin.cli.main import main
from aladin.data.scenes import write_scenes
from aladin.data.splits import open_split
from aladin.model.model import load_model
from aladin.search.index import SearchIndex
from aladin.search.resident import Question, Resident
from aladin.search.segments import SetStore
from aladin.search.serve import Answers, Explanation, Health, Limits, Problem, Refusal, Service
from served import make_index, Served

TEXT = "a red fish above a green cactus"
LIMITS = ("--max-k", 20, "--max-rerank", 50, "--max-text", 200, "--max-body", 20_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_index(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def served(folder):
    (folder/"token").write_text("s3cret\n")
    with Served(folder/"index", "--onnx", "--token-file", folder/"token", *LIMITS, token="s3cret") as service:
        yield service


@pytest.mark.parametrize("onnx", [True, False])
def test_answers_are_those_of_the_index(folder, onnx):
    index = SearchIndex.open(folder/"index")
    image = index.image_ids()[3]
    def compare(found, hits):
        assert [h["id"] for h in found] == [h.id for h in hits] and hits
        np.testing.assert_allclose(
            [(h["score"], h["matching"]) for h in found], [(h.score, h.matching) for h in hits], atol=1e-4)
    with Served(folder/"index", *["--onnx"]*onnx) as service:
        for rerank in (0, 30): compare(service.hits(text=TEXT, k=5, rerank=rerank), index.search(TEXT, 5, rerank))
        compare(service.hits(image=image, k=5), index.similar(image, 5))
        compare(captions := service.hits("/captions", image=image, k=5), index.search_captions(image, 5))
        assert [c["text"] for c in captions] == [h.text for h in index.search_captions(image, 5)]
        pair, own = service.ask("/pair", dict(text=TEXT, image=image))[2], index.pair(TEXT, image)
        assert ([w["text"] for w in pair["words"]] == own.alignment.words
                and [r["tag"] for r in pair["regions"]] == own.alignment.tags)
        np.testing.assert_allclose(pair["cosines"], own.alignment.cosines, atol=1e-3)
        explained = service.hits(text=TEXT, k=2, explain=True)[0]["explanation"]
        assert explained["words"][0]["text"] == "a" and explained["score"] == service.hits(text=TEXT, k=2)[0]["score"]
        status, headers, picture = service.ask(f"/image/{image}")
        assert status == 200 and headers.get_content_type() == "image/png" and picture.startswith(b"\x89PNG")
        for model, answer in ((Answers, service.ask("/search", dict(text=TEXT, explain=True))[2]), (Explanation, pair),
                              (Health, service.ask("/health")[2])):
            model.model_validate(answer, extra="forbid")
        assert service.ask("/health")[2]["encoder"] == ("onnx" if onnx else "torch")
        assert service.stop() == (0, "")


def test_onnx_needs_no_torch(folder):
    "The service itself looks at its modules and its memory after it has answered every kind of question."
    code = f"""
import http.client, json, os, signal, sys, threading
from aladin.cli import search
from aladin.cli.main import main
import aladin.search.serve as serve
def ask(port):
    for path, body in (("/search", dict(text="a tree", explain=True)), ("/search", dict(image="200010")),
                       ("/captions", dict(image="200010")), ("/pair", dict(text="a tree", image="200010")),
                       ("/image/200010", None), ("/", None)):
        c = http.client.HTTPConnection("127.0.0.1", port)
        c.request("POST" if body else "GET", path, body and json.dumps(body), {{"Content-Type": "application/json"}})
        assert c.getresponse().status == 200, path
    resident = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
    modules = sorted({{"torch", "transformers", "pandas", "matplotlib"}} & set(sys.modules))
    print(json.dumps(dict(modules=modules, resident=resident)), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
address = serve.address
def started(bound):
    threading.Thread(target=ask, args=[bound.getsockname()[1]]).start()
    return address(bound)
serve.address = started
sys.exit(main(["serve", {str(folder/'index')!r}, "--onnx", "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[1])
    assert found["modules"] == [] and found["resident"] < 500_000, found


def test_only_serve_imports_fastapi():
    code = ("import sys, aladin.cli.main, aladin.search.resident, aladin.search.batching, aladin.search.service_page; "
            "print([m for m in ('fastapi', 'uvicorn', 'starlette', 'pydantic') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


SEARCH = dict(text=TEXT)
WRONG = [("/search", 422, field, body) for field, body in [
    ("text", {}),
    ("text", dict(text="")),
    ("text", dict(text=" \n\t")),
    ("text", dict(text="\x00\u200b")),
    ("text", dict(text="x"*201)),
    ("text", dict(text=5)),
    ("text", dict(text=None)),
    ("text", dict(text=["a"])),
    ("text", b'{"text": "\\ud800"}'),
    ("k", SEARCH | dict(k=0)),
    ("k", SEARCH | dict(k=21)),
    ("k", SEARCH | dict(k="5")),
    ("k", SEARCH | dict(k=True)),
    ("k", SEARCH | dict(k=None)),
    ("k", SEARCH | dict(k=1.5)),
    ("k", b'{"text": "a", "k": NaN}'),
    ("k", b'{"text": "a", "k": 1e999}'),
    ("k", SEARCH | dict(k=10**30)),
    ("rerank", SEARCH | dict(rerank=-1)),
    ("rerank", SEARCH | dict(rerank=51)),
    ("rerank", SEARCH | dict(rerank={})),
    ("explain", SEARCH | dict(explain=1)),
    ("explain", SEARCH | dict(explain="true")),
    ("image", SEARCH | dict(image="200010")),
    ("reranc", SEARCH | dict(reranc=5)),
    ("image", dict(image="")),
    ("image", dict(image=200010)),
    ("image", dict(image="x"*501)),
    ("rerank", dict(image="200010", rerank=5)),
    ("body", []),
    ("body", b""),
    ("body", b"{"),
    ("body", b"\xff\xfe{"),
    ("body", b"null"),
    ("body", b'"text"')]]
WRONG += [("/pair", 422, field, body) for field, body in [
    ("image", SEARCH),
    ("text", dict(image="200010")),
    ("k", SEARCH | dict(image="200010", k=5)),
    ("image", SEARCH | dict(image=None))]]
WRONG += [("/captions", 422, field, body) for field, body in [
    ("image", {}),
    ("text", SEARCH | dict(image="200010")),
    ("rerank", dict(image="200010", rerank=51))]]
WRONG += [(path, 404, "image", body) for path, body in [
    ("/search", dict(image="nowhere")),
    ("/captions", dict(image="../data/images/200010.png")),
    ("/pair", SEARCH | dict(image="/etc/passwd")),
    ("/image/nowhere", None),
    ("/image/..%2F..%2Fetc%2Fpasswd", None),
    ("/image//etc/passwd", None),
    ("/image/%00", None),
    ("/image/%ff%fe", None),
    ("/image/" + "x"*5000, None),
    ("/image/200010.png", None)]]
WRONG += [
    ("/search", 413, "body", b" "*20_001),
    ("/search", 413, "body", b" "*3_000_000),
    ("/search", 405, "method", None),
    ("/health", 405, "method", {}),
    ("/nowhere", 404, "path", None),
    ("/image/", 404, "image", None),
    ("/docs", 404, "path", None),
    ("/redoc", 404, "path", None)]


@pytest.mark.parametrize("path, status, field, body", WRONG, ids=lambda o: repr(o)[:40])
def test_wrong_requests(served, path, status, field, body):
    "4xx, a message that names the field with what was expected and found, and no path of the service's machine."
    try: found, _, answer = served.ask(path, body)
    except OSError:
        # the connection is closed while more than a megabyte is sent
        if isinstance(body, bytes) and len(body) > 2_000_000: return
        raise
    if isinstance(body, bytes) and found == 400: status, field = 400, "body"  # not parsed at all
    assert (found, answer["field"]) == (status, field), answer
    assert set(answer) == set(Problem.model_fields) and all(answer.values())
    assert (answer["message"]
            == f"{answer['field']}: expected {answer['expected']}, found {answer['found']}. Fix: {answer['fix']}")
    assert "/tmp" not in answer["message"] and len(answer["message"]) < 1500


def test_a_whole_number_may_have_a_point(served): assert len(served.hits(text=TEXT, k=3.0, rerank=2e1)) == 3


def test_nested_body(served):
    for body in (b"["*900, b'{"text":'*100 + b"1" + b"}"*100, b'{"text": ' + b"["*400 + b"]"*400 + b"}"):
        assert served.ask("/search", body)[0] in (400, 422)


def test_a_body_of_another_type(served):
    assert served.ask("/search", b"text=fish", **{"Content-Type": "application/x-www-form-urlencoded"})[0] == 422
    # what another site's form can send
    assert served.ask("/search", json.dumps(SEARCH).encode(), **{"Content-Type": "text/plain"})[0] == 422


def test_token(served):
    assert ([served.ask(path, token="")[0]
             for path in ("/health", "/", "/metrics", "/openapi.json", "/image/200010", "/nowhere")]
            == [200, 200, 401, 401, 401, 401])
    for token in ("S3cret", "s3cre", "s3crett"):
        status, headers, answer = served.ask("/search", SEARCH, token=token)
        assert (status == 401 and headers["WWW-Authenticate"] == "Bearer" and answer["field"] == "token"
                and "s3cret" not in answer["message"])
    assert served.ask("/search", SEARCH, token="", Authorization="Basic s3cret")[0] == 401
    assert served.ask("/search", SEARCH)[0] == 200


def test_token_from_the_environment(folder):
    with Served(folder/"index", "--onnx", ALADIN_SERVE_TOKEN="other", token="other") as service:
        assert (service.ask("/search", SEARCH)[0], service.ask("/search", SEARCH, token="")[0]) == (200, 401)


def test_metrics(served):
    def requests():
        text = served.ask("/metrics")[2].decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
                for line in text.splitlines() if not line.startswith("#")}
    before = requests()
    for i in range(3): served.ask("/search", SEARCH)
    served.ask(f"/image/{'x'*50}")
    after = requests()
    key = 'aladin_requests_total{route="/search",status="200"}'
    assert after[key] == before.get(key, 0) + 3 and after['aladin_index_items{kind="images"}'] == 30
    assert after['aladin_request_seconds_count{route="/search"}'] >= 3 and after["process_resident_memory_bytes"] > 1e7
    assert not [k for k in after if "xxx" in k]  # a route, not each address


def test_the_page_holds_nothing(served):
    "One document that loads nothing, under a policy that allows its own script alone."
    status, headers, page = served.ask("/", token="")
    assert (status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
            and headers["X-Content-Type-Options"] == "nosniff")
    assert b"http://" not in page and b"https://" not in page and b"200010" not in page


def test_schemathesis(served, tmp_path):
    """Requests made from the OpenAPI document, wrong ones too: no 5xx, only documented answers, of the documented form;
    what is wrong is refused."""
    pytest.importorskip("schemathesis")
    checks = ("not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
              "negative_data_rejection,positive_data_acceptance,unsupported_method")
    command = [Path(sys.executable).parent/"schemathesis", "run", f"{served.url}/openapi.json",
               "--header", "Authorization: Bearer s3cret", "--checks", checks, "--phases", "examples,coverage,fuzzing",
               "--max-examples", "60", "--generation-database", "none", "--seed", "1", "--no-color",
               "--exclude-path", "/metrics"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_extended_under_load(folder, tmp_path):
    """Four clients ask without a pause while pictures are added and deleted: every request is answered, and the answers
    follow."""
    for name in ("data", "model", "index"): shutil.copytree(folder/name, tmp_path/name)
    write_scenes(tmp_path/"more", train=4, minival=4, test=60, seed=2, progress=False)
    model, ended, failed, seen = load_model(tmp_path/"model"), threading.Event(), [], set()
    with Served(tmp_path/"index", "--onnx") as service:
        def client():
            while not ended.is_set():
                try: seen.add(len(service.hits(text=TEXT, k=100)))
                except Exception as e: failed.append(e)
        def until(pictures):
            end = time.monotonic() + 60
            while service.ask("/health")[2]["pictures"] != pictures:
                assert time.monotonic() < end and time.sleep(.05) is None
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4): pool.submit(client)
            index = SearchIndex.build(
                model, open_split(tmp_path/"more", "test", model.processor), tmp_path/"index", progress=False)
            until(60)
            index.delete(index.image_ids()[:10])
            until(50)
            assert len(service.hits(text=TEXT, k=100)) == 50
            ended.set()
        assert not failed and {30, 50} <= seen, (failed[:3], seen)
        assert service.stop() == (0, "")


SLOW = """
import sys, time
import aladin.search.resident as resident
answer = resident.Keeper.answer_all
def slow(self, questions):
    print("asked", flush=True)
    time.sleep(1)
    return answer(self, questions)
resident.Keeper.answer_all = slow
from aladin.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_running_requests_are_answered(folder):
    "SIGTERM while one request is computed and others wait: all are answered, and the exit status is 0."
    with (Served(folder/"index", "--onnx", command=[sys.executable, "-c", SLOW]) as service,
          ThreadPoolExecutor(5) as pool):
        asked = [pool.submit(service.ask, "/search", SEARCH)]
        assert service.process.stdout.readline() == "asked\n"
        asked += [pool.submit(service.ask, "/search", SEARCH) for _ in range(4)]
        time.sleep(.5)  # they wait in the queue now
        assert service.stop()[0] == 0
        assert [a.result()[0] for a in asked] == [200]*5


def test_killed_under_load_and_started_again(folder):
    """kill -9 while four clients ask: an answer is whole or an error of the connection, and the next process gives the
    same answers."""
    answers, broken = [], []
    def client(service):
        try:
            while True: answers.append(service.hits(text=TEXT, k=20))
        except (OSError, HTTPException) as e: broken.append(e)
    with Served(folder/"index", "--onnx") as service, ThreadPoolExecutor(4) as pool:
        before, port = service.hits(text=TEXT, k=20), service.port
        for _ in range(4): pool.submit(client, service)
        end = time.monotonic() + 60
        while len(answers) < 20: assert time.monotonic() < end and time.sleep(.01) is None
        service.kill()
    assert len(broken) == 4 and all(a == before for a in answers)
    with Served(folder/"index", "--onnx", port=port) as again: assert again.hits(text=TEXT, k=20) == before


def test_a_full_queue_is_refused(folder):
    service = Service(Resident(folder/"index", onnx=True), limits=Limits(waiting=1))
    async def ask():
        service.batcher.queue.put_nowait(("first", None))
        await service.ask(Question("search", TEXT))
    with pytest.raises(Refusal) as refused: asyncio.run(ask())
    assert refused.value.status == 503 and refused.value.headers == {"Retry-After": "1"}


def test_no_path_of_a_request_reaches_the_files(folder, tmp_path, monkeypatch):
    "Neither an id that the index lacks is looked up among the pictures, nor one of a crafted index that is a path."
    shutil.copytree(folder/"index", tmp_path/"index")
    store = SetStore(tmp_path/"index"/"images")
    first = store.segment(store.names()[0])
    outside = ["../secret", "/etc/passwd", "a__..__..__secret"]
    arrays = dict(vectors=first.vectors[:3], sets=first.sets[:3], offsets=np.arange(4), boxes=first.boxes[:3])
    store.write(dict(ids=outside, owners=outside, tags=[["x"]]*3, source=""), **arrays)
    (tmp_path/"pictures").mkdir()
    shutil.copy(next((folder/"data"/"images").iterdir()), tmp_path/"secret.png")
    service, looked = Service(Resident(tmp_path/"index", onnx=True), tmp_path/"pictures"), []
    monkeypatch.setattr(service.pictures, "thumbnail", lambda image, side: looked.append(image))
    async def statuses(*images):
        async with service.batcher:
            return [(await asyncio.gather(service.thumbnail(i), return_exceptions=True))[0].status for i in images]
    assert all(i in service.keeper.resident.index for i in outside)
    assert asyncio.run(statuses(*outside, "nowhere", "../pictures", "200010")) == [404]*6 and looked == ["200010"]


def test_command_refuses(folder, tmp_path, capsys):
    def error(*words):
        assert main(["serve", *map(str, words)]) == 2
        return capsys.readouterr().err
    assert "--onnx or --model" in error(folder/"index", "--onnx", "--model", folder/"model")
    assert "the description of an index" in error(tmp_path, "--port", "0")
    (tmp_path/"empty").touch()
    assert "printable ASCII" in error(folder/"index", "--token-file", tmp_path/"empty")
    assert "a free port" in error(folder/"index", "--host", "192.0.2.1")
    shutil.copytree(folder/"index", tmp_path/"bare", ignore=shutil.ignore_patterns("encoder"))
    assert "aladin export" in error(tmp_path/"bare", "--onnx", "--port", "0")


def test_missing_packages(monkeypatch, capsys, folder):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "aladin.search.serve")
    import aladin.search
    monkeypatch.delattr(aladin.search, "serve", raising=False)
    assert main(["serve", str(folder/"index")]) == 2 and "pip install 'aladin[serve]'" in capsys.readouterr().err
