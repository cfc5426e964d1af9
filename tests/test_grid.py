"""Grid regions of a vision encoder through the graph, with the encoder's own two vectors as a zero-shot row in the
table."""
import csv
import json

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModel

from aladin.cli.main import main
from aladin.data.encoders import make_encoder, open_encoder
from aladin.data.pictures import open_picture
from aladin.evaluation.embeddings import load_embeddings
from aladin.evaluation.zero_shot import TwoTowers, encode_zero_shot
from aladin.files import InputError, read_json
from small_inputs import write_picture

CONFIGURATION = "alad-alignment-and-matching-distill"
SMALL = dict(base="grid", all=dict(
    model=dict(hidden_size=32, layers=1, attention_heads=2, intermediate_size=64),
    training=dict(max_steps=4, validate_every=2, pretrain_steps=3, batch_size=8, epochs=2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder/"photos").mkdir()
    rows = [("image", "caption", "split")]
    for i in range(12):
        write_picture(folder/"photos"/f"{i}.jpg", seed=i)
        rows += [(f"{i}.jpg", f"a {colour} picture {i}", "train" if i < 6 else "minival" if i < 9 else "test")
                 for colour in ("red", "dark")]
    with open(folder/"captions.csv", "w", newline="") as file: csv.writer(file).writerows(rows)
    for kind in ("clip", "siglip"): make_encoder(folder/kind, kind, texts=[text for _, text, _ in rows[1:]])
    (folder/"small.yaml").write_text(yaml.safe_dump(SMALL))
    command = ["extract", "--images", folder/"photos", "--captions", folder/"captions.csv", "--encoder", folder/"clip",
               "--grid", 2, "--out", folder/"data"]
    assert main([str(o) for o in command]) == 0
    return folder


def test_grid_and_zero_shot_rows(folder, capfd):
    "The joint student trains on five regions an image; the rows of CLIP and SigLIP stand beside it."
    command = ["results", "--data", folder/"data", "--settings", folder/"small.yaml", "--configuration", CONFIGURATION,
               "--out", folder/"results", "--zero-shot", folder/"clip", folder/"siglip", "--name", "grid"]
    assert main([str(o) for o in command]) == 0
    table = pd.read_csv(folder/"results"/"grid"/"table.csv")
    assert (list(zip(table.configuration, table["head"]))
            == [(CONFIGURATION, "alignment"),
                (CONFIGURATION, "matching"),
                ("zero-shot-clip", "matching"),
                ("zero-shot-siglip", "matching")])
    assert "zero-shot-clip" in (folder/"results"/"grid"/"table.md").read_text()
    run = folder/"results"/"grid"/CONFIGURATION
    model = next(run.glob("seed-*"))/"model"/"config.json"
    assert json.loads(model.read_text())["region_dim"] == 32 + 6
    zero = read_json(folder/"results"/"grid"/"zero-shot-clip"/"seed-0"/"metrics.json")
    assert (zero["images"], zero["captions"], list(zero["heads"])) == (3, 6, ["matching"]) and zero["made by"]["commit"]
    stored = load_embeddings(folder/"results"/"grid"/"zero-shot-clip"/"seed-0"/"embeddings.safetensors")
    assert (stored.image_ids == list(read_json(folder/"data"/"test_captions.json"))
            and set(stored.image_ids) == {"9", "10", "11"})
    torch.testing.assert_close(
        stored.image_matching,
        TwoTowers(folder/"clip").images([open_picture(folder/"photos"/f"{i}.jpg") for i in stored.image_ids]))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_towers_are_those_of_transformers(kind, folder):
    "The cosines are the logits of the whole model, without its scale and bias."
    towers, texts = TwoTowers(folder/kind), ["a red picture 3", "a dark picture"]
    pictures = [open_picture(folder/"photos"/f"{i}.jpg") for i in range(3)]
    model = AutoModel.from_pretrained(folder/kind).eval()
    tokens = towers.tokenizer(
        texts, padding=towers.padding, truncation=True, max_length=towers.most, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **towers.processor(images=pictures, return_tensors="pt")).logits_per_image
    cosines = towers.images(pictures) @ towers.texts(texts).T
    expected = logits/model.logit_scale.exp() if kind == "clip" else (logits - model.logit_bias)/model.logit_scale.exp()
    torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)


def test_pooled_vector_is_region_zero(folder):
    "Region 0 is what the vision tower pools, before the projection that the zero-shot row uses."
    encoder = open_encoder(str(folder/"clip"))
    found, = encoder([open_picture(folder/"photos"/"0.jpg")])
    assert found.pooled.shape == (32,) and found.cells.shape == (32, 4, 4)


def test_bad_zero_shot_models(folder, tmp_path, capsys):
    "A model with one tower, a folder of another kind, two models of one name and a missing picture are refused."
    make_encoder(tmp_path/"dino", "dinov2")
    with pytest.raises(InputError, match="image tower and a text tower"): TwoTowers(tmp_path/"dino")
    make_encoder(tmp_path/"clip", "clip")
    with pytest.raises(InputError, match="tokenizer"): TwoTowers(tmp_path/"clip")
    for names in ([folder/"nothing"], [folder/"clip", tmp_path/"clip"]):
        command = ["results", "--data", folder/"data", "--settings", folder/"small.yaml", "--out", tmp_path/"results",
                   "--zero-shot", *names]
        assert main([str(o) for o in command]) == 2 and not (tmp_path/"results").exists()
    assert "models of different names" in capsys.readouterr().err
    with pytest.raises(InputError, match="a picture"):
        encode_zero_shot(TwoTowers(folder/"clip"), folder/"data", tmp_path)
