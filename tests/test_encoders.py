"Regions from vision encoders: the command, data without tags from extraction to search, labels, boxes of a file."

import numpy as np
import pytest
import torch
from PIL import Image

from aladin.cli.main import main
from aladin.data.encoders import ENCODER_KINDS, GridRegions, Labels, VisionEncoder, make_encoder
from aladin.data.extract import make_detector
from aladin.data.processor import AladinProcessor
from aladin.data.regions import RegionStore
from aladin.data.splits import open_images
from aladin.files import InputError, resource_dir
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel
from aladin.search.index import SearchIndex
from small_inputs import write_picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5): write_picture(folder/f"{i}.jpg", seed=i)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    for kind in ENCODER_KINDS: make_encoder(folder/kind, kind)
    make_detector(folder/"detr")
    return folder


def extracted(photos, out, *options):
    assert main(["extract", "--images", str(photos), "--out", str(out), *map(str, options)]) == 0
    return RegionStore(out/"regions")


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_grids(kind, photos, encoders, tmp_path):
    "Every family: the whole picture, then the cells row by row; twice the same."
    store = extracted(photos, tmp_path/"data", "--encoder", encoders/kind, "--grid", 2)
    again = extracted(photos, tmp_path/"again", "--encoder", encoders/kind, "--grid", 2)
    for i in store.ids:
        np.testing.assert_array_equal(store.features(i), again.features(i))
        np.testing.assert_allclose(store.features(i)[:, -6:],
                                   [[0, 0, 1, 1, 1, 1], [0, 0, .5, .5, .5, .5], [.5, 0, 1, .5, .5, .5],
                                    [0, .5, .5, 1, .5, .5], [.5, .5, 1, 1, .5, .5]], atol=1e-6)
        assert store.tags(i) == [] and np.isfinite(store.features(i)).all()
    assert len(store) == 5 and store.dim == 32 + 6


def test_without_tags_to_search(photos, encoders, tmp_path, capsys):
    "Regions without tags are encoded, indexed, searched and shown."
    assert not extracted(photos, tmp_path/"data", "--encoder", encoders/"dinov2").has_tags
    torch.manual_seed(0)
    processor = AladinProcessor.from_pretrained(resource_dir("demo")/"model")
    model = AladinModel(AladinConfig(vocab_size=len(processor.tokenizer), region_dim=38, hidden_size=32,
                                     num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).eval()
    model.processor = processor
    index = SearchIndex.build(model, open_images(tmp_path/"data", processor), tmp_path/"index", progress=False)
    hits = index.search("a red fish", k=3, explain=True)
    assert len(hits) == 3 and hits[0].alignment.tags is None
    capsys.readouterr()
    assert main(["regions", "--data", str(tmp_path/"data"), "--show", "0", "--most", "3",
                 "--out", str(tmp_path/"grid.png")]) == 0
    assert capsys.readouterr().out.startswith("region") and Image.open(tmp_path/"grid.png").width > 300


def test_boxes_of_a_detector_and_of_a_file(photos, encoders, tmp_path):
    "The boxes and tags are the detector's, the vectors the encoder's; a file with these boxes gives the same."
    plain = extracted(photos, tmp_path/"plain", "--detector", encoders/"detr", "--tsv")
    both = extracted(photos, tmp_path/"both", "--detector", encoders/"detr", "--encoder", encoders/"convnext")
    stored = extracted(photos, tmp_path/"stored", "--boxes", tmp_path/"plain"/"tsv"/"predictions.tsv",
                       "--encoder", encoders/"convnext")
    assert both.box_order == plain.box_order
    for i in plain.ids:
        assert both.tags(i) == plain.tags(i) == stored.tags(i)
        np.testing.assert_array_equal(both.rects(i), plain.rects(i))
        np.testing.assert_allclose(both.features(i)[:, -6:], plain.features(i)[:, -6:], atol=1e-6)
        np.testing.assert_allclose(stored.features(i), both.features(i), atol=1e-5)


def test_labels(photos, encoders, tmp_path):
    "Tags are the nearest of the labels; the first region's is what the two towers say of the whole picture."
    folder = tmp_path/"clip"
    make_encoder(folder, "clip", texts=["a photo of a dog", "a photo of a tree", "a photo of a cup"])
    (tmp_path/"labels.txt").write_text("dog\ntree\n\ncup\ndog\n")
    store = extracted(photos, tmp_path/"data", "--encoder", folder, "--grid", 2, "--labels", tmp_path/"labels.txt")
    encoder = VisionEncoder(str(folder))
    labels = Labels(tmp_path/"labels.txt", encoder)
    # three texts
    assert labels.names == ["dog", "tree", "cup"] and (labels.texts @ labels.texts.T).triu(1).max() < 1 - 1e-4
    with Image.open(photos/"0.jpg") as picture: pooled = encoder([picture.convert("RGB")])[0].pooled
    with torch.no_grad(): image = labels.model.visual_projection(pooled)
    assert store.tags("0")[0] == labels.names[int((labels.texts @ image).argmax())]
    assert len(store.tags("0")) == store.num_regions("0") == 5 and (store.confidences("0") > 1/3 - 1e-6).all()
    with pytest.raises(InputError, match="choose CLIP"): Labels(tmp_path/"labels.txt", VisionEncoder(encoders/"siglip"))


@pytest.mark.parametrize("options", [
    [],
    ["--boxes", "p.tsv"],
    ["--detector", "d", "--grid", "2"],
    ["--encoder", "e", "--detector", "d", "--boxes", "p.tsv"],
    ["--encoder", "e", "--detector", "d", "--labels", "l.txt"]])
def test_options_that_do_not_fit(options, photos, tmp_path, capsys):
    assert main(["extract", "--images", str(photos), "--out", str(tmp_path/"data"), *options]) == 2
    assert ("--detector, one --encoder (with --grid, --labels)" in capsys.readouterr().err
            and not (tmp_path/"data").exists())


def test_options_of_a_detector_need_one(photos, encoders, tmp_path, capsys):
    "An option that an encoder alone would ignore is refused by name."
    assert main(["extract", "--images", str(photos), "--out", str(tmp_path/"data"), "--encoder", str(encoders/"vit"),
                 "--filter", "2", "--threshold", "0.3"]) == 2
    assert "--threshold --filter" in capsys.readouterr().err and not (tmp_path/"data").exists()


def test_crops_need_an_encoder(photos, tmp_path, capsys):
    "Stored vectors are not of pictures cut out, so --crops would be ignored."
    (tmp_path/"stored").mkdir()
    (tmp_path/"stored/store.json").touch()
    words = ["--boxes", "p.tsv", "--encoder", tmp_path/"stored", "--crops"]
    assert main(["extract", "--images", str(photos), "--out", str(tmp_path/"data"), *map(str, words)]) == 2
    assert "--crops: expected an encoder" in capsys.readouterr().err and not (tmp_path/"data").exists()


def test_damaged_maps(photos, tmp_path):
    "A picture on which an encoder fails is left out by name, as with a detector."
    class Weak:
        fingerprint = "weak 1"
        def __call__(self, pictures): raise ValueError("no memory")
    from aladin.data.extract import extract
    with pytest.raises(InputError, match="5 that were left out"):
        extract(photos, GridRegions(Weak()), tmp_path/"data", progress=False, report=lambda line: None)
    assert not (tmp_path/"data").exists()
