"""The operators of VinVL's detector: what its own program recorded (tests/golden/detector, or ALADIN_GOLDEN), decisions
compared exactly.

`ALADIN_GOLDEN` may name a folder with detector/ in it, or that folder itself."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from aladin.data.boxes import (box_iou, cell_anchors, clip_boxes, decode_boxes, grid_anchors, nms, not_small,
                               resized_size, roi_align)
from aladin.data.selection import select_detections

here = Path(os.environ.get("ALADIN_GOLDEN") or Path(__file__).parent/"golden")
golden = next((p for p in (here/"detector", here) if (p/"roi_align.npz").exists()),
              Path(__file__).parent/"golden"/"detector")


def recorded(name):
    with np.load(golden/f"{name}.npz") as f: return {k: torch.from_numpy(f[k]) for k in f}


def test_anchors():
    r = recorded("anchors")
    cell = cell_anchors((32, 64, 128, 256, 512), (.5, 1, 2), 16)
    assert torch.equal(cell, r["vinvl_cell"]) and torch.equal(grid_anchors(cell, 3, 5, 16), r["vinvl_grid_3x5"])


def test_sizes():
    for case in json.loads((golden/"resize.json").read_text()):
        assert list(resized_size(*case["picture"], *case["rule"])) == case["resized"], case


@pytest.mark.parametrize("kind, weights", [("rpn", (1., 1., 1., 1.)), ("head", (10., 10., 5., 5.))])
def test_decoding(kind, weights):
    r = recorded("boxes")
    found = decode_boxes(r[f"{kind}.deltas"], r["boxes"], weights)
    assert torch.equal(found, r[f"{kind}.decoded"]), (found - r[f"{kind}.decoded"]).abs().max()


def test_clipping_and_small_boxes():
    r = recorded("boxes")
    clipped = clip_boxes(r["rpn.decoded"], (320, 240))
    assert torch.equal(clipped, r["clipped_320x240"])
    for side in (0, 1, 16): assert torch.equal(not_small(clipped, side), r[f"not_small_{side}"]), side


@pytest.mark.parametrize("case", ["random", "exact", "small", "integer"])
def test_nms(case):
    r = recorded("nms")
    boxes, scores = r[f"{case}.boxes"], r[f"{case}.scores"]
    np.testing.assert_array_equal(box_iou(boxes, boxes), r[f"{case}.iou"])  # NaN for a box without an area
    for name in (k for k in r if k.startswith(f"{case}.own_") or k.startswith(f"{case}.torchvision_")):
        kind, threshold = name.split(".", 1)[1].split("_")
        assert torch.equal(nms(boxes, scores, float(threshold), kind == "own"), r[name]), name


def test_roi_align():
    r = recorded("roi_align")
    for name in (k for k in r if k.startswith("own.")):
        scale, ratio, out = name.removeprefix("own.scale").replace("_ratio", " ").replace("_out", " ").split()
        found = roi_align(r["map"], r["rois"], float(scale), tuple(map(int, out.split("x"))), int(ratio))
        assert (found - r[name]).abs().max() < 1e-5, (name, (found - r[name]).abs().max())


CASES = json.loads((golden/"filters.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda o: o["name"])
def test_selection(case):
    "Each recorded setting: labels, scores and boxes exactly, and the features of the same proposals."
    r, name = recorded("filters"), case["name"]
    deltas = None if case["ignore_box_regression"] else r["in.deltas"]
    found = select_detections(
        r["in.logits"], deltas, r["in.boxes"], r["in.size"].tolist(), case["nms_filter"], case["score_thresh"],
        case["min_detections"], case["max_detections"], case["ops"] == "own")
    assert len(found.rows) == case["kept"]
    for what in ("labels", "scores", "boxes"): assert torch.equal(getattr(found, what), r[f"{name}.{what}"]), what
    if f"{name}.features" in r: assert torch.equal(r["in.features"][found.rows], r[f"{name}.features"])
