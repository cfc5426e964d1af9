"""Exact scoring: every aggregation against a double loop over pairs, gradients against the padded form, ranks against
sorting, memory."""

import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aladin.model.heads
from aladin.files import InputError
from aladin.data.ragged import Ragged
from aladin.evaluation.embeddings import Embeddings
from aladin.evaluation.scoring import score_matrix
from aladin.evaluation.metrics import image_to_text_ranks, retrieval_ranks, text_to_image_ranks
from aladin.evaluation.relevance import caption_relevance
from aladin.model.heads import aggregate, alignment_scores

aggregations = ["MrSw", "MrAVGw", "MwSr", "symm", "sum", "mean", "scan-sentences"]
lengths = lambda low, most: st.lists(st.integers(low, 7), min_size=1, max_size=most)
often = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def blocks(monkeypatch):
    "Sets the size of the scorer's blocks."
    def resize(cells, columns):
        monkeypatch.setattr(aladin.model.heads, "_CELLS", cells)
        monkeypatch.setattr(aladin.model.heads, "_COLUMNS", columns)
    return resize


def unit(sizes, generator, dim=6):
    return Ragged(F.normalize(torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64), dim=1),
                  torch.tensor(sizes))


def pair_score(regions, words, aggregation, clamp, width, longest):
    "One pair's score by loops, from the table in the notebook of the heads."
    if not len(regions) or not len(words): return 0.0
    floor = lambda cosines, clamped: max([c.item() for c in cosines] + [0.0]*clamped)
    cosines = regions @ words.T
    cut_regions,cut_words = (clamp == "always" or clamp == "batch" and n < w
                             for n,w in ((len(regions), width), (len(words), longest)))
    by_word,by_region = sum(floor(c, cut_regions) for c in cosines.T),sum(floor(c, cut_words) for c in cosines)
    if aggregation == "scan-sentences":
        positive = cosines.clamp(min=0)
        weights = (positive / positive.norm(dim=0, keepdim=True).clamp(min=1e-12)).softmax(1)
        return F.cosine_similarity(regions, weights @ words, dim=1).sum().item()
    return {"MrSw": by_word, "MrAVGw": by_word/len(words), "MwSr": by_region, "symm": by_word + by_region,
            "sum": cosines.sum().item(), "mean": cosines.sum().item()/(width*longest)}[aggregation]


@pytest.mark.parametrize("aggregation", aggregations)
@given(region_counts=lengths(0, 4), word_counts=lengths(0, 4), clamp=st.sampled_from(["batch", "always", "never"]),
       cells=st.integers(1, 400), columns=st.integers(1, 30), seed=st.integers(0, 999), more=st.integers(0, 3))
@often
def test_scores_by_definition(blocks, aggregation, region_counts, word_counts, clamp, cells, columns, seed, more):
    "Random ragged sets, empty ones too, and any block size."
    blocks(cells, columns)
    generator = torch.Generator().manual_seed(seed)
    regions,words = unit(region_counts, generator),unit(word_counts, generator)
    width,longest = max(1, *region_counts) + more,max(1, *word_counts)
    scores = alignment_scores(regions, words, aggregation, clamp, width)
    direct = [[pair_score(regions[i], words[c], aggregation, clamp, width, longest) for c in range(len(words))]
              for i in range(len(regions))]
    np.testing.assert_allclose(scores, direct, atol=1e-5, rtol=0)


@pytest.mark.parametrize("aggregation", ["MrSw", "MrAVGw", "MwSr", "symm", "sum", "mean"])
@given(region_counts=lengths(0, 5), word_counts=lengths(0, 5), clamp=st.sampled_from(["batch", "always"]),
       cells=st.integers(1, 300), columns=st.integers(1, 20), seed=st.integers(0, 999))
@often
def test_gradients_equal_the_padded_form(blocks, aggregation, region_counts, word_counts, clamp, cells, columns, seed):
    blocks(cells, columns)
    generator = torch.Generator().manual_seed(seed)
    sides = unit(region_counts, generator),unit(word_counts, generator)
    factors = torch.randn(len(region_counts), len(word_counts), generator=generator, dtype=torch.float64)
    def gradients(score):
        leaves = [Ragged(o.values.clone().requires_grad_(), o.lengths) for o in sides]
        (score(*leaves)*factors).sum().backward()
        return [o.values.grad for o in leaves]
    more = int(clamp == "always") # a column of padding on both sides cuts every maximum off at 0
    def padded(regions, words):
        shapes = [max(1, *o.lengths.tolist()) + more*(aggregation != "mean") for o in (regions, words)]
        return aggregate(torch.einsum("ird,cwd->icrw", regions.padded(shapes[0]), words.padded(shapes[1])),
                         regions.mask(shapes[0]), words.mask(shapes[1]), aggregation,
                         lengths=words.lengths.clamp(min=1))
    for ours,theirs in zip(gradients(lambda r, w: alignment_scores(r, w, aggregation, clamp)), gradients(padded)):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def sort_ranks(scores, owner):
    "Ranks by sorting a whole matrix, for scores without ties."
    i2t = [min(np.flatnonzero(owner[np.argsort(-row)] == i)) for i,row in enumerate(scores)]
    return np.array(i2t),np.array([np.flatnonzero(np.argsort(-column) == i)[0] for column,i in zip(scores.T, owner)])


@given(images=st.integers(2, 40), captions=st.integers(1, 4), seed=st.integers(0, 999),
       memory=st.sampled_from([1, 1e-4, 1e-5, 1e-7]), ties=st.booleans(),
       head=st.sampled_from(["alignment", "matching"]))
@settings(max_examples=60, deadline=None)
def test_ranks_from_tiles(images, captions, seed, memory, ties, head):
    """Any tile size, captions in any order: as by sorting where nothing ties, as by the definition on the whole matrix
    where much does."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(images).repeat_interleave(captions)[torch.randperm(images*captions, generator=generator)]
    sizes = lambda n: torch.randint(1, 6, (n,), generator=generator).tolist()
    side = lambda n: (torch.randn(n, 3, generator=generator).mul(1.5).round() if ties
                      else torch.randn(n, 8, generator=generator))
    counts = sizes(images),sizes(len(owner))
    e = Embeddings(side(images), side(len(owner)), Ragged(side(sum(counts[0])), torch.tensor(counts[0])),
                   Ragged(side(sum(counts[1])), torch.tensor(counts[1])), [str(i) for i in range(images)],
                   owner, clamp="never")
    scores = score_matrix(e, head, memory)
    found = retrieval_ranks(e, head, memory)
    for ours,whole in zip(found, (image_to_text_ranks(scores, owner), text_to_image_ranks(scores, owner))):
        np.testing.assert_array_equal(ours, whole)
    if not ties:
        for ours,by_sort in zip(found, sort_ranks(scores.numpy(), owner.numpy())):
            np.testing.assert_array_equal(ours, by_sort)


PEAK = """
import resource, sys, torch
import torch.nn.functional as F
from aladin.data.ragged import Ragged
from aladin.evaluation.embeddings import Embeddings
from aladin.evaluation.metrics import retrieval_ranks
torch.set_num_threads(1)
images,memory = int(sys.argv[1]),float(sys.argv[2])
unit = lambda n: F.normalize(torch.randn(n, 32), dim=1)
regions = Ragged(unit(4*images), torch.full((images,), 4))
words = Ragged(unit(15*images), torch.full((5*images,), 3))
ids, owners = [str(i) for i in range(images)], torch.arange(images).repeat_interleave(5)
e = Embeddings(unit(images), unit(5*images), regions, words, ids, owners)
few = Embeddings(e.image_matching[:8], e.caption_matching[:40], regions[:8], words[:40], ids[:8], owners[:40])
retrieval_ranks(few)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieval_ranks(e, memory=memory)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/2**10)
"""

def test_memory_of_ranks():
    "Peak memory beyond the embeddings stays within what was allowed and does not grow with the square of the images."
    peak = lambda images, memory: float(subprocess.run(
        [sys.executable, "-c", PEAK, str(images), str(memory)], capture_output=True, text=True, check=True).stdout)
    allowed = 64
    small,large = (peak(n, allowed/2**10) for n in (1000, 3000))
    print(f"{small:.0f} MiB beyond the embeddings at 1,000 images, {large:.0f} MiB at 3,000; allowed {allowed}")
    assert small < allowed and large < allowed  # the matrix of 3,000 x 15,000 alone has 172 MiB


def longest_common(a, b):
    "By the textbook's table."
    rows = [[0]*(len(b) + 1) for _ in range(len(a) + 1)]
    for i,x in enumerate(a):
        for j,y in enumerate(b): rows[i+1][j+1] = rows[i][j] + 1 if x == y else max(rows[i][j+1], rows[i+1][j])
    return rows[-1][-1]


@given(words=st.lists(st.lists(st.sampled_from("a dog runs on the red beach".split()), max_size=6),
                      min_size=1, max_size=8), first=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_rouge_by_definition(words, first):
    owner = np.minimum(np.arange(len(words))//first, 1)
    table = caption_relevance([" ".join(w) for w in words], owner)
    for image in range(owner[-1] + 1):
        references = [w for w,o in zip(words, owner) if o == image]
        for c,caption in enumerate(words):
            common = [longest_common(caption, r) for r in references]
            p,r = max(common)/max(1, len(caption)),max(n/max(1, len(o)) for n,o in zip(common, references))
            np.testing.assert_allclose(table[image, c], (1 + 1.44)*p*r/(r + 1.44*p) if p else 0, atol=1e-6)


def test_spice_says_what_it_needs_and_fills_the_table(monkeypatch):
    "A stand-in for pycocoevalcap scores a caption by the share of its words that any reference has."
    texts,owner = ["a red cup", "a cup", "two kites", "kites in the sky"],[0, 0, 1, 1]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", None)
    with pytest.raises(InputError, match="pip install pycocoevalcap"): caption_relevance(texts, owner, "spice")
    def compute_score(self, references, found):
        score = lambda i: len(set(found[i][0].split()) & set(" ".join(references[i]).split()))/len(found[i][0].split())
        return None,[dict(All=dict(f=score(i))) for i in sorted(found)]
    for name in ("pycocoevalcap", "pycocoevalcap.spice", "pycocoevalcap.spice.spice"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pycocoevalcap.spice.spice"].Spice = type("Spice", (), dict(compute_score=compute_score))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="Java"): caption_relevance(texts, owner, "spice")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    np.testing.assert_allclose(caption_relevance(texts, owner, "spice"), [[1, 1, 0, 0], [0, 0, 1, 1]])
