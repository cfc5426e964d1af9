"""What codecs of region sets cost and keep, and a generated collection that is searched in two stages.

`python benchmarks/search.py --codecs --model MODEL --data DATA --name NAME` measures a trained model on the test split
and adds a table to codecs_benchmark.json, .md and .png. `python benchmarks/search.py --million` builds a collection of
--pictures (a million if not given) with --regions of --dim and adds a row to collection_benchmark.json and .md.
"""
import shutil
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from aladin.files import atomic_write
from aladin.data.ragged import Ragged
from aladin.data.splits import open_split
from aladin.evaluation.embeddings import encode_split
from aladin.evaluation.metrics import image_to_text_ranks, text_to_image_ranks
from aladin.model.alignment import set_scores
from aladin.model.heads import alignment_scores
from aladin.model.model import load_model
from aladin.search.codecs import CODECS
from aladin.search.faiss import FaissEngine
from aladin.search.segments import SetStore
from search import clustered, folder_bytes, in_process, publish, query_times, resident, unit

CANDIDATES = 100
WAYS = [(way, order) for order in ("reranked", "scanned") for way in ("t2i", "i2t")]


# What codecs keep of a model's recall

def stored(folder, name, values, lengths, vectors):
    """A store with one segment of these sets, the sets as they are read from it, and the seconds of learning and
    writing."""
    store, ids, start = SetStore(folder, sets=name), [str(i) for i in range(len(lengths))], time.perf_counter()
    if store.needs_training(): store.learn(values)
    learned = time.perf_counter()
    segment = store.write(dict(ids=ids, owners=ids), vectors=vectors, sets=values, offsets=np.cumsum([0, *lengths]))
    written = time.perf_counter()
    places = [(segment, row) for row in range(len(ids))]
    return store, places, store.arrays(places)[0], dict(learn_seconds=learned - start, write_seconds=written - learned)


def recalls(scores, matching, owner):
    "R@1 and R@10 of both directions: among the candidates of the matching head, and among all. Two score matrices."
    ranks = dict(t2i=text_to_image_ranks, i2t=image_to_text_ranks)
    found = {}
    for (way, order) in WAYS:
        s, axis = scores[way], 0 if way == "t2i" else 1
        if order == "reranked":
            best = matching.topk(min(CANDIDATES, matching.shape[axis]), axis).indices
            s = torch.where(torch.zeros_like(s, dtype=torch.bool).scatter_(axis, best, True), s, -1e4 + matching)
        places = ranks[way](s, owner)
        found |= {f"{way} {order} R@{k}": 100*float((places < k).mean()) for k in (1, 10)}
    return found


def rerank_times(store, places, embeddings, queries, rng):
    "Milliseconds of ranking the candidates of a caption, read from a mapped segment."
    words, candidates = embeddings.words, min(CANDIDATES, len(places))
    chosen = rng.choice(len(words), queries, replace=len(words) < queries)
    own = [words[int(c)].float().numpy() for c in chosen]
    some = [[places[i] for i in rng.choice(len(places), candidates, replace=False)] for _ in chosen]
    def rank(query): return set_scores(*store.cosines(some[query], own[query]), True, "MrSw")
    return query_times(rank, range(len(own)))[0]["median_ms"]


def measure_codec(name, e, matching, args, scratch):
    "One row of the table: bytes, recall, times."
    sides = dict(images=(e.regions, e.image_matching), captions=(e.words, e.caption_matching))
    read, row = {}, dict(codec=name)
    for kind, (sets, vectors) in sides.items():
        values, lengths = sets.values.float().numpy(), sets.lengths.numpy()
        store, places, decoded, times = stored(scratch/name/kind, name, values, lengths, vectors.float().numpy())
        read[kind] = Ragged(torch.from_numpy(decoded), sets.lengths)
        if kind == "captions": continue
        row |= times | dict(rerank_ms=rerank_times(store, places, e, args.queries, np.random.default_rng(args.seed)))
        row["bytes"] = store.segment(places[0][0]).sets.nbytes/len(places)
        row["vector_bytes"] = store.segment(places[0][0]).sets[:1].nbytes
        row["codec_bytes"] = folder_bytes(scratch/name/kind/"codec")
    def scores(words): return alignment_scores(read["images"], words, e.aggregation, e.clamp)
    exact = Ragged(e.words.values.float(), e.words.lengths)
    return row | recalls(dict(t2i=scores(exact), i2t=scores(read["captions"])), matching, e.caption_image)


def measure_codecs(args):
    "All codecs on the test split of a model."
    model = load_model(args.model)
    test = open_split(args.data, "test", model.processor)
    e = encode_split(model, test, progress=False)
    matching = e.image_matching.float() @ e.caption_matching.float().T
    dim = model.config.hidden_size
    names = [name for name, size in CODECS.items() if (size or 0) <= dim]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = [measure_codec(name, e, matching, args, Path(scratch)) for name in tqdm(names, desc="codecs")]
    return dict(images=len(e.regions), captions=len(e.words), regions=len(e.regions.values)/len(e.regions), dim=dim,
                aggregation=e.aggregation, note=args.note, codecs=rows)


def kept(m, row, key):
    "The share of the recall of float16, in per cent; NaN where that is 0."
    whole = m["codecs"][0][key]
    return 100*row[key]/whole if whole else float("nan")


def codecs_table(name, m):
    "The table of one data set as Markdown."
    base, at = m["codecs"][0], m["made by"]["machine"]
    keys = [f"{way} {order} R@{k}" for way, order in WAYS for k in (1, 10)]
    lines = [f"## {name}: {m['images']:,} images with {m['regions']:.1f} regions of {m['dim']}, "
             f"{m['captions']:,} captions", "",
             f"Commit {(m['made by']['commit'] or '')[:9]}, {m['made by']['date']}, {at['processor']}, "
             f"{at['threads']} thread{'s'*(at['threads'] > 1)}. {m['note']}".rstrip(), "",
             "| codec | bytes of a vector | bytes of a picture | share | " + " | ".join(keys) +
             " | learning | 100 candidates |", "|---|" + "---:|"*(len(keys) + 5)]
    for row in m["codecs"]:
        figures = " | ".join(f"{kept(m, row, key):.1f} %" for key in keys)
        learning = f"{row['learn_seconds']:.0f} s" if row["codec_bytes"] else ""
        lines.append(f"| {row['codec']} | {row['vector_bytes']} | {row['bytes']:,.0f} | "
                     f"1/{base['bytes']/row['bytes']:.1f} | {figures} | {learning} | {row['rerank_ms']:.1f} ms |")
    recall = ", ".join(f"{key} {base[key]:.2f}" for key in keys)
    return "\n".join([*lines, "", f"100 % are, in per cent: {recall}. One query more or less is "
                                  f"{100/m['images']:.2f} of i2t and {100/m['captions']:.2f} of t2i."]) + "\n"


INTRO = (
    "# Codecs of region and token sets\n\n"
    "Made by `python benchmarks/search.py --codecs`. Kept are R@1 and R@10 of the alignment head, in per cent of those "
    "of float16: when the\nmatching head's 100 candidates are ranked, and when all items are. From text to image the "
    "query is exact and the regions are coded; from image\nto text both are. Codecs are learned from the test images "
    "themselves, as `aladin index` learns them from the pictures that it is given.\nBytes of a picture are those of "
    "its region set; its boxes, 16 bytes a region, and its matching vector come to these. The last column is the\n"
    "median time to read 100 candidates of a caption, mapped, and to score them in NumPy.\n\n")


def codecs_text(found): return INTRO + "\n".join(codecs_table(*o) for o in found.items())


def plot_codecs(found):
    "R@1 and R@10 kept over the bytes of a picture; a row for each data set."
    figure, axes = plt.subplots(len(found), 2, figsize=(9, 3.2*len(found)), dpi=90, layout="constrained", squeeze=False)
    look = dict(t2i=("#0072B2", "o", "text to image"), i2t=("#D55E00", "s", "image to text"))
    for line, (name, m) in zip(axes, found.items()):
        for ax, k in zip(line, (1, 10)):
            for way, (colour, marker, label) in look.items():
                for kind, style in (("opq", "-"), ("pq", ":")):
                    rows = [o for o in m["codecs"] if o["codec"].startswith((kind, "int8", "float16"))]
                    rows.sort(key=lambda o: o["bytes"])
                    ax.plot([o["bytes"] for o in rows], [kept(m, o, f"{way} reranked R@{k}") for o in rows], style,
                            color=colour, marker=marker, markersize=4, label=f"{label}, {kind}")
            for o in m["codecs"]:
                if not o["codec"].startswith("pq"):
                    ax.annotate(o["codec"], (o["bytes"], 1.0), xycoords=("data", "axes fraction"), rotation=60,
                                fontsize=7)
            ticks = [o["bytes"] for o in m["codecs"] if not o["codec"].startswith("pq")]
            ax.set(xscale="log", xlabel="bytes of a region set", ylabel=f"R@{k} kept, percent")
            ax.set_xticks(ticks, [f"{t:,.0f}" for t in ticks], fontsize=8)
            ax.minorticks_off()
            ax.axhline(100, color="0.6", linewidth=.8)
            ax.spines[["top", "right"]].set_visible(False)
        line[0].set_title(name, loc="left", pad=24, fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center",
                  ncols=4)
    plt.close(figure)
    return figure


def codecs(args):
    "Measure one data set and write it beside the others."
    torch.set_num_threads(args.threads)
    start, m = time.perf_counter(), measure_codecs(args)
    m |= dict(seconds=round(time.perf_counter() - start, 1))
    found = publish(args, "codecs_benchmark", args.name, m, codecs_text)
    with atomic_write(args.out/"codecs_benchmark.png") as part: plot_codecs(found).savefig(part, format="png", dpi=160)


# A generated collection

def spectrum(dim): return np.linspace(2, .2, dim, dtype=np.float32)  # models use some directions more than others


def some_regions(rng, pictures, args, centres):
    "Region sets of some pictures, [pictures*regions, dim], each region in one of the clusters."
    values = clustered(rng, pictures*args.regions, centres)*spectrum(args.dim)
    return values/np.linalg.norm(values, axis=1, keepdims=True)


def write_collection(args, folder):
    "Generate, encode and write block by block; the seconds of each, and queries that are made of some pictures."
    rng = np.random.default_rng(args.seed)
    centres, objects = (unit(rng, args.clusters, args.dim) for _ in range(2))
    store, spent = SetStore(folder/"images", sets=args.sets), dict(generate=0., learn=0., write=0.)
    if store.needs_training():
        start = time.perf_counter()
        store.learn(some_regions(rng, max(1, min(args.pictures, 2048)), args, objects))
        spent["learn"] = time.perf_counter() - start
    asked = set(rng.choice(args.pictures, min(args.queries, args.pictures), replace=False).tolist())
    queries = []
    for at in tqdm(range(0, args.pictures, 2048), desc="pictures"):
        start = time.perf_counter()
        count = min(2048, args.pictures - at)
        vectors, sets = clustered(rng, count, centres), some_regions(rng, count, args, objects)
        made = time.perf_counter()
        ids = [f"{i:012d}" for i in range(at, at + count)]
        boxes = np.tile(np.array([.1, .1, .6, .6], np.float32), (len(sets), 1))
        store.write(dict(ids=ids, owners=ids, source="", tags=[None]*count), vectors=vectors, sets=sets, boxes=boxes,
                    offsets=np.arange(count + 1)*args.regions)
        spent["generate"] += made - start
        spent["write"] += time.perf_counter() - made
        queries += [question(rng, at + row, vectors[row], sets[row*args.regions:(row + 1)*args.regions], args)
                    for row in range(count) if at + row in asked]
    return spent, queries


def question(rng, number, vector, regions, args, words=12):
    "A caption of a picture: a vector near the picture's, and tokens near some of its regions."
    def near(values, spread):
        values = values + spread*unit(rng, *values.shape)
        return values/np.linalg.norm(values, axis=-1, keepdims=True)
    return f"{number:012d}", near(vector[None], 1.)[0], near(regions[rng.choice(len(regions), words)], 1.)


def build_engine(folder, name, threads):
    "Codes of the vectors, if there are enough of them; the seconds."
    import faiss
    faiss.omp_set_num_threads(threads)
    start = time.perf_counter()
    FaissEngine(SetStore(folder/"images", sets=name)).settle()
    return dict(codes_seconds=time.perf_counter() - start, build_memory=resident())


def ask_collection(folder, name, queries, k):
    "Open the collection and ask each query alone, on one thread: find candidates, rank them; and all times apart."
    import faiss
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    start = time.perf_counter()
    engine = FaissEngine(SetStore(folder/"images", sets=name))
    def candidates(q): return engine.search(q[1][None], k)[0]
    def ranked(q):
        found = candidates(q)
        scores = set_scores(*engine.store.cosines([place for *_, place in found], q[2]), True, "MrSw")
        return [found[i][0] for i in np.argsort(-scores)]
    ranked(queries[0])
    opened = time.perf_counter() - start
    first, answers = query_times(ranked, queries)
    again, _ = query_times(ranked, queries)
    stage, found = query_times(candidates, queries)
    hit = dict(candidates=np.mean([q[0] in [o[0] for o in f] for q, f in zip(queries, found)]),
               first=np.mean([q[0] == a[0] for q, a in zip(queries, answers)]))
    return dict(open_seconds=opened, memory=resident(), first_pass=first, second_pass=again, first_stage=stage,
                **{f"right_{key}": 100*float(value) for key, value in hit.items()})


def measure_collection(args, folder):
    "Build, search, measure; each in a process of its own."
    (spent, queries), written_memory = in_process(write_and_size, args, folder)
    built = in_process(build_engine, folder, args.sets, args.build_threads)
    asked = in_process(ask_collection, folder, args.sets, queries, CANDIDATES)
    def size(pattern): return sum(p.stat().st_size for p in folder.glob(pattern))
    disk = dict(sets=size("images/*/sets.npy"), vectors=size("images/*/vectors.npy"), boxes=size("images/*/boxes.npy"),
                codes=size("images.faiss/*/*"), all=folder_bytes(folder))
    return dict(pictures=args.pictures, regions=args.regions, dim=args.dim, sets=args.sets, queries=len(queries),
                seconds=spent, write_memory=written_memory, disk=disk, note=args.note, **built, **asked)


def write_and_size(args, folder): return write_collection(args, folder), resident()


def collection_text(found):
    "The table as Markdown, and what ten million pictures would need if everything but the first stage grows alike."
    rows = sorted(found.values(), key=lambda m: (m["sets"], m["pictures"]))
    lines = ["# Benchmark of a generated collection", "",
             "Made by `python benchmarks/search.py --million`. Vectors and regions are drawn in clusters and written "
             "block by block; tags are not stored. A query is a picture's vector and twelve of its regions, with "
             "noise; the 100 nearest vectors are found by the engine with faiss and ranked by the sets. Encoding is "
             "the codec and the disk, without a model. Memory is the most that a process had in use, mapped files "
             "included; searching includes importing torch. Times are of one thread; the first pass reads sets that "
             "are in the page cache only as far as building left them there.", "",
             "| pictures | sets | generate | encode, write | codes of faiss | sets on disk | vectors | boxes | codes "
             "| memory to write | to make codes | to search | open | query, first pass "
             "| second pass, 99th percentile | candidates alone | right one among 100 | first |",
             "|---:|---|" + "---:|"*16]
    def gb(b): return f"{b/1e9:.2f} GB"
    for m in rows:
        s, d = m["seconds"], m["disk"]
        lines.append(f"| {m['pictures']:,} | {m['sets']} | {s['generate']:.0f} s | {s['learn'] + s['write']:.0f} s | "
                     f"{m['codes_seconds']:.0f} s | {gb(d['sets'])} | {gb(d['vectors'])} | {gb(d['boxes'])} | "
                     f"{gb(d['codes'])} | {gb(m['write_memory'])} | {gb(m['build_memory'])} | {gb(m['memory'])} | "
                     f"{m['open_seconds']:.1f} s | {m['first_pass']['median_ms']:.1f} ms | "
                     f"{m['second_pass']['median_ms']:.1f} ms, {m['second_pass']['p99_ms']:.1f} ms | "
                     f"{m['first_stage']['median_ms']:.1f} ms | {m['right_candidates']:.1f} % | "
                     f"{m['right_first']:.1f} % |")
    lines += [""] + [extrapolated(m) for m in rows[-1:]] + [""]
    for m in rows:
        at = m["made by"]["machine"]
        lines.append(f"- {m['pictures']:,} pictures, {m['sets']}: {m['regions']} regions of {m['dim']}, "
                     f"{m['queries']} queries, commit {(m['made by']['commit'] or '')[:9]}, {m['made by']['date']}, "
                     f"{at['processor']}. {m['note']}".rstrip())
    return "\n".join(lines) + "\n"


def extrapolated(m, pictures=10_000_000):
    "A sentence on ten million pictures."
    n, d, s = pictures/m["pictures"], m["disk"], m["seconds"]
    return (f"Extrapolated, not measured: {pictures:,} pictures with {m['sets']}, by {n:g} times the bytes and seconds "
            f"of {m['pictures']:,}, take {n*d['sets']/1e9:.0f} GB of sets "
            f"({n*m['pictures']*m['regions']*m['dim']*2/1e9:.0f} GB in float16), {n*d['vectors']/1e9:.0f} GB of "
            f"vectors, {n*d['boxes']/1e9:.0f} GB of boxes, {n*d['codes']/1e9:.0f} GB of codes, and "
            f"{n*(s['learn'] + s['write'])/3600:.1f} h to encode and write. Ranking candidates does not depend on the "
            "number of pictures once their sets are in memory; finding them does.")


def collection(args):
    "Measure one size and write it beside the others."
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    try: m = measure_collection(args, folder)
    finally: shutil.rmtree(folder)
    publish(args, "collection_benchmark", f"{args.pictures} pictures, {args.sets}", m, collection_text)
