"""Any input gives a valid result or an InputError, never another exception and never a hang.

Values, raw bytes, and files whose bytes are changed or cut off. ALADIN_EXAMPLES=1000 tries as many of each, others each
time."""
import base64, contextlib, io, json, os, signal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from small_inputs import with_processor
from aladin.cli.command import COMMANDS, parser_of
from aladin.cli.main import main
from aladin.config import ExperimentConfig, config_from_dict, config_to_dict
from aladin.model.authors_config import load_config
from aladin.data.ragged import Ragged
from aladin.data.text import read_captions, read_keys
from aladin.data.splits import RetrievalSet
from aladin.evaluation.embeddings import Embeddings, load_embeddings, save_embeddings
from aladin.evaluation.metrics import retrieval_ranks
from aladin.files import InputError, resource_dir
from aladin.runs.graph import experiment_config
from aladin.data.manifests import Manifest, load_manifest
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel, save_model
from aladin.data.regions import RegionStore, TsvRegions, convert_regions
from aladin.search.index import SearchIndex

EXAMPLES = int(os.environ.get("ALADIN_EXAMPLES", 0))


def often(examples=60):
    return settings(max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def answers(action, *allowed):
    "What `action` returns, or None where it raises an InputError with all its parts; ended after 20 seconds."
    def stop(*_): raise AssertionError("still running after 20 seconds")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try: return action()
    except InputError as e: assert all((e.path, e.where, e.expected, e.found, e.fix)) and len(str(e)) < 5000
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def changed(path, content):
    "A file with other content for a while."
    whole = path.read_bytes()
    path.write_bytes(content)
    try: yield path
    finally: path.write_bytes(whole)


@st.composite
def damaged(draw, content):
    "The bytes with up to four of them changed, those of the header more often, and perhaps cut off."
    content, last = bytearray(content), max(0, len(content) - 1)
    at = st.integers(0, min(last, 200)) | st.integers(0, last)
    for i, byte in draw(
            st.lists(st.tuples(at, st.integers(0, 255) | st.sampled_from(b'0129-.,:"[]{}\n\t e')), max_size=4)):
        content[i:i+1] = [byte]
    return bytes(content[:draw(st.just(len(content)) | st.integers(0, len(content)))])


# Configurations

def every_key(values, prefix=()):
    for key, value in values.items():
        yield prefix + (key,)
        if isinstance(value, dict): yield from every_key(value, prefix + (key,))


KEYS = list(every_key(config_to_dict(ExperimentConfig())))
AUTHORS = ["dataset", "model", "training", "embed-size", "loss-type", "loss-weights", "measure", "bs", "lr", "name",
           "alignment-mode", "tern-layers", "dropout", "margin", "grad-clip", "all", "base", "configurations"]
words = st.sampled_from(sorted({k for key in KEYS for k in key} | set(AUTHORS)
                               | {"never", "auto", "coco", "alignment", "dot", "order", "scenes", "teran", "1e-5"}))
plain = (st.none() | st.booleans() | st.integers() | st.integers(-2, 8) | st.just(10**400) | st.floats() | words
         | st.text(max_size=6))
values = st.recursive(
    plain,
    lambda o: st.lists(o, max_size=3) | st.dictionaries(words | st.integers(0, 2) | st.text(max_size=3), o, max_size=4),
    max_leaves=12)
tokens = ["a", "b: ", ": ", "\n", "  ", "- ", "&x ", "*x ", "[", "]", "{", "}", ", ", "'", '"', "|\n", "!!int ",
          "!!bool ", "!!timestamp ", "!!python/object:os.system ", "1e400", ".nan", "2001-01-01", "0o7", "\t", "\ufeff",
          "? ", "<<: ", "#", "%", "---\n", "model:\n  ", "hidden_size: ", "training: ", "lr: ", "dataset: ",
          "loss-type: ", "~", "1_000", "12:30:45", "=", "\x00", "\ud7ff", "base: ", "all:\n  ", "configurations:\n  "]
texts = st.lists(st.sampled_from(tokens), max_size=14).map(lambda o: "".join(o).encode())


@given(st.dictionaries(words | st.integers(), values, max_size=4) | values)
@often(150)
def test_values_of_a_configuration(value):
    config = answers(lambda: config_from_dict(value, "own.yaml"))
    if config is not None: assert answers(lambda: config_from_dict(config_to_dict(config), "own.yaml")) == config


@given(st.sampled_from(KEYS), plain | values)
@often(150)
def test_one_value_of_a_configuration(key, value):
    whole = config_to_dict(ExperimentConfig())
    group = whole
    for k in key[:-1]: group = group[k]
    group[key[-1]] = value
    config = answers(lambda: config_from_dict(whole, "own.yaml"))
    if config is not None: assert answers(lambda: config_from_dict(config_to_dict(config), "own.yaml")) == config


def in_yaml(value):
    try: return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError: return b"" # the integer is too long to be printed


@given(values.map(in_yaml) | texts | st.binary(max_size=40))
@often(100)
def test_files_of_configurations(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp()/"own.yaml"
    path.write_bytes(content)
    config = answers(lambda: load_config(path))
    assert config is None or isinstance(config, ExperimentConfig)
    config = answers(lambda: experiment_config("alad-alignment-triplet", str(path)))
    assert config is None or config.name == "alad-alignment-triplet"
    answers(lambda: experiment_config(str(path), "scenes"))
    manifest = answers(lambda: load_manifest(path))
    assert manifest is None or isinstance(manifest, Manifest)


@given(st.data())
@often()
def test_manifests(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp()/"flickr8k_source.yaml"
    path.write_bytes(data.draw(damaged((resource_dir("manifests")/path.name).read_bytes())))
    answers(lambda: load_manifest(path))
    value = yaml.safe_load((resource_dir("manifests")/path.name).read_bytes())
    group = data.draw(st.sampled_from([value, *value["files"]]))
    group[data.draw(st.sampled_from([*group, "size", "sha256"]))] = data.draw(plain | values)
    path.write_bytes(in_yaml(value))
    answers(lambda: load_manifest(path))


# Key files and captions

@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda o: o.encode("utf-8", "surrogatepass"))
       | st.lists(st.sampled_from(["7", "i9", "\t", "\n", "\r\n", " ", "\ufeff", "{", "\x00", ","]), max_size=9).map(
           lambda o: "".join(o).encode()))
@often(150)
def test_key_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp()/"keys.tsv"
    path.write_bytes(content)
    keys = answers(lambda: read_keys(path))
    if keys is not None: assert len(set(keys)) == len(keys) and all(isinstance(k, str) and k == k.strip() for k in keys)


def good_captions(captions):
    return all(isinstance(k, str) and v and all(isinstance(o, str) for o in v) for k, v in captions.items())


@given(st.data())
@often(100)
def test_caption_files(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    whole = json.dumps({"7": ["a dog", "caf\u00e9"], "9": '["a cat"]'}).encode()
    (folder/"test_captions.json").write_bytes(
        data.draw(damaged(whole) | st.binary(max_size=40) | values.map(lambda o: json.dumps(o, default=str).encode())))
    for end in ("zip", "old"):
        torch.save({7: ["a dog"], "9": '["a cat"]'}, folder/f"{end}.bin", _use_new_zipfile_serialization=end == "zip")
    (folder/"test_captions.pt").write_bytes(
        data.draw(st.sampled_from(["zip", "old"]).flatmap(lambda end: damaged((folder/f"{end}.bin").read_bytes()))
                  | st.binary(max_size=40)))
    for end in ("json", "pt"):
        captions = answers(lambda: read_captions(folder/f"test_captions.{end}"))
        assert captions is None or good_captions(captions)


# Embeddings

@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings")/"e.safetensors"
    vectors = lambda *n: torch.linspace(-1, 1, n[0]*n[1]).view(n)
    save_embeddings(Embeddings(
        vectors(3, 4), vectors(5, 4), Ragged(vectors(6, 4), torch.full((3,), 2)),
        Ragged(vectors(10, 4), torch.full((5,), 2)), ["i0", "i1", "i2"], torch.tensor([0, 0, 1, 2, 2])), path)
    return path


@given(data=st.data())
@often(200)
def test_embedding_files(embeddings, data):
    with changed(embeddings, data.draw(damaged(embeddings.read_bytes()))) as path:
        found = answers(lambda: load_embeddings(path))
        if found is None: return
        assert len(set(found.image_ids)) == len(found.image_matching) and torch.isfinite(found.regions.values).all()
        for head in ("matching", "alignment"):
            try: answers(lambda: retrieval_ranks(found, head))
            except FloatingPointError: pass # large finite numbers whose product is not


# Regions

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Four images in the published layout, and a store of them."
    folder = tmp_path_factory.mktemp("regions")/"tsv"
    folder.mkdir()
    vectors = [np.linspace(0, 1, 8*n).astype("<f4") for n in (1, 2, 3, 1)]
    features = [f"{i}\t{len(v)//8}\t{base64.b64encode(v.tobytes()).decode()}\n" for i, v in enumerate(vectors)]
    found = [dict(image_w=30, image_h=20, objects=[{"class": "fish", "rect": [0, 0, 10, 20], "conf": .5}]*(len(v)//8))
             for v in vectors]
    predictions = [f"{i}\t{json.dumps(o if i else o['objects'])}\n" for i, o in enumerate(found)]
    for name, rows in dict(features=features, predictions=predictions).items():
        (folder/f"{name}.tsv").write_text("".join(rows))
        (folder/f"{name}.lineidx").write_text("".join(f"{sum(map(len, rows[:i]))}\n" for i in range(4)))
    (folder/"imageid2idx.json").write_text(json.dumps({str(i): i for i in range(4)}))
    (folder/"test_captions.json").write_text(json.dumps({str(i): ["a red fish", "a fish"] for i in range(4)}))
    convert_regions(folder, folder.parent/"store", progress=False)
    return folder


def read_all(regions):
    for i in regions.ids:
        answers(lambda: regions.num_regions(i))
        vectors = answers(lambda: regions.features(i))
        assert vectors is None or vectors.ndim == 2 and vectors.shape[1] == regions.dim
        assert len(regions.tags(i)) == len(regions.rects(i)) == len(regions.confidences(i))
        assert regions.size(i) is None or min(regions.size(i)) > 0
    return regions.fingerprint


@pytest.mark.parametrize("name", [
    "features.tsv", "features.lineidx", "imageid2idx.json", "predictions.tsv", "predictions.lineidx"])
@given(data=st.data())
@often()
def test_region_folders(folder, name, data):
    with changed(folder/name, data.draw(damaged((folder/name).read_bytes()))):
        answers(lambda: read_all(TsvRegions(folder)))


@given(data=st.data())
@often()
def test_rows_of_detections(folder, data):
    "Any JSON in a row of predictions.tsv."
    row = data.draw(values | st.lists(values) | st.fixed_dictionaries(dict(
        image_w=plain, image_h=plain,
        objects=values | st.lists(st.fixed_dictionaries({"class": plain, "rect": values, "conf": plain}), max_size=2))))
    rows = (folder/"predictions.tsv").read_text().splitlines(keepends=True)
    with changed(folder/"predictions.tsv", "".join([*rows[:3], f"3\t{json.dumps(row, default=str)}\n"]).encode()):
        with changed(folder/"predictions.lineidx", (folder/"predictions.lineidx").read_bytes()):
            answers(lambda: read_all(TsvRegions(folder)))


STORE = ["store.json", "ids.json", "tags.json", "regions.npy", "offsets.npy", "detection_offsets.npy", "tag_codes.npy",
         "rects.npy", "confidences.npy", "sizes.npy"]


@pytest.mark.parametrize("name", STORE)
@given(data=st.data())
@often()
def test_region_stores(folder, name, data):
    "The size in store.json is that of the damaged file, so that more than sizes must be checked."
    store = folder.parent/"store"
    with (changed(store/name, data.draw(damaged((store/name).read_bytes()))),
          changed(store/"store.json", (store/"store.json").read_bytes())):
        if name != "store.json":
            info = json.loads((store/"store.json").read_text())
            info["files"][name] = (store/name).stat().st_size
            (store/"store.json").write_text(json.dumps(info))
        answers(lambda: read_all(RegionStore(store)))


@given(st.sampled_from(["dim", "dtype", "arrays", "files", "version", "format", "images"]),
       values | st.dictionaries(st.sampled_from(STORE) | st.text(max_size=4), plain, max_size=3))
@often()
def test_descriptions_of_stores(folder, key, value):
    store = folder.parent/"store"
    with changed(store/"store.json", json.dumps(json.loads((store/"store.json").read_text()) | {key: value}).encode()):
        answers(lambda: read_all(RegionStore(store)))


# Indexes

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder/"vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a red fish".split()))
    torch.manual_seed(0)
    model = AladinModel(
        AladinConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                     region_dim=8, max_tokens=8, max_regions=4, drop_first_region=False, drop_last_word=False))
    save_model(with_processor(model.eval(), folder), folder/"model")
    return folder/"model", model


@pytest.fixture(scope="module")
def index(folder, model, tmp_path_factory):
    "A small index with a deletion."
    out, loaded = tmp_path_factory.mktemp("index")/"index", model[1]
    captions = {str(i): ["a red fish", "a fish"][:1 + i % 2] for i in range(4)}
    made = SearchIndex.build(
        loaded, RetrievalSet(RegionStore(folder.parent/"store"), captions, loaded.processor), out, progress=False)
    made.delete(["2"])
    return out


def search(index, model):
    "Open the index and ask in both directions."
    opened = SearchIndex(index, model)
    hits = opened.search("a red fish", 3, explain=True) + opened.search_captions("1", 3, explain=True)
    for hit in hits:
        assert (np.isfinite(hit.score) and isinstance(hit.id, str)
                and len(hit.alignment.best()) <= len(hit.alignment.words))
    return [hit.id for hit in hits]


def files_of(index):
    return sorted((p for p in index.rglob("*") if p.is_file()), key=lambda p: (p.suffix, p.name, str(p)))


def test_the_index_is_whole(index, model):
    names = {p.name for p in files_of(index)}
    assert (names == {"index.json", "segment.json", "vectors.npy", "sets.npy", "offsets.npy", "boxes.npy"}
            and len(search(index, model[1])) > 2)


@given(data=st.data())
@often(180)
def test_indexes(index, model, data):
    path = data.draw(st.sampled_from(files_of(index)))
    with changed(path, data.draw(damaged(path.read_bytes()))): answers(lambda: search(index, model[1]))


@given(data=st.data())
@often(100)
def test_descriptions_of_indexes(index, model, data):
    "Any JSON in place of a value of index.json or of a segment.json."
    path = data.draw(st.sampled_from([p for p in files_of(index) if p.suffix == ".json"]))
    whole = json.loads(path.read_text())
    key = data.draw(st.sampled_from(sorted(whole)))
    if key == "engine": value = data.draw(plain.filter(lambda o: o not in ("faiss", "milvus") and "://" not in str(o)))
    else: value = data.draw(values | st.lists(plain, max_size=4))
    with changed(path, json.dumps(whole | {key: value}, default=str).encode()): answers(lambda: search(index, model[1]))


# Options of the commands

def commands():
    "Name and options of each command."
    return {name: [a for a in parser_of(made)._actions if a.dest != "help"] for name, made in COMMANDS.items()}


names = st.text(st.characters(exclude_characters="/\\.\0:", exclude_categories=["Cs"]), max_size=8).filter(
    lambda o: not o.startswith("-") and o not in ("faiss", "milvus", "scenes"))
numbers = st.integers(-2, 4).map(str) | st.integers().map(str) | st.floats().map(str) | names
# get whole inputs too; others would train or fetch
READERS = ("encode", "evaluate", "index", "search", "search-study", "verify")


def option(draw, action, odd, whole):
    "The words that give an option, or none; always --data, without which `results` trains on its own data."
    if not action.required and action.option_strings and action.dest != "data" and draw(st.integers(0, 2)): return []
    if action.nargs == 0: return [action.option_strings[0]]
    if action.choices: value = draw(st.sampled_from(sorted(action.choices)) | names)
    elif action.type: value = draw(numbers)
    elif whole and draw(st.integers(0, 3)): value = draw(st.sampled_from(whole))
    else: value = draw(st.sampled_from(odd) | names)
    if not action.option_strings: return [value or "x"]
    return [f"{action.option_strings[0]}={value}"] if action.nargs is None else [action.option_strings[0], value or "x"]


@pytest.mark.parametrize("command", sorted(commands()))
@given(data=st.data())
@often(10)
def test_options_of_commands(command, folder, model, index, embeddings, tmp_path_factory, monkeypatch, data):
    "A status, whatever the options are and whatever the files are that they name."
    place = tmp_path_factory.mktemp("options")
    (place/"text.txt").write_text("a")
    monkeypatch.chdir(place)
    monkeypatch.setattr("aladin.runs.graph.end_with_parent", lambda **_: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("a red fish\n\n"))
    whole = dict(model=model[0], index=index, embeddings=embeddings, bank=embeddings, features=folder, data=folder,
                 name="coco_ir", folder=folder) if command in READERS else {}
    words = [command]
    for action in commands()[command]:
        words += option(data.draw, action, [str(place/"text.txt"), str(place/"none"), str(place)],
                        [str(whole[action.dest])] if action.dest in whole else [])
    try: status = main(words)
    except SystemExit as e: status = e.code
    assert status in (0, 2), (words, status)
