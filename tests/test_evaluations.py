"""Evaluations of the field: equality with the package of ECCV Caption, streaming, protocols, significance, and what is refused."""
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aladin.data.ragged import Ragged
from aladin.evaluation.coco import coco_test_ids, extended_metrics
from aladin.evaluation.embeddings import Embeddings
from aladin.evaluation.metrics import ranks_metrics, retrieval_ranks
from aladin.evaluation.similarity import open_similarity


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
    "Embeddings, and the numbers of the package eccv_caption for them; its measures read the first R or K candidates only."
    e, ids = coco_embeddings(0), coco_test_ids()
    images, captions = np.array(e.image_ids, np.int64), ids.caption.to_numpy(np.int64)
    scores = e.image_matching @ e.caption_matching.T
    i2t = dict(zip(images.tolist(), best_ids(scores, captions)))
    t2i = dict(zip(captions.tolist(), best_ids(scores.T, images)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from eccv_caption import Metrics
    metrics = Metrics().compute_all_metrics(i2t, t2i, ("coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1"), (1, 5, 10))
    return e, metrics


@pytest.mark.parametrize("name, keys", [("eccv", {"map_at_r": "eccv_map_at_r", "r_precision": "eccv_rprecision", "r1": "eccv_r1"}),
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
