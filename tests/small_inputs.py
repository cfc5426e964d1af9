"Small inputs for tests: a data folder in the COCO-IR layout, a model with random weights that fits it, pictures."
import base64
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aladin.data.processor import AladinProcessor
from aladin.data.text import build_vocabulary
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel, save_model

SPLITS = ("train", "minival", "test")
COLOURS = ("red", "blue", "green", "small", "big")
DIM = 70


def ids_of(n): return [str(1000 + i) for i in range(n)]


def write_data(folder, n=12, seed=0, splits=SPLITS, captions=None, ids=None, regions=6):
    "features.tsv, .lineidx, imageid2idx.json, predictions.tsv and the same captions in every split."
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng, ids, rows, offsets, at, found = np.random.default_rng(seed), ids or ids_of(n), [], [], 0, []
    for image in ids:
        x = rng.standard_normal((regions, DIM)).astype("<f4")
        x[:, -6:] = .1, .1, .5, .5, .4, .4
        rows.append(f"{image}\t{regions}\t{base64.b64encode(x.tobytes()).decode()}\n".encode())
        offsets.append(at)
        at += len(rows[-1])
        objects = [{"class": "fish", "rect": [10, 10, 50, 50], "conf": .9}]*regions
        found.append(f"{image}\t" + json.dumps(dict(image_w=100, image_h=100, objects=objects)) + "\n")
    (folder/"features.tsv").write_bytes(b"".join(rows))
    (folder/"features.lineidx").write_text("".join(f"{o}\n" for o in offsets))
    (folder/"imageid2idx.json").write_text(json.dumps({i: k for k, i in enumerate(ids)}))
    (folder/"predictions.tsv").write_text("".join(found), encoding="utf-8")
    for split in splits:
        (folder/f"{split}_captions.json").write_text(
            json.dumps(captions or {i: [f"a {w} fish" for w in COLOURS] for i in ids}))
    return folder


def write_model(folder, seed=0, dim=DIM):
    "A model of one layer with random weights."
    folder = Path(folder)
    words = build_vocabulary(["a red blue green small big fish above cactus dog person tree one two three"]*2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = folder.parent/f"{folder.name}-vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    torch.manual_seed(seed)
    config = AladinConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                          intermediate_size=64, region_dim=dim, max_tokens=40, max_regions=20, drop_last_word=False)
    save_model(with_processor(AladinModel(config), vocabulary), folder)
    return folder


def with_processor(model, vocabulary):
    """A model that knows how its input is made: by a vocab.txt, or a folder that has one, and the settings of its
    configuration."""
    model.processor = AladinProcessor.from_pretrained(vocabulary, model.config.settings)
    return model


def write_picture(path, size=(80, 60), seed=0):
    "Coloured noise."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
