#!/usr/bin/env python3
"""An index of as many pictures as COCO has: build time, size and query time of each engine, recall of the approximate
one, and what re-ranking costs.

The vectors are random but clustered, as pictures are: a cluster's members share a direction, and queries are drawn as
they are. Region sets are random; time and size do not depend on what they hold. Writes search_benchmark.json and
search_benchmark.md.

With --embedded: the engine with faiss beside exact search and other libraries, each in a process of its own, for its
memory. Vectors are written as they are drawn, so that a million of them need no more memory than a block. Results are
added to embedded_benchmark.json, by size, and embedded_benchmark.md is written from it. `make bench` does not run this.

With --milvus ADDRESS: collections at a Milvus server that runs there, made for the measurement and dropped after it:
recall of exact search, and time by consistency level. Results are added to milvus_benchmark.json, by size, and
milvus_benchmark.md is written from it.

With --codecs and with --million: see region_sets.py."""
import argparse
import importlib.metadata
import multiprocessing
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aladin.files import atomic_write, read_json, write_json
from aladin.data.ragged import Ragged
import aladin.search.engines as engines
from aladin.search.engines import ExactEngine, MilvusEngine
from aladin.search.faiss import FaissEngine
from aladin.search.segments import SetStore
from aladin.runs.record import provenance
from aladin.model.heads import alignment_scores


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, help="default: 123,000; with --million a million")
    parser.add_argument("--dim", type=int, help="width of the vectors (default: 768, BERT's; with --million 256)")
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--regions", type=int, default=36,
                        help="regions of a picture, for re-ranking (default: 36, VinVL's mean on COCO)")
    parser.add_argument("--stored", type=int, default=10_000,
                        help="pictures whose region sets are written, for re-ranking")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--embedded", action="store_true",
                        help="measure the engine with faiss and other libraries instead")
    parser.add_argument("--milvus", metavar="ADDRESS",
                        help="measure a Milvus server instead, such as http://localhost:19530")
    parser.add_argument("--build-threads", type=int, default=2,
                        help="threads for building, with --embedded (default: 2)")
    parser.add_argument("--peers", action="store_true",
                        help="with --embedded: also graphs of faiss, hnswlib and usearch, where they are installed")
    parser.add_argument("--codecs", action="store_true",
                        help="measure what codecs of region sets keep of a model's recall instead; see region_sets.py")
    parser.add_argument("--model", type=Path, help="with --codecs: folder of a trained model")
    parser.add_argument("--data", type=Path, help="with --codecs: its data folder")
    parser.add_argument("--name", help="with --codecs: name of the data in the table (default: the data folder's)")
    parser.add_argument("--million", action="store_true",
                        help="build and search a generated collection with region sets instead; --pictures is a "
                             "million then, --dim 256")
    parser.add_argument("--sets", default="opq64", help="with --million: codec of the region sets (default: opq64)")
    parser.add_argument("--note", default="",
                        help="a sentence on the machine for the table, such as what else ran on it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path,
                        help="folder for the index while it is measured (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    if args.codecs and not (args.model and args.data): parser.error("--codecs needs --model and --data")
    args.pictures = args.pictures or (1_000_000 if args.million else 123_000)
    args.dim = args.dim or (256 if args.million else 768)
    if args.data: args.name = args.name or args.data.resolve().name
    return args


def unit(rng, *shape):
    v = rng.standard_normal(shape, np.float32)
    return v/np.linalg.norm(v, axis=-1, keepdims=True)


def clustered(rng, count, centres, spread=.8):
    "Vectors of length 1 around random centres; two of a cluster have a cosine of about 0.6."
    v = centres[rng.integers(len(centres), size=count)] + spread*unit(rng, count, centres.shape[1])
    return v/np.linalg.norm(v, axis=1, keepdims=True)


def write_vectors(store, vectors, batch=8192):
    "Segments without region sets."
    return [store.write(
        dict(ids=(ids := [f"{i:012d}" for i in range(at, min(at + batch, len(vectors)))]), owners=ids, source=""),
        vectors=vectors[at:at+batch], sets=np.zeros((0, vectors.shape[1]), np.float16),
        offsets=np.zeros(len(ids) + 1, np.int64)) for at in range(0, len(vectors), batch)]


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
        names += [(store.write(dict(ids=ids, owners=ids, source=""),
                               vectors=np.zeros((len(ids), args.dim), np.float32),
                               sets=unit(rng, len(ids)*n, args.dim).astype(np.float16),
                               offsets=np.arange(len(ids) + 1)*n), len(ids))]
    places = [(name, row) for name, count in names for row in range(count)]
    caption = Ragged(torch.from_numpy(unit(rng, words, args.dim)), torch.tensor([words]))
    def rerank(chosen): return alignment_scores(store.read([places[i] for i in chosen]), caption, "MrSw", "always")
    times, _ = query_times(rerank, [rng.choice(len(places), k, replace=False) for _ in range(args.queries)])
    return dict(pictures=len(places), regions=n, candidates=k,
                bytes_per_picture=folder_bytes(folder)/len(places)) | times


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
        compared = [("exact, in memory", lambda: ExactEngine(store), lambda: folder_bytes(folder/"images"))]
        for name, approximate in (("Milvus Lite, every vector", False), ("Milvus Lite, HNSW graph", True)):
            path = folder/f"{approximate}.db"
            compared.append((
                name,
                lambda path=path, approximate=approximate: MilvusEngine(
                    store, path, "bench", args.dim, "bench", approximate),
                lambda path=path: folder_bytes(path)))
        for name, make, size in compared:
            row, found = measure_engine(name, make, segments, queries, size)
            answers.append(found)
            rows.append(row | {
                f"recall_at_{k}": 100*float(np.mean([len(set(a[:k]) & set(b[:k]))/k
                                                     for a, b in zip(answers[0], found)])) for k in (10, 100)})
        return dict(pictures=args.pictures, dim=args.dim, clusters=args.clusters, queries=args.queries,
                    write_seconds=written, engines=rows, rerank=rerank_times(rng, args, folder/"sets"))


def size_text(b): return f"{b/1e9:.2f} GB" if b >= 1e9 else f"{b/1e6:.0f} MB"


def markdown(m, made):
    r, at = m["rerank"], made["machine"]
    lines = ["# Benchmark of the search engines", "",
             f"Made by `python benchmarks/search.py` at commit {(made['commit'] or '')[:9]} on {made['date']}: "
             f"{at['processor']}, {at['threads']} thread{'s' if at['threads'] > 1 else ''}, "
             f"torch {made['versions']['torch']}.", "",
             f"{m['pictures']:,} vectors of {m['dim']}, random in {m['clusters']:,} clusters; {m['queries']} queries, "
             f"one at a time, 100 answers each. Writing the segments took {m['write_seconds']:.0f} s. "
             "Building is what an engine does after that, until it is closed; opening is the first answer after that, "
             "without starting Python. Recall is of the exact engine's answers.", "",
             "| engine | build | on disk | open | median query | 99th percentile | recall@10 | recall@100 |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {o['engine']} | {o['build_seconds']:.1f} s | {size_text(o['bytes'])} | {o['open_seconds']:.1f} s | "
              f"{o['median_ms']:.1f} ms | {o['p99_ms']:.1f} ms | {o['recall_at_10']:.1f} % | "
              f"{o['recall_at_100']:.1f} % |" for o in m["engines"]]
    return "\n".join(lines + ["", f"Re-ranking {r['candidates']} candidates of {r['pictures']:,} pictures with "
                                  f"{r['regions']} regions each, float16, mapped and in the page cache: median "
                                  f"{r['median_ms']:.1f} ms, 99th percentile {r['p99_ms']:.1f} ms; "
                                  f"{r['bytes_per_picture']:,.0f} bytes a picture."]) + "\n"


# The engine with faiss, and other libraries on the same vectors

def nearest_so_far(best, rows, scores, at, k=100):
    "The k highest scores and their rows, of those so far and of a block whose first row is `at`."
    rows = np.concatenate([rows, np.broadcast_to(np.arange(scores.shape[1]) + at, scores.shape)], 1)
    scores = np.concatenate([best, scores], 1)
    chosen = np.argpartition(-scores, min(k, scores.shape[1]) - 1, 1)[:, :k]
    return np.take_along_axis(scores, chosen, 1), np.take_along_axis(rows, chosen, 1)


def draw(args, folder):
    "Write segments block by block; returns the queries and the exact rows of their 100 nearest."
    rng, store = np.random.default_rng(args.seed), SetStore(folder/"images")
    centres = unit(rng, args.clusters, args.dim)
    queries = clustered(rng, args.queries, centres)
    best, rows = np.full((len(queries), 0), -1, np.float32), np.zeros((len(queries), 0), np.int64)
    for at in tqdm(range(0, args.pictures, 8192), desc="vectors"):
        block = clustered(rng, min(8192, args.pictures - at), centres)
        ids = [f"{i:012d}" for i in range(at, at + len(block))]
        store.write(dict(ids=ids, owners=ids, source=""), vectors=block, sets=np.zeros((0, args.dim), np.float16),
                    offsets=np.zeros(len(ids) + 1, np.int64))
        best, rows = nearest_so_far(best, rows, queries @ block.T, at)
    return queries, rows


def resident():
    "The most memory that this process had in use. `getrusage` would include that of the process which started it."
    line = next(o for o in Path("/proc/self/status").read_text().splitlines() if o.startswith("VmHWM"))
    return 1024*int(line.split()[1])


def in_process(work, *arguments):
    "The result of `work` in a new process, and the most memory that the process had in use, mapped files included."
    with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.apply(work, arguments)


def all_vectors(folder):
    store = SetStore(folder/"images")
    return np.concatenate([store.segment(name).vectors for name in store.names()])


def build_faiss(folder, threads):
    import faiss
    faiss.omp_set_num_threads(threads)
    start = time.perf_counter()
    engine = FaissEngine(SetStore(folder/"images"))
    engine.settle()
    return dict(build_seconds=time.perf_counter() - start, build_memory=resident()), engine._tail.codes.about


def ask_engine(make, folder, queries):
    "Open an engine and ask each query alone, on one thread."
    import faiss
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    start = time.perf_counter()
    engine = make(SetStore(folder/"images"))
    engine.search(torch.from_numpy(queries[:1]), 100)
    opened = time.perf_counter() - start
    times, found = query_times(lambda q: engine.search(torch.from_numpy(q[None]), 100)[0], queries)
    return dict(open_seconds=opened, memory=resident()) | times, [[int(o[0]) for o in hits] for hits in found]


def recalls(found, best_first):
    "Recall of the 10 and of the 100 nearest, in per cent."
    return {f"recall_at_{k}": 100*float(np.mean([len(set(a[:k]) & set(b[:k].tolist()))/k
                                                 for a, b in zip(found, best_first)])) for k in (10, 100)}


def faiss_graph(vectors, threads, m, construction):
    import faiss
    index = faiss.index_factory(vectors.shape[1], f"HNSW{m},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = construction
    faiss.omp_set_num_threads(threads)
    index.train(vectors[:20_000])
    index.add(vectors)
    faiss.omp_set_num_threads(1)
    return (lambda q, width: index.search(q[None], 100, params=faiss.SearchParametersHNSW(efSearch=width))[1][0],
            len(faiss.serialize_index(index)))


def faiss_lists(vectors, threads, lists):
    import faiss
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(threads)
    index.train(vectors[:40*lists])
    index.add(vectors)
    faiss.omp_set_num_threads(1)
    return (lambda q, width: index.search(q[None], 100, params=faiss.SearchParametersIVF(nprobe=width//4))[1][0],
            len(faiss.serialize_index(index)))


def hnswlib_graph(vectors, threads, m, construction):
    import hnswlib
    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), M=m, ef_construction=construction)
    index.add_items(vectors, num_threads=threads)
    def search(q, width):
        index.set_ef(width)
        return index.knn_query(q[None], 100, num_threads=1)[0][0]
    return search, index.index_file_size()


def usearch_graph(vectors, threads, m, construction, dtype):
    from usearch.index import Index
    index = Index(ndim=vectors.shape[1], metric="ip", dtype=dtype, connectivity=m, expansion_add=construction)
    index.add(np.arange(len(vectors)), vectors, threads=threads)
    def search(q, width):
        index.expansion_search = width
        return index.search(q, 100, threads=1).keys
    return search, index.serialized_length


PEERS = {"faiss HNSW32, 8 bits": (faiss_graph, 32, 80),
         "faiss HNSW48, 8 bits": (faiss_graph, 48, 80),
         "faiss IVF1024, 8 bits": (faiss_lists, 1024),
         "hnswlib, M 32, float32": (hnswlib_graph, 32, 100),
         "usearch, M 32, float16": (usearch_graph, 32, 100, "f16"),
         "usearch, M 32, 8 bits": (usearch_graph, 32, 100, "i8")}


def measure_peer(folder, queries, rows, threads, make, *how):
    "Build, then widen the search until 98 % of the 100 nearest are found or the widest is reached."
    vectors, start = all_vectors(folder), time.perf_counter()
    search, size = make(vectors, threads, *how)
    row = dict(build_seconds=time.perf_counter() - start, bytes=size)
    for width in (200, 400, 800, 1600):
        times, found = query_times(lambda q: [int(i) for i in search(q, width)], queries)
        found = recalls(found, rows)
        if found["recall_at_100"] >= 98: break
    return row | times | found | dict(width=width, memory=resident())


def measure_embedded(args):
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        queries, nearest = draw(args, folder)
        order = exact_order(folder, queries, nearest)
        if args.pictures <= 200_000:
            row, found = in_process(ask_engine, ExactEngine, folder, queries)
            rows.append(dict(engine="exact, in memory", build_seconds=0, bytes=folder_bytes(folder/"images"))
                        | row | recalls(found, order))
        built, about = in_process(build_faiss, folder, args.build_threads)
        row, found = in_process(ask_engine, FaissEngine, folder, queries)
        size = folder_bytes(folder/"images.faiss")
        rows.append(dict(engine="faiss, this package", bytes=size) | built | row | recalls(found, order)
                    | {k: about[k] for k in ("pool", "probes", "recall")})
        for name, (make, *how) in PEERS.items() if args.peers else ():
            try:
                rows.append(dict(engine=name) | in_process(measure_peer, folder, queries, order, args.build_threads,
                                                           make, *how))
            except ImportError as e: print(f"{name}: {e}")
    return dict(pictures=args.pictures, dim=args.dim, clusters=args.clusters, queries=args.queries,
                build_threads=args.build_threads, note=args.note, engines=rows)


def exact_order(folder, queries, nearest):
    "The rows of the nearest, best first."
    store = SetStore(folder/"images")
    names = store.names()
    def vector(row): return store.segment(names[row//8192]).vectors[row % 8192]
    ordered = []
    for q, rows in zip(queries, nearest):
        scores = np.array([vector(row) @ q for row in rows.tolist()])
        ordered.append(rows[np.argsort(-scores)])
    return np.array(ordered)


def heading(m, rest, took=""):
    "The title of one size and a line on where and when it was measured."
    made, at = m["made by"], m["made by"]["machine"]
    return [f"## {m['pictures']:,} vectors of {m['dim']}, {m['clusters']:,} clusters", "",
            f"Made at commit {(made['commit'] or '')[:9]} on {made['date']}{took}: {at['processor']}, {rest}. "
            f"{m['note']}".rstrip(), ""]


def publish(args, stem, key, m, text):
    "Add a measurement to STEM.json, and write STEM.md from all of them by `text`; returns all of them."
    path = args.out/f"{stem}.json"
    found = (read_json(path) if path.exists() else {}) | {key: m | {"made by": provenance(args.seed)}}
    write_json(path, found)
    with atomic_write(path.with_suffix(".md")) as part: part.write_text(text(found), encoding="utf-8")
    print(text(found))
    return found


def embedded_text(m):
    libraries = ", ".join(f"{k} {v}" for k, v in m["libraries"].items())
    threads = f"{m['build_threads']} thread{'s'*(m['build_threads'] > 1)}"
    lines = heading(m, f"{threads} to build, one to ask, {m['queries']} queries; {libraries}")
    lines += ["| engine | build | on disk | memory to build | memory to search | open | median query | 99th percentile "
              "| recall@10 | recall@100 |",
              "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    def size(row, key): return size_text(row[key]) if key in row else ""
    for o in m["engines"]:
        opened = f"{o['open_seconds']:.1f} s" if "open_seconds" in o else ""
        name = o["engine"] + (f", width {o['width']}" if "width" in o else "")
        lines.append(f"| {name} | {o['build_seconds']:.0f} s | {size(o, 'bytes')} | {size(o, 'build_memory')} | "
                     f"{size(o, 'memory')} | {opened} | {o['median_ms']:.1f} ms | {o['p99_ms']:.1f} ms | "
                     f"{o['recall_at_10']:.1f} % | {o['recall_at_100']:.1f} % |")
    return "\n".join(lines) + "\n"


def embedded(args):
    "Measure one size and write it beside the others."
    start, m = time.perf_counter(), measure_embedded(args)
    libraries = {name: importlib.metadata.version(name) for name in ("faiss-cpu", "hnswlib", "usearch")
                 if name == "faiss-cpu" or args.peers}
    m |= dict(libraries=libraries, seconds=round(time.perf_counter() - start, 1))
    intro = ("# Benchmark of embedded search\n\n"
             "Made by `python benchmarks/search.py --embedded`. Vectors are random in clusters. Queries are asked one "
             "at a time, 100 answers each; recall is of the exact answers. Memory is the most that a process had in "
             "use, mapped files included; it includes importing torch, and for other libraries the vectors that they "
             "are given. Graphs and lists are searched at the smallest width of 200, 400, 800 and 1,600 (lists: a "
             "quarter of it) that finds 98 %, or at 1,600.\n\n")
    def text(found): return intro + "\n".join(embedded_text(o) for o in found.values())
    publish(args, "embedded_benchmark", f"{args.pictures} vectors, {args.clusters} clusters", m, text)


# A Milvus server

# approximate, GRAPH
MODES = {"every vector": (False, None), "--approximate": (True, None), "a graph whatever the size": (True, 1)}


def measure_collection(args, store, segments, queries, name):
    "Fill a collection, ask it, and drop it."
    approximate, graph = MODES[name]
    engine = MilvusEngine(store, args.milvus, f"aladin_bench_{uuid.uuid4().hex[:12]}", queries.shape[1], "bench",
                          approximate)
    usual = engines.GRAPH
    try:
        start = time.perf_counter()
        for segment in tqdm(segments, desc=name): engine.put(segment)
        if graph is not None: engines.GRAPH = graph
        engine.settle()
        row, levels = dict(engine=name, index=engine._index(), build_seconds=time.perf_counter() - start), []
        for level in ("session", "bounded", "eventually", "strong") if not approximate else ("session",):
            engine.consistency = level.capitalize()
            asked = queries[:60] if level == "strong" else queries
            times, found = query_times(lambda q: engine.search(q[None], 100)[0], asked)
            levels.append(dict(level=level, queries=len(asked)) | times)
            if level == "session": row |= times | dict(found=[[int(o[0]) for o in hits] for hits in found])
        return row, levels, engine.client.get_server_version()
    finally:
        engines.GRAPH = usual
        engine.client.release_collection(engine.collection)
        engine.client.drop_collection(engine.collection)
        engine.close()


def measure_milvus(args):
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        queries, nearest = draw(args, Path(scratch))
        store = SetStore(Path(scratch)/"images")
        order, rows, levels = exact_order(Path(scratch), queries, nearest), [], []
        for name in MODES:
            row, asked, version = measure_collection(args, store, store.names(), torch.from_numpy(queries), name)
            levels += asked if name == "every vector" else []
            found = row.pop("found")
            same = 100*float(np.mean([set(a) == set(b.tolist()) for a, b in zip(found, order)]))
            rows.append(row | recalls(found, order) | dict(same=same))
        return dict(pictures=args.pictures, dim=args.dim, clusters=args.clusters, queries=args.queries, server=version,
                    note=args.note, engines=rows, levels=levels)


def milvus_text(m):
    rest = f"{m['queries']} queries; Milvus {m['server']} on the same machine, pymilvus {m['pymilvus']}"
    lines = heading(m, rest, f", in {m['seconds']:.0f} s")
    lines += ["| collection | index | build | median query | 99th percentile | recall@10 | recall@100 | same 100 |",
              "|---|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {o['engine']} | {o['index']} | {o['build_seconds']:.0f} s | {o['median_ms']:.1f} ms | "
              f"{o['p99_ms']:.1f} ms | {o['recall_at_10']:.1f} % | {o['recall_at_100']:.1f} % | {o['same']:.0f} % |"
              for o in m["engines"]]
    lines += ["", "| consistency of the search, every vector | queries | median query | 99th percentile |",
              "|---|---:|---:|---:|"]
    return "\n".join(lines + [f"| {o['level']} | {o['queries']} | {o['median_ms']:.1f} ms | {o['p99_ms']:.1f} ms |"
                              for o in m["levels"]]) + "\n"


def milvus(args):
    "Measure one size and write it beside the others."
    start, m = time.perf_counter(), measure_milvus(args)
    m |= dict(pymilvus=importlib.metadata.version("pymilvus"), seconds=round(time.perf_counter() - start, 1))
    intro = ("# Benchmark of search at a Milvus server\n\n"
             "Made by `python benchmarks/search.py --milvus ADDRESS`. Vectors are random in clusters. Queries are "
             "asked one at a time, 100 answers each; recall is of the exact answers, and *same 100* is the share of "
             "queries that find all of them, so that re-ranking gives the same answers. Building is inserting, sealing "
             f"and indexing. With `--approximate` a collection has a graph (HNSW) from {engines.GRAPH:,} vectors on; "
             "the last row makes it in any case.\n\n")
    def text(found):
        return intro + "\n".join(milvus_text(o) for o in sorted(found.values(), key=lambda o: o["pictures"]))
    publish(args, "milvus_benchmark", f"{args.pictures} vectors, {args.clusters} clusters", m, text)


def main():
    args = parse_args()
    if args.codecs or args.million:
        import region_sets
        return region_sets.codecs(args) if args.codecs else region_sets.collection(args)
    if args.embedded: return embedded(args)
    if args.milvus: return milvus(args)
    start = time.perf_counter()
    m = measure(args)
    made = provenance(args.seed)
    write_json(args.out/"search_benchmark.json",
               m | {"seconds": round(time.perf_counter() - start, 1), "made by": made})
    text = markdown(m, made)
    with atomic_write(args.out/"search_benchmark.md") as part: part.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
