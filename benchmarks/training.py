#!/usr/bin/env python3
"""Peak memory and time of one optimisation step as functions of the batch, for the ways to make a batch large; write
results/training.md, .json and .png.

A small BERT (4 layers, 256 wide) reads pictures of 30 to 38 regions and captions of 8 to 18 words; the loss is the
joint configuration's, hinge triplet and ListNet, so every pair of the batch is compared. Each point is a process of its
own: memory is what its resident set grows by. With a GPU at hand the same is measured there at VinVL-base's size in
bfloat16, as samples a second and share of the peak of its matrix product.

Reading is measured by itself too: rows of VinVL's width from a mapped file, as many pairs a second as an epoch's reader
gives out, and the share of its time that a device would wait which takes batches as fast as VinVL-base's operations at
400 TFLOP/s let it, while this process is as busy as one that launches them."""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from bench import RandomRegions, matmul_peak, peak_memory, random_split, timed
from aladin.config import config_from_dict
from aladin.files import write_json
from aladin.runs.record import provenance
from aladin.training.losses import Criterion
from aladin.device import default_device
from aladin.model.configuration import model_config
from aladin.model.model import AladinModel
from aladin.training.processes import Processes
from aladin.training.step import Step, read_epoch
from aladin.training.pretraining import clip_gradients, make_optimizer

WAYS = {"all at once": {},
        "layers recomputed": dict(recompute_layers=True),
        "chunks of 32": dict(chunk_size=32),
        "chunks of 32, layers recomputed": dict(chunk_size=32, recompute_layers=True)}
GPU_WAYS = {"chunks of 256": dict(chunk_size=256)}
SMALL = dict(hidden_size=256, layers=4, attention_heads=4, intermediate_size=1024)
BASE = dict(hidden_size=768, layers=12, attention_heads=12, intermediate_size=3072)


def build(batch, way, size, precision, device):
    "A step to repeat, and how many multiplications and additions it takes."
    gpu = device == "cuda"
    if gpu: default_device()  # sets it up as training does
    config = config_from_dict(dict(
        model=size | dict(dropout=0.1 if gpu else 0.0),
        loss=dict(terms=["alignment", "distillation"], weights=[1., 1.]),
        training=(WAYS | GPU_WAYS)[way] | dict(batch_size=batch, precision=precision)))
    data = random_split(4*batch if gpu else batch)
    torch.manual_seed(0)
    model = AladinModel(model_config(config.model, config.data, 30522, data.regions.dim)).to(device).train()
    model.backbone.recompute = config.training.recompute_layers
    criterion = Criterion(config.loss).to(device)
    optimizer, step = make_optimizer(model, criterion, config.training), Step(model, criterion, data, config)
    rng = np.random.default_rng(0)
    batches = [rng.permutation(len(data.image_ids))[:batch]*5 for _ in range(1000)]
    shares, order = read_epoch(data, batches, config, 0, Processes(), pin=gpu), iter(batches)
    def work():
        start = time.perf_counter()
        share, rows = next(shares), next(order)
        waited = time.perf_counter() - start
        optimizer.zero_grad()
        step(share, rows)
        clip_gradients(list(model.parameters()), 2.0)
        optimizer.step()
        if gpu: torch.cuda.synchronize()
        return waited/(time.perf_counter() - start)
    return work, operations(data, batches[0], size)


def operations(data, rows, size):
    """Multiplications and additions of a step, forward and back, on the batch of some captions, each with an image of
    its own; the alignment's way back are sums of rows."""
    images = data.caption_image[rows]
    regions, words = int(data.region_counts[images].sum()), int(data.caption_lengths[rows].sum())
    h, layers, wide = size["hidden_size"], size["layers"], size["intermediate_size"]
    return 6*(int(data.tag_lengths[images].sum()) + regions + words)*layers*(4*h*h + 2*h*wide) + 2*h*regions*words


def measure(batch, way, device="cpu"):
    "Seconds, memory and share of waiting of one point."
    gpu = device == "cuda"
    work, flop = build(batch, way, BASE if gpu else SMALL, "bfloat16" if gpu else "float32", device)
    before = peak_memory()
    if gpu: torch.cuda.reset_peak_memory_stats()
    seconds, waited = timed(work, least=10 if gpu else 5, most=30 if gpu else 3)
    memory = torch.cuda.max_memory_allocated()/2**20 if gpu else peak_memory() - before
    return dict(batch=batch, way=way, seconds=seconds, memory_mib=memory, samples_a_second=batch/seconds, flop=flop,
                data_share=waited, device=torch.cuda.get_device_name() if gpu else "processor")


class MappedRegions(RandomRegions):
    "The same in a file, as a region store maps it."
    def __init__(self, count, path):
        super().__init__(count)
        self.vectors = np.lib.format.open_memmap(path, "w+", np.float32, (count, *self.vectors.shape[1:]))
        self.vectors[:] = 1
    def features(self, i): return self.vectors[int(i), :self.num_regions(i)]


@contextmanager
def recycled(blocks):
    """Without a GPU: memory that is used again and again, in place of the pinned memory that a GPU's reader takes and
    gives back."""
    if torch.cuda.is_available(): yield; return
    empty, kept = torch.empty, {}
    def recycle(*shape, pin_memory=False, **options):
        if not pin_memory: return empty(*shape, **options)
        size = int(np.prod(shape[0]))
        with lock:
            if (bits := size.bit_length()) not in kept:
                kept[bits] = deque(empty(2**bits, **options).fill_(1) for _ in range(blocks))
            kept[bits].rotate()
            return kept[bits][0][:size].view(shape[0])
    lock = Lock()
    with patch("torch.empty", recycle), patch("torch.Tensor.pin_memory", lambda tensor: tensor): yield


def reading(batches=(32, 256, 1024), images=2048, pairs=12288, least=40, device_flops=4e14):
    "Pairs a second that reading gives out, and what a fast device would wait for, by threads that read ahead."
    rows = []
    with tempfile.TemporaryDirectory() as d:
        data = random_split(images)
        data.regions = MappedRegions(images, Path(d)/"regions.npy")
        rng = np.random.default_rng(0)
        for threads in (1, 2, 4):
            for batch in batches:
                config = config_from_dict(dict(training=dict(workers=threads, batch_size=batch)))
                order = [rng.permutation(images)[:batch]*5 for _ in range(max(least, pairs//batch))]
                step, small, waited = operations(data, order[0], BASE)/device_flops, torch.ones(1), []
                with recycled(3*threads + 2):
                    for _ in read_epoch(data, order[:2], config, 0, Processes(), pin=True): pass  # the memory is there
                    start = time.perf_counter()
                    for _ in read_epoch(data, order, config, 0, Processes(), pin=True): pass
                    delivered = len(order)*batch/(time.perf_counter() - start)
                    shares = read_epoch(data, order, config, 0, Processes(), pin=True)
                    for _ in order:
                        start = time.perf_counter()
                        next(shares)
                        waited.append(time.perf_counter() - start)
                        while time.perf_counter() - start < waited[-1] + step: small.add_(1)
                late = waited[2*threads + 1:]  # when all that was read before the first step is used up
                rows.append(dict(threads=threads, batch=batch, pairs_a_second=delivered, step_seconds=step,
                                 waiting=sum(late)/(sum(late) + step*len(late))))
                print({k: round(v, 4) for k, v in rows[-1].items()}, flush=True)
    return rows


def run_point(batch, way, device, threads):
    done = subprocess.run([sys.executable, __file__, "--point", json.dumps([batch, way, device]),
                           "--threads", str(threads)],
                          stdout=subprocess.PIPE, text=True, check=device == "cpu")
    # a GPU may be too small for it, as its error says
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def draw(table, path):
    "Memory and time over the batch, a line for each way."
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (way, rows), marker in zip(table.groupby("way", sort=False), "osD^"):
        axes[0].plot(rows.batch, rows.memory_mib, marker=marker, label=way)
        axes[1].plot(rows.batch, rows.seconds, marker=marker, label=way)
    for axis, name in zip(axes, ("peak memory of a step in MiB", "seconds a step")):
        axis.set(xscale="log", yscale="log", xlabel="pairs a batch", ylabel=name)
        axis.set_xticks(sorted(table.batch.unique()), sorted(table.batch.unique()))
        axis.minorticks_off()
        axis.grid(alpha=.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def markdown(table, read, made, peaks):
    m = made["machine"]
    lines = ["# Training steps", "",
             f"Made by `benchmarks/training.py` at commit {(made['commit'] or 'unknown')[:9]} on {made['date']}: "
             f"{m['processor']}, {m['threads']} thread{'s'*(m['threads'] > 1)}, torch {made['versions']['torch']}, "
             f"{made['wall_seconds']:.0f} s in all.", "",
             "One step of the joint configuration's loss over the whole batch: 4 layers, 256 wide, on the CPU; "
             "VinVL-base in bfloat16 on a GPU.", "",
             "| device | batch | way | seconds a step | pairs a second | peak MiB "
             "| share of the matrix product's peak | waiting for data |",
             "|---|---:|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {r.device} | {r.batch} | {r.way} | {r.seconds:.3f} | {r.samples_a_second:.1f} | {r.memory_mib:.0f} | "
              f"{100*r.flop/r.seconds/peaks[r.device]:.0f} % | {100*r.data_share:.1f} % |" for r in table.itertuples()]
    lines += ["", "![Peak memory and time of a step over the batch](training.png)", "", "## Reading", "",
              "Rows of VinVL's width, 30 to 38 a picture, from a mapped file into memory that is used again, as pinned "
              "memory is. Threads read ahead of the step. A device that sustains 400 TFLOP/s would be done with a "
              "batch of VinVL-base in the time that the fourth column says, "
              f"{read[0]['batch']/read[0]['step_seconds']:,.0f} pairs a second; it is played by this process, busy "
              "with small operations.", "",
              "| threads | batch | pairs a second read | milliseconds a step | waiting for data |",
              "|---:|---:|---:|---:|---:|"]
    lines += [f"| {r['threads']} | {r['batch']} | {r['pairs_a_second']:,.0f} | {1000*r['step_seconds']:.1f} | "
              f"{100*r['waiting']:.1f} % |" for r in read]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"),
                        help="folder for training.md, .json and .png (default: results)")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024],
                        help="pairs a batch (default: 32 to 1024)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.point: return print(json.dumps(measure(*json.loads(a.point))))
    rows, start = [], time.perf_counter()
    points = [(b, w, "cpu") for w in WAYS for b in a.batches] + (
        [(b, w, "cuda") for b, w in (
            (32, "all at once"), (256, "all at once"), (1024, "all at once"), (1024, "chunks of 256"))]
        if torch.cuda.is_available() else [])
    for point in points:
        if not (row := run_point(*point, a.threads)): continue
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items() if k != "flop"}, flush=True)
    read = reading()
    peaks = dict(processor=matmul_peak()) | (
        {torch.cuda.get_device_name(): matmul_peak(torch.bfloat16, "cuda", 8192)} if torch.cuda.is_available() else {})
    made = provenance(0) | dict(wall_seconds=round(time.perf_counter() - start, 1))
    table = pd.DataFrame(rows)
    draw(table[table.device == "processor"], a.out/"training.png")
    write_json(a.out/"training.json", dict(rows=rows, reading=read, peak_flops=peaks, **{"made by": made}))
    (a.out/"training.md").write_text(markdown(table, read, made, peaks), encoding="utf-8")


if __name__ == "__main__": main()
