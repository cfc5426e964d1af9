#!/usr/bin/env python3
"""Which pairs meet in a batch: by chance, by chance but never two captions of one image, or next to the images that the
matching head confuses with their own.

One configuration is trained for each composition and seed from the same pre-trained backbone, with all else equal, and
judged on minival by the best validation. Writes batches.md and batches.json."""
import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from aladin.config import config_from_dict, config_to_dict
from aladin.files import write_json
from aladin.data.text import captions_file, read_captions
from aladin.runs.record import provenance
from aladin.runs.stages import pretrain_run, train_run
from aladin.runs.graph import experiment_config

# allow_siblings, mined_negatives
COMPOSITIONS = {"by chance": (True, 0),
                "never two captions of an image": (False, 0),
                "that, and hard negatives mined each epoch": (False, 3)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared folder, such as results/scenes/data")
    parser.add_argument("--configuration", default="alad-alignment-and-matching-distill",
                        help="what is trained (default: alad-alignment-and-matching-distill)")
    parser.add_argument("--settings", default="scenes", help="how it is scaled (default: scenes)")
    parser.add_argument("--start", type=Path,
                        help="model folder to start from (default: one is pre-trained as the settings say)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted up from 88 (default: 3)")
    parser.add_argument("--steps", type=int, default=0, help="steps of each training (default: the settings')")
    parser.add_argument("--batch-size", type=int, default=0, help="pairs a step (default: the settings')")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for batches.md and batches.json, such as results/scenes")
    return parser.parse_args()


def configured(args, seed, siblings, mined):
    values = config_to_dict(experiment_config(args.configuration, args.settings, seed))
    values["loss"]["allow_siblings"], values["training"]["mined_negatives"] = siblings, mined
    if args.steps:
        values["training"] |= dict(max_steps=args.steps,
                                   validate_every=min(values["training"]["validate_every"], args.steps))
    if args.batch_size: values["training"]["batch_size"] = args.batch_size
    return config_from_dict(values)


def measure(args, scratch):
    start = args.start
    if not start:
        pretrain_run(configured(args, 88, False, 0), args.data, scratch/"pretraining")
        start = scratch/"pretraining"/"model"
    rows = []
    for name, (siblings, mined) in COMPOSITIONS.items():
        for seed in range(88, 88 + args.seeds):
            began = time.perf_counter()
            made = train_run(configured(args, seed, siblings, mined), args.data,
                             scratch/f"{siblings}-{mined}-{seed}", start)
            for head, m in made["minival"].items():
                rows.append(dict(batches=name, seed=seed, head=head, rsum=m["rsum"],
                                 seconds=time.perf_counter() - began, best_step=made["best_step"])
                            | {f"{d} R@1": m[d]["r1"] for d in ("i2t", "t2i")})
            print(rows[-2:], flush=True)
    return rows


def markdown(table, args, made):
    figures = (table.groupby(["batches", "head"], sort=False)[["i2t R@1", "t2i R@1", "rsum", "seconds"]]
               .agg(["mean", "std"]))
    lines = [f"Made by `benchmarks/batches.py` at commit {(made['commit'] or 'unknown')[:9]} on {made['date']}, "
             f"{made['machine']['processor']}, {made['wall_seconds']:.0f} s in all: {args.configuration}, "
             f"{made['steps']} steps of {made['batch_size']} pairs, {made['training_images']:,} training images, "
             f"minival, {args.seeds} seeds (mean ± standard deviation).", "",
             "| batches | head | i2t R@1 | t2i R@1 | rsum | seconds |", "|---|---|---:|---:|---:|---:|"]
    for (batches, head), r in figures.iterrows():
        lines.append(f"| {batches} | {head} | "
                     + " | ".join(f"{r[c, 'mean']:.1f} ± {r[c, 'std']:.1f}" for c in ("i2t R@1", "t2i R@1", "rsum"))
                     + f" | {r['seconds', 'mean']:.0f} |")
    return "\n".join(lines) + "\n"


def main():
    args, began = parse_args(), time.perf_counter()
    with tempfile.TemporaryDirectory() as d: rows = measure(args, Path(d))
    t = configured(args, 88, True, 0).training
    made = provenance(88) | dict(
        wall_seconds=round(time.perf_counter() - began, 1), steps=t.max_steps, batch_size=t.batch_size,
        training_images=len(read_captions(captions_file(args.data, "train"))))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out/"batches.json", dict(
        rows=rows, configuration=args.configuration, settings=args.settings,
        start=args.start and "/".join(args.start.parts[-3:]), **{"made by": made}))
    (args.out/"batches.md").write_text(markdown(pd.DataFrame(rows), args, made), encoding="utf-8")
    print((args.out/"batches.md").read_text())


if __name__ == "__main__": main()
