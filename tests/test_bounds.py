"""Models of any width, bounds of every number, and files that are read whole or refused: each error names the file, the
place and a fix."""
import argparse, base64, json, os, re
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from small_inputs import with_processor
from aladin.data.processor import AladinProcessor
from aladin.cli.main import main
from aladin.config import DataSettings, ExperimentConfig, config_from_dict
from aladin.model.authors_config import load_config
from aladin.data.ragged import Ragged
from aladin.data.text import build_vocabulary, load_tokenizer, load_torch_file, read_captions, read_keys
from aladin.data.splits import open_split
from aladin.evaluation.embeddings import Embeddings, load_embeddings, save_embeddings
from aladin.evaluation.scoring import hubness, score_matrix
from aladin.evaluation.metrics import bootstrap_intervals, image_to_text_ranks, retrieval_ranks
from aladin.evaluation.relevance import caption_relevance, ndcg_metrics, top_ranked
from aladin.files import InputError, resource_dir
from aladin.runs.graph import experiment_config
from aladin.data.manifests import load_manifest
from aladin.device import default_device, evaluating, select_device
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel, load_model, save_model
from aladin.data.scenes import write_scenes

BERT = "img_txt_enc.oscar_model.bert."
REGION_DIM = 70  # of the scenes


def fails(action, *names):
    "`action` raises an InputError whose message holds every name and a fix."
    with pytest.raises(InputError) as error: action()
    for name in (*map(str, names), "Fix:"): assert name in str(error.value), str(error.value)
    return str(error.value)


# Checkpoints of any width

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")/"data"
    write_scenes(folder, train=8, minival=4, test=12, seed=0, progress=False)
    return folder


def authors_name(name):
    "The authors' name of one of our tensors."
    if name.startswith("backbone."): return BERT + name.removeprefix("backbone.")
    if name.startswith("matching."): return "img_txt_enc.final_projection_net." + name.removeprefix("matching.")
    return "img_txt_enc.oscar_model." + name


def write_original(folder, scenes, width, heads, prefix="", change=None):
    """An Oscar folder and a checkpoint of one layer in the authors' form, as their program saves them; the model that
    they hold."""
    oscar = folder/"oscar"
    oscar.mkdir(parents=True)
    captions = json.loads((scenes/"train_captions.json").read_text())
    words = build_vocabulary([c for texts in captions.values() for c in texts])
    (oscar/"vocab.txt").write_text("\n".join(words) + "\n")
    sizes = dict(vocab_size=len(words), hidden_size=width, num_hidden_layers=1, num_attention_heads=heads,
                 intermediate_size=2*width, max_position_embeddings=80)
    (oscar/"config.json").write_text(json.dumps(sizes | dict(img_feature_dim=REGION_DIM, use_img_layernorm=1)))
    torch.manual_seed(0)
    model = AladinModel(AladinConfig(**sizes, region_dim=REGION_DIM, max_tokens=40, max_regions=20)).eval()
    weights = {prefix + authors_name(n): t for n, t in model.state_dict().items()}
    if change: change(weights)
    torch.save({n: t for n, t in weights.items() if ".bert." in n or "classifier" in n}, oscar/"pytorch_model.bin")
    config = dict(dataset=dict(name="coco"),
                  model={"name": "teran", "embed-size": width, "tern-layers": 2, "dropout": 0.1},
                  training={"lr": 1e-5, "loss-type": "alignment", "loss-weights": [1],
                            "alignment-mode": "MrSw", "measure": "dot"})
    torch.save(
        dict(epoch=1, model=weights, opt=argparse.Namespace(max_seq_length=40, max_img_seq_length=20), config=config),
        folder/"checkpoint.pth.tar")
    return model


def convert(folder):
    return main(["convert", "--checkpoint", str(folder/"checkpoint.pth.tar"), "--oscar", str(folder/"oscar"),
                 "--out", str(folder/"model")])


@pytest.mark.parametrize("width, heads", [(40, 5), (1024, 16), (44, 11)])
def test_a_checkpoint_of_any_width(tmp_path, scenes, capsys, width, heads):
    """Neither our default of 12 heads nor any other default takes part: converted, encoded and evaluated by the
    commands."""
    original = write_original(tmp_path, scenes, width, heads)
    assert convert(tmp_path) == 0, capsys.readouterr().err
    model = load_model(tmp_path/"model")
    assert (model.config.hidden_size, model.config.num_attention_heads) == (width, heads)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in original.state_dict().items())
    assert main(["encode", "--model", str(tmp_path/"model"), "--data", str(scenes), "--split", "test",
                 "--out", str(tmp_path/"e.safetensors")]) == 0
    assert main(["evaluate", "--embeddings", str(tmp_path/"e.safetensors")]) == 0
    assert re.search(r"rsum \d", capsys.readouterr().out)


def test_a_checkpoint_of_data_parallel(tmp_path, scenes):
    original = write_original(tmp_path, scenes, 40, 5, prefix="module.")
    assert convert(tmp_path) == 0
    model = load_model(tmp_path/"model")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in original.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, scenes, capsys, value):
    name = authors_name("matching.layers.0.linear1.bias")
    def spoil(weights):
        weights[name] = weights[name].clone()
        weights[name][3] = value
    write_original(tmp_path, scenes, 40, 5, change=spoil)
    assert convert(tmp_path) == 2 and not (tmp_path/"model").exists()
    err = capsys.readouterr().err
    assert name in err and "checkpoint.pth.tar" in err and "1 of 40" in err


@pytest.mark.parametrize("key, value", [
    ("num_attention_heads", 7),
    ("hidden_size", "40"),
    ("hidden_size", 42),
    ("num_hidden_layers", -1),
    ("vocab_size", 10**12),
    ("layer_norm_eps", "small"),
    ("hidden_act", 3)])
def test_an_oscar_folder_that_does_not_fit(tmp_path, scenes, key, value):
    write_original(tmp_path, scenes, 40, 5)
    path = tmp_path/"oscar"/"config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    where = "hidden_size" if key == "num_attention_heads" else key
    fails(lambda: AladinModel.from_original(tmp_path/"checkpoint.pth.tar", tmp_path/"oscar"), path, where)


@pytest.mark.parametrize("change, where", [
    (dict(model={}), "tensors"),
    (dict(model=[1]), "tensors"),
    (dict(model={"a": 1}), "tensor a"),
    (dict(model={1: torch.zeros(1)}), "tensors"),
    (dict(config=[1]), "config"),
    (dict(opt=argparse.Namespace(max_seq_length="long")), "opt.max_seq_length")])
def test_a_checkpoint_of_another_content(tmp_path, scenes, change, where):
    write_original(tmp_path, scenes, 40, 5)
    path = tmp_path/"checkpoint.pth.tar"
    torch.save(load_torch_file(path, allow=(argparse.Namespace,)) | change, path)
    fails(lambda: AladinModel.from_original(path, tmp_path/"oscar"), path, where)


def test_the_authors_files_do_not_state_the_heads(tmp_path):
    (tmp_path/"theirs.yaml").write_text("dataset: {name: coco}\nmodel: {embed-size: 40}")
    assert load_config(tmp_path/"theirs.yaml").model.hidden_size == 40


# Bounds

def every_number(group, prefix=""):
    "Key, type and bounds of each number of the configuration."
    hints = get_type_hints(type(group))
    for f in fields(group):
        value = getattr(group, f.name)
        if is_dataclass(value): yield from every_number(value, f"{f.name}.")
        elif hints[f.name] in (int, float): yield prefix + f.name, hints[f.name], f.metadata


def nested(key, value):
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


@pytest.mark.parametrize(
    "key, kind, bounds", list(every_number(ExperimentConfig())), ids=lambda o: o if isinstance(o, str) else "")
def test_every_number_has_bounds(key, kind, bounds):
    "Just outside of each bound, and what is not a number, is refused by its key."
    outside = [bounds["ge"] - 1] if "ge" in bounds else [bounds["gt"]]
    outside += [bounds["le"] + 1] if "le" in bounds else [bounds["lt"]] if "lt" in bounds else []
    if kind is float: outside = [*map(float, outside), float("nan"), float("inf"), -float("inf")]
    for value in [*outside, 10**400, True, "1", None, [1], {}]:
        fails(lambda: config_from_dict(nested(key, value), "own.yaml"), f"own.yaml: {key}: expected")


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", ".", "..", ".hidden", "a\0b", "a\nb", "x"*201, "a\\b"])
def test_a_name_that_leads_elsewhere(name):
    fails(lambda: config_from_dict(dict(name=name), "own.yaml"), "own.yaml: name: expected")


@pytest.mark.parametrize("text, where", [
    ("grd_clip: 2\n3: x", "key 3"),
    ("training: {3: 1}", "key 3 in training"),
    ("loss: {terms: [[x]]}", "loss.terms"),
    ("loss: {weights: [[1.0]]}", "loss.weights"),
    ("loss: {weights: {a: 1}}", "loss.weights"),
    ("loss: {measure: order}", "loss.measure"),
    ("training: {lr: .nan}", "training.lr"),
    ("[a, b]", "top level"),
    ("training: {pretrain_losses: words}", "training.pretrain_losses"),
    ("a: &x [*x]", "a.0"),
    ("a: [", "line"),
    ("seed: !!int", "file"),
    ("seed: !!bool x", "file"),
    ("seed: !!timestamp x", "file"),
    ("model: {clamp: [never]}", "model.clamp"),
    ("dataset: {}\ntraining: {loss-type: 3}", "training.loss-type"),
    ("dataset: {}\ntraining: {measure: order}", "training.measure"),
    ("dataset: {}\ntraining: {bs: -1}", "training.bs"),
    ("dataset: {}\ntraining: [1]", "training"),
    ("dataset: {}\nmodel: {name: [teran]}", "model.name"),
    ("dataset: {}\nmodel: {embed-size: 0}", "model.embed-size")])
def test_a_configuration_that_does_not_fit(tmp_path, text, where):
    (tmp_path/"own.yaml").write_text(text)
    fails(lambda: load_config(tmp_path/"own.yaml"), tmp_path/"own.yaml", where)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path/"own.yaml").write_bytes(b"name: caf\xe9")
    for read in (load_config, load_manifest, lambda p: experiment_config("alad-alignment-triplet", str(p))):
        fails(lambda: read(tmp_path/"own.yaml"), tmp_path/"own.yaml", "UTF-8")


@pytest.mark.parametrize("text, where", [
    ("base: own.yaml", "base"),
    ("base: [a]", "base"),
    ("base: scenez", "did you mean scenes"),
    ("all: [1]", "all"),
    ("all: {model: {hidden_size: [1]}}", "model.hidden_size"),
    ("configurations: 3", "configurations"),
    ("configurations: {alad-alignment-triplet: 3}", "configurations.alad-alignment-triplet"),
    ("- a", "top level"),
    ("configurations: {alad: {}}", "configurations.alad"),
    ("every: {}", "key every"),
    ("all: {training: {grad_clip: -1}}", "training.grad_clip"),
    ("all: &a {model: *a}", "all.model"),
    ("3: {}", "key 3"),
    ('base: "\\0.yaml"', "base"),
    ("base: " + "x"*300 + ".yaml", "too long")])
def test_settings_that_do_not_fit(tmp_path, monkeypatch, text, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"own.yaml").write_text(text)
    fails(lambda: experiment_config("alad-alignment-triplet", "own.yaml"), where)


def test_settings_in_a_circle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"a.yaml").write_text("base: b.yaml")
    (tmp_path/"b.yaml").write_text("base: ./a.yaml")
    fails(lambda: experiment_config("alad-alignment-triplet", "a.yaml"), "b.yaml", "base")


def test_the_published_files_are_valid():
    configurations, settings = (sorted(p.stem for p in (resource_dir("experiments")/kind).glob("*.yaml"))
                                for kind in ("configurations", "settings"))
    assert configurations and settings
    for configuration in configurations:
        for name in ("", *settings): assert experiment_config(configuration, name).name == configuration


@pytest.mark.parametrize("content", [
    dict(name="own", title=3),
    dict(name="own", title="t", kind="data set", licence="l", citation="c", homepage="h", files=[3]),
    dict(name="own", title="t", kind="data set", licence="l", citation="c", homepage="h", files=[dict(path="../up")]),
    [1],
    {3: 1}])
def test_a_manifest_that_does_not_fit(tmp_path, content):
    (tmp_path/"own.yaml").write_text(yaml.safe_dump(content))
    fails(lambda: load_manifest(tmp_path/"own.yaml"), tmp_path/"own.yaml")


# Evaluation mode and devices

@pytest.fixture(scope="module")
def tiny(tmp_path_factory, scenes):
    "A converted model of width 40."
    folder = tmp_path_factory.mktemp("tiny")
    write_original(folder, scenes, 40, 5)
    assert convert(folder) == 0
    return folder/"model"


def test_search_without_dropout(tiny):
    "A model in training mode encodes a query alike each time, and stays in training mode."
    model = load_model(tiny).train()
    first, again = (model.encode_captions("a red fish").matching for _ in range(2))
    assert torch.equal(first, again) and model.training and model.backbone.training


def test_the_mode_comes_back_after_an_error(tiny):
    model = load_model(tiny).train()
    model.matching.eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert model.training and model.backbone.training and not model.matching.training


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "graphics", "meta"])
def test_a_device_that_is_not_there(monkeypatch, name):
    if torch.cuda.device_count() > 3 or name == "cuda" and torch.cuda.is_available(): pytest.skip("this machine has it")
    monkeypatch.setenv("ALADIN_DEVICE", name)
    for ask in (select_device, default_device): fails(ask, "ALADIN_DEVICE", name, "cpu")


def test_asking_for_a_device_changes_nothing(monkeypatch):
    monkeypatch.setenv("ALADIN_DEVICE", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    assert select_device().type == "cuda"
    assert (before == (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled())
            and "CUBLAS_WORKSPACE_CONFIG" not in os.environ)


# Captions and key files

IDS = [f"i{k}" for k in range(4)]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a fish red one two three four five six seven".split()


class Pictures:
    "Regions in memory."
    dim, path, fingerprint = 10, "pictures", ""
    def __contains__(self, image_id): return image_id.startswith("i")
    def num_regions(self, image_id): return 2
    def features(self, image_id): return np.ones((2, 10), np.float32)
    def tags(self, image_id): return ["fish"]


@pytest.fixture
def folder(tmp_path):
    "Four images; the last two have six and seven captions."
    captions = {i: [f"a {w} fish" for w in WORDS[8:8 + n]] for i, n in zip(IDS, (1, 5, 6, 7))}
    (tmp_path/"test_captions.json").write_text(json.dumps(captions))
    (tmp_path/"vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


def opened(folder, settings=None, **options):
    return open_split(folder, "test", AladinProcessor.from_pretrained(folder, settings), Pictures(), **options)


def test_captions_beyond_five_are_reported(folder, capsys):
    data = opened(folder)
    assert (len(data), data.captions_left_out, data.images_with_more) == (16, 3, 2)
    told = capsys.readouterr().err.splitlines()
    assert (len(told) == 1 and "test_captions.json: first 5" in told[0]
            and "3 of 19 captions are left out, those of 2 images" in told[0])
    assert len(opened(folder, settings=DataSettings(captions_per_image=7))) == 19
    assert len(opened(folder, keys=IDS[:2])) == 6 and not capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "i2\ni0\n",
    "\ufeffi2\r\ni0\r\n",
    "\n i2 \n\ni0\tx\n\n",
    "i2\ri0"])
def test_keys_choose_and_order(folder, content):
    (folder/"keys.tsv").write_bytes(content.encode())
    for keys in ("keys.tsv", folder/"keys.tsv", ["i2", "i0"], ("i2", "i0"), iter(["i2", "i0"])):
        assert opened(folder, keys=keys).image_ids == ["i2", "i0"]


@pytest.mark.parametrize("keys", [[], (), iter([])])
def test_an_empty_request(folder, keys): fails(lambda: opened(folder, keys=keys), "an empty split")


def test_an_empty_key_file(folder):
    (folder/"keys.tsv").write_text("\n\n")
    fails(lambda: opened(folder, keys="keys.tsv"), folder/"keys.tsv", "an empty split")


def test_keys_that_stand_twice(folder):
    (folder/"keys.tsv").write_text("i0\ni1\ni0\n")
    for action in (lambda: opened(folder, keys="keys.tsv"), lambda: read_keys(folder/"keys.tsv")):
        fails(action, folder/"keys.tsv", "image i0", "id 1 and id 3")
    fails(lambda: opened(folder, keys=["i0", "i1", "i0"]), "image i0", "each image once")


@pytest.mark.parametrize("content, found", [
    (b'{"a": 1}', "JSON"),
    (b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
    (b"a\0b\n", "binary data"),
    ("i0".encode("utf-16"), "UTF-16 text"),
    (b"caf\xe9\n"*9, "not UTF-8")])
def test_a_key_file_of_another_kind(folder, content, found):
    (folder/"keys.tsv").write_bytes(content)
    fails(lambda: opened(folder, keys="keys.tsv"), folder/"keys.tsv", found)


@pytest.mark.parametrize("end", ["json", "pt"])
@pytest.mark.parametrize("content, found", [
    (b"image,caption\n1,a fish\n2,a dog\n", "a CSV table"),
    (b"\xff\xd8\xff\xe0", "a JPEG picture"),
    (b"", "an empty file"),
    (b"PAR1", "Parquet")])
def test_captions_of_another_format(tmp_path, end, content, found):
    path = tmp_path/f"test_captions.{end}"
    path.write_bytes(content)
    fails(lambda: read_captions(path), path, found)


@pytest.mark.parametrize("value", [[], "", 3, [1], [["a"]], {"a": 1}, None, "[", "["*10**5, ["\ud800"]])
def test_an_image_without_captions(tmp_path, value):
    path = tmp_path/"test_captions.json"
    path.write_text(json.dumps({"9": ["a fish"], "7": value}))
    fails(lambda: read_captions(path), path, "image 7")


def test_captions_with_a_mark(tmp_path):
    (tmp_path/"test_captions.json").write_text('{"7": ["a fish"]}', encoding="utf-8-sig")
    assert read_captions(tmp_path/"test_captions.json") == {"7": ["a fish"]}
    torch.save({7: ["a"], "7": ["b"]}, tmp_path/"test_captions.pt")
    fails(lambda: read_captions(tmp_path/"test_captions.pt"), "image 7", "each image once")


@pytest.mark.parametrize("content, found", [
    (b"\x89PNG\r\n\x1a\n\xff", "a PNG picture"),
    (b'{"model": 1}', "JSON"),
    ("[PAD]\ncaf\xe9\n".encode("latin-1")*9, "not UTF-8"),
    (None, "a folder")])
def test_a_vocabulary_of_another_kind(tmp_path, content, found):
    path = tmp_path/"vocab.txt"
    if content is None: path.mkdir()
    else: path.write_bytes(content)
    fails(lambda: load_tokenizer(tmp_path), path, found)


def test_a_vocabulary_with_a_mark(tmp_path):
    (tmp_path/"vocab.txt").write_text("\r\n".join(WORDS), encoding="utf-8-sig")
    assert load_tokenizer(tmp_path).convert_tokens_to_ids(["[PAD]", "fish"]) == [0, 6]


def test_ids_of_any_length(tmp_path, capsys):
    "Ids of 300 bytes in every file, through the commands."
    ids = ["é"*150 + str(k) for k in range(3)]
    folder = tmp_path/"data"
    folder.mkdir()
    block = base64.b64encode(np.full((2, 10), .5, "<f4").tobytes()).decode()
    rows = [f"{i}\t2\t{block}\n".encode() for i in ids]
    (folder/"features.tsv").write_bytes(b"".join(rows))
    (folder/"features.lineidx").write_text("".join(f"{k*len(rows[0])}\n" for k in range(3)))
    (folder/"imageid2idx.json").write_text(json.dumps({i: k for k, i in enumerate(ids)}))
    boxes = json.dumps(dict(image_w=9, image_h=9, objects=[{"class": "fish", "rect": [0, 0, 9, 9], "conf": 1}]*2))
    (folder/"predictions.tsv").write_text("".join(f"{i}\t{boxes}\n" for i in ids), encoding="utf-8")
    (folder/"test_captions.json").write_text(json.dumps({i: ["a fish"] for i in ids}))
    (folder/"keys.tsv").write_text("\n".join(ids[1:]), encoding="utf-8")
    (folder/"vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    save_model(
        with_processor(AladinModel(AladinConfig(**sizes, region_dim=10, max_tokens=9)), folder), tmp_path/"model")
    common = ["--model", str(tmp_path/"model"), "--data", str(folder), "--keys", "keys.tsv"]
    assert (main(["encode", *common, "--out", str(tmp_path/"e.safetensors")]) == 0
            and load_embeddings(tmp_path/"e.safetensors").image_ids == ids[1:])
    assert main(["evaluate", "--embeddings", str(tmp_path/"e.safetensors"), "--keys", str(folder/"keys.tsv")]) == 0
    assert (main(["index", *common, "--out", str(tmp_path/"index")]) == 0
            and main(["search", "a fish", "--index", str(tmp_path/"index")]) == 0)
    assert ids[1] in capsys.readouterr().out


# Embedding files

def small_embeddings(images=3, owners=(0, 0, 2, 2, 2, 2, 2)):
    "Three images with two, no and five captions."
    unit = lambda *n: torch.nn.functional.normalize(
        torch.randn(*n, generator=torch.Generator().manual_seed(sum(n))), dim=-1)
    n = len(owners)
    sets = [Ragged(unit(2*k, 6), torch.full((k,), 2)) for k in (images, n)]
    return Embeddings(unit(images, 8), unit(n, 8), *sets, [f"i{k}" for k in range(images)],
                      torch.tensor(owners, dtype=torch.int64))


@pytest.fixture
def saved(tmp_path):
    save_embeddings(small_embeddings(), tmp_path/"e.safetensors")
    return tmp_path/"e.safetensors"


def spoil(path, metadata=None, **tensors):
    "Write the file again with other tensors or other metadata."
    with safe_open(path, "pt") as f: meta, t = f.metadata(), {k: f.get_tensor(k).clone() for k in f.keys()}
    for name, change in tensors.items(): t[name] = change(t[name])
    save_file(t, path, metadata={k: v for k, v in (meta | (metadata or {})).items() if v is not None})


def put(at, value):
    def change(t):
        t[at] = value
        return t
    return change


@pytest.mark.parametrize("name, change, where", [
    ("image_matching", lambda t: t[:2], "image_ids"),
    ("image_matching", lambda t: t[0], "image_matching"),
    ("image_matching", put((1, 2), float("nan")), "image_matching, row 1"),
    ("caption_matching", lambda t: t[:-1], "word_offsets"),
    ("caption_matching", lambda t: t[:, :3].contiguous(), "caption_matching"),
    ("caption_matching", lambda t: t.half(), "caption_matching"),
    ("regions", put((5, 0), float("inf")), "regions, row 5"),
    ("regions", lambda t: t[:-1], "region_offsets"),
    ("regions", lambda t: t.long(), "tensor regions"),
    ("words", lambda t: t[:, :5].contiguous(), "words"),
    ("region_offsets", put(0, 1), "region_offsets"),
    ("region_offsets", put(1, 5), "region_offsets, row 2"),
    ("region_offsets", put(2, -2**62), "region_offsets"),
    ("region_offsets", lambda t: t.int(), "region_offsets"),
    ("word_offsets", put(-1, 99), "word_offsets"),
    ("word_offsets", lambda t: t[:-1], "word_offsets"),
    ("caption_image", put(3, 3), "caption_image, row 3"),
    ("caption_image", put(0, -1), "caption_image, row 0"),
    ("caption_image", lambda t: t[:-1], "caption_image"),
    ("image_ids", lambda t: t[:-1], "image_ids")])
def test_embeddings_that_do_not_fit(saved, name, change, where):
    load_embeddings(saved)
    spoil(saved, **{name: change})
    fails(lambda: load_embeddings(saved), saved, where)


@pytest.mark.parametrize("key, value", [
    ("image_ids", "["),
    ("image_ids", "{}"),
    ("image_ids", "[1, 2, 3]"),
    ("image_ids", '["i0", "i1"]'),
    ("image_ids", '["i0", "i1", "i0"]'),
    ("image_ids", "["*10**5),
    ("aggregation", "mxSr"),
    ("clamp", "reference"),
    ("format", "aladin-model")])
def test_metadata_that_does_not_fit(saved, key, value):
    spoil(saved, {key: value})
    fails(lambda: load_embeddings(saved), saved,
          "image i0" if '"i0", "i1", "i0"' in value else f"{key} in the metadata")


def test_ids_from_numbers(saved):
    spoil(saved, dict(image_ids=None))
    assert load_embeddings(saved).image_ids == ["0", "1", "2"]
    spoil(saved, image_ids=put(1, 0))
    fails(lambda: load_embeddings(saved), saved, "image 0", "each image once")


def test_missing_ids_score_nothing(saved, capsys):
    "They are refused by the command; images beyond the ids had scored a recall of 100 percent."
    spoil(saved, dict(image_ids='["i0"]'))
    assert main(["evaluate", "--embeddings", str(saved)]) == 2
    assert "3 ids, one an image" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["matching", "alignment"])
@pytest.mark.parametrize("images, owners, what", [(0, (), "images"), (2, (), "captions")])
def test_nothing_to_compare(tmp_path, head, images, owners, what):
    save_embeddings(small_embeddings(images, owners), tmp_path/"e.safetensors")
    empty, whole = load_embeddings(tmp_path/"e.safetensors"), small_embeddings()
    for action in (lambda: retrieval_ranks(empty, head), lambda: score_matrix(empty, head),
                   lambda: top_ranked(empty, head), lambda: hubness(whole, empty, head),
                   lambda: hubness(empty, whole, head)):
        fails(action, what, "at least one")
    assert main(["evaluate", "--embeddings", str(tmp_path/"e.safetensors"), "--head", head]) == 2


@pytest.mark.parametrize("head", ["matching", "alignment"])
def test_images_with_any_number_of_captions(head):
    "An image without captions is found or missed by others' captions, and asks for nothing itself."
    e = small_embeddings()
    scores = score_matrix(e, head)
    i2t, t2i = retrieval_ranks(e, head)
    np.testing.assert_array_equal(i2t, image_to_text_ranks(scores, e.caption_image))
    assert (len(i2t) == 2 and len(t2i) == 7 and i2t[0] == (scores[0] > scores[0, :2].max()).sum()
            and i2t[1] == (scores[2] > scores[2, 2:].max()).sum())
    spread = bootstrap_intervals(i2t, t2i, e.caption_image, samples=50)
    assert all(np.isfinite(v).all() for d in ("i2t", "t2i") for v in spread[d].values())
    fails(lambda: ndcg_metrics(e, caption_relevance(["a fish"]*7, e.caption_image), head), "NDCG", "without captions")


def test_a_subset_with_a_repeated_id():
    fails(lambda: small_embeddings().subset(["i2", "i0", "i2"]), "image i2", "each image once")
    assert small_embeddings().subset(["i2", "i0"]).image_ids == ["i2", "i0"]
