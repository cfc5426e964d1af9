#!/usr/bin/env python3
"""What a data set's features allow at most: two-tower probes on pooled region and caption vectors, by text side and by
number of training images.

A probe sees one vector an image (mean, maximum and largest region) and one a caption (words that occur, a sentence
model's vector, or both). It learns no alignment, so what limits it are the vectors and the number of training images,
not the network under study. Trained by InfoNCE, judged after the last step."""
import argparse, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel

from aladin.files import atomic_write, write_json
from aladin.data.processor import AladinProcessor
from aladin.data.splits import open_split
from aladin.config import DataSettings
from aladin.evaluation.metrics import retrieval_metrics
from aladin.runs.record import provenance
from aladin.data.regions import open_regions
from aladin.device import set_seed

RECALLS = [(d, f"r{k}") for d in ("i2t", "t2i") for k in (1, 5, 10)]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared folder, such as results/flickr8k/data")
    parser.add_argument("--text-model", required=True,
                        help="folder of a sentence model whose vocabulary is the data's, such as "
                             "models/all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each probe (default: 500)")
    parser.add_argument("--seed", type=int, default=88, help="of initialisation, order and dropout (default: 88)")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for limits.json and limits.md, such as results/flickr8k")
    return parser.parse_args()


def pooled_regions(data):
    "Mean, maximum and largest region of each image: [images, 3*numbers of a region]."
    def pool(regions):
        # the last two: width and height
        return np.concatenate([regions.mean(0), regions.max(0), regions[regions[:, -2:].prod(1).argmax()]])
    return torch.from_numpy(np.stack([pool(np.asarray(data.regions.features(i), np.float32)) for i in data.image_ids]))


def occurring_words(data, size):
    "Which tokens occur: [captions, vocabulary]."
    words = torch.zeros(len(data), size)
    for row, tokens in zip(words, data.caption_tokens): row[torch.as_tensor(tokens)] = 1
    return words


@torch.inference_mode()
def sentence_vectors(data, model):
    "Mean of the last hidden states: [captions, hidden]."
    order, out = torch.as_tensor([len(o) for o in data.caption_tokens]).argsort(), []
    for rows in order.split(256):
        batch = data.caption_batch(rows.tolist())
        tokens = nn.utils.rnn.pad_sequence(batch.values.split(batch.lengths.tolist()), batch_first=True)
        mask = torch.arange(tokens.shape[1]) < batch.lengths[:, None]
        hidden = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        out.append((hidden*mask[..., None]).sum(1)/mask.sum(1, keepdim=True))
    return torch.cat(out)[order.argsort()]


class Tower(nn.Module):
    def __init__(self, inputs, dropout, hidden=1024, out=512):
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(inputs, out)
        self.deep = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out))

    def forward(self, x):
        x = self.dropout(x)
        return normalize(self.linear(x) + self.deep(x), dim=1)


def probe(images, captions, caption_image, steps, seed, batch_size=256, lr=1e-3, temperature=.05, dropout=.3):
    "Train two towers on one random caption of each of `batch_size` random images a step."
    set_seed(seed)
    towers = nn.ModuleList([Tower(images.shape[1], dropout), Tower(captions.shape[1], dropout)])
    optimizer = torch.optim.AdamW(towers.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=.1, cycle_momentum=False)
    own = [torch.nonzero(caption_image == i).flatten() for i in range(len(images))]
    for _ in range(steps):
        rows = torch.randperm(len(images))[:batch_size]
        texts = torch.stack([own[i][torch.randint(len(own[i]), ())] for i in rows])
        scores = towers[0](images[rows]) @ towers[1](captions[texts]).T/temperature
        target = torch.arange(len(rows))
        loss = (cross_entropy(scores, target) + cross_entropy(scores.T, target))/2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return towers.eval()


def first_images(images, captions, caption_image, count):
    keep = caption_image < count
    return images[:count], captions[keep], caption_image[keep]


@torch.inference_mode()
def judge(towers, images, captions, caption_image):
    return retrieval_metrics(towers[0](images) @ towers[1](captions).T, caption_image)


def standardise(splits):
    "Every number to mean 0 and deviation 1 over the training split; numbers that hardly vary stay small."
    mean, std = splits[0].mean(0), splits[0].std(0).clamp(min=.05)
    return [(o - mean)/std for o in splits]


def measure(args):
    processor, regions = (AladinProcessor.from_pretrained(args.data, DataSettings(max_tokens=32)),
                          open_regions(args.data/"regions"))
    data = [open_split(args.data, s, processor, regions) for s in ("train", "minival", "test")]
    images, caption_image = (standardise([pooled_regions(o) for o in data]),
                             [torch.from_numpy(o.caption_image) for o in data])
    words = [occurring_words(o, len(processor.tokenizer)) for o in data]
    seen = words[0].sum(0) >= 5
    model = AutoModel.from_pretrained(args.text_model, local_files_only=True).eval()
    texts = dict(words=[o[:, seen] for o in words], sentence=standardise([sentence_vectors(o, model) for o in data]))
    texts["both"] = [torch.cat(o, 1) for o in zip(*texts.values())]
    rows = []
    for text, share in [("words", 1), ("sentence", 1), ("both", .25), ("both", .5), ("both", 1)]:
        splits = list(zip(images, texts[text], caption_image))
        start, count = time.perf_counter(), int(share*len(images[0]))
        towers = probe(*first_images(*splits[0], count), args.steps, args.seed)
        seconds = time.perf_counter() - start
        # as many training images as minival has
        judged = [first_images(*splits[0], min(count, len(images[1]))), *splits[1:]]
        rows.append(dict(text=text, training_images=count, seconds=round(seconds, 1))
                    | {n: judge(towers, *s) for n, s in zip(("train", "minival", "test"), judged)})
        print(f"{text}, {count} images: {seconds:.0f} s, rsum {rows[-1]['train']['rsum']:.1f} train, "
              f"{rows[-1]['minival']['rsum']:.1f} minival", flush=True)
    return rows


def markdown(rows):
    def cells(m): return {f"{d} R@{k[1:]}": m[d][k] for d, k in RECALLS} | dict(rsum=m["rsum"])
    table = pd.DataFrame([{"text side": r["text"], "training images": r["training_images"],
                           "rsum, training images": r["train"]["rsum"], "rsum, minival": r["minival"]["rsum"]}
                          | cells(r["test"]) for r in rows])
    return table.round(1).to_markdown(index=False, floatfmt=".1f", intfmt=",")


def main():
    args = parse_args()
    rows = measure(args)
    write_json(args.out/"limits.json",
               dict(probes=rows, steps=args.steps, text_model=Path(args.text_model).name)
               | {"made by": provenance(args.seed)})
    with atomic_write(args.out/"limits.md") as part: part.write_text(markdown(rows) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__": main()
