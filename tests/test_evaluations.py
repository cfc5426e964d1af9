"""Evaluations of the field: equality with the package of ECCV Caption, streaming, protocols, significance, and what is
refused."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aladin.cli.main import main
from aladin.data.ragged import Ragged
from aladin.evaluation.coco import _truth, coco_test_ids, extended_metrics, read_cxc_ratings, read_object_classes
from aladin.evaluation.embeddings import Embeddings
from aladin.evaluation.graded import NEVER, group_pairs, positive_ranks, read_judged_pairs
from aladin.evaluation.metrics import ranks_metrics, retrieval_ranks
from aladin.evaluation.protocols import read_clip_benchmark
from aladin.evaluation.similarity import Similarity, read_ids
from aladin.files import InputError


def coco_embeddings(seed, dim=24, noise=1.4):
    "Random vectors at COCO's ids: captions near their images, so that no figure is zero."
    generator = torch.Generator().manual_seed(seed)
    ids = coco_test_ids()
    images = list(ids.image.unique())
    vectors = torch.randn(len(images), dim, generator=generator)
    owner = torch.arange(len(images)).repeat_interleave(5)
    captions = vectors[owner] + noise*torch.randn(len(owner), dim, generator=generator)
    empty = [Ragged(torch.zeros(0, dim), torch.zeros(n, dtype=torch.int64)) for n in (len(images), len(owner))]
    return Embeddings(F.normalize(vectors, dim=1), F.normalize(captions, dim=1), *empty, images, owner)


def best_ids(scores, names, k=100):
    "The ids of the best candidates of each query, in blocks."
    return np.concatenate([names[part.topk(k, 1).indices.numpy()] for part in scores.split(500)]).tolist()


@pytest.fixture(scope="module")
def published():
    """Embeddings, and the numbers of the package eccv_caption for them; its measures read the first R or K candidates
    only."""
    e, ids = coco_embeddings(0), coco_test_ids()
    images, captions = np.array(e.image_ids, np.int64), ids.caption.to_numpy(np.int64)
    scores = e.image_matching @ e.caption_matching.T
    i2t = dict(zip(images.tolist(), best_ids(scores, captions)))
    t2i = dict(zip(captions.tolist(), best_ids(scores.T, images)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from eccv_caption import Metrics
    metrics = Metrics().compute_all_metrics(
        i2t, t2i, ("coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1"), (1, 5, 10))
    return e, metrics


@pytest.mark.parametrize("name, keys", [
    ("eccv", {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}),
    ("cxc", {"r1": "cxc_r1", "r5": "cxc_r5", "r10": "cxc_r10"})])
def test_equals_the_package_of_eccv_caption(published, name, keys):
    e, theirs = published
    ours = extended_metrics(e, name, "matching")
    for way in ("i2t", "t2i"):
        for key, their in keys.items():
            difference = abs(ours[way][key] - 100*theirs[their][way])
            print(f"{name} {way} {key}: {ours[way][key]:.6f}, difference {difference:.1e}")
            assert 0 < ours[way][key] < 100 and difference < 1e-9


def test_plain_recall_equals_the_package(published):
    e, theirs = published
    ours = ranks_metrics(*retrieval_ranks(e, "matching"))
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10): assert abs(ours[way][f"r{k}"] - 100*theirs[f"coco_5k_r{k}"][way]) < 1e-9


def brute_ranks(scores, right):
    """Ranks of the positives of one query by walking through the scores: of the wrong ones with an equal score, half
    come first."""
    ranks, before = [], 0
    for value in sorted(set(scores.tolist()), reverse=True):
        here, wrong = (right & (scores == value)).sum(), (~right & (scores == value)).sum()
        ranks += [before + wrong//2 + i for i in range(here)]
        before += here + wrong
    return ranks


@given(images=st.integers(1, 7), captions=st.integers(1, 4), levels=st.integers(1, 12), share=st.floats(.1, .9),
       seed=st.integers(0, 999), memory=st.sampled_from([1, 1e-9]))
@settings(max_examples=60, deadline=None)
def test_ranks_of_positives_by_definition(images, captions, levels, share, seed, memory):
    "Scores with many ties, any number of positives, positives that are lacking, any tile size."
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(images, images*captions)).astype(np.float32)
    owner = torch.arange(images).repeat_interleave(captions)
    source = Similarity(
        "scores", scores, np.arange(images), np.arange(len(owner)), [str(i) for i in range(images)], None, owner)
    right = rng.random(scores.shape) < share
    right[0, 0] = True
    for by, s, r in (("images", scores, right), ("captions", scores.T, right.T)):
        pairs = np.argwhere(r)
        lacking = np.unique(pairs[:, 0])
        positives = group_pairs([*pairs[:, 0], *lacking], [*pairs[:, 1], *[-1]*len(lacking)])
        found, _ = positive_ranks(source.tiles(memory=memory), positives, by)
        for i, query in enumerate(positives.queries):
            start, stop = positives.offsets[i:i+2]
            assert found[start:stop].tolist() == [*brute_ranks(s[query], r[query]), NEVER]


LIMITED = """
import resource, sys
import numpy as np
from aladin.evaluation.graded import graded_metrics, group_pairs
from aladin.evaluation.metrics import retrieval_ranks
from aladin.evaluation.similarity import open_similarity
import torch
torch.set_num_threads(1)
def everything(path, memory):
    source = open_similarity(path)
    owner = source.caption_image.numpy()
    rows = np.arange(len(owner))
    retrieval_ranks(source, memory=memory)
    return graded_metrics(source, (group_pairs(owner, rows), group_pairs(rows, owner)), memory=memory)["i2t"]["r1"]
everything(sys.argv[1], 1)
status = dict(line.split(":") for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0])*1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[3])*2**20,)*2)
print(everything(sys.argv[2], .03))
try: np.ones((8000, 8000), np.float16)
except MemoryError: sys.exit(0)
sys.exit("the limit has no effect")
"""


def test_a_matrix_is_streamed(tmp_path):
    "A matrix of 128 MB, each image's row five times, is evaluated where 80 MB of memory can be had."
    small, large = tmp_path/"small.npy", tmp_path/"large.npy"
    rng = np.random.default_rng(0)
    np.save(small, rng.random((10, 50), np.float32))
    scores = np.lib.format.open_memmap(large, "w+", np.float16, (8000, 8000))
    for i in range(0, 8000, 100): scores[i:i+100] = rng.random((20, 8000), np.float32).repeat(5, 0)
    del scores
    done = subprocess.run([sys.executable, "-c", LIMITED, str(small), str(large), "80"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.fixture
def files(tmp_path, monkeypatch):
    "A folder with a matrix of ten images, ids and judged pairs."
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    np.save("scores.npy", rng.standard_normal((10, 50), dtype=np.float32) + 2*np.eye(10, dtype=np.float32).repeat(5, 1))
    np.save("five.npy", np.load("scores.npy").repeat(5, 0))
    ids = [(f"img{c//5}", f"c{c}") for c in range(50)]
    Path("ids.csv").write_text("image,caption\n" + "".join(f"{i},{c}\n" for i,c in ids))
    Path("judged.csv").write_text("image,caption,relevance\n" + "".join(f"{i},{c},{1 + int(c[1:])%2}\n" for i,c in ids))
    return tmp_path


def run(*words): return main([str(w) for w in words])


def test_both_forms_of_a_matrix_give_the_same(files, capsys):
    assert run("evaluate", "--similarity", "scores.npy", "--protocol", "all", "--json", "a.json") == 0
    assert run("evaluate", "--similarity", "five.npy", "--protocol", "all", "--json", "b.json") == 0
    out = capsys.readouterr().out
    assert Path("a.json").read_text() == Path("b.json").read_text()
    assert "| 10 images" in out and "mean of 5 folds of 2 images" in out and "Ties:" in out and "pmrp left out" in out
    assert run("evaluate", "--similarity", "scores.npy", "--json", "b.json") == 0
    assert json.loads(Path("a.json").read_text())["protocols"]["5k"] == json.loads(Path("b.json").read_text())


def test_judged_pairs_from_the_command(files, capsys):
    assert run("evaluate", "--similarity", "five.npy", "--ids", "ids.csv", "--relevance", "judged.csv",
               "--json", "a.json", "--clip-benchmark", "b.json") == 0
    assert "judged pairs, i2t map_at_r" in capsys.readouterr().out
    found = json.loads(Path("a.json").read_text())
    assert found["judged"]["t2i"]["r1"] == pytest.approx(found["t2i"]["r1"])  # the pairs are the captions' own images
    assert (json.loads(Path("b.json").read_text())["metrics"]["image_retrieval_recall@1"]
            == pytest.approx(found["t2i"]["r1"]/100))
    assert run("evaluate", "--similarity", "scores.npy", "--beside", "b.json", "--name", "other") == 0
    assert "| five" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    ((), "--embeddings FILE or --similarity FILE"),
    (("--similarity", "scores.npy", "--embeddings", "x"), "found both"),
    (("--similarity", "scores.npy", "--protocol", "pmrp"), "--objects"),
    (("--similarity", "scores.npy", "--protocol", "eccv"), "COCO's test images"),
    (("--similarity", "scores.npy", "--protocol", "judged"), "--relevance"),
    (("--similarity", "scores.npy", "--relevance", "judged.csv"), "--ids"),
    (("--similarity", "scores.npy", "--ratings", "judged.csv"), "--ids"),
    (("--similarity", "scores.npy", "--protocol", "all", "--folds", "5"), "--protocol"),
    (("--similarity", "scores.npy", "--bank", "bank.safetensors"), "bank.safetensors"),
    (("--similarity", "scores.npy", "--bfloat16"), "--bfloat16"),
    (("--similarity", "scores.npy", "--judgements", "x", "--names", "y"), "embeddings"),
    (("--similarity", "scores.npy", "--protocol", "1k", "--clip-benchmark", "c.json"), "5k"),
    (("--similarity", "ids.csv"), "NumPy array"),
    (("--similarity", "scores.npy", "--ids", "judged.csv"), "header image,caption"),
    (("--similarity", "scores.npy", "--json", "ids.csv"), "metrics to replace"),
    (("--similarity", "scores.npy", "--clip-benchmark", "ids.csv"), "recalls to replace")])
def test_what_does_not_fit_is_refused(files, capsys, words, said):
    assert run("evaluate", *words) == 2
    assert said in capsys.readouterr().err
    assert not Path("c.json").exists()


def test_a_run_is_compared_with_a_matrix(files, capsys):
    scores = np.load("scores.npy")
    np.save("other.npy", scores + .3*np.random.default_rng(2).standard_normal(scores.shape, dtype=np.float32))
    assert run("compare", "scores.npy", "other.npy", "--samples", "200", "--figure", "d.png", "--json", "d.json") == 0
    first = capsys.readouterr().out
    assert "McNemar p" in first and Path("d.png").stat().st_size and len(json.loads(Path("d.json").read_text())) == 7
    assert run("compare", "scores.npy", "other.npy", "--samples", "200") == 0
    assert capsys.readouterr().out == first
    before = Path("d.json").read_bytes()
    for option, path in (("--json", "d.json"), ("--figure", "d.png")):
        assert run("compare", "scores.npy", "other.npy", option, path) == 2 and "--force" in capsys.readouterr().err
    assert Path("d.json").read_bytes() == before
    assert run("compare", "scores.npy", "other.npy", "--samples", "200", "--json", "d.json", "--force") == 0
    capsys.readouterr()
    for words, said in ((("scores.npy", "ids.csv"), "check the path"), (("scores.npy", "."), "evaluated run"),
                        (("scores.npy", "other.npy", "--figure", "d.txt"), ".png")):
        assert run("compare", *words) == 2 and said in capsys.readouterr().err


def test_a_head_without_training_is_not_compared(files, capsys):
    Path("run").mkdir()
    Path("run/metrics.json").write_text('{"heads": {"alignment": {}}}')
    assert run("compare", "run", "run") == 2 and "found alignment" in capsys.readouterr().err


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    _truth.cache_clear()
    with pytest.raises(InputError, match=r"aladin\[evaluation\]"): coco_test_ids()
    monkeypatch.undo()
    assert len(coco_test_ids()) == 25_000


@pytest.mark.parametrize("read, content", [
    (read_ids, b"image,caption\n1,2\n1,3\n"),
    (read_judged_pairs, b"image,caption,relevance\n1,2,1\n1,3,0.5\n"),
    (read_clip_benchmark,
     b'{"dataset": "d", "model": "m", "task": "zeroshot_retrieval", "metrics": {"image_retrieval_recall@5": 0.5}}'),
    (lambda path: read_object_classes(path, ["1"]),
     b'{"images": [{"id": 1}], "categories": [{"id": 3}], "annotations": [{"image_id": 1, "category_id": 3}]}'),
    (read_cxc_ratings,
     b"caption,image,agg_score,sampling_method\nCOCO_val2014_sentid:1,COCO_val2014_000000000007.jpg,4.5,c2i\n")])
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_read_or_refused(tmp_path, read, content, place, byte, cut):
    "One byte changed, or the end cut off: a value, or an error that names the file; never another exception."
    place %= len(content)
    path = tmp_path/"file"
    path.write_bytes(content)
    read(path)
    path.write_bytes(content[:place] if cut else content[:place] + bytes([byte]) + content[place+1:])
    try: read(path)
    except InputError as e: assert str(path) in str(e)
