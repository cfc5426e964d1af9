"""Fetching from a server that fails, stalls, cuts off, refuses and lies: what comes is whole or nothing, and each error
says what to do."""
import hashlib, json, sys, threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from aladin.cli.main import main
from aladin.files import InputError
from aladin.data.manifests import Manifest, ManifestFile, fetch, verify

body = bytes(range(251))*2000  # about half a megabyte: several blocks
secret = "sp=r&sig=abc%3D"


class Handler(BaseHTTPRequestHandler):
    "Serves `body` under every path, with the mishaps that the server holds for the next requests."
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_GET(self):
        server = self.server
        mishap = server.mishaps.pop(0) if server.mishaps else None
        server.asked.append((self.path, self.headers.get("Range")))
        if isinstance(mishap, int): return self.refuse(mishap)
        start = self.start() if server.ranges else 0
        if start >= len(server.body): return self.refuse(416, {"Content-Range": f"bytes */{len(server.body)}"})
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(server.body)-1}/{len(server.body)}")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(server.body)-start))
        self.end_headers()
        self.write(server.body[start:], mishap)

    def start(self):
        "Where the client wants to go on: 0 when its version is another."
        if self.headers.get("If-Range", self.server.etag) != self.server.etag: return 0
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def write(self, rest, mishap):
        if mishap is None: return self.wfile.write(rest)
        self.wfile.write(rest[:len(rest)//2])
        self.wfile.flush()
        if mishap == "stall": self.server.over.wait(3)
        self.close_connection = True

    def refuse(self, status, headers={}):
        self.send_response(status)
        for name,value in headers.items(): self.send_header(name, value)
        if status in (403, 409):
            self.send_header("x-ms-error-code", {403: "AuthenticationFailed", 409: "PublicAccessNotPermitted"}[status])
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *where):
        "A client that goes away is part of these tests."
        if not isinstance(sys.exc_info()[1], ConnectionError): super().handle_error(*where)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("ALADIN_TEST_TOKEN", raising=False)


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.body,server.etag,server.mishaps,server.asked,server.ranges,server.kind,server.over = (
        body,'"1"',[],[],True,"application/octet-stream",threading.Event())
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def manifest(server):
    file = ManifestFile(
        "sub/a.bin", len(body), hashlib.sha256(body).hexdigest(), url=f"http://127.0.0.1:{server.server_port}/a.bin")
    return Manifest("mine", "One file", "data set", "CC0", "none", "https://example.org", [file])


def without_digest(manifest): return replace(manifest, files=[replace(manifest.files[0], size=None, sha256=None)])


def get(manifest, folder, **options):
    return fetch(manifest, folder,
                 **dict(dict(progress=False, timeout=.5, tries=3, wait=.01, say=lambda line: None), **options))


def contents(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def refused(manifest, folder, *names, **options):
    with pytest.raises(InputError) as error: get(manifest, folder, **options)
    for name in (*names, "Fix:"): assert name in str(error.value), str(error.value)
    return str(error.value)


def whole(folder): return (folder/"sub"/"a.bin").read_bytes() == body


def test_fetch_then_skip(manifest, server, tmp_path):
    said = []
    get(manifest, tmp_path, say=said.append)
    get(manifest, tmp_path, say=said.append)
    assert whole(tmp_path) and contents(tmp_path) == ["sub/a.bin"] and verify(manifest, tmp_path) == []
    assert len(server.asked) == 1 and "fetched" in said[0] and "already there" in said[1]


def test_progress_bar(manifest, tmp_path, capsys):
    get(manifest, tmp_path, progress=True)
    assert "sub/a.bin: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("mishap", [500, 503, 429, "cut", "stall"])
def test_mishap_then_works(manifest, server, tmp_path, mishap):
    server.mishaps = [mishap]
    get(manifest, tmp_path)
    assert whole(tmp_path) and contents(tmp_path) == ["sub/a.bin"] and len(server.asked) == 2
    resumed = server.asked[1][1]
    assert (resumed is None) == isinstance(mishap, int)
    if resumed: assert 0 < int(resumed.removeprefix("bytes=").rstrip("-")) < len(body)


def test_server_without_ranges_starts_over(manifest, server, tmp_path):
    server.ranges,server.mishaps = False,["cut"]
    get(manifest, tmp_path)
    assert whole(tmp_path)


@pytest.mark.parametrize("mishap, says", [(500, "status 500"), ("stall", "time limit")])
def test_gives_up(manifest, server, tmp_path, mishap, says):
    server.ranges,server.mishaps = False,[mishap]*10
    refused(manifest, tmp_path, says, "2 times in a row", tries=2, timeout=.2)
    assert len(server.asked) in (2, 3) and "sub/a.bin" not in contents(tmp_path)


def test_progress_renews_the_tries(manifest, server, tmp_path):
    server.mishaps = ["cut"]*3
    get(manifest, tmp_path, tries=2)
    assert whole(tmp_path) and len(server.asked) == 4


def test_goes_on_in_the_next_call(manifest, server, tmp_path):
    server.mishaps = ["cut", 500]
    refused(manifest, tmp_path, "Fix", tries=1)
    assert "sub/a.bin.part" in contents(tmp_path) and "sub/a.bin" not in contents(tmp_path)
    get(manifest, tmp_path)
    assert whole(tmp_path) and server.asked[-1][1] and contents(tmp_path) == ["sub/a.bin"]


def test_other_version_starts_over(manifest, server, tmp_path):
    server.mishaps = ["cut"]
    refused(manifest, tmp_path, tries=1)
    server.body,server.etag = body[::-1],'"2"'
    get(without_digest(manifest), tmp_path)
    assert (tmp_path/"sub"/"a.bin").read_bytes() == body[::-1]


@pytest.mark.parametrize("rest, asked", [(b"", 1), (b"more", 2)], ids=["whole", "too long"])
def test_part_that_lacks_nothing(manifest, server, tmp_path, rest, asked):
    (tmp_path/"sub").mkdir()
    (tmp_path/"sub"/"a.bin.part").write_bytes(body + rest)
    get(manifest, tmp_path)
    assert whole(tmp_path) and len(server.asked) == asked


@pytest.mark.parametrize("given, names", [
    (body[:-1] + b"!", ["digest", hashlib.sha256(body).hexdigest(), hashlib.sha256(body[:-1] + b"!").hexdigest()]),
    (body + b"!", ["size", f"{len(body)} bytes", f"{len(body)+1} bytes"])
], ids=["digest", "size"])
def test_wrong_bytes_leave_nothing(manifest, server, tmp_path, given, names):
    server.body = given
    refused(manifest, tmp_path, "a.bin", *names)
    assert contents(tmp_path) == []


def test_md5(manifest, server, tmp_path):
    manifest.files = [replace(manifest.files[0], sha256=None, md5=hashlib.md5(body).hexdigest())]
    get(manifest, tmp_path/"right")
    assert (json.loads((tmp_path/"right"/".mine.sha256.json").read_text())["sub/a.bin"]["sha256"]
            == hashlib.sha256(body).hexdigest())
    server.body = body[::-1]
    refused(manifest, tmp_path/"wrong", hashlib.md5(body).hexdigest())


def test_wrong_file_is_replaced(manifest, server, tmp_path):
    for m,content in ((manifest, b"x"), (manifest, body[::-1]),
                      (replace(manifest, files=[replace(manifest.files[0], sha256=None)]), b"x")):
        (tmp_path/"sub").mkdir(exist_ok=True)
        (tmp_path/"sub"/"a.bin").write_bytes(content)
        get(m, tmp_path)
        assert whole(tmp_path)


def test_recorded_digest_holds(manifest, server, tmp_path):
    loose = without_digest(manifest)
    get(loose, tmp_path)
    record = json.loads((tmp_path/".mine.sha256.json").read_text())["sub/a.bin"]
    assert ((record["sha256"], record["size"], record["url"])
            == (hashlib.sha256(body).hexdigest(), len(body), manifest.files[0].url))
    assert verify(loose, tmp_path) == []
    (tmp_path/"sub"/"a.bin").write_bytes(body[::-1])
    assert [o.problem for o in verify(loose, tmp_path)] == ["wrong hash"]
    server.body = body[::-1]
    refused(loose, tmp_path, "digest", ".mine.sha256.json")
    server.body = body
    get(loose, tmp_path)
    assert verify(loose, tmp_path) == []


def test_broken_record(manifest, tmp_path):
    (tmp_path/".mine.sha256.json").write_text("[1]")
    refused(manifest, tmp_path, ".mine.sha256.json", "remove this file")


@pytest.mark.parametrize("status, code", [
    (403, "AuthenticationFailed"),
    (409, "PublicAccessNotPermitted"),
    (401, "Unauthorized")])
def test_token(manifest, server, tmp_path, monkeypatch, status, code):
    manifest.token = "ALADIN_TEST_TOKEN"
    server.mishaps = [status]*2
    refused(manifest, tmp_path, f"status {status} ({code})", "ALADIN_TEST_TOKEN is not set", "https://example.org",
            "ALADIN_TEST_TOKEN='")
    monkeypatch.setenv("ALADIN_TEST_TOKEN", "?" + secret)
    message = refused(manifest, tmp_path, f"status {status}", "expired", "https://example.org")
    assert "sig" not in message and len(server.asked) == 2
    get(without_digest(manifest), tmp_path)
    assert server.asked[-1][0] == f"/a.bin?{secret}" and whole(tmp_path)
    assert not any(b"sig" in p.read_bytes() for p in tmp_path.glob(".*.json"))


@pytest.mark.parametrize("status", [403, 404])
def test_refused_without_a_token(manifest, server, tmp_path, status):
    server.mishaps = [status]
    refused(manifest, tmp_path, f"status {status}", "https://example.org")
    assert len(server.asked) == 1


def test_web_page_in_place_of_the_file(manifest, server, tmp_path):
    server.kind = "text/html; charset=utf-8"
    refused(without_digest(manifest), tmp_path, "a web page", "https://example.org")
    assert contents(tmp_path) == []


def test_nobody_answers(manifest, server, tmp_path):
    manifest.files = [replace(manifest.files[0], url="http://127.0.0.1:9/a.bin")]
    refused(manifest, tmp_path, "broken connection", tries=2)


def test_disk_too_small(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    refused(manifest, tmp_path, "free space")


def test_made_by_hand(manifest, tmp_path):
    manifest.files += [ManifestFile("b.bin"), ManifestFile("c.bin")]
    manifest.note = "Ask for b and c."
    refused(manifest, tmp_path, "b.bin, c.bin", "no address", "Ask for b and c.", "https://example.org")
    assert whole(tmp_path)
    for name in "bc": (tmp_path/f"{name}.bin").write_text("x")
    get(manifest, tmp_path)


@pytest.fixture
def written(manifest, tmp_path):
    "The manifest as a YAML file, for the command line."
    file = manifest.files[0]
    (tmp_path/"mine.yaml").write_text(json.dumps(dict(vars(manifest), files=[vars(file)])))
    return tmp_path/"mine.yaml"


def test_commands(written, server, tmp_path, capsys):
    out = str(tmp_path/"got")
    assert main(["verify", str(written), out]) == 2
    assert capsys.readouterr().out.splitlines() == ["sub/a.bin: missing: expected a file, found nothing there"]
    assert main(["fetch", str(written), "--out", out]) == 0
    assert "fetched" in capsys.readouterr().out
    assert main(["verify", str(written), out]) == 0
    (tmp_path/"got"/"sub"/"a.bin").write_bytes(b"x")
    assert main(["verify", str(written), out]) == 2
    assert "wrong size" in capsys.readouterr().out


@pytest.mark.parametrize("name, says", [
    ("scenes", "aladin prepare --data scenes"),
    ("flickr8k", "aladin fetch flickr8k_source"),
    ("aladin_best", "drive.google.com"),
    ("coco_it", "write 'coco_ir'")])
def test_command_without_an_address(tmp_path, capsys, name, says):
    assert main(["fetch", name, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err and contents(tmp_path) == []
