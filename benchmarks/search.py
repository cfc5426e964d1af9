#!/usr/bin/env python3
"""An index of as many pictures as COCO has: build time, size and query time of each engine, recall of the approximate one, and what re-ranking costs.

The vectors are random but clustered, as pictures are: a cluster's members share a direction, and queries are drawn as they are. Region sets are random;
time and size do not depend on what they hold. Writes search_benchmark.json and search_benchmark.md."""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aladin.files import atomic_write, write_json
from aladin.data.ragged import Ragged
from aladin.search.engines import ExactEngine, MilvusEngine
from aladin.search.segments import SetStore
from aladin.runs.record import provenance
from aladin.model.heads import alignment_scores


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=123_000)
    parser.add_argument("--dim", type=int, default=768, help="width of the vectors (default: 768, BERT's)")
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--regions", type=int, default=36, help="regions of a picture, for re-ranking (default: 36, VinVL's mean on COCO)")
    parser.add_argument("--stored", type=int, default=10_000, help="pictures whose region sets are written, for re-ranking")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for the index while it is measured (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser.parse_args()


def unit(rng, *shape):
    v = rng.standard_normal(shape, np.float32)
    return v/np.linalg.norm(v, axis=-1, keepdims=True)


def clustered(rng, count, centres, spread=.8):
    "Vectors of length 1 around random centres; two of a cluster have a cosine of about 0.6."
    v = centres[rng.integers(len(centres), size=count)] + spread*unit(rng, count, centres.shape[1])
    return v/np.linalg.norm(v, axis=1, keepdims=True)


def write_vectors(store, vectors, batch=8192):
    "Segments without region sets."
    return [store.write(dict(ids=(ids := [f"{i:012d}" for i in range(at, min(at + batch, len(vectors)))]), owners=ids, source=""), vectors=vectors[at:at+batch],
                        sets=np.zeros((0, vectors.shape[1]), np.float16), offsets=np.zeros(len(ids) + 1, np.int64)) for at in range(0, len(vectors), batch)]


def query_times(search, queries):
    "Each query alone: milliseconds, median and 99th percentile, after some to warm up; and the answers."
    for q in queries[:10]: search(q)
    took, found = [], []
    for q in queries:
        start = time.perf_counter()
        found.append(search(q))
        took.append(1000*(time.perf_counter() - start))
    return dict(zip(("median_ms", "p99_ms"), np.percentile(took, [50, 99]))), found


def folder_bytes(folder): return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def close(engine):
    if hasattr(engine, "close"): engine.close()


def wait_for_graph(engine):
    "Milvus Lite builds in the background; loading the collection again waits for it."
    if not hasattr(engine, "client"): return
    engine.client.release_collection(engine.collection)
    engine.client.load_collection(engine.collection)


def measure_engine(name, make, segments, queries, size, k=100):
    "Build, close, open again, ask."
    engine, start = make(), time.perf_counter()
    for s in tqdm(segments, desc=name): engine.put(s)
    engine.settle()
    wait_for_graph(engine)
    close(engine)
    row = dict(engine=name, build_seconds=time.perf_counter() - start, bytes=size())
    start = time.perf_counter()
    engine = make()
    engine.search(queries[:1], k)
    row["open_seconds"] = time.perf_counter() - start
    times, found = query_times(lambda q: engine.search(q[None], k)[0], queries)
    close(engine)
    return row | times, [[o[0] for o in hits] for hits in found]


def rerank_times(rng, args, folder, words=12, k=100):
    "Reading a hundred region sets at random places and scoring them against a caption's words."
    store = SetStore(folder)
    n, names = args.regions, []
    for at in range(0, args.stored, 1000):
        ids = [str(i) for i in range(at, min(at + 1000, args.stored))]
        names += [(store.write(dict(ids=ids, owners=ids, source=""), vectors=np.zeros((len(ids), args.dim), np.float32), sets=unit(rng, len(ids)*n, args.dim).astype(np.float16), offsets=np.arange(len(ids) + 1)*n), len(ids))]
    places = [(name, row) for name, count in names for row in range(count)]
    caption = Ragged(torch.from_numpy(unit(rng, words, args.dim)), torch.tensor([words]))
    def rerank(chosen): return alignment_scores(store.read([places[i] for i in chosen]), caption, "MrSw", "always")
    times, _ = query_times(rerank, [rng.choice(len(places), k, replace=False) for _ in range(args.queries)])
    return dict(pictures=len(places), regions=n, candidates=k, bytes_per_picture=folder_bytes(folder)/len(places)) | times


def measure(args):
    rng = np.random.default_rng(args.seed)
    torch.set_num_threads(args.threads)
    centres = unit(rng, args.clusters, args.dim)
    vectors, queries = clustered(rng, args.pictures, centres), torch.from_numpy(clustered(rng, args.queries, centres))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        store = SetStore(folder/"images")
        start = time.perf_counter()
        segments = write_vectors(store, vectors)
        written = time.perf_counter() - start
        rows, answers = [], []
        engines = [("exact, in memory", lambda: ExactEngine(store), lambda: folder_bytes(folder/"images"))]
        for name, approximate in (("Milvus Lite, every vector", False), ("Milvus Lite, HNSW graph", True)):
            path = folder/f"{approximate}.db"
            engines.append((name, lambda path=path, approximate=approximate: MilvusEngine(store, path, "bench", args.dim, "bench", approximate), lambda path=path: folder_bytes(path)))
        for name, make, size in engines:
            row, found = measure_engine(name, make, segments, queries, size)
            answers.append(found)
            rows.append(row | {f"recall_at_{k}": 100*float(np.mean([len(set(a[:k]) & set(b[:k]))/k for a, b in zip(answers[0], found)])) for k in (10, 100)})
        return dict(pictures=args.pictures, dim=args.dim, clusters=args.clusters, queries=args.queries, write_seconds=written, engines=rows, rerank=rerank_times(rng, args, folder/"sets"))


def size_text(b): return f"{b/1e9:.2f} GB" if b >= 1e9 else f"{b/1e6:.0f} MB"


def markdown(m, made):
    r, at = m["rerank"], made["machine"]
    lines = ["# Benchmark of the search engines", "",
             f"Made by `python benchmarks/search.py` at commit {(made['commit'] or '')[:9]} on {made['date']}: {at['processor']}, {at['threads']} thread{'s' if at['threads'] > 1 else ''}, torch {made['versions']['torch']}.", "",
             f"{m['pictures']:,} vectors of {m['dim']}, random in {m['clusters']:,} clusters; {m['queries']} queries, one at a time, 100 answers each. Writing the segments took {m['write_seconds']:.0f} s. "
             "Building is what an engine does after that, until it is closed; opening is the first answer after that, without starting Python. Recall is of the exact engine's answers.", "",
             "| engine | build | on disk | open | median query | 99th percentile | recall@10 | recall@100 |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {o['engine']} | {o['build_seconds']:.1f} s | {size_text(o['bytes'])} | {o['open_seconds']:.1f} s | {o['median_ms']:.1f} ms | {o['p99_ms']:.1f} ms | {o['recall_at_10']:.1f} % | {o['recall_at_100']:.1f} % |" for o in m["engines"]]
    return "\n".join(lines + ["", f"Re-ranking {r['candidates']} candidates of {r['pictures']:,} pictures with {r['regions']} regions each, float16, mapped and in the page cache: median {r['median_ms']:.1f} ms, 99th percentile {r['p99_ms']:.1f} ms; {r['bytes_per_picture']:,.0f} bytes a picture."]) + "\n"


def main():
    args = parse_args()
    start = time.perf_counter()
    m = measure(args)
    made = provenance(args.seed)
    write_json(args.out/"search_benchmark.json", m | {"seconds": round(time.perf_counter() - start, 1), "made by": made})
    text = markdown(m, made)
    with atomic_write(args.out/"search_benchmark.md") as part: part.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
