"""Bad captions, checkpoints, configurations and embeddings: each error names the file and the place in it and says how
to mend it."""
import argparse, json, pickle, shutil, socket
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from aladin.data.processor import AladinProcessor
from aladin.config import config_from_dict
from aladin.model.authors_config import config_from_authors, load_config
from aladin.files import InputError
from aladin.data.text import load_tokenizer, load_torch_file, read_captions
from aladin.data.splits import open_split
from aladin.data.clip import ClipReader
from aladin.evaluation.embeddings import encode_split, load_embeddings, save_embeddings
from aladin import AladinModel
from aladin.model.model import start_from_text_model

golden = Path(__file__).parent/"golden"/"v1"


class Hostile:
    "Touches a file when it is unpickled."
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return Path.touch, (Path(self.marker),)


@pytest.fixture
def marker(tmp_path):
    "A file that must not appear."
    yield tmp_path/"code-ran"
    assert not (tmp_path/"code-ran").exists()


@pytest.fixture
def oscar(tmp_path): return Path(shutil.copytree(golden/"oscar_ckpt", tmp_path/"oscar"))


@pytest.fixture
def data(tmp_path): return Path(shutil.copytree(golden/"data", tmp_path/"data"))


@pytest.fixture
def checkpoint(): return load_torch_file(golden/"checkpoint.pth.tar", allow=(argparse.Namespace,))


def fails(action, *names):
    "`action` raises an InputError whose message holds every name and says how to mend it."
    with pytest.raises(InputError) as error: action()
    for name in (*map(str, names), "Fix:"): assert name in str(error.value), str(error.value)
    assert error.value.fix


def open_test(data, settings=None, **kwargs):
    return open_split(data, "test", AladinProcessor.from_pretrained(golden/"oscar_ckpt", settings),
                      golden/"feats", **kwargs)


def write_pickle(value, path): path.write_bytes(pickle.dumps(value, protocol=2))
def write_new_pickle(value, path): path.write_bytes(pickle.dumps(value))
def write_zip(value, path): torch.save(value, path)
def write_old(value, path): torch.save(value, path, _use_new_zipfile_serialization=False)


every_format = pytest.mark.parametrize(
    "write", [write_zip, write_old, write_pickle, write_new_pickle], ids=["zip", "old", "pickle", "new pickle"])
new_protocol = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


# Hidden code

def refused(action, path, write):
    """`action` names the hidden call, or for a pickle that torch cannot read says so, and never advises to read it
    unsafely."""
    with pytest.raises(InputError) as error: action()
    message = str(error.value)
    assert str(path) in message and "Fix:" in message and "weights_only" not in message
    if write is not write_new_pickle: assert "pickled content" in message


@every_format
def test_the_hostile_file_would_run_code(tmp_path, write):
    write(Hostile(tmp_path/"ran"), tmp_path/"file")
    if write in (write_pickle, write_new_pickle): pickle.loads((tmp_path/"file").read_bytes())
    else: torch.load(tmp_path/"file", weights_only=False)
    assert (tmp_path/"ran").exists()


@new_protocol
@every_format
def test_captions_that_hide_code(data, marker, write):
    path = data/"test_captions.pt"
    write({1: '["a dog"]', 2: Hostile(marker)}, path)
    refused(lambda: read_captions(path), path, write)
    refused(lambda: open_test(data), path, write)


@new_protocol
@every_format
def test_checkpoint_that_hides_code(tmp_path, checkpoint, marker, write):
    path = tmp_path/"checkpoint.pth.tar"
    write(checkpoint | dict(scheduler=Hostile(marker)), path)
    refused(lambda: AladinModel.from_original(path, golden/"oscar_ckpt"), path, write)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin"])
def test_oscar_folder_that_hides_code(oscar, marker, name):
    write_old(dict(weight=Hostile(marker)), oscar/name)
    fails(lambda: AladinModel.from_original(None, oscar), oscar/name, "pickled content")


# Checkpoints

@pytest.fixture
def spoilt(tmp_path, checkpoint):
    "Write a changed checkpoint and try to load it."
    def load(change):
        change(checkpoint["model"])
        torch.save(checkpoint, tmp_path/"checkpoint.pth.tar")
        return AladinModel.from_original(tmp_path/"checkpoint.pth.tar", golden/"oscar_ckpt")
    return load


prefix = "img_txt_enc.oscar_model.bert."


def test_checkpoint_of_another_shape(spoilt):
    def widen(weights): weights[prefix+"img_embedding.weight"] = torch.zeros(48, 39)
    fails(lambda: spoilt(widen), "checkpoint.pth.tar", "tensors", "other shape",
          "backbone.img_embedding.weight (48, 39) instead of (48, 38)")


def test_checkpoint_without_a_tensor(spoilt):
    fails(lambda: spoilt(lambda weights: weights.pop(prefix+"img_embedding.bias")), "checkpoint.pth.tar",
          "missing: backbone.img_embedding.bias")


def test_checkpoint_with_a_foreign_tensor(spoilt):
    fails(lambda: spoilt(lambda weights: weights.update(another=torch.zeros(1))), "checkpoint.pth.tar",
          "unknown: another")


def test_checkpoint_of_another_geometry(oscar):
    config = json.loads((oscar/"config.json").read_text())
    (oscar/"config.json").write_text(json.dumps(config | dict(intermediate_size=95)))
    fails(lambda: AladinModel.from_original(golden/"checkpoint.pth.tar", oscar), "checkpoint.pth.tar",
          "intermediate.dense.weight (96, 48) instead of (95, 48)")
    fails(lambda: AladinModel.from_original(None, oscar), "pytorch_model.bin", "other shape")


@pytest.mark.parametrize("value", [[1, 2], dict(weights={})], ids=["list", "no model"])
def test_file_that_is_no_checkpoint(tmp_path, value):
    torch.save(value, tmp_path/"other.pth.tar")
    fails(lambda: AladinModel.from_original(tmp_path/"other.pth.tar", golden/"oscar_ckpt"),
          "other.pth.tar", "key model")


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "checkpoint_zip.pth.tar"])
@pytest.mark.parametrize("share", [0, .001, .5, .999], ids=lambda o: f"{100*o:g} %")
def test_truncated_checkpoint(tmp_path, name, share):
    whole = (golden/name).read_bytes()
    (tmp_path/name).write_bytes(whole[:int(share*len(whole))])
    fails(lambda: AladinModel.from_original(tmp_path/name, golden/"oscar_ckpt"), tmp_path/name, "whole torch file")


def test_missing_checkpoint(tmp_path):
    fails(lambda: AladinModel.from_original(tmp_path/"none.pth.tar", golden/"oscar_ckpt"),
          tmp_path/"none.pth.tar", "nothing there")


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_missing_oscar_file(oscar, name):
    (oscar/name).unlink()
    fails(lambda: AladinModel.from_original(None, oscar), oscar/name, "nothing there")


def test_missing_oscar_folder(tmp_path):
    fails(lambda: AladinModel.from_original(golden/"checkpoint.pth.tar", tmp_path/"none"),
          tmp_path/"none", "nothing there")


def test_oscar_folder_without_a_key(oscar):
    config = json.loads((oscar/"config.json").read_text())
    del config["img_feature_dim"]
    (oscar/"config.json").write_text(json.dumps(config))
    fails(lambda: AladinModel.from_original(None, oscar), oscar/"config.json", "key img_feature_dim")


def test_oscar_trained_without_tags(oscar):
    torch.save(argparse.Namespace(add_od_labels=False), oscar/"training_args.bin")
    fails(lambda: AladinModel.from_original(None, oscar), oscar/"training_args.bin", "add_od_labels")


# Vocabulary

def test_missing_vocabulary(tmp_path): fails(lambda: load_tokenizer(tmp_path), tmp_path/"vocab.txt", "nothing there")


def test_vocabulary_without_a_special_token(oscar):
    words = (oscar/"vocab.txt").read_text()
    (oscar/"vocab.txt").write_text(words.replace("[SEP]\n", ""))
    fails(lambda: load_tokenizer(oscar), oscar/"vocab.txt", "[SEP]")


# Captions and splits

def test_missing_captions(data):
    (data/"test_captions.pt").unlink()
    fails(lambda: open_test(data), data/"test_captions.pt", "nothing there")


@pytest.mark.parametrize("value, names", [
    ({}, ["an empty split"]),
    (["a dog"], ["a mapping", "list"]),
    ({7: "[a dog"}, ["image 7", "JSON"]),
    ({7: "[]"}, ["image 7", "non-empty"]),
    ({7: [1]}, ["image 7", "captions"])
], ids=["empty", "list", "broken JSON", "no caption", "number"])
def test_malformed_captions(data, value, names):
    torch.save(value, data/"test_captions.pt")
    fails(lambda: open_test(data), data/"test_captions.pt", *names)


def test_empty_key_file(data):
    (data/"test_img_keys.tsv").write_text("\n")
    fails(lambda: open_test(data, keys="test_img_keys.tsv"), data/"test_img_keys.tsv", "an empty split")


def test_missing_key_file(data): fails(lambda: open_test(data, keys="none.tsv"), data/"none.tsv", "nothing there")


def test_key_without_captions(data):
    (data/"test_img_keys.tsv").write_text("123456789\n")
    fails(lambda: open_test(data, keys="test_img_keys.tsv"), data/"test_img_keys.tsv", "image 123456789",
          "test_captions.pt")


def test_image_without_features(data):
    torch.save(load_torch_file(data/"test_captions.pt") | {123456789: '["a dog"]'}, data/"test_captions.pt")
    fails(lambda: open_test(data), data/"test_captions.pt", "image 123456789", "features")


# Configurations

@pytest.mark.parametrize("line, key, near", [
    ("loss: {margn: 0.1}", "loss.margn", "loss.margin"),
    ("trainin: {lr: 1}", "trainin", "training"),
    ("training: {batchsize: 8}", "training.batchsize", "training.batch_size")])
def test_unknown_key(tmp_path, line, key, near):
    (tmp_path/"own.yaml").write_text(line)
    fails(lambda: load_config(tmp_path/"own.yaml"), tmp_path/"own.yaml", f"key {key}", f"did you mean {near}?")


@pytest.mark.parametrize("group, key, near", [
    ("training", "loss-typ", "loss-type"),
    ("model", "tern-layer", "tern-layers"),
    ("training", "marginn", "margin")])
def test_unknown_key_of_the_authors(tmp_path, group, key, near):
    (tmp_path/"theirs.yaml").write_text(f"dataset: {{name: coco}}\n{group}: {{{key}: 1}}")
    fails(lambda: load_config(tmp_path/"theirs.yaml"), tmp_path/"theirs.yaml", f"key {group}.{key}",
          f"did you mean {near}?")


@pytest.mark.parametrize("values, names", [
    (dict(loss=dict(terms=["alignmnt"])), ["loss.terms", "alignment"]),
    (dict(training=dict(lr="fast")), ["training.lr", "float", "fast"]),
    (dict(loss=dict(terms=["alignment", "matching"])), ["loss.weights", "2 numbers"]),
    (dict(model=[1]), ["model", "mapping"]),
    (dict(model=dict(hidden_size=50)), ["model.attention_heads", "50"])
], ids=["term", "type", "weights", "group", "heads"])
def test_value_that_does_not_fit(values, names): fails(lambda: config_from_dict(values, "own.yaml"), "own.yaml", *names)


def test_variant_of_the_authors_that_is_not_built():
    fails(lambda: config_from_authors(dict(model={"depth-aggregation-matching": "transformer"}), "theirs.yaml"),
          "theirs.yaml", "model.depth-aggregation-matching", "transformer")


@pytest.mark.parametrize("content, found", [(None, "nothing there"), ("loss: [", "YAML")], ids=["missing", "broken"])
def test_configuration_file(tmp_path, content, found):
    if content: (tmp_path/"own.yaml").write_text(content)
    fails(lambda: load_config(tmp_path/"own.yaml"), tmp_path/"own.yaml", found)


# Embeddings

@pytest.fixture(scope="module")
def model(): return AladinModel.from_original(golden/"checkpoint.pth.tar", golden/"oscar_ckpt")


@every_format
def test_a_text_model_that_hides_code(tmp_path, model, marker, write):
    (tmp_path/"text").mkdir()
    write(dict(weights=Hostile(marker)), tmp_path/"text"/"pytorch_model.bin")
    BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
               intermediate_size=32).save_pretrained(tmp_path/"text")
    fails(lambda: start_from_text_model(model, str(tmp_path/"text")), tmp_path/"text", "model.init_from", "safetensors")


def test_a_missing_text_model_is_not_asked_of_a_hub(model, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    fails(lambda: start_from_text_model(model, "models/not-here"), "models/not-here", "model.init_from",
          "nothing there", "aladin fetch")


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "models/not-here"])
def test_a_missing_clip_is_not_asked_of_a_hub(monkeypatch, name):
    monkeypatch.setattr(socket, "socket", None)
    fails(lambda: ClipReader(name), name, "hub:NAME", "nothing there")


@pytest.fixture(scope="module")
def embeddings(model): return encode_split(model, open_test(golden/"data", keys="test_img_keys_1k.tsv"), progress=False)


def test_features_of_another_width(model):
    regions = type("Regions", (), dict(dim=model.config.region_dim+1))()
    fails(lambda: encode_split(model, type("Data", (), dict(regions=regions))(), progress=False), "regions",
          "feature width", model.config.region_dim)


@pytest.mark.parametrize("share", [0, .01, .5, .999], ids=lambda o: f"{100*o:g} %")
def test_truncated_embeddings(tmp_path, embeddings, share):
    path = tmp_path/"test.safetensors"
    save_embeddings(embeddings, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share*len(whole))])
    fails(lambda: load_embeddings(path), path, "file")


def test_missing_embeddings(tmp_path):
    fails(lambda: load_embeddings(tmp_path/"none.safetensors"), tmp_path/"none.safetensors", "nothing there")


def test_foreign_safetensors(tmp_path, model):
    model.save_pretrained(tmp_path)
    fails(lambda: load_embeddings(tmp_path/"model.safetensors"), tmp_path/"model.safetensors", "tensor image_matching")


def test_images_that_are_not_encoded(embeddings): fails(lambda: embeddings.subset(["123456789"]), "image 123456789")
