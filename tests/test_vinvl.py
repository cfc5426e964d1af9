"""VinVL's detector: every stage fed with what the authors' program recorded for the stage before, then whole runs
(tests/golden/detector, or ALADIN_GOLDEN).

Decisions from recorded numbers are exact. In a whole run nearly equal scores may change places, so detections are
matched by class and nearest box."""
import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image

from aladin.data.selection import select_detections
from aladin.data.boxes import clip_boxes, decode_boxes, grid_anchors, nms, not_small, resized_size, roi_align
from aladin.data.extract import extract, open_detector
from aladin.data.pictures import Pictures
from aladin.data.regions import RegionStore, TsvRegions
from aladin.data.vinvl import VinvlImageProcessor, convert_detector, load_original_detector
from aladin.files import InputError
from test_boxes import golden

report = json.loads((golden/"report.json").read_text())
PICTURES = [p for p in report["pictures"] if p["size"] == "small" and (golden/f"{p['name']}.npz").exists()]
OPTIONS = {"MODEL.ROI_HEADS.NMS_FILTER": "rule", "TEST.IGNORE_BOX_REGRESSION": "regression",
           "MODEL.ROI_HEADS.SCORE_THRESH": "threshold", "MODEL.ROI_HEADS.DETECTIONS_PER_IMG": "most"}
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


# EXIF orientation ignored, as recorded
def opened(picture): return Image.open(golden/"pictures"/picture["file"]).convert("RGB")


def same_attributes(labels, scores, r, prefix="final"):
    positive = r[f"{prefix}.attr_scores"] > 0
    assert ((scores - r[f"{prefix}.attr_scores"]).abs().max() < 1e-3
            and torch.equal(labels[positive], r[f"{prefix}.attr_labels"][positive]))


def matched(found, r, prefix="final"):
    "Each recorded detection has one of the same class at the same place, with the same score and features."
    assert len(found.boxes) == len(r[f"{prefix}.boxes"])
    left = set(range(len(found.boxes)))
    for row, box in enumerate(r[f"{prefix}.boxes"]):
        own = [i for i in left
               if found.labels[i] == r[f"{prefix}.labels"][row]
                  and abs(found.scores[i] - r[f"{prefix}.scores"][row]) < 1e-3]
        assert own, row
        near = min(own, key=lambda i: float((found.boxes[i] - box).abs().max()))
        left.remove(near)
        assert (found.boxes[near] - box).abs().max() < .05
        if f"{prefix}.box_features" in r:
            assert (found.features[near] - r[f"{prefix}.box_features"][row]).abs().max() < 2e-3


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
    assert ((head["cls_logits"](hidden) - r["rpn.objectness"]).abs().max() < 1e-4
            and (head["bbox_pred"](hidden) - r["rpn.deltas"]).abs().max() < 1e-4)
    cell = detector.rpn["anchor_generator"]["cell_anchors"].get_buffer("0")
    anchors = grid_anchors(cell, *r["backbone"].shape[2:], 16)
    assert torch.equal(anchors, r["rpn.anchors"])
    scores = r["rpn.objectness"].permute(0, 2, 3, 1).reshape(-1).sigmoid()
    deltas = r["rpn.deltas"].view(1, len(cell), 4, *r["backbone"].shape[2:]).permute(0, 3, 4, 1, 2).reshape(-1, 4)
    best = scores.topk(min(c.candidates, len(scores))).indices
    assert torch.equal(clip_boxes(decode_boxes(deltas[best], anchors[best]), (width, height)),
                       r["rpn.before_nms.boxes"])
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
        file = (picture["name"] + ("" if variant == "vinvl" and kind == "own" else f".{variant}")
                + (".torchvision" if kind == "torchvision" else ""))
        if not (golden/f"{file}.npz").exists(): continue
        found, = detector.detect(*processor([opened(picture)]))
        matched(found, recorded(file))
        checked += 1
    assert checked


def test_inference(processor, tmp_path):
    """With folded norms the same detections; in bfloat16 the same map and the same features of given boxes, to its
    precision; neither can be saved."""
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
        # as much as the roundings differ: 2**-8 to 2**-24
        assert error(rounded, r["backbone"]) < 2**16*error(exact, r["backbone"])
        assert pooled.dtype == torch.float32 and error(pooled, r["box.pooled"]) < .02
    with pytest.raises(RuntimeError, match="load it again"): folded.save_pretrained(tmp_path)


def test_a_batch_with_padding(detector, processor):
    "Padding changes the narrower picture, as it does in the authors' program."
    r, pictures = recorded("batch"), {p["name"]: p for p in report["pictures"]}
    pixels, found_sizes = processor([opened(pictures[name]) for name in ("landscape", "grey")])
    assert torch.equal(pixels, r["input"])
    for number, found in enumerate(detector.detect(pixels, found_sizes)): matched(found, r, f"final{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The recorded detector as `aladin convert-detector` writes it, with the sizes of the recorded runs."
    made = tmp_path_factory.mktemp("detector")/"vinvl"
    convert_detector(golden/"weights.pth", golden/"labelmap.json", made)
    for name, changed in (("config", dict(candidates=sizes["pre_nms_top_n"], proposals=sizes["post_nms_top_n"])),
                          ("preprocessor_config", dict(short=sizes["min_size"], long=sizes["max_size"]))):
        path = made/f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return made


def rows_of(path):
    with open(path) as f: return {i: json.loads(value)["objects"] for i, value in (line.split("\t") for line in f)}


def test_rows_of_the_authors_tool(folder, tmp_path):
    "`aladin extract --ignore-exif --tsv` on the six small pictures writes what the authors' test tool wrote for them."
    (tmp_path/"pictures").mkdir()
    files = {p["name"]: p["file"] for p in PICTURES}
    for image_id, name in report["tsv_ids"].items():
        (tmp_path/"pictures"/f"{image_id}.{files[name].split('.')[-1]}").symlink_to(golden/"pictures"/files[name])
    store = extract(tmp_path/"pictures", open_detector(f"vinvl:{folder}"), tmp_path/"data", progress=False,
                    upright=False, tsv=True)
    found, vectors = rows_of(tmp_path/"data"/"tsv"/"predictions.tsv"), TsvRegions(tmp_path/"data"/"tsv")
    attributes, of_name = (rows_of(golden/"tsv_attributes"/"predictions.tsv"),
                           {p["name"]: p["picture"] for p in PICTURES})
    for image_id, expected in rows_of(golden/"tsv"/"predictions.tsv").items():
        own, features = list(enumerate(found[image_id])), vectors.features(image_id)
        size = of_name[report["tsv_ids"][image_id]]
        # pixels of the picture in one of the input
        scale = max(np.divide(size, resized_size(*size, sizes["min_size"], sizes["max_size"])))
        assert [o["bbox_id"] for _, o in own] == list(range(len(own))) and len(own) == len(expected) == len(features)
        np.testing.assert_array_equal(features, store.features(image_id))
        for o, a in zip(expected, attributes[image_id]):
            same = [(n, f) for n, f in own if f["class"] == o["class"] and abs(f["conf"] - o["conf"]) < 1e-3]
            n, f = min(same, key=lambda pair: np.abs(np.subtract(pair[1]["rect"], o["rect"])).max())
            own.remove((n, f))
            assert np.abs(np.subtract(f["rect"], o["rect"])).max() < .05*scale
            assert np.abs(features[n, :-6] - np.frombuffer(base64.b64decode(o["feature"]), "<f4")).max() < 2e-3
            positive = [name for name, score in zip(a["attributes"], a["attr_scores"]) if score > 0]
            assert (f.get("attributes", []) == positive
                    and np.abs(np.subtract(f.get("attr_scores", []), a["attr_scores"][:len(positive)]))
                        .max(initial=0) < 1e-3)
    assert store.box_order == "height width" and RegionStore(store.path).detections.attributes("900001")[0] == \
        list(zip(found["900001"][0]["attributes"], found["900001"][0]["attr_scores"]))


def test_orientation(folder, tmp_path):
    "EXIF data turn a picture unless they are ignored; figures then show it as its regions were found."
    (tmp_path/"pictures").mkdir()
    turned = next(p for p in PICTURES if p["name"] == "turned")
    (tmp_path/"pictures"/"turned.jpg").symlink_to(golden/"pictures"/turned["file"])
    for upright in (True, False):
        out = tmp_path/f"data{upright}"
        store = extract(tmp_path/"pictures", open_detector(f"vinvl:{folder}"), out, progress=False, upright=upright)
        width, height = store.size("turned")
        assert ((width, height) == tuple(turned["picture"])) is not upright
        shown = Pictures(out)
        assert (shown.open("turned").size == (width, height)
                and shown.thumbnail("turned").ratio == pytest.approx(width/height))


def pixels_of(size, mode, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).convert(mode)


def test_unusual_pictures(folder, tmp_path):
    "Pictures of one pixel, narrow, grey, CMYK and of 16 bits give regions; what cannot is named and left out."
    pictures = tmp_path/"pictures"
    pictures.mkdir()
    pixels_of((1, 1), "RGB").save(pictures/"pixel.png")
    pixels_of((2, 300), "RGB").save(pictures/"narrow.png")
    pixels_of((1, 60_000), "RGB").save(pictures/"line.png")
    grey = pixels_of((60, 40), "L")
    grey.save(pictures/"grey.png")
    grey.convert("RGB").save(pictures/"grey_rgb.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16)*257).save(pictures/"deep.png")
    pixels_of((60, 40), "CMYK").save(pictures/"cmyk.jpg")
    Image.new("L", (20_000, 20_000)).save(pictures/"huge.png")
    lines = []
    store = extract(pictures, open_detector(f"vinvl:{folder}", threshold=1.), tmp_path/"data", progress=False,
                    report=lines.append)
    assert store.ids == ["cmyk", "deep", "grey", "grey_rgb", "narrow", "pixel"]
    for i in store.ids:
        assert store.num_regions(i) == 10 and np.isfinite(store.features(i)).all()  # no score reaches 1: the best ten
    for i in ("grey", "deep"): np.testing.assert_array_equal(store.features(i), store.features("grey_rgb"))
    said = "\n".join(lines)
    assert ("huge.png" in said and "179" in said.replace("178,956,970", "179") and "line.png" in said
            and "too narrow for a long side" in said)


def test_other_files(tmp_path):
    "A label map of another size, a checkpoint of another network and files that are none are refused by name."
    weights, labels = golden/"weights.pth", golden/"labelmap.json"
    names = json.loads(labels.read_text())
    fewer = dict(list(names["label_to_idx"].items())[:-1])
    (tmp_path/"fewer.json").write_text(json.dumps(names | dict(label_to_idx=fewer)))
    (tmp_path/"gap.json").write_text(
        json.dumps(names | dict(attribute_to_idx={k: v + 1 for k, v in names["attribute_to_idx"].items()})))
    tensors = torch.load(weights, weights_only=True)["model"]
    torch.save({k: v for k, v in tensors.items() if "layer3.5." not in k}, tmp_path/"shallow.pth")
    torch.save({k: v[..., :1] if k.endswith("rpn.head.conv.weight") else v for k, v in tensors.items()},
               tmp_path/"misshapen.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path/"other.pth")
    (tmp_path/"text.pth").write_text("not a checkpoint")
    for checkpoint, table, *said in ((weights, tmp_path/"fewer.json", "fewer.json", "one for each row"),
                                     (weights, tmp_path/"gap.json", "gap.json: attribute_to_idx"),
                                     (tmp_path/"shallow.pth", labels, "missing backbone.body.layer3.5.conv1.weight"),
                                     (tmp_path/"misshapen.pth", labels, "rpn.head.conv.weight (", "in place of"),
                                     (tmp_path/"other.pth", labels, "other.pth", "a tensor of the detector"),
                                     (tmp_path/"text.pth", labels, "text.pth")):
        with pytest.raises(InputError) as e: convert_detector(checkpoint, table, tmp_path/"out")
        assert all(o in str(e.value) for o in said), str(e.value)
        assert not (tmp_path/"out").exists()
    bare = {k.removeprefix("module."): v for k, v in tensors.items()}
    torch.save(bare, tmp_path/"bare.pth")  # a bare dict without the prefix loads too
    one, two = (load_original_detector(weights, labels).state_dict(),
                load_original_detector(tmp_path/"bare.pth", labels).state_dict())
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_published_size():
    "The full-size network has the names and shapes of the published checkpoint."
    from accelerate import init_empty_weights
    from aladin.data.vinvl import VinvlConfig, VinvlDetector
    with init_empty_weights(include_buffers=True):
        full = VinvlDetector(
            VinvlConfig(class_names=[str(i) for i in range(1594)], attribute_names=[str(i) for i in range(524)]))
    shapes = {name: list(t.shape) for name, t in full.state_dict().items()}
    published = json.loads((golden/"fullsize.json").read_text())["keys"]
    assert shapes == {name: shape
                      for name, shape in published.items() if not name.startswith("attribute.feature_extractor.")}
