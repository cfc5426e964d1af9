"""Several processes share a batch: the same losses and gradients as one process has, uneven batches included; a killed
training of two ends as an undisturbed one.

Run by torchrun, this file is what the processes do."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from aladin.data.processor import AladinProcessor
from aladin.config import config_from_dict
from aladin.data.splits import RetrievalSet
from aladin.training.losses import Criterion
from aladin.model.configuration import model_config
from aladin.model.model import AladinModel, load_model
from aladin.training.processes import Processes
from aladin.training.step import Step, read_share
from aladin.training.loop import TIMES

WORDS = "red blue green white black brown pink grey".split()
CASES = {
    "alignment": dict(terms=["alignment"]),
    "alignment, all negatives": dict(terms=["alignment"], max_violation=False, allow_siblings=False),
    "matching": dict(terms=["matching"]),
    "both by InfoNCE": dict(terms=["alignment", "matching"], ranking="infonce", allow_siblings=False),
    "distillation": dict(terms=["alignment", "distillation"]),
    "distillation alone by mse": dict(terms=["distillation"], distillation="mse"),
    "symm": dict(terms=["alignment"], aggregation="symm")}
# tiny: one of three processes has nothing
BATCHES = dict(even=np.arange(12), uneven=np.array([3, 0, 1, 18, 6, 12, 11]), tiny=np.array([4, 9]))


class Regions:
    "Ten images of one to four regions."
    dim, ids = 12, [str(i) for i in range(10)]
    def __contains__(self, i): return i in self.ids
    def features(self, i): return np.random.default_rng(int(i)).standard_normal((1 + int(i) % 4, 12)).astype(np.float32)
    def tags(self, i): return ["thing"]*(int(i) % 3)
    def num_regions(self, i): return 1 + int(i) % 4


def gradients(vocabulary, loss, rows, chunk_size, processes, device="cpu"):
    "Total loss and gradients of one step of a small model; what was received, in bytes."
    data = RetrievalSet(
        Regions(), {str(i): [f"a {WORDS[i % 8]} thing {WORDS[i//2]} a", f"one {WORDS[i % 5]}"] for i in range(10)},
        AladinProcessor.from_pretrained(vocabulary))
    loss = dict(loss)
    model = dict(hidden_size=16, layers=2, attention_heads=2, intermediate_size=16, dropout=0.,
                 aggregation=loss.pop("aggregation", "MrSw"))
    config = config_from_dict(
        dict(model=model, loss=loss | dict(weights=[1.]*len(loss["terms"])), training=dict(chunk_size=chunk_size)))
    torch.manual_seed(0)
    model, criterion = (AladinModel(model_config(config.model, config.data, 16, 12)).to(device).train(),
                        Criterion(config.loss).to(device))
    total, _ = Step(model, criterion, data, config, processes=processes)(
        read_share(data, processes.share(rows), chunk_size), rows)
    tensors = {n: p.grad for n, p in [*model.named_parameters(), *criterion.named_parameters()] if p.grad is not None}
    return tensors | dict(total=total[None]), processes.bytes_exchanged


def work(vocabulary, out):
    "What each process of the equality test does: every case and batch, in one piece and in chunks."
    received = {}
    for case, loss in CASES.items():
        for batch, rows in BATCHES.items():
            for chunk in (0, 2):
                processes = Processes.start()
                tensors, received[f"{case}/{batch}/{chunk}"] = gradients(vocabulary, loss, rows, chunk, processes)
                save_file({k: v.contiguous() for k, v in tensors.items()},
                          out/f"{case}-{batch}-{chunk}-{processes.rank}.safetensors")
    (out/f"received-{processes.rank}.json").write_text(json.dumps(received))


def torchrun(count, *command):
    "A command in so many processes on this machine, over gloo."
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
         *map(str, command)],
        env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    said, _ = process.communicate()
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder/"vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "one", *WORDS]))
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    finish(torchrun(request.param, __file__, vocabulary, folder))
    return request.param, folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_of_several_processes_are_those_of_one(shared, vocabulary, case, batch):
    count, folder = shared
    alone, _ = gradients(vocabulary, CASES[case], BATCHES[batch], 0, Processes())
    for chunk in (0, 2):
        for rank in range(count):
            together = load_file(folder/f"{case}-{batch}-{chunk}-{rank}.safetensors")
            assert set(together) == set(alone)
            for name, value in alone.items():
                torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-5*max(1, value.abs().max().item()),
                                           msg=lambda m: f"{name}: {m}")


def test_sets_go_round_without_padding(shared):
    """What a process receives, to the byte: words and their gradients, two vectors a pair, lengths, counts and scores,
    each as many as there are."""
    count, folder = shared
    received = json.loads((folder/"received-0.json").read_text())
    for batch, rows in BATCHES.items():
        # word pieces between [CLS] and [SEP], the last one dropped
        words = np.array([5 if r % 2 == 0 else 2 for r in rows]) - 1
        own = slice(0, Processes.bounds(type("P", (), dict(count=count))(), len(rows))[1])
        others, pairs = words.sum() - words[own].sum(), len(rows) - own.stop
        sets = others*16*4*2 + pairs*8  # there and back, and the lengths
        assert received[f"alignment/{batch}/0"] == sets + pairs*len(rows)*4, batch
        assert received[f"matching/{batch}/0"] == pairs*2*16*4, batch


# A whole training in two processes

ALADIN = Path(sys.executable).parent/"aladin"
ARGUMENTS = ["train", "--configuration", "alad-alignment-and-matching-distill", "--settings"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The tiny scenes, and settings with dropout and thinning, checkpoints between validations, and a last batch that
    does not divide."""
    folder = tmp_path_factory.mktemp("training")
    subprocess.run([ALADIN, "prepare", "--data", "scenes", "--size", "tiny", "--out", folder], check=True,
                   capture_output=True)
    (folder/"settings.yaml").write_text(
        "all:\n  model: {hidden_size: 32, layers: 1, attention_heads: 2, intermediate_size: 64, dropout: 0.1, "
        "drop_last_word: false}\n"
        "  data: {max_tokens: 40, max_regions: 20}\n"
        "  loss: {all_negatives_steps: 10, allow_siblings: false}\n"
        "  training: {lr: 0.001, batch_size: 23, epochs: 4, validate_every: 20, checkpoint_every: 3, thinning: 0.1, "
        "workers: 1, mined_negatives: 1}\n")
    return folder


def train(count, folder, out, *more):
    command = [ALADIN, *ARGUMENTS, folder/"settings.yaml", "--data", folder/"data", "--out", folder/out, *more]
    if count > 1: return torchrun(count, "--no-python", *command)
    return subprocess.Popen([*map(str, command)], start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def same(a, b):
    one, other = (load_model(o/"model").state_dict() for o in (a, b))
    assert all(torch.equal(one[n], other[n]) for n in one)
    tables = [pd.read_csv(o/"history.csv").drop(columns=TIMES) for o in (a, b)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize("count", [1, 2])
def test_killed_anywhere_a_training_ends_as_if_undisturbed(prepared, count):
    """kill -9 of all its processes at random moments (ALADIN_KILLS of them), then the same command to its end: weights
    and figures to the last bit."""
    choose, undisturbed, out = random.Random(count), prepared/f"undisturbed-{count}", f"killed-{count}"
    finish(train(count, prepared, undisturbed.name))
    history = pd.read_csv(undisturbed/"history.csv")
    # 300 captions, 23 a step in all processes together; two of an image never meet, which may take a batch more
    assert 4*14 <= history.step.max() <= 4*15
    steps = sorted(choose.sample(range(1, history.step.max()), int(os.environ.get("ALADIN_KILLS", 1))))
    for kill in steps:
        process = train(count, prepared, out, "--resume", "auto")
        while process.poll() is None and newest(prepared/out) < kill: time.sleep(.02)
        time.sleep(choose.uniform(0, .3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (prepared/out/"training.json").exists() or newest(prepared/out) == history.step.max()
    finish(train(count, prepared, out, "--resume", "auto"))
    same(undisturbed, prepared/out)


def newest(folder):
    "The step of the newest checkpoint."
    return max((int(p.stem.split("-")[1]) for p in (folder/"checkpoints").glob("step-*.safetensors")), default=0)


def test_another_number_of_processes_is_refused(prepared):
    if not (prepared/"undisturbed-1").exists(): finish(train(1, prepared, "undisturbed-1"))
    said, _ = (process := train(2, prepared, "undisturbed-1", "--resume", "auto")).communicate()
    assert process.returncode and "processes was 1, is 2" in said


if __name__ == "__main__": work(*map(Path, sys.argv[1:]))
