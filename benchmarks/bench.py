#!/usr/bin/env python3
"""Measure scoring, encoding, training, ranks, store reads and search against plain references, each pair in one
process; write results/benchmarks.md.

A reference is written from the formulas the way the original program works: padded, every image once for each of its
captions, query by query, sorted. Sizes are VinVL-base's: 768 wide, 12 layers, 34 regions, about 13 words. Weights and
vectors are random: only time and memory count. Where a reference would take too long it runs on a part of the work,
named in its row, and is scaled by it."""
import argparse
import base64
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from aladin.config import DataSettings
from aladin.files import read_json, write_json
from aladin.data.ragged import Ragged
from aladin.data.processor import AladinProcessor
from aladin.data.splits import RetrievalSet
from aladin.data.clip import ClipReader, clip_tokens, make_clip, tag_sentences
from aladin.data.boxes import box_iou
from aladin.data.pictures import open_picture
from aladin.data.selection import select_detections
from aladin.data.vinvl import VinvlConfig, VinvlDetector, VinvlImageProcessor
from aladin.evaluation.embeddings import Embeddings, encode_split
from aladin.evaluation.metrics import retrieval_ranks
from aladin.evaluation.entangled import EntangledScorer
from aladin.runs.record import provenance
from aladin.model.heads import alignment_scores
from aladin.training.losses import triplet_loss
from aladin.device import default_device
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel
from peers import PEERS

# What the original programs themselves took on one thread of such a machine, measured once: CPU seconds, of how many of
# our units
ORIGINALS = dict(scores_200=121.9, ranks_5000=11.5, store=1.39e-3, encoding=.294*300, step=28.6)
# the lengths of the authors' code in training, and of stored sets in evaluation
DIM,PAD_TEXT,PAD_REGIONS,PAD_SETS = 768,50,34,71


def timed(work, least=1.0, most=5):
    "Median seconds of one call after a first one, and the last result."
    out,seconds = work(),[]
    while len(seconds) < most and (not seconds or sum(seconds) < least):
        start = time.perf_counter()
        out = work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)),out


def once(work):
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start,out


def on_one_thread(work):
    "The time of a reference, measured as the authors' code was: seconds on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return once(work)
    finally: torch.set_num_threads(threads)


def flop(work):
    "Operations of the matrix products in one call, padding within its batches included."
    with FlopCounterMode(display=False) as counter: work()
    return counter.get_total_flops()


def peak_memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10  # MiB


def matmul_peak(dtype=torch.float32, device="cpu", n=4096):
    "FLOP/s of torch's own matrix product: the fastest of ten."
    a,b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    def product():
        c = a @ b
        if device == "cuda": torch.cuda.synchronize()
        return c
    product()
    return 2*n**3/min(once(product)[0] for _ in range(10))


def matmul_peaks(before=None):
    """For both kinds; with those found before some work, the better of each, because other tenants of a processor come
    and go."""
    return {k: max(matmul_peak(getattr(torch, k)), (before or {}).get(k, 0)) for k in ("float32", "bfloat16")}


def unit(*shape, generator): return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def ragged(count, low, high, generator, dim=DIM):
    lengths = torch.randint(low, high + 1, (count,), generator=generator)
    return Ragged(unit(int(lengths.sum()), dim, generator=generator), lengths)


def random_embeddings(images, seed=0):
    """A split of random vectors: 30 to 38 regions an image, five captions of 8 to 18 words each, near enough to their
    image to be found sometimes."""
    g = torch.Generator().manual_seed(seed)
    regions,words = ragged(images, 30, 38, g),ragged(5*images, 8, 18, g)
    owner = torch.arange(images).repeat_interleave(5)
    own = (regions.offsets[owner[words.owner]]
           + (torch.rand(len(words.values), generator=g)*regions.lengths[owner[words.owner]]).long())
    words.values = F.normalize(words.values + .12*regions.values[own], dim=-1)
    vectors = unit(images, DIM, generator=g)
    return Embeddings(vectors, F.normalize(vectors[owner] + 2.5*unit(5*images, DIM, generator=g), dim=-1), regions,
                      words, [str(i) for i in range(images)], owner)


def padded_ranks(e, queries, captions):
    """The reference: sets stored padded to 71; one image against all captions, one caption against all images, as one
    product of batched matrices, the query's set expanded to every candidate; cosines masked, maximum, sum, sorted."""
    regions,words = e.regions.padded(PAD_SETS),e.words.padded(PAD_SETS)
    region_mask,word_mask = e.regions.mask(PAD_SETS),e.words.mask(PAD_SETS)
    def scores(r, rm, w, wm):
        cosines = r @ w.transpose(1, 2)
        return cosines.masked_fill_(~(rm[:, :, None] & wm[:, None]), 0).max(1).values.sum(1)
    def search(n, score, own):
        order = np.argsort(-score(n).numpy())
        return min(np.flatnonzero(np.isin(order, own(n))))
    n,m = len(e.regions),len(e.words)
    seconds,found = [],[]
    for chosen,score,own in (
            (queries, lambda i: scores(regions[i].expand(m, -1, -1), region_mask[i].expand(m, -1), words, word_mask),
             lambda i: np.arange(5*i, 5*i + 5)),
            (captions, lambda c: scores(regions, region_mask, words[c].expand(n, -1, -1), word_mask[c].expand(n, -1)),
             lambda c: [c//5])):
        s,ranks = once(lambda: np.array([search(i, score, own) for i in chosen]))
        seconds.append(s)
        found.append(ranks)
    return seconds,found


def scoring(images, every):
    "Alignment scores and ranks of both directions; the reference takes every n-th query."
    e = random_embeddings(images)
    products = 2*DIM*len(e.regions.values)*len(e.words.values)
    peaks = matmul_peaks()
    before = peak_memory()
    ours,ranks = timed(lambda: retrieval_ranks(e), most=3) if products < 1e13 else once(lambda: retrieval_ranks(e))
    memory = peak_memory() - before
    short,rounded = (timed(lambda: retrieval_ranks(e, dtype=torch.bfloat16), most=3) if products < 1e13
                     else once(lambda: retrieval_ranks(e, dtype=torch.bfloat16)))
    peaks = matmul_peaks(peaks)
    queries = [np.arange(0, n, every) for n in (images, 5*images)]
    seconds,reference = padded_ranks(e, *queries)
    reference_seconds = sum(s*n/len(q) for s,q,n in zip(seconds, queries, (images, 5*images)))
    alone = dict(reference_one_thread=sum(on_one_thread(lambda: padded_ranks(e, *queries))[1][0])) if every == 1 else {}
    return dict(work=f"alignment head, {images:,} x {5*images:,}, ranks of both directions",
                reference=reference_seconds, **alone, part=f"1/{every} of the queries" if every > 1 else "all queries",
                ours=ours, ratio=reference_seconds/ours,
                equal=bool(all((a[q] == b).all() for a,b,q in zip(ranks, reference, queries))),
                share_of_peak=products/ours/peaks["float32"], extra_mib=memory,
                bfloat16=short, bfloat16_ratio=reference_seconds/short,
                bfloat16_share_of_peak=products/short/peaks["bfloat16"],
                bfloat16_ranks_changed=float(np.mean(np.concatenate([a != b for a,b in zip(ranks, rounded)]))),
                peak_gflops={k: v/1e9 for k,v in peaks.items()}, tflop=products/1e12)


def training_scores(batch):
    "Alignment scores of a batch with gradients, against the padded form."
    g = torch.Generator().manual_seed(0)
    sides = ragged(batch, 34, 34, g),ragged(batch, 8, 18, g)
    def step(score):
        leaves = [Ragged(o.values.clone().requires_grad_(), o.lengths) for o in sides]
        triplet_loss(score(*leaves)).backward()
        return [o.values.grad for o in leaves]
    def padded(regions, words):
        r,w = regions.padded(),words.padded()
        cosines = torch.einsum("ird,cwd->icrw", r, w).masked_fill(
            ~(regions.mask()[:, None, :, None] & words.mask()[None, :, None]), 0)
        return cosines.max(2).values.sum(2)
    before = peak_memory()
    ours,mine = timed(lambda: step(alignment_scores))
    memory = peak_memory() - before
    reference,theirs = timed(lambda: step(padded))
    return dict(work=f"alignment scores and gradients of a batch of {batch}", reference=reference, ours=ours,
                ratio=reference/ours, extra_mib=memory, reference_mib=peak_memory() - before,
                equal=all(torch.allclose(a, b, atol=1e-5) for a,b in zip(mine, theirs)))


class RandomRegions:
    "Region vectors of VinVL's width in memory, with about 12 words of tags an image."
    dim = 2054
    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        self.vectors = rng.standard_normal((64, 38, self.dim), dtype=np.float32)
        self.counts,self.words = rng.integers(30, 39, count),rng.integers(20, 40, count)
    def __contains__(self, i): return True
    def num_regions(self, i): return int(self.counts[int(i)])
    def features(self, i): return self.vectors[int(i) % 64, :self.num_regions(i)]
    def tags(self, i): return ["thing"]*int(self.words[int(i)])


def random_split(images, seed=0):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/"vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] word thing".split()))
        captions = {str(i): [" ".join(["word"]*int(n)) for n in rng.integers(8, 19, 5)] for i in range(images)}
        return RetrievalSet(RandomRegions(images, seed), captions, AladinProcessor.from_pretrained(
            d, DataSettings(max_tokens=PAD_TEXT, max_tags=PAD_TEXT, max_regions=PAD_REGIONS)))


def base_model():
    return AladinModel(AladinConfig(vocab_size=30522, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                    head_dropout=0.0))


def padded_encoding(model, tokens, regions):
    "Hidden states as the authors' code computes them: text padded to 50, regions to 34, a mask of -10000."
    b,text = model.backbone,Ragged.stack(tokens)
    ids,mask = text.padded(PAD_TEXT),text.mask(PAD_TEXT)
    hidden = b.embeddings(ids, token_type_ids=torch.zeros_like(ids))
    if regions is not None:
        vectors = Ragged.stack(regions)
        hidden = torch.cat([hidden, b.LayerNorm(b.img_embedding(vectors.padded(PAD_REGIONS)))], 1)
        mask = torch.cat([mask, vectors.mask(PAD_REGIONS)], 1)
    hidden = b.encoder(hidden, attention_mask=(1.0 - mask[:, None, None].float())*-10000.0).last_hidden_state
    start = PAD_TEXT if regions is not None else 0
    return Ragged(hidden[:, start:][mask[:, start:]], mask[:, start:].sum(1))


def padded_pairs(model, data, captions):
    "Both sides of some captions, the image encoded again for each."
    images = data.caption_image[captions]
    fine = padded_encoding(model, [data.tag_tokens[i] for i in images],
                           [data.regions.features(data.image_ids[i])[:PAD_REGIONS] for i in images])
    words = padded_encoding(model, [data.caption_tokens[c] for c in captions], None)
    return model.alignment.region_set(fine),model.alignment.word_set(words),model.matching(fine),model.matching(words)


def encoding(images, part):
    "All images and captions of a split; the reference encodes a part of the captions with their images."
    model,data = base_model().eval(),random_split(images)
    with torch.no_grad():
        padded_pairs(model, data, np.arange(2))
        def padded(): return [padded_pairs(model, data, np.arange(i, i + 10)) for i in range(0, part, 10)]
        reference,alone = (f(padded)[0]*len(data)/part for f in (once, on_one_thread))
    peaks,operations = matmul_peaks(),flop(lambda: encode_split(model, data, progress=False))
    ours,e = once(lambda: encode_split(model, data, progress=False))
    short,rounded = once(lambda: encode_split(model, data, progress=False, autocast=torch.bfloat16))
    peaks = matmul_peaks(peaks)
    return dict(work=f"encoding {images} images with {len(data)} captions", reference=reference,
                reference_one_thread=alone, part=f"{part} pairs", ours=ours, ratio=reference/ours,
                seconds_a_pair=ours/len(data),
                share_of_peak=operations/ours/peaks["float32"],
                bfloat16_share_of_peak=operations/short/peaks["bfloat16"],
                peak_gflops={k: v/1e9 for k,v in peaks.items()}, tflop=operations/1e12,
                bfloat16=short, bfloat16_ratio=reference/short,
                bfloat16_deviation=(e.image_matching - rounded.image_matching).abs().max().item())


def training_step(batch, how):
    """One step of the joint configuration's forward and backward pass; memory is this process's peak, so reference and
    ours run apart."""
    from aladin.training.losses import listnet_loss
    model,data = base_model().train(),random_split(batch)
    rows = np.arange(0, 5*batch, 5)
    def ours():
        images,words = (model.encode_image_batch(data.image_batch(np.arange(batch))),
                        model.encode_caption_batch(data.caption_batch(rows)))
        return alignment_scores(images.sets, words.sets),images.matching @ words.matching.T
    def padded():
        r,w,i,c = padded_pairs(model, data, rows)
        regions,words = r.padded(PAD_SETS),w.padded(PAD_SETS)
        cosines = regions[:, None].expand(-1, batch, -1, -1) @ words[None].expand(batch, -1, -1, -1).transpose(2, 3)
        return cosines.masked_fill(
            ~(r.mask(PAD_SETS)[:, None, :, None] & w.mask(PAD_SETS)[None, :, None]), 0).max(2).values.sum(2),i @ c.T
    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "bfloat16"):
            alignment,matching = (padded if how == "padded" else ours)()
        (triplet_loss(alignment.float()) + listnet_loss(alignment.float().detach(), matching.float())).backward()
        model.zero_grad()
    before = peak_memory()
    seconds,_ = timed(step, least=20, most=3)
    memory = peak_memory() - before
    return dict(seconds=seconds, extra_mib=memory, **(
        dict(one_thread=on_one_thread(step)[0]) if how == "padded" else dict(
            share_of_peak=flop(step)/seconds/matmul_peak(torch.bfloat16 if how == "bfloat16" else torch.float32))))


def matching_ranks(images):
    "Ranks of the matching head from vectors, against sorting every query's scores."
    e = random_embeddings(8)
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(5)
    e.image_matching = unit(images, DIM, generator=g)
    e.caption_matching = F.normalize(e.image_matching[owner] + 2.5*unit(5*images, DIM, generator=g), dim=-1)
    e.image_ids,e.caption_image = [str(i) for i in range(images)],owner
    before = peak_memory()
    ours,ranks = timed(lambda: retrieval_ranks(e, "matching"))
    memory = peak_memory() - before
    def sort():
        scores = (e.image_matching @ e.caption_matching.T).numpy()
        i2t = np.array([np.flatnonzero(np.argsort(row)[::-1]//5 == i)[0] for i,row in enumerate(scores)])
        return i2t,np.array([np.flatnonzero(np.argsort(column)[::-1] == c//5)[0] for c,column in enumerate(scores.T)])
    reference,theirs = once(sort)
    return dict(work=f"ranks of the matching head, {images:,} x {5*images:,}", reference=reference, ours=ours,
                ratio=reference/ours, extra_mib=memory, reference_mib=peak_memory() - before,
                equal=bool(all((a == b).all() for a,b in zip(ranks, theirs))))


def entangled(images, part):
    """One query over many images: the cross-encoder against a product of vectors, and against that with the best
    hundred scored by the alignment head."""
    model,data = base_model().eval(),random_split(images)
    scorer = EntangledScorer(model, data)
    seconds,_ = once(lambda: scorer.scores(np.zeros(part, dtype=int), np.arange(part)))
    reference = seconds*images/part
    g = torch.Generator().manual_seed(0)
    vectors,sets,caption = unit(images, DIM, generator=g),ragged(images, 30, 38, g),data.caption_batch([0])
    def encode(alignment):
        with torch.no_grad(): return model.encode_caption_batch(caption, alignment=alignment)
    def matching(): return (vectors @ encode(False).matching[0]).topk(10)
    def two_stage():
        query = encode(True)
        best = (vectors @ query.matching[0]).topk(100).indices
        return alignment_scores(sets[best], query.sets, clamp="always")[:, 0].topk(10)
    def whole():
        return alignment_scores(sets, encode(True).sets, clamp="always")[:, 0].topk(10)
    times = {f.__name__: timed(f, least=2, most=50)[0] for f in (matching, two_stage, whole)}
    return dict(work=f"one query over {images:,} images, its caption encoded", reference=reference,
                part=f"{part} images", ours=times["matching"], ratio=reference/times["matching"],
                two_stage=times["two_stage"], two_stage_ratio=reference/times["two_stage"],
                alignment=times["whole"], alignment_ratio=reference/times["whole"])


def caption_and_sets(images, dim):
    "One caption of 14 tokens, the regions of some images, and their scores by the definition, padded."
    g = torch.Generator().manual_seed(0)
    sets,words = ragged(images, 30, 38, g, dim),ragged(1, 14, 14, g, dim)
    padded,mask = sets.padded(),sets.mask()
    return sets,words,lambda: (padded @ words.values.T).masked_fill_(~mask[:, :, None], -1).amax(1).sum(1)


def peer(name, images, dim, threads):
    "Seconds of another package, and how far its scores are off; nothing where it is not installed."
    torch.set_num_threads(threads)
    sets,words,reference = caption_and_sets(images, dim)
    try: work = PEERS[name](sets, words)
    except ImportError: return {}
    seconds,found = timed(work)
    return dict(seconds=seconds, difference=float((found.float() - reference()).abs().nan_to_num(torch.inf).max()))


def all_peers(images, dim):
    "The packages that are installed, each in a process of its own, which may crash."
    found = {}
    for name in PEERS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try: found[name] = pool.submit(peer, name, images, dim, torch.get_num_threads()).result()
            except BrokenProcessPool: found[name] = dict(crashed=True)
    return {name: row for name,row in found.items() if row}


def one_caption(images, dim):
    """The alignment head's scores of one caption with many images: padded, ours, and other packages where they are
    installed."""
    sets,words,reference = caption_and_sets(images, dim)
    def ours(): return alignment_scores(sets, words, clamp="never")[:, 0]
    def product():
        return min(timed(lambda: sets.values @ words.values.T)[0], timed(lambda: words.values @ sets.values.T)[0])
    before,(seconds,scores),(theirs,expected) = product(),timed(ours, most=20),timed(reference)
    peers,fastest = all_peers(images, dim),min(before, product())
    for row in peers.values():
        if "seconds" in row: row["share_of_product"] = fastest/row["seconds"]
    return dict(work=f"one caption against {images:,} images, {dim} numbers a vector", reference=theirs, ours=seconds,
                ratio=theirs/seconds, equal=bool((scores - expected).abs().max() < 1e-4),
                product=fastest, share_of_product=fastest/seconds, peers=peers)


def clip_tags(images, part):
    """One epoch's tags as CLIP reads them, 36 an image of 1,600 names, common ones more often; the reference reads each
    image's again, a batch of images at a time, as the authors' code does."""
    rng = np.random.default_rng(0)
    often = 1/np.arange(1, 1601)
    tags = [[f"thing {i}" for i in row] for row in rng.choice(1600, (images, 36), p=often/often.sum())]
    with tempfile.TemporaryDirectory() as d:
        make_clip(Path(d)/"clip", [t for o in tags for t in o], dim=512, layers=12)
        reader = ClipReader(Path(d)/"clip", Path(d)/"kept")
        ours,_ = once(lambda: reader.tags(tags))
        different,again = reader.texts_read,once(lambda: reader.tags(tags))[0]
        reference,_ = once(lambda: reader._read(clip_tokens(
            reader.tokenizer, [t for o in tags[:part] for t in tag_sentences(o)])))
    reference *= images/part
    return dict(work=f"tags of {images:,} images through CLIP, 512 wide, 12 layers", reference=reference,
                part=f"{part} images", ours=ours, ratio=reference/ours, later_epochs=again, different=different,
                sentences=images*37)


def store_reads(images):
    "Regions of an image at random from the store, as a view and as a copy into a batch, against decoding the TSV row."
    from region_store import measure
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as d:
        rows,boxes = dict(features=[], predictions=[]),[dict(rect=[0, 0, 9, 9], conf=.5, **{"class": "thing"})]*50
        for i in range(images):
            rows["features"].append(
                f"{i}\t50\t{base64.b64encode(rng.standard_normal((50, 2054), dtype=np.float32).tobytes()).decode()}\n")
            rows["predictions"].append(f"{i}\t" + json.dumps(dict(objects=boxes)) + "\n")
        for name,lines in rows.items():
            (Path(d)/f"{name}.tsv").write_text("".join(lines))
            (Path(d)/f"{name}.lineidx").write_text("".join(f"{o}\n" for o in np.cumsum([0, *map(len, lines[:-1])])))
        (Path(d)/"imageid2idx.json").write_text(json.dumps({str(i): i for i in range(images)}))
        m = measure(argparse.Namespace(data=Path(d), dtype="float32", reads=1000, seed=0, scratch=Path(d), json=True))
    return dict(work="one image's regions from disk, 50 x 2054", reference=m["tsv_read_seconds"],
                ours=m["store_read_seconds"], ratio=m["ratio"], copy_ratio=m["fill_ratio"])


_IMPORT = """import json, sys, time
from aladin.data.importing import import_data
start = time.perf_counter()
about = import_data([sys.argv[1]], sys.argv[2], progress=False, report=lambda line: None)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])/2**10  # ru_maxrss begins with the parent's
print(json.dumps(dict(seconds=time.perf_counter() - start, peak_mib=peak, regions=about["regions"])))"""


def importing(images):
    """aladin import of SCAN's layout, 36 regions of 2,048 float32, against a copy of the file; both until it is on
    disk, the source in memory."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source = Path(folder)/"precomp"
        source.mkdir()
        rng = np.random.default_rng(0)
        vectors = np.lib.format.open_memmap(source/"train_ims.npy", "w+", np.float32, (images, 36, 2048))
        for i in range(images): rng.random(out=vectors[i], dtype=np.float32)
        del vectors
        (source/"train_ids.txt").write_text("".join(f"{i}\n" for i in range(images)))
        (source/"train_caps.txt").write_text(
            "".join(f"caption {k} of image {i}\n" for i in range(images) for k in range(5)))
        os.sync()
        def copy():
            shutil.copyfile(source/"train_ims.npy", Path(folder)/"copy.npy")
            with open(Path(folder)/"copy.npy", "rb") as f: os.fsync(f.fileno())
        copy()  # the source is then in memory
        seconds, _ = once(copy)
        out = subprocess.run([sys.executable, "-c", _IMPORT, str(source), str(Path(folder)/"data")],
                             stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    megabytes = images*36*2048*4/1e6
    return dict(work=f"import of {images:,} images in SCAN's layout, {megabytes/1000:.1f} GB", reference=seconds,
                ours=found["seconds"], ratio=seconds/found["seconds"],
                megabytes_a_second=megabytes/found["seconds"], peak_mib=found["peak_mib"])


def sampled(features, box, cells=14, scale=1/16):
    "ROIAlign of one box from its definition: the mean of bilinear samples, as many a cell as it has map cells."
    height,width = features.shape[2:]
    def axis(low, high, extent):
        length = max((high - low)*scale, 1.)
        points = int(np.ceil(length/cells))
        at = low*scale + (torch.arange(cells*points) + .5)*length/(cells*points)
        return at.clamp(0, extent - 1),points
    x1,y1,x2,y2 = box.tolist()
    (y,across),(x,along) = axis(y1, y2, height),axis(x1, x2, width)
    grid = torch.stack(torch.meshgrid(x/(width - 1)*2 - 1, y/(height - 1)*2 - 1, indexing="xy"), -1)[None]
    return F.avg_pool2d(F.grid_sample(features, grid, align_corners=True), (across, along))


def plain_detection(model, pixels, size):
    "One picture from the definition: norms apart, one box at a time, attributes from boxes pooled again."
    features,head,layer4 = (model.backbone["body"](pixels), model.roi_heads["box"]["predictor"],
                            model.roi_heads["box"]["feature_extractor"]["head"]["layer4"])
    def pooled(boxes): return torch.cat([layer4(sampled(features, box)).mean((2, 3)) for box in boxes])
    proposals = model.propose(features, size)
    vectors = pooled(proposals)
    found = select_detections(head["cls_score"](vectors), None, proposals, size)
    return found,model.attributes_of(pooled(found.boxes), found.labels)


def full_detector(seed=0):
    "VinVL's detector at its published size, with random weights."
    torch.manual_seed(seed)
    return VinvlDetector(VinvlConfig(class_names=[str(i) for i in range(1594)],
                                     attribute_names=[str(i) for i in range(524)])).eval()


def found_again(ours, theirs):
    "Share of some boxes that have one of the others at an intersection over union of at least 0.9."
    return (box_iou(ours.boxes, theirs.boxes).max(1).values >= .9).float().mean().item()


@torch.no_grad()
def detector(width=640, height=480):
    "Regions of one photograph, from the JPEG to the detections, against the same from the definition."
    with tempfile.TemporaryDirectory() as d:
        small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(Path(d)/"photo.jpg")
        processor = VinvlImageProcessor()
        def inputs(): return processor([open_picture(Path(d)/"photo.jpg")])
        model = full_detector()
        def plain(): pixels,sizes = inputs(); return plain_detection(model, pixels, sizes[0])
        first,(size,) = processor([small.resize((64, 48))])
        plain_detection(model, first, size)
        reference,(expected,_) = once(plain)
        model,rows,found = model.for_inference(),{},{}
        peaks = matmul_peaks()
        def whole(): return model.detect(*inputs())[0]
        operations = flop(whole)
        rows["float32"],found["float32"] = timed(whole, least=20, most=3)
        memory = peak_memory()
        pixels,sizes = inputs()
        def of_proposals(model, dtype): # the same boxes, so that the features can be compared
            return model.pooled(model.backbone["body"](pixels.to(dtype)), boxes)
        boxes = model.propose(model.backbone["body"](pixels), sizes[0])
        exact = of_proposals(model, torch.float32)
        model = full_detector().for_inference(torch.bfloat16)
        rows["bfloat16"],found["bfloat16"] = timed(whole, least=20, most=3)
        rounded = of_proposals(model, torch.bfloat16)
        peaks = matmul_peaks(peaks)
    return dict(work=f"VinVL's detector on a photograph of {width} x {height}", reference=reference,
                ours=rows["float32"], ratio=reference/rows["float32"],
                share_of_peak=operations/rows["float32"]/peaks["float32"],
                bfloat16=rows["bfloat16"], bfloat16_ratio=reference/rows["bfloat16"],
                bfloat16_share_of_peak=operations/rows["bfloat16"]/peaks["bfloat16"],
                tflop=operations/1e12, process_mib=memory, peak_gflops={k: v/1e9 for k,v in peaks.items()},
                detections=len(expected.boxes),
                equal=bool(len(expected.boxes) == len(found["float32"].boxes)
                           and found_again(found["float32"], expected) == 1),
                bfloat16_boxes=found_again(found["bfloat16"], found["float32"]),
                bfloat16_features=((rounded - exact).norm()/exact.norm()).item())


@torch.no_grad()
def detector_gpu():
    "The same on a GPU, eight pictures of one size a batch, without reading them."
    if not torch.cuda.is_available(): return dict(work="detector on a GPU", note="no GPU here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    out = dict(work="VinVL's detector on 8 pictures of 800 x 600, on the GPU", gpu=torch.cuda.get_device_name())
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        pixels = torch.randn(8, 3, 600, 800, device="cuda")*50
        def whole(model=full_detector().for_inference(dtype).to("cuda")):
            model.detect(pixels, [(800, 600)]*8)
            torch.cuda.synchronize()
        seconds,_ = timed(whole, least=5, most=5)
        out |= {name: seconds, f"{name}_share_of_peak": flop(whole)/seconds/matmul_peak(dtype, "cuda", 8192)}
    return out


def gpu():
    "Full evaluation at COCO's size on a GPU."
    if not torch.cuda.is_available(): return dict(work="GPU", note="no GPU here")
    torch.backends.cuda.matmul.allow_tf32 = False
    default_device()  # sets the GPU up as `aladin evaluate` does
    e = random_embeddings(5000).to("cuda")
    products,out = (2*DIM*len(e.regions.values)*len(e.words.values),
                    dict(work="alignment head, 5,000 x 25,000, on the GPU", gpu=torch.cuda.get_device_name()))
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        seconds,_ = timed(lambda: retrieval_ranks(e, dtype=dtype), least=5, most=3)
        out |= {name: seconds, f"{name}_share_of_peak": products/seconds/matmul_peak(dtype, "cuda", 8192)}
    return out


SECTIONS = dict(scores_200=lambda: scoring(200, 1),
                scores_1000=lambda: scoring(1000, 50),
                ranks_5000=lambda: matching_ranks(5000),
                batch_32=lambda: training_scores(32),
                batch_256=lambda: training_scores(256),
                store=lambda: store_reads(300),
                importing=lambda: importing(4000),
                encoding=lambda: encoding(60, 60),
                entangled=lambda: entangled(1000, 64),
                caption_128=lambda: one_caption(10000, 128),
                caption_768=lambda: one_caption(3000, 768),
                clip_tags=lambda: clip_tags(1000, 32),
                step_padded=lambda: training_step(32, "padded"),
                step=lambda: training_step(32, "float32"),
                step_bfloat16=lambda: training_step(32, "bfloat16"),
                detector=detector,
                gpu=gpu,
                detector_gpu=detector_gpu)
# Flickr30k has 29,000 training images
LONG = dict(scores_5000=lambda: scoring(5000, 2500), importing_29000=lambda: importing(29000))


def run_section(name, threads):
    out = subprocess.run([sys.executable, __file__, "--section", name, "--threads", str(threads)],
                         stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def seconds_text(s):
    return (f"{s:.0f} s" if s >= 100 else f"{s:.2f} s" if s >= 1 else f"{s*1000:.2f} ms" if s >= 1e-3
            else f"{s*1e6:.1f} µs")


def against_one_thread(row):
    """The same ratios with one thread for the reference, as the times of the authors' code were measured, and ours on
    all of them."""
    alone = {"the reference on one thread": row.get("reference_one_thread"),
             "the authors' code on one thread": row.get("originals")}
    return "; ".join(
        f"{name} {seconds_text(s)}: {s/row['ours']:.0f} times ours"
        + (f", {s/row['bfloat16']:.0f} times ours in bfloat16" if "bfloat16" in row else "")
        for name,s in alone.items() if s)


def against_peers(row):
    "The times of other packages, and whether their scores are those of the definition."
    def text(name, p):
        if "crashed" in p: return f"{name} crashed"
        same = "same scores" if p["difference"] < 1e-3 else f"scores off by up to {p['difference']:.2g}"
        return f"{name} {seconds_text(p['seconds'])}, {100*p['share_of_product']:.0f} % of the product's speed, {same}"
    return "; ".join(text(name, p) for name,p in row.get("peers", {}).items())


def markdown(rows, made):
    "The table with what a reader needs beside it."
    m = made["machine"]
    lines = ["# Benchmarks", "",
             f"Made by `make bench`, last on {made['date']}: {m['processor']}, {m['cores']} cores, "
             f"torch {made['versions']['torch']}.",
             "Ratios are of times within one run; references are described in benchmarks/bench.py. A row names the "
             "commit it was measured at.", "",
             "| work | reference | ours | times faster | bfloat16 | times faster | more | commit |",
             "|---|---:|---:|---:|---:|---:|---|---|"]
    for r in rows:
        if "reference" not in r: continue
        more = [f"copied into a batch {r['copy_ratio']:.0f} times faster" if "copy_ratio" in r else "",
                f"{r['share_of_peak']*100:.0f} % of the matrix product's peak" if "share_of_peak" in r else "",
                f"{r['bfloat16_share_of_peak']*100:.0f} % of it in bfloat16" if "bfloat16_share_of_peak" in r else "",
                f"same results: {'yes' if r['equal'] else 'NO'}" if "equal" in r else "",
                f"{r['process_mib']:,.0f} MiB in all" if "process_mib" in r else "",
                (f"in bfloat16 {100*r['bfloat16_boxes']:.0f} % of the boxes, "
                 f"features off by {100*r['bfloat16_features']:.1f} %") if "bfloat16_boxes" in r else "",
                f"{r['extra_mib']:.0f} MiB beyond the inputs" if "extra_mib" in r else "",
                (f"{r['megabytes_a_second']:.0f} MB/s, at most {r['peak_mib']:.0f} MiB of memory; "
                 "the reference is a copy of the file") if "megabytes_a_second" in r else "",
                f"reference {r['reference_mib']:.0f} MiB" if "reference_mib" in r else "",
                f"bfloat16 changes {100*r['bfloat16_ranks_changed']:.1f} % of the ranks"
                if "bfloat16_ranks_changed" in r else "",
                f"{r['seconds_a_pair']:.3f} s a pair" if "seconds_a_pair" in r else "",
                (f"two-stage {r['two_stage_ratio']:.0f} times, "
                 f"alignment head on all {r['alignment_ratio']:.0f} times faster") if "two_stage_ratio" in r else "",
                f"reference on {r['part']}" if "part" in r else "",
                (f"{r['different']:,} different sentences of {r['sentences']:,}; "
                 f"{seconds_text(r['later_epochs'])} in later epochs") if "later_epochs" in r else "",
                against_one_thread(r),
                f"{100*r['share_of_product']:.0f} % of the matrix product's speed" if "share_of_product" in r else "",
                against_peers(r)]
        lines.append(f"| {r['work']} | {seconds_text(r['reference'])} | {seconds_text(r['ours'])} | {r['ratio']:.1f} | "
                     f"{seconds_text(r['bfloat16']) if 'bfloat16' in r else ''} | "
                     f"{format(r['bfloat16_ratio'], '.1f') if 'bfloat16_ratio' in r else ''} | "
                     f"{'; '.join(o for o in more if o)} | {(r['made by']['commit'] or 'unknown')[:9]} |")
    gpus = [r for r in rows if "gpu" in r]
    lines += ["", *(f"{r['work']} ({r['gpu']}): float32 {seconds_text(r['float32'])} "
                    f"({100*r['float32_share_of_peak']:.0f} % of peak), bfloat16 {seconds_text(r['bfloat16'])} "
                    f"({100*r['bfloat16_share_of_peak']:.0f} % of peak)." for r in gpus)]
    if not gpus: lines.append("No GPU was at hand.")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"),
                        help="folder for benchmarks.md and benchmarks.json (default: results)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *LONG],
                        help="only these; the other rows of --out stay as they are")
    parser.add_argument("--long", action="store_true",
                        help="also COCO's 5,000 x 25,000, some 20 minutes on two cores, and an import of Flickr30k's "
                             "size, 26 GB on disk meanwhile")
    parser.add_argument("--section", choices=[*SECTIONS, *LONG], help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.section: return print(json.dumps((SECTIONS | LONG)[a.section]()))
    found,made = {},provenance(0)
    for name in a.only or [*SECTIONS, *(LONG if a.long else ())]:
        print(f"{name} ...", flush=True)
        found[name] = run_section(name, a.threads)
        print(json.dumps(found[name], indent=1), flush=True)
    if {"step", "step_padded", "step_bfloat16"} <= set(found):
        ours,padded,short = (found.pop(n) for n in ("step", "step_padded", "step_bfloat16"))
        found["step"] = dict(work="training step, batch 32, forward and backward", reference=padded["seconds"],
                             reference_one_thread=padded["one_thread"], ours=ours["seconds"],
                             ratio=padded["seconds"]/ours["seconds"],
                             extra_mib=ours["extra_mib"], reference_mib=padded["extra_mib"],
                             share_of_peak=ours["share_of_peak"], bfloat16_share_of_peak=short["share_of_peak"],
                             bfloat16=short["seconds"], bfloat16_ratio=padded["seconds"]/short["seconds"])
    rows = {r["work"]: r for r in (read_json(a.out/"benchmarks.json")["rows"]
                                   if a.only and (a.out/"benchmarks.json").exists() else [])}
    # a training step is reported with its reference or not at all
    rows |= {r["work"]: r | {"made by": made} | (dict(originals=ORIGINALS[name]) if name in ORIGINALS else {})
             for name,r in found.items() if "seconds" not in r}
    write_json(a.out/"benchmarks.json", dict(rows=list(rows.values()), **{"made by": made}))
    (a.out/"benchmarks.md").write_text(markdown(rows.values(), made), encoding="utf-8")


if __name__ == "__main__": main()
