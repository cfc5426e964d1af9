"""Everything that may run on a GPU runs on a device that only looks like one (simulated_device.py): the same numbers
bit for bit, and a training step that waits for it once.

Run by itself, this file is what the processes do in which torch knows the device; they write what they found, the tests
below judge it."""
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from aladin.model.configuration import config_for_split
from aladin.data.processor import AladinProcessor
from aladin.training.checkpoints import Checkpoints
from aladin.cli.main import main
from aladin.config import config_from_dict
from aladin.files import read_json
from aladin.data.splits import open_split
from aladin.data.regions import open_regions
from aladin.evaluation.embeddings import load_embeddings
from aladin.evaluation.scoring import score_matrix
from aladin.evaluation.metrics import evaluate_model
from aladin.evaluation.relevance import top_ranked
from aladin.evaluation.entangled import EntangledScorer
from aladin.runs.stages import evaluate_run, prepare_data, prepare_scenes
from aladin.model.model import AladinModel, load_model
from aladin.view.plots import attend
from aladin.search.index import SearchIndex
from aladin.training.processes import Processes
from aladin.device import set_seed
from aladin.training.pretraining import pretrain
from aladin.training.loop import TIMES, Training
from simulated_device import NAME, OnDevice, install, waits
from test_processes import BATCHES, CASES, finish, gradients, torchrun, vocabulary  # noqa: F401 (a fixture)

WAYS = {  # of training, by what they change
    "joint": dict(),
    "InfoNCE, learnt weights": dict(loss=dict(ranking="infonce", weights="auto", allow_siblings=False)),
    "mse": dict(loss=dict(distillation="mse")),
    "ordinal": dict(loss=dict(distillation="ordinal")),
    "contrastive, cosine": dict(loss=dict(distillation="contrastive", measure="cosine", max_violation=False)),
    "entropy": dict(loss=dict(terms=["matching", "entropy"], weights=[1., .1])),
    "symm": dict(model=dict(aggregation="symm")),
    "mean": dict(model=dict(aggregation="mean")),
    "MrAVGw, never clamped": dict(model=dict(aggregation="MrAVGw", clamp="never")),
    "scan-sentences": dict(model=dict(aggregation="scan-sentences")),
    "gated depth": dict(model=dict(depth_alignment="gated")),
    "gated depth, layers after": dict(model=dict(depth_matching="gated", post_layers=1),
                                      loss=dict(terms=["alignment", "matching", "hidden_l1"])),
    "mean depth": dict(model=dict(depth_matching="mean")),
    "layers, streams": dict(model=dict(alignment_layers=2, separate_streams=True)),
    "frozen": dict(model=dict(freeze_backbone=True), loss=dict(terms=["matching"], weights=[1.])),
    "chunks": dict(training=dict(chunk_size=4)),
    "layers recomputed": dict(training=dict(recompute_layers=True)),
    "bfloat16": dict(training=dict(precision="bfloat16")),
    "thinned, workers": dict(training=dict(thinning=.2, workers=1)),
    "mined": dict(training=dict(mined_negatives=2, batch_size=40)),
    "Detic and CLIP": dict(data=dict(detections="det_padded", tag_reader="clip", caption_reader="clip"),
                           loss=dict(terms=["alignment"], weights=[1.]))}
STEPS = 5


def same(a, b):
    "Whether two tensors, arrays, or nested collections of such are equal, NaNs included."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return bool(np.array_equal(torch.as_tensor(a).cpu().numpy(), torch.as_tensor(b).cpu().numpy(), equal_nan=True))
    return a == b


def refusals():
    "What the device itself does: refuse, count, and go on."
    x, found = torch.arange(6.).to(NAME), {}
    for name, wrong in {
            "two devices": lambda: x + torch.ones(6),
            "index_copy": lambda: x.index_copy(0, torch.arange(6), x),
            "numpy": x.numpy,
            "from the CPU": lambda: torch.ones(6) * x}.items():
        try: wrong(); found[name] = "not refused"
        except (RuntimeError, TypeError) as e: found[name] = type(e).__name__
    counted = {}
    for name, do in {
            "item": lambda: x[2].item(),
            "bool": lambda: bool((x > 1).any()),
            "to the host": x.cpu,
            "mask": lambda: x[x > 2],
            "nonzero": lambda: torch.nonzero(x),
            "int": lambda: int(x.max()),
            "tolist": x.tolist,
            "to the device": lambda: torch.ones(3).to(NAME),
            "made of a list": lambda: torch.tensor([1, 2], device=NAME),
            "repeat": lambda: torch.repeat_interleave(x, torch.ones(6, dtype=torch.int64).to(NAME, non_blocking=True)),
            "going on": lambda: torch.ones(3).to(NAME, non_blocking=True),
            "sums": lambda: ((x @ x) + x[torch.arange(3, device=NAME)]).sum(),
            "made there": lambda: torch.zeros(3, device=NAME) + 1}.items():
        waits.clear()
        do()
        counted[name] = sum(waits.values())
    return dict(found=found, counted=counted)


def both(work):
    "What `work` of a device's name gives on the CPU and on the device."
    with sdpa_kernel(SDPBackend.MATH): here = work("cpu")  # the device knows no other
    return here, work(NAME)


def train_way(changes, data):
    "A short training with validations: weights and history, and what its last steps wait for."
    settings = dict(model=dict(hidden_size=16, layers=2, attention_heads=2, intermediate_size=16, dropout=.1),
                    loss=dict(terms=["alignment", "matching", "distillation"], weights=[1., 1., .5]),
                    training=dict(batch_size=12, lr=1e-3, max_steps=STEPS, validate_every=3, warmup_steps=2))
    for part, values in changes.items(): settings[part] = settings.get(part, {}) | values
    if settings["loss"]["weights"] != "auto":
        settings["loss"]["weights"] = (settings["loss"]["weights"] + [1.]*3)[:len(settings["loss"]["terms"])]
    config = config_from_dict(settings)
    processor = AladinProcessor.from_pretrained(data, config.data)
    train, minival = (open_split(data, s, processor, open_regions(Path(data)/"regions")) for s in ("train", "minival"))

    def work(device):
        set_seed(0)
        model = AladinModel(config_for_split(config, train)).to(device)
        training = Training(model, train, config,
                            lambda m, heads: {k: {d: v for d, v in o.items() if d != "seconds"}
                                              for k, o in evaluate_model(m, minival, heads).items()},
                            progress=False)
        counted, after = [], training._after_step

        def count(*args):
            counted.append(dict(waits))
            after(*args)
            waits.clear()
        training._after_step = count
        waits.clear()
        history, best = training.run()
        return (dict(weights=dict(model.state_dict()), history=history.drop(columns=TIMES).to_numpy(), best=best),
                counted)
    (here, _), (there, counted) = both(work)
    return dict(same=same(here, there), losses=[list(o["history"][:, 1]) for o in (here, there)],
                finite=bool(np.isfinite(here["history"][:, 1]).all()), waits=counted[1:])


def pretraining(data):
    "The stand-in for VinVL's pre-training."
    train = open_split(data, "train", AladinProcessor.from_pretrained(data), features=Path(data)/"regions")

    def work(device, steps):
        config = config_from_dict(dict(model=dict(hidden_size=16, layers=1, attention_heads=2, intermediate_size=16),
                                       training=dict(batch_size=8, pretrain_steps=steps, thinning=.1)))
        set_seed(0)
        model = AladinModel(config_for_split(config, train)).to(device)
        waits.clear()
        log = pretrain(model, train, config.training, 0, progress=False)
        return dict(weights=dict(model.state_dict()), log=log.to_numpy()), sum(waits.values())
    return dict(same=same(*both(lambda device: work(device, 4)[0])), waits=(work(NAME, 8)[1] - work(NAME, 4)[1])/4)


def whole_run(data, folder):
    """`aladin train`, resumed from a checkpoint in its middle, encode, evaluate, index and search, as the environment
    variable says."""

    def run(*arguments):
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            status = main([str(a) for a in arguments])
        if status: raise SystemExit(f"{arguments} ended with {status}")

    def work(device):
        os.environ["ALADIN_DEVICE"] = device
        out, train = (folder/device,
                      lambda *more: run("train", "--configuration", "alad-alignment-and-matching-distill",
                                        "--settings", "tiny", "--data", data, "--out", folder/device/"run", *more))
        train()
        newest = Checkpoints(out/"run"/"checkpoints", 2).all()[-1]
        newest.unlink()  # as if it had been killed after the first validation
        first = dict(load_model(out/"run"/"model").state_dict())
        train("--resume", "auto")
        again = dict(load_model(out/"run"/"model").state_dict())
        metrics = evaluate_run(out/"run", data, "scenes", progress=False)
        run("encode", "--model", out/"run"/"model", "--data", data, "--split", "test", "--out", out/"test.safetensors")
        run("evaluate", "--embeddings", out/"test.safetensors", "--head", "alignment", "--bank", out/"test.safetensors",
            "--json", out/"evaluated.json")
        model, embeddings = load_model(out/"run"/"model").to(device), load_embeddings(out/"test.safetensors").to(device)
        test = open_split(data, "test", AladinProcessor.from_pretrained(out/"run"/"model"),
                          features=Path(data)/"regions")
        index = SearchIndex.build(model, test)
        hits = index.search(test.captions[0], k=3, explain=True)
        pointing = attend(model, test, 0, 0)
        torch.manual_seed(0)
        entangled = AladinModel(config_for_split(
            config_from_dict(dict(model=dict(hidden_size=16, layers=1, attention_heads=2, intermediate_size=16))),
            test))
        entangled.classifier = torch.nn.Linear(16, 2)
        pairs = EntangledScorer(entangled.eval().to(device), test).scores([0, 5, 10], [0, 1, 0])
        return dict(resumed_alike=same(first, again), weights=again, heads=strip(metrics["heads"]),
                    corrected=strip(metrics["heads_csls"]), evaluated=strip(read_json(out/"evaluated.json")),
                    embeddings=[embeddings.image_matching, embeddings.regions.values, embeddings.words.values],
                    scores=score_matrix(embeddings), some=score_matrix(embeddings.subset(embeddings.image_ids[3:0:-1])),
                    top=top_ranked(embeddings, "matching", 3),
                    hits=[(h.id, h.score, h.alignment.cosines) for h in hits], cosines=pointing.cosines,
                    score=pointing.score, pairs=pairs)
    here, there = both(work)
    return dict(resumed_alike=there["resumed_alike"]) | {k: same(here[k], there[k]) for k in here}


def strip(metrics):
    return {k: strip(v) for k, v in metrics.items() if k != "seconds"} if isinstance(metrics, dict) else metrics


def work_all(folder):
    "Everything, as JSON."
    install()
    prepare_scenes(folder/"scenes", "tiny", progress=False)
    prepare_data(folder/"scenes", folder/"data", progress=False)
    found = dict(refusals=refusals(), pretraining=pretraining(folder/"data"),
                 whole_run=whole_run(folder/"data", folder),
                 ways={name: train_way(changes, folder/"data") for name, changes in WAYS.items()})
    (folder/"found.json").write_text(json.dumps(found))


def work_together(vocabulary, folder):
    "A batch shared by processes whose tensors are all on the device, as NCCL must have them."
    install()

    def checked(function):
        def run(tensor, *args, **kwargs):
            if not isinstance(tensor, OnDevice):
                raise RuntimeError(f"{function.__name__} of a tensor in the CPU's memory")
            return function(tensor, *args, **kwargs)
        return run
    for function in (dist.broadcast, dist.reduce, dist.all_reduce): setattr(dist, function.__name__, checked(function))
    for case, loss in CASES.items():
        for chunk in (0, 2):
            processes = Processes.start()
            tensors, _ = gradients(vocabulary, loss, BATCHES["uneven"], chunk, processes, NAME)
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()},
                      folder/f"{case}-{chunk}-{processes.rank}.safetensors")


@pytest.fixture(scope="module")
def together(vocabulary, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("together")
    finish(torchrun(2, __file__, vocabulary, folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_processes_share_a_batch_on_the_device(together, vocabulary, case):  # noqa: F811
    alone, _ = gradients(vocabulary, CASES[case], BATCHES["uneven"], 0, Processes())
    for chunk, rank in ((0, 0), (0, 1), (2, 0), (2, 1)):
        shared = load_file(together/f"{case}-{chunk}-{rank}.safetensors")
        assert set(shared) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-5*max(1, value.abs().max().item()),
                                       msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    done = subprocess.run([sys.executable, __file__, folder], env=os.environ | dict(OMP_NUM_THREADS="1"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads((folder/"found.json").read_text())


def test_the_device_refuses_what_a_gpu_refuses(found):
    assert set(found["refusals"]["found"].values()) <= {"RuntimeError", "TypeError"}, found["refusals"]["found"]


def test_the_device_counts_what_waits(found):
    free = {"going on", "sums", "made there"}
    assert {k for k, n in found["refusals"]["counted"].items() if not n} == free, found["refusals"]["counted"]


@pytest.mark.parametrize("way", [w for w in WAYS if w != "bfloat16"])
def test_training_is_the_same_on_the_device(found, way):
    assert found["ways"][way]["same"] and found["ways"][way]["finite"]


def test_bfloat16_goes_as_a_gpu_casts(found):
    """A GPU's autocast sums and normalises in float32, the CPU's does not: the first steps agree to bfloat16's
    precision, an operation that would meet two types would fail."""
    here, there = found["ways"]["bfloat16"]["losses"]
    np.testing.assert_allclose(there[:2], here[:2], rtol=2**-8)
    assert here != there


@pytest.mark.parametrize("way", WAYS)
def test_a_step_waits_for_the_device_once(found, way):
    expected = 2 if way == "Detic and CLIP" else 1  # Detic's regions are told apart by their numbers
    assert all(sum(step.values()) == expected for step in found["ways"][way]["waits"]), found["ways"][way]["waits"]


def test_pretraining_is_the_same_on_the_device_and_waits_once_a_step(found):
    assert found["pretraining"] == dict(same=True, waits=1)


def test_a_whole_run_is_the_same_on_the_device(found):
    assert all(found["whole_run"].values()), found["whole_run"]


if __name__ == "__main__": (work_all if len(sys.argv) == 2 else work_together)(*map(Path, sys.argv[1:]))
