"The commands that users' scripts rely on, in their exact forms, on the authors' own files."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from aladin.model.authors import model_from_original
from aladin.data.processor import AladinProcessor
from aladin.cli.command import COMMANDS
from aladin.cli.main import main
from aladin.config import DataSettings
from aladin.data.splits import open_split
from aladin.evaluation.embeddings import encode_to_file, load_embeddings
from aladin.evaluation.scoring import score_matrix
from aladin.evaluation.metrics import evaluate_embeddings
from aladin.model.model import AladinModel

golden = Path(__file__).parent/"golden"/"v1"


@pytest.fixture(scope="module")
def work(tmp_path_factory): return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module", params=["checkpoint.pth.tar", "checkpoint_zip.pth.tar"])
def model(request, work):
    out = work/request.param.split(".")[0]
    assert main(["convert", "--checkpoint", str(golden/request.param), "--oscar", str(golden/"oscar_ckpt"),
                 "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def embeddings(model):
    out = model/"embeddings.safetensors"
    assert main(["encode", "--model", str(model), "--data", str(golden/"data"), "--features", str(golden/"feats"),
                 "--split", "test", "--keys", "test_img_keys.tsv", "--out", str(out)]) == 0
    return out


def test_converted_folder(model):
    assert {p.name for p in model.iterdir()} >= {"config.json", "model.safetensors", "vocab.txt"}


def test_embedding_file(embeddings):
    with safe_open(embeddings, "np") as f: t = {k: f.get_tensor(k) for k in f.keys()}
    keys = (golden/"data"/"test_img_keys.tsv").read_text().split()
    assert t["image_ids"].tolist() == [int(k) for k in keys]
    assert len(t["image_matching"]) == len(keys) == len(t["region_offsets"]) - 1
    assert len(t["caption_matching"]) == len(t["caption_image"]) == len(t["word_offsets"]) - 1
    assert t["region_offsets"][-1] == len(t["regions"]) and t["word_offsets"][-1] == len(t["words"])
    assert t["regions"].shape[1] == t["words"].shape[1] == t["image_matching"].shape[1]
    assert (np.diff(t["caption_image"]) >= 0).all()


@pytest.mark.parametrize("head", ["matching", "alignment"])
def test_metrics(embeddings, head):
    out = embeddings.parent/f"{head}.json"
    assert main(["evaluate", "--embeddings", str(embeddings), "--head", head, "--json", str(out)]) == 0
    metrics, expected = json.loads(out.read_text()), np.load(golden/"expected"/"evaluation.npz")
    assert set(metrics) == {"i2t", "t2i", "rsum"}
    for direction in ("i2t", "t2i"):
        want = expected[f"test_{direction}_{head}_metrics"]
        assert list(metrics[direction]) == ["r1", "r5", "r10", "medr", "meanr"]
        np.testing.assert_allclose([metrics[direction][k] for k in ("r1", "r5", "r10", "medr")], want[:4], atol=1e-6)
    assert metrics["rsum"] == pytest.approx(sum(metrics[d][k] for d in ("i2t", "t2i") for k in ("r1", "r5", "r10")))


def test_1k_keys_on_encoded_file(embeddings):
    out = embeddings.parent/"1k.json"
    assert main(["evaluate", "--embeddings", str(embeddings), "--head", "matching",
                 "--keys", str(golden/"data"/"test_img_keys_1k.tsv"), "--json", str(out)]) == 0
    want = np.load(golden/"expected"/"evaluation.npz")["test1k_i2t_matching_metrics"]
    np.testing.assert_allclose(json.loads(out.read_text())["i2t"]["r1"], want[0], atol=1e-6)


def test_evaluation_protocols(embeddings, tmp_path, capsys):
    "Folds, intervals, NDCG and human judgements from the command, held to the functions and to each other."
    out = tmp_path/"m.json"
    evaluate = lambda *more: main([
        "evaluate", "--embeddings", str(embeddings), "--head", "alignment", "--json", str(out), *more])
    assert evaluate("--intervals", "--ndcg", "--data", str(golden/"data"), "--cache", str(tmp_path/"cache")) == 0
    m = json.loads(out.read_text())
    for d in ("i2t", "t2i"):
        for k,v in m[d].items(): assert m["intervals"][d][k][0] <= v <= m["intervals"][d][k][1]
    assert 0 < m["ndcg"]["i2t"] < 100 and "NDCG@25" in capsys.readouterr().out
    assert len(list((tmp_path/"cache").glob("rouge-*.npy"))) == 1
    e = load_embeddings(embeddings)
    assert evaluate("--folds", "5") == 0
    n = len(e.image_ids)//5
    parts = [evaluate_embeddings(e.subset(e.image_ids[i*n:i*n + n]), ("alignment",))["alignment"] for i in range(5)]
    assert json.loads(out.read_text())["t2i"]["r5"] == pytest.approx(np.mean([p["t2i"]["r5"] for p in parts]))
    assert evaluate("--bank", str(embeddings)) == 0
    assert json.loads(out.read_text())["t2i"] == evaluate_embeddings(e, ("alignment",), bank=e)["alignment"]["t2i"]
    (tmp_path/"names.tsv").write_text("".join(f"{i}\t{i}.jpg\ttest\n" for i in e.image_ids))
    scores = score_matrix(e)
    (tmp_path/"expert.txt").write_text("".join(
        f"{e.image_ids[i]}.jpg\t{e.image_ids[c]}.jpg#{k}\t"
        + "\t".join(f"{scores[i, 5*c + k]:.4f}" for _ in range(3)) + "\n"
        for i in range(8) for c in range(8) for k in range(5)))
    assert evaluate("--judgements", str(tmp_path/"expert.txt"), "--names", str(tmp_path/"names.tsv")) == 0
    assert json.loads(out.read_text())["judgements"] == pytest.approx(dict(tau_b=1, rho=1, pairs=320), abs=1e-2)
    for options,word in ((["--ndcg"], "--data"), (["--judgements", "x"], "--names"),
                         (["--folds", "7"], "multiple of 7"), (["--folds", "5", "--bank", "x"], "--bank")):
        assert evaluate(*options) == 2 and word in capsys.readouterr().err


def test_encoding_goes_on_after_a_kill(tmp_path, monkeypatch):
    """Cut off amid the images and again amid the captions, the same call encodes only what is missing, and the file is
    the same."""
    model = model_from_original(golden/"checkpoint.pth.tar", golden/"oscar_ckpt")
    processor = AladinProcessor.from_pretrained(golden/"oscar_ckpt", DataSettings(max_tokens=20, max_regions=12))
    data = open_split(golden/"data", "train", processor, golden/"feats")
    encode_to_file(model, data, tmp_path/"whole.safetensors", 1, progress=False)
    calls,limit = [],[130]
    for name in ("encode_image_batch", "encode_caption_batch"):
        def cut(*args, whole=getattr(AladinModel, name), name=name):
            if len(calls) == limit[0]: raise KeyboardInterrupt
            calls.append(name)
            return whole(*args)
        monkeypatch.setattr(AladinModel, name, cut)
    encode = lambda: encode_to_file(model, data, tmp_path/"e.safetensors", 1, progress=False)
    for limit[0] in (130, 400):
        with pytest.raises(KeyboardInterrupt): encode()
        assert not (tmp_path/"e.safetensors").exists()
    assert calls.count("encode_image_batch") == 160 + 30  # a hundred were noted as done
    limit[0] = None
    encode()
    assert calls.count("encode_caption_batch") == len(data) + 10  # 210 were there, 200 noted
    assert (tmp_path/"e.safetensors").read_bytes() == (tmp_path/"whole.safetensors").read_bytes()
    assert sorted(o.name for o in tmp_path.iterdir()) == ["e.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command):
    done = subprocess.run(
        [sys.executable, "-c", "from aladin.cli.main import main; main()", *command.split(), "--help"],
        capture_output=True, text=True)
    assert done.returncode == 0 and "usage: aladin" in done.stdout
    if command:
        assert f"aladin {command} " in done.stdout.split("example:")[1]


def test_bad_input_leaves_nothing(tmp_path, capsys):
    assert main(["convert", "--checkpoint", str(tmp_path/"none.pth.tar"), "--oscar", str(golden/"oscar_ckpt"),
                 "--out", str(tmp_path/"model")]) == 2
    assert "none.pth.tar" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_prepare_replaces_only_when_told(tmp_path, capsys):
    first = ["prepare", "--data", "scenes", "--size", "tiny", "--out", str(tmp_path)]
    assert main(first) == 0
    before = (tmp_path/"data"/"prepared.json").stat().st_mtime_ns
    assert main(first) == 2 and "files in it" in capsys.readouterr().err
    assert main([*first, "--force"]) == 0 and (tmp_path/"data"/"prepared.json").stat().st_mtime_ns > before
