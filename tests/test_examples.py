"""Every command's help has an example that is run here, word for word.

The examples name files: a working folder has small ones under those names. Its scenes.yaml has the tiny settings, which
are found before the package's own. Left out are lines that need a network, a server or several processes; each command
has at least one line that is run."""
import contextlib
import hashlib
import io
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

from aladin.cli.command import COMMANDS
from aladin.cli.main import main
from aladin.data.encoders import make_encoder
from aladin.data.extract import make_detector
from aladin.data.scenes import write_scenes
from aladin.data.splits import open_split
from aladin.evaluation.embeddings import encode_split, save_embeddings
from aladin.files import resource_dir
from aladin.model.model import load_model
from aladin.runs.stages import prepare_data, prepare_scenes
import import_formats
from small_inputs import write_picture

root = Path(__file__).resolve().parent.parent
golden = root/"tests"/"golden"
ELSEWHERE = ("hub:", "http://", "ALADIN_VINVL_TOKEN", "torchrun", "flickr8k_source", "aladin verify coco_ir",
             "--data coco_ir --name coco", "aladin results\n",
             "--data coco_ir --features vinvl\n", "train --run alad-alignment-triplet/seed-88")
ORDER = ("prepare", "convert-detector", "extract", "import", "regions", "convert-detections", "convert", "make-clip",
         "fetch", "verify", "train", "plan", "lengths", "results", "reproduce", "stage", "encode", "evaluate",
         "compare", "index", "search", "export", "serve", "search-study", "demo")


def runnable(line): return not any(part in line + "\n" for part in ELSEWHERE)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


def write_imports(folder):
    "Regions and captions of other projects, under the names in the examples of import."
    of = import_formats.pictures(8)
    import_formats.write_precomp(folder/"f30k_precomp", of)
    import_formats.write_lxmert(folder, of[4:])
    (folder/"train2014_obj36.tsv").rename(folder/"val2014_obj36.tsv")
    import_formats.write_lxmert(folder, of[:4])
    import_formats.write_karpathy(folder, of).rename(folder/"dataset_coco.json")
    (folder/"objects_vocab.txt").write_text("".join(f"class {i}\n" for i in range(6)))
    import_formats.write_hdf5_volta(folder, of)
    (folder/"boxes36.h5").rename(folder/"flickr30k_boxes36.h5")
    import_formats.write_results_csv(folder, of)
    for name, some in dict(train=of[:6], test=of[6:]).items():
        (folder/f"{name}.txt").write_text("".join(f"{p.name}.jpg\n" for p in some))


def write_manifest(path, port, name, content):
    "A manifest of one file, which a server on this machine has."
    file = dict(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest(),
                url=f"http://127.0.0.1:{port}/{name}", note="a file")
    about = dict(name="mine", title="One file", kind="data set", licence="CC0", citation="none",
                 homepage="https://example.org", note="for a test", files=[file])
    path.write_text(yaml.safe_dump(about))


def write_scores(folder, runs):
    "The test images' embeddings in two run folders, and another model's scores with ids and judged pairs."
    model = load_model(folder/"model")
    encoded = encode_split(
        model, open_split(folder/"coco_ir", "test", model.checked_processor(), folder/"coco_ir"/"regions"),
        progress=False)
    for run in runs: save_embeddings(encoded, folder/"results"/"scenes"/run/"seed-88"/"embeddings.safetensors")
    images = [encoded.image_ids[i] for i in encoded.caption_image.tolist()]
    np.save(folder/"scores.npy",
            np.random.default_rng(0).standard_normal((len(encoded.image_ids), len(images)), dtype=np.float32))
    (folder/"ids.csv").write_text("image,caption\n" + "".join(f"{image},{c}\n" for c,image in enumerate(images)))
    (folder/"judged.csv").write_text(
        "image,caption,relevance\n" + "".join(f"{image},{c},1\n" for c,image in enumerate(images)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A working folder with everything that the examples name."
    folder = tmp_path_factory.mktemp("examples")
    write_scenes(folder/"coco_ir", train=44, minival=10, test=20, progress=False)
    shutil.copytree(folder/"coco_ir", folder/"vinvl")
    shutil.copytree(folder/"coco_ir", folder/"data")
    shutil.copytree(folder/"coco_ir", folder/"flickr8k")
    for name in ("features.tsv", "features.lineidx", "imageid2idx.json", "predictions.tsv"):
        (folder/"coco_ir"/name).unlink()
    shutil.copytree(folder/"vinvl", folder/"coco_ir"/"regions")
    for i in range(4): write_picture(folder/"photos"/f"{i}.jpg", seed=i)
    (folder/"captions.csv").write_text(
        "image,caption,split\n0.jpg,noise,train\n1.jpg,more noise,minival\n2.jpg,other noise,test\n")
    make_detector(folder/"models"/"detr")
    make_encoder(folder/"models"/"vision_clip")
    for path in (golden/"v2"/"feats").glob("detic.*"): shutil.copy(path, folder)
    shutil.copy(golden/"v1"/"checkpoint.pth.tar", folder)
    shutil.copy(golden/"detector"/"weights.pth", folder/"vinvl_vg_x152c4.pth")
    shutil.copy(golden/"detector"/"labelmap.json", folder/"VG-SGG-dicts-vgoi6-clipped.json")
    shutil.copytree(golden/"v1"/"oscar_ckpt", folder/"vinvl_base")
    shutil.copy(resource_dir("experiments")/"settings"/"tiny.yaml", folder/"scenes.yaml")
    shutil.copytree(resource_dir("demo")/"model", folder/"model")
    prepare_scenes(folder/"results"/"scenes-2.0"/"scenes", "tiny", progress=False)
    prepare_data(folder/"results"/"scenes-2.0"/"scenes", folder/"results"/"scenes-2.0"/"data", progress=False)
    shutil.copytree(root/"results"/"reference"/"scenes", folder/"results"/"scenes")
    prepare_data(folder/"data", folder/"results"/"scenes"/"data", progress=False)
    shutil.copytree(folder/"model", folder/"results"/"scenes"/"alad-alignment-and-matching-distill"/"seed-88"/"model")
    write_imports(folder)
    (folder/"token.txt").write_text("a-token\n")
    (folder/"queries.txt").write_text("a red fish\ntwo hats\n")
    write_scores(folder, ("alad-alignment-and-matching-distill", "alad-matching-distill-finetune"))
    return folder


@pytest.fixture(scope="module")
def served(world):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(world/"served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (world/"served").mkdir()
    (world/"served"/"a.bin").write_bytes(b"content")
    write_manifest(world/"mine.yaml", server.server_port, "a.bin", b"content")
    yield server
    server.shutdown()


def run_service(words):
    "A service as a process, at a free port: until it answers, then until SIGTERM has ended it."
    if "--port" not in words: words = [*words, "--port", "0"]
    words = ["0" if before == "--port" else word for before, word in zip(["", *words], words)]
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if line: urllib.request.urlopen(line.split()[-1] + "/health").close()
    process.terminate()
    return process.wait(60), line


def run(line, monkeypatch):
    "Run a command line in this process; `< FILE` as a shell does it."
    words = shlex.split(line)
    if words[1] == "serve": return run_service(words)
    if "<" in words:
        at = words.index("<")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(words[at + 1]).read_bytes())))
        words = words[:at]
    assert words[0] == "aladin"
    with contextlib.redirect_stdout(io.StringIO()) as out: status = main(words[1:])
    return status, out.getvalue()


def test_every_command_has_its_turn(): assert set(ORDER) == set(COMMANDS)


@pytest.mark.parametrize("name", ORDER)
def test_examples(name, world, served, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    lines = [line for line in COMMANDS[name].examples if runnable(line)]
    assert lines
    for line in lines:
        status, out = run(line, monkeypatch)
        assert status == 0, f"{line}\n{out}\n{capsys.readouterr().err}"
