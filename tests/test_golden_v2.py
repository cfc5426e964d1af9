"""ALADIN-2.0's detections and InfoNCE: what its program recorded (tests/golden/v2, or ALADIN_GOLDEN), compared exactly;
and shelves that must not be trusted."""

import contextlib
import copy
import io
import json
import os
import pickle
import shelve
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from aladin.cli.main import main
from aladin.config import LossSettings
from aladin.data.ragged import Ragged
from aladin.data.splits import ImageBatch
from aladin.data.clip import clip_tokens, tag_sentences
from aladin.data.detections import SOURCES, DeticShelve, MergedRegions, suppress, unify_classes
from aladin.training.losses import Criterion, infonce_loss, triplet_loss
from aladin.model.model import AladinModel
from aladin.model.authors import original_name
from aladin.data.regions import RegionStore, TsvRegions

here = Path(os.environ.get("ALADIN_GOLDEN") or Path(__file__).parent/"golden")
v2 = here/"v2" if (here/"v2").is_dir() else here
if not (v2/"expected"/"merge.json").is_file():
    pytest.skip("this recorded set has no ALADIN-2.0 detections", allow_module_level=True)
recorded = json.loads((v2/"expected"/"merge.json").read_text())


@cache
def detectors(): return TsvRegions(v2/"feats"),DeticShelve(v2/"feats"/"detic")


@cache
def merged(key, merge):
    split,source = key.split("/")
    with contextlib.redirect_stderr(io.StringIO()) as told:
        regions = MergedRegions(
            *detectors(), [str(i) for i in recorded[f"{split}/fast"]["img_keys"]], source, merge, width=2054)
        return regions,told.getvalue().splitlines()


@pytest.mark.parametrize("number", range(len(json.loads((v2/"expected"/"class_id_cases.json").read_text()))))
def test_class_numbers(number):
    case = json.loads((v2/"expected"/"class_id_cases.json").read_text())[number]
    assert list(unify_classes(case["fast"], case["detic"])) == case["ids"]


def test_suppression():
    with np.load(v2/"expected"/"nms.npz") as a:
        assert suppress(a["boxes"], a["scores"], a["classes"]) == a["keep"].tolist()
        assert suppress(a["boxes"], a["scores"], None) == a["keep_single_class"].tolist()


@pytest.mark.parametrize("key", recorded)
def test_published_merge(key):
    "Images, tags, the row of each vector, the vectors' shape."
    want,(regions,told) = recorded[key],merged(key, "published")
    assert regions.ids == [str(i) for i in want["img_keys"]]
    assert len(told) == bool(regions.empty) and all(i in told[0] for i in regions.empty)
    fast,detic = detectors()
    for i in regions.ids:
        assert regions.tags(i) == want["labels"][i]
        assert " ".join(regions.tags(i)) == want["od_label_string"][i]
        if isinstance(want["rows"][i], str):  # the authors' program stops at an image without Detic boxes
            assert "ERROR" in want["rows"][i] and i not in detic
            continue
        assert [list(o) for o in regions.origins(i)] == want["rows"][i]
        vectors = regions.features(i)
        assert list(vectors.shape) == want["feat_shape"][i] and regions.num_regions(i) == len(vectors)
        for row,(side,n) in zip(vectors, want["rows"][i]):
            source = (fast if side == "f" else detic).features(i)[n]
            np.testing.assert_array_equal(row[:len(source)], source)
            assert not row[len(source):].any()


@pytest.mark.parametrize("key", [k for k in recorded if "stats" in recorded[k]])
def test_steps_of_the_merge(key):
    "Statistics of the confidences, class numbers, normalised confidences, suppression, both orders."
    want,(regions,_),(aligned,_) = recorded[key],merged(key, "published"),merged(key, "aligned")
    s = want["stats"]
    np.testing.assert_allclose(
        regions.statistics, [(s["fast_mean"], s["fast_std"]), (s["det_mean"], s["det_std"])], rtol=1e-6)
    for i,image in want["images"].items():
        found = regions.merged(i)
        assert list(found["classes"]) == [image["fast_class_ids"], image["detic_class_ids"]]
        np.testing.assert_allclose(found["normalised"], image["normalised_conf"], atol=1e-5)
        np.testing.assert_allclose(found["scores"], image["nms_scores"], atol=1e-6)
        assert found["kept"] == image["nms_keep"] == image["nms_keep_vanilla"]
        assert found["order"] == image["order_reference"] == want["box_ordering"][i]
        assert aligned.merged(i)["order"] == image["order_if_conf_followed_its_own_box"]


@pytest.mark.parametrize("key", [k for k in recorded if k.endswith("/det+fast")])
def test_aligned_merge_keeps_rows_together(key):
    "Each vector belongs to the box that its tag names; so it is not in the published merge."
    def agreeing(merge):
        regions,sides = merged(key, merge)[0],dict(zip("fd", detectors()))
        return [tag == sides[side].tags(i)[n] for i in regions.ids
                for tag,(side,n) in zip(regions.tags(i), regions.origins(i))]
    assert all(agreeing("aligned")) and not all(agreeing("published"))


def test_shelve_becomes_a_store(tmp_path, capsys):
    out = tmp_path/"store"
    assert main(["convert-detections", "--shelve", str(v2/"feats"/"detic"), "--out", str(out)]) == 0
    source = detectors()[1]
    told = capsys.readouterr().err
    assert source.empty and all(i in told for i in source.empty)
    store = RegionStore(out)
    assert store.ids == source.ids and store.dim == source.dim
    for i in store.ids:
        np.testing.assert_array_equal(store.features(i), source.features(i))
        np.testing.assert_array_equal(store.rects(i), source.rects(i))
        assert store.tags(i) == source.tags(i) and store.size(i) == source.size(i)
    for a,b in zip(
            *(MergedRegions(detectors()[0], o, detectors()[0].ids[:4], "det+fast").features(detectors()[0].ids[0])
              for o in (store, source))):
        np.testing.assert_array_equal(a, b)


class Hostile:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open,(str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_shelve_is_refused(tmp_path, protocol, capsys):
    with shelve.open(str(tmp_path/"detic"), protocol=protocol) as f:
        f["1"] = dict(
            image_w=2, image_h=2,
            objects=[{"class": "dog", "conf": .5, "rect": [0, 0, 1, 1], "features": [Hostile(tmp_path/"was_run")]}])
    assert main(["convert-detections", "--shelve", str(tmp_path/"detic"), "--out", str(tmp_path/"store")]) == 2
    assert "image 1" in capsys.readouterr().err
    assert not (tmp_path/"was_run").exists() and not (tmp_path/"store").exists()


def test_unknown_source():
    with pytest.raises(ValueError, match="det_padded"): MergedRegions(*detectors(), [], "detic")
    assert SOURCES[0] == "fast"


def test_infonce():
    "The loss, its gradients and the triplet losses of the same scores."
    with np.load(v2/"expected"/"infonce.npz") as f: a = {k: f[k] for k in f.files}
    scores,log_scale = (torch.from_numpy(a["scores"]).requires_grad_(),
                        torch.tensor(float(a["infonce_logit_scale"]), requires_grad=True))
    loss = infonce_loss(scores, log_scale.exp())
    loss.backward()
    np.testing.assert_allclose(loss.item(), a["infonce_loss"], rtol=1e-5)
    np.testing.assert_allclose(scores.grad, a["infonce_grad_scores"], atol=1e-6)
    np.testing.assert_allclose(log_scale.grad, a["infonce_grad_logit_scale"], rtol=1e-5)
    for kind in ("maxviol", "sum"):
        np.testing.assert_allclose(
            triplet_loss(scores.detach(), max_violation=kind == "maxviol"), a[f"triplet_{kind}_loss"], rtol=1e-5)


strings = json.loads((v2/"expected"/"clip_label_strings.json").read_text())

@pytest.mark.parametrize("case", strings["single_class_cases"])
def test_sentence_of_one_class(case):
    name,_,count = case.rpartition(" x")
    assert tag_sentences([name]*int(count), aggregate=True, published=True) == strings["single_class_cases"][case]


@pytest.mark.parametrize("key", strings["per_image"])
def test_sentences_of_an_image(key):
    "Exact in order without aggregation; with it as sets, since the authors' code takes the order from one."
    source,aggregation = key.split("/")
    regions = merged(f"train/{source}", "published")[0]
    for i,want in strings["per_image"][key].items():
        most = max(len(o) for o in strings["per_image"][key].values())
        found = tag_sentences(regions.tags(i), aggregation == "labels", published=True)
        if aggregation == "labels": assert found[0] == want[0] and set(found) == set(want) and len(found) == len(want)
        else: assert found[:len(want)] == want and len(want) == min(len(found), most)


with np.load(v2/"expected"/"forward.npz") as f: forward = {k: f[k] for k in f.files}
combinations = list(dict.fromkeys(k.split("/")[0] for k in forward))
SOURCE = {"fast": "fast", "det": "det", "detpadded": "det_padded", "detfast": "det+fast",
          "detfastlabels": "det+fast_labels"}


@cache
def model(): return AladinModel.from_original(v2/"checkpoint.pth.tar", v2/"oscar_ckpt")


def model_of(name):
    "The recorded model; `det` has a region projection of its own width."
    if f"{name}/img_embedding_weight" not in forward: return model()
    config = copy.deepcopy(model().config)
    config.region_dim,config.detic_dim = forward[f"{name}/img_embedding_weight"].shape[1],0
    other = AladinModel(config).eval()
    weights = {k: v for k,v in model().state_dict().items() if "detic_embedding" not in k}
    other.load_state_dict(weights
                          | {f"backbone.img_embedding.{p}": torch.from_numpy(forward[f"{name}/img_embedding_{p}"])
                             for p in ("weight", "bias")})
    return other


def inputs(name):
    """The batch of a combination: tags or CLIP's vectors of them, regions as the published merge gives them, captions
    or CLIP's vectors of them."""
    a = lambda key: forward.get(f"{name}/{key}")
    source = SOURCE[name.split("_")[0]]
    regions = merged(f"train/{source}", "published")[0]
    mask,most = a("img_attention_mask"),a("img_segment_ids").shape[1]
    tag_lengths,region_lengths = torch.from_numpy(mask[:, :most].sum(1)),torch.from_numpy(mask[:, most:].sum(1))
    cut = lambda values, lengths: Ragged.stack([torch.from_numpy(v[:n]) for v,n in zip(values, lengths)])
    tags = cut(a("clip_label_global") if a("clip_label_global") is not None else a("img_input_ids").astype(np.int64),
               tag_lengths)
    per_image = 5  # captions of an image, in the order of the data set
    ids = [regions.ids[i//per_image] for i in a("index")]
    vectors = cut([regions.features(i) for i in ids], region_lengths)
    captions = cut(
        a("clip_caption_local") if a("clip_caption_local") is not None else a("cap_input_ids").astype(np.int64),
        torch.from_numpy(a("cap_len")))
    return ImageBatch(tags, vectors),captions


@pytest.mark.parametrize("name", combinations)
@torch.no_grad()
def test_forward(name):
    "Embeddings, sets and hidden states of every combination of detections, tags and captions."
    m,(images,captions) = model_of(name),inputs(name)
    a = lambda key: torch.from_numpy(forward[f"{name}/{key}"])
    left,right = m.encode_image_batch(images),m.encode_caption_batch(captions)
    np.testing.assert_allclose(left.matching, a("img_emb"), atol=1e-5)
    np.testing.assert_allclose(right.matching, a("cap_emb"), atol=1e-5)
    for hidden,key,drop in (
            (m.backbone.encode_captions(captions), "txt_last_hidden", 0),
            (Ragged(m.backbone.regions_of(m.backbone.encode_images(images), images).values, images.regions.lengths),
             "img_last_hidden", a("img_segment_ids").shape[1])):
        for i in range(len(hidden)):
            np.testing.assert_allclose(hidden[i], a(key)[i, drop:drop + hidden.lengths[i]], atol=1e-5)
    for i,n in enumerate(images.regions.lengths):
        np.testing.assert_allclose(
            left.sets[i], torch.nn.functional.normalize(a("img_set")[:n, i], dim=1)[1:], atol=1e-5)


with np.load(v2/"expected"/"train_step.npz") as f: steps = {k: f[k] for k in f.files}

@pytest.mark.parametrize("name, terms", [k.split("/")[:2] for k in steps if k.endswith("/total")])
def test_training_step(name, terms):
    "Losses and every parameter's gradient norm, dropout off."
    m = copy.deepcopy(model_of(name)).train()
    for o in m.modules():
        if isinstance(o, torch.nn.Dropout): o.p = 0.0
        if isinstance(o, torch.nn.MultiheadAttention): o.dropout = 0.0
    m.config.attention_probs_dropout_prob = 0.0
    images,captions = inputs(name)
    left,right = m.encode_image_batch(images),m.encode_caption_batch(captions)
    terms_list = terms.split("-")
    total,losses = Criterion(LossSettings(terms=terms_list, weights=[1.0]*len(terms_list)))(
        m.alignment(left.sets, right.sets), left.matching, right.matching)
    a = lambda key: steps[f"{name}/{terms}/{key}"]
    np.testing.assert_allclose(total.item(), a("total"), rtol=1e-5)
    for t in terms_list: np.testing.assert_allclose(losses[t].item(), a(f"loss_{t}"), rtol=1e-5)
    total.backward()
    ours,names = dict(m.named_parameters()),json.loads((v2/"expected"/"param_names.json").read_text())
    compared = 0
    for theirs,norm in zip(names, a("grad_norms"), strict=True):
        p = ours.get(original_name(theirs))
        if p is None or p.grad is None: assert np.isnan(norm) or norm < 1e-6, theirs
        elif norm > 1e-6: np.testing.assert_allclose(p.grad.norm(), norm, rtol=1e-4, err_msg=theirs); compared += 1
    assert compared > 20


def subset_tokenizer():
    """The entries of CLIP's vocabulary that the strings of the committed set need, with CLIP's numbers; the whole one
    is not ours to publish.

    Their merges were made so that these pieces come out, and how a split word is spelt in pieces is a guess: the
    numbers are what is compared."""
    subset = json.loads((Path(__file__).parent/"golden"/"v2"/"clip_subset.json").read_text())
    return CLIPTokenizer(vocab=subset["vocab"], merges=[tuple(m.split(" ")) for m in subset["merges"]])


class LearnedTokenizer:
    """CLIP's normalisation and division into words, with each word's numbers read off a recorded set; for sets whose
    words are not in the subset.

    Each word has one or more numbers, the same in every text; any division of the texts that is consistent will do."""
    def __init__(self, rows):
        base = subset_tokenizer()
        self.bos_token_id, self.eos_token_id, self._backend = (
            base.bos_token_id, base.eos_token_id, base.backend_tokenizer)
        different = {(tuple(self.words(self.cleaned(text))), tuple(ids)) for text, ids in rows}
        self.numbers = self.solved(sorted(different, key=lambda o: (len(o[1]) - len(o[0]), len(o[0]), o)), {})
        assert self.numbers, "no word has the same numbers in every text"

    def solved(self, rows, numbers):
        "The numbers of all words, by trying the divisions of one text after the other; None where none is consistent."
        if not rows: return numbers
        return next((found for more in self.divided(*rows[0], numbers) if (found := self.solved(rows[1:], more))), None)

    def divided(self, words, ids, numbers):
        "Each way to divide the numbers of a text among its words, as `numbers` with those of its words."
        if not words: yield from [] if ids else [numbers]
        elif words[0] in numbers:
            known = numbers[words[0]]
            if ids[:len(known)] == known: yield from self.divided(words[1:], ids[len(known):], numbers)
        else:
            for n in range(1, len(ids) - len(words) + 2):
                yield from self.divided(words[1:], ids[n:], numbers | {words[0]: ids[:n]})

    def cleaned(self, text):
        "The text as `clip_tokens` gives it to the tokenizer."
        class Spy:
            bos_token_id = eos_token_id = 0
            def __call__(self, texts, **_):
                self.texts = texts
                return dict(input_ids=[[] for _ in texts])
        spy = Spy()
        clip_tokens(spy, [text])
        return spy.texts[0]

    def words(self, text):
        return [w for w, _ in self._backend.pre_tokenizer.pre_tokenize_str(
            self._backend.normalizer.normalize_str(text))]

    # a word of cut texts only has no known end
    def knows(self, text): return set(self.words(self.cleaned(text))) <= set(self.numbers)

    def __call__(self, texts, add_special_tokens):
        return dict(input_ids=[[i for w in self.words(t) for i in self.numbers[w]] for t in texts])


def recorded_rows(end):
    "Every recorded text that was not cut, with its numbers between start and end."
    captions = json.loads((v2/"expected"/"clip_captions.json").read_text())["texts_given_to_clip_tokenize"]
    rows = [(captions[number], row) for number, row in zip(tokens["cap_ok_index"], tokens["cap_input_ids"])]
    for kind, key in TAGS:
        for image, some in zip(tokens[f"labels_{kind}_img_keys"], tokens[f"labels_{kind}_input_ids"]):
            rows += zip(strings["per_image"][key][str(image)], some)
    for text, row in rows:
        ids = row.tolist()
        if end in ids[:-1]: yield text, ids[1:ids.index(end)]


def tokenizer_of(kind):
    if kind == "learned": return LearnedTokenizer(recorded_rows(subset_tokenizer().eos_token_id))
    return (CLIPTokenizer.from_pretrained(os.environ["ALADIN_CLIP"]) if "ALADIN_CLIP" in os.environ
            else subset_tokenizer())


# The subset covers the committed set. ALADIN_CLIP names a folder with CLIP's own tokenizer, to be used instead.
TOKENIZERS = ["learned",
              *(["whole"] if "ALADIN_CLIP" in os.environ else [] if "ALADIN_GOLDEN" in os.environ else ["subset"])]
TAGS = [("noagg", "det+fast/None"), ("agg", "det+fast/labels")]
with np.load(v2/"expected"/"clip_tokens.npz") as f: tokens = {k: f[k] for k in f.files}


@pytest.mark.parametrize("which", TOKENIZERS)
def test_clip_tokens_of_captions(which):
    "Exact: the first words, cleaned, between start and end, the end kept at 77; and how many of them count."
    captions = json.loads((v2/"expected"/"clip_captions.json").read_text())
    most = int(tokens["cap_len"].max())
    tokenizer, compared = tokenizer_of(which), 0
    for row, number in enumerate(tokens["cap_ok_index"]):
        if which == "learned" and not tokenizer.knows(captions["captions"][number]): continue
        want = tokens["cap_input_ids"][row]
        found = clip_tokens(tokenizer, [captions["captions"][number]], want.shape[0], most - 2)[0]
        assert found.tolist() == want[:len(found)].tolist() and not want[len(found):].any()
        assert (min(len(found), most) == tokens["cap_len"][row] == tokens["cap_attention_mask"][row].sum()
                and not tokens["cap_segment_ids"][row].any())
        cut = clip_tokens(tokenizer, [captions["captions"][number]], most, most - 2)[0]
        # ours keeps the end token where the authors' code cuts it off
        assert len(cut) == tokens["cap_len"][row] and cut[-1] == tokenizer.eos_token_id
        compared += 1
    assert compared > 20
    # an error there, cut here
    for number in captions["errors"] if which != "learned" else ():
        assert len(clip_tokens(tokenizer, [captions["captions"][int(number)]], 77, most - 2)[0]) == 77


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("kind, key", TAGS)
def test_clip_tokens_of_tags(kind, key, which):
    "Exact: a sentence for each tag, the start first, as many as fit; masks and lengths."
    tokenizer, most = tokenizer_of(which), tokens[f"labels_{kind}_input_ids"].shape[1]
    for row, image in enumerate(tokens[f"labels_{kind}_img_keys"]):
        sentences = strings["per_image"][key][str(image)][:most]
        ids, length, regions = (tokens[f"labels_{kind}_{n}"][row] for n in ("input_ids", "label_len", "img_len"))
        assert len(sentences) == length
        for want, found in zip(ids, clip_tokens(tokenizer, sentences)):
            assert found.tolist() == want[:len(found)].tolist() and not want[len(found):].any()
        assert not ids[length:].any()
        mask = tokens[f"labels_{kind}_attention_mask"][row]
        assert mask[:length].all() and not mask[length:most].any() and mask[most:].sum() == regions
        assert tokens[f"labels_{kind}_segment_ids"][row][:length].tolist() == [0] + [1]*(length - 1)
