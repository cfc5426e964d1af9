"""VinVL's detector: every stage fed with what the authors' program recorded for the stage before, then whole runs (tests/golden/detector, or ALADIN_GOLDEN).

Decisions from recorded numbers are exact. In a whole run nearly equal scores may change places, so detections are matched by class and nearest box."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from aladin.data.selection import select_detections
from aladin.data.boxes import clip_boxes, decode_boxes, grid_anchors, nms, not_small, roi_align
from aladin.data.vinvl import VinvlImageProcessor, load_original_detector
from test_boxes import golden

report = json.loads((golden/"report.json").read_text())
PICTURES = [p for p in report["pictures"] if p["size"] == "small" and (golden/f"{p['name']}.npz").exists()]
OPTIONS = {"MODEL.ROI_HEADS.NMS_FILTER": "rule", "TEST.IGNORE_BOX_REGRESSION": "regression", "MODEL.ROI_HEADS.SCORE_THRESH": "threshold",
           "MODEL.ROI_HEADS.DETECTIONS_PER_IMG": "most"}
sizes = report["sizes"]["small"]


def recorded(name):
    with np.load(golden/f"{name}.npz") as f: return {k: torch.from_numpy(f[k]) for k in f}


@pytest.fixture(scope="module")
def detector():
    made = load_original_detector(golden/"weights.pth", golden/"labelmap.json")
    made.config.candidates, made.config.proposals = sizes["pre_nms_top_n"], sizes["post_nms_top_n"]
    return made


@pytest.fixture(scope="module")
def processor(): return VinvlImageProcessor(sizes["min_size"], sizes["max_size"])


def opened(picture): return Image.open(golden/"pictures"/picture["file"]).convert("RGB")  # EXIF orientation ignored, as recorded


def same_attributes(labels, scores, r, prefix="final"):
    positive = r[f"{prefix}.attr_scores"] > 0
    assert (scores - r[f"{prefix}.attr_scores"]).abs().max() < 1e-3 and torch.equal(labels[positive], r[f"{prefix}.attr_labels"][positive])


def matched(found, r, prefix="final"):
    "Each recorded detection has one of the same class at the same place, with the same score and features."
    assert len(found.boxes) == len(r[f"{prefix}.boxes"])
    left = set(range(len(found.boxes)))
    for row, box in enumerate(r[f"{prefix}.boxes"]):
        own = [i for i in left if found.labels[i] == r[f"{prefix}.labels"][row] and abs(found.scores[i] - r[f"{prefix}.scores"][row]) < 1e-3]
        assert own, row
        near = min(own, key=lambda i: float((found.boxes[i] - box).abs().max()))
        left.remove(near)
        assert (found.boxes[near] - box).abs().max() < .05
        if f"{prefix}.box_features" in r: assert (found.features[near] - r[f"{prefix}.box_features"][row]).abs().max() < 2e-3


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p["name"])
@torch.no_grad()
def test_stages(detector, processor, picture):
    r, c = recorded(picture["name"]), detector.config
    height, width = r["input"].shape[2:]
    pixels, found_sizes = processor([opened(picture)])
    assert torch.equal(pixels, r["input"]) and found_sizes == [(width, height)]
    assert (detector.backbone["body"](r["input"]) - r["backbone"]).abs().max() < 2e-3

    head = detector.rpn["head"]
    hidden = torch.relu(head["conv"](r["backbone"]))
    assert (head["cls_logits"](hidden) - r["rpn.objectness"]).abs().max() < 1e-4 and (head["bbox_pred"](hidden) - r["rpn.deltas"]).abs().max() < 1e-4
    cell = detector.rpn["anchor_generator"]["cell_anchors"].get_buffer("0")
    anchors = grid_anchors(cell, *r["backbone"].shape[2:], 16)
    assert torch.equal(anchors, r["rpn.anchors"])
    scores = r["rpn.objectness"].permute(0, 2, 3, 1).reshape(-1).sigmoid()
    deltas = r["rpn.deltas"].view(1, len(cell), 4, *r["backbone"].shape[2:]).permute(0, 3, 4, 1, 2).reshape(-1, 4)
    best = scores.topk(min(c.candidates, len(scores))).indices
    assert torch.equal(clip_boxes(decode_boxes(deltas[best], anchors[best]), (width, height)), r["rpn.before_nms.boxes"])
    boxes, objectness = r["rpn.before_nms.boxes"], r["rpn.before_nms.objectness"]
    usable = not_small(boxes, 0)
    kept = usable[nms(boxes[usable], objectness[usable], c.proposal_overlap)][:c.proposals]
    assert torch.equal(boxes[kept], r["rpn.proposals.boxes"])

    proposals = r["rpn.proposals.boxes"]
    aligned = roi_align(r["backbone"], torch.nn.functional.pad(proposals, (1, 0)), 1/16, (14, 14))
    assert (aligned[:len(r["box.aligned"])] - r["box.aligned"]).abs().max() < 1e-4
    assert (detector.pooled(r["backbone"], proposals) - r["box.pooled"]).abs().max() < 1e-4
    assert (detector.roi_heads["box"]["predictor"]["cls_score"](r["box.pooled"]) - r["box.logits"]).abs().max() < 1e-4
    found = select_detections(r["box.logits"], None, proposals, (width, height))
    for what in ("labels", "scores", "boxes"): assert torch.equal(getattr(found, what), r[f"final.{what}"]), what
    assert torch.equal(r["box.pooled"][found.rows], r["final.box_features"])
    same_attributes(*detector.attributes_of(detector.pooled(r["backbone"], r["final.boxes"]), r["final.labels"]), r)
    scale = torch.tensor([*picture["picture"]]*2)/torch.tensor([width, height]*2)
    assert (r["final.boxes"]*scale - r["final.boxes_in_picture"]).abs().max() < 1e-3


@pytest.mark.parametrize("variant", report["variants"])
@pytest.mark.parametrize("kind", ["own", "torchvision"])
def test_whole_runs(detector, processor, variant, kind, monkeypatch):
    "Each variant of the options on every picture, with both generations of operators."
    changed = {OPTIONS[k]: v for k, v in report["variants"][variant].items()}
    changed["regression"] = not changed["regression"]
    for name, value in (changed | dict(pixels=kind == "own")).items(): monkeypatch.setattr(detector.config, name, value)
    checked = 0
    for picture in PICTURES:
        file = picture["name"] + ("" if variant == "vinvl" and kind == "own" else f".{variant}") + (".torchvision" if kind == "torchvision" else "")
        if not (golden/f"{file}.npz").exists(): continue
        found, = detector.detect(*processor([opened(picture)]))
        matched(found, recorded(file))
        checked += 1
    assert checked


def test_inference(processor, tmp_path):
    "With folded norms the same detections; in bfloat16 the same map and the same features of given boxes, to its precision; neither can be saved."
    def loaded(dtype):
        made = load_original_detector(golden/"weights.pth", golden/"labelmap.json").for_inference(dtype)
        made.config.candidates, made.config.proposals = sizes["pre_nms_top_n"], sizes["post_nms_top_n"]
        return made
    folded, short = loaded(torch.float32), loaded(torch.bfloat16)
    def error(found, expected): return ((found.float() - expected).norm()/expected.norm()).item()
    for picture in PICTURES:
        r, (pixels, found_sizes) = recorded(picture["name"]), processor([opened(picture)])
        matched(folded.detect(pixels, found_sizes)[0], r)
        with torch.no_grad():
            exact, rounded = folded.backbone["body"](pixels), short.backbone["body"](pixels.bfloat16())
            pooled = short.pooled(r["backbone"].bfloat16(), r["rpn.proposals.boxes"])
        assert error(rounded, r["backbone"]) < 2**16*error(exact, r["backbone"])  # as much as the roundings differ: 2**-8 to 2**-24
        assert pooled.dtype == torch.float32 and error(pooled, r["box.pooled"]) < .01
    with pytest.raises(RuntimeError, match="load it again"): folded.save_pretrained(tmp_path)


def test_a_batch_with_padding(detector, processor):
    "Padding changes the narrower picture, as it does in the authors' program."
    r, pictures = recorded("batch"), {p["name"]: p for p in report["pictures"]}
    pixels, found_sizes = processor([opened(pictures[name]) for name in ("landscape", "grey")])
    assert torch.equal(pixels, r["input"])
    for number, found in enumerate(detector.detect(pixels, found_sizes)): matched(found, r, f"final{number}")


def test_the_published_size():
    "The full-size network has the names and shapes of the published checkpoint."
    from accelerate import init_empty_weights
    from aladin.data.vinvl import VinvlConfig, VinvlDetector
    with init_empty_weights(include_buffers=True):
        full = VinvlDetector(VinvlConfig(class_names=[str(i) for i in range(1594)], attribute_names=[str(i) for i in range(524)]))
    shapes = {name: list(t.shape) for name, t in full.state_dict().items()}
    published = json.loads((golden/"fullsize.json").read_text())["keys"]
    assert shapes == {name: shape for name, shape in published.items() if not name.startswith("attribute.feature_extractor.")}
