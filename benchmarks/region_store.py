#!/usr/bin/env python3
"""Measure the RegionStore on a folder of one's own: seconds to convert it, and a random read against decoding the TSV
row."""
import argparse, json, os, platform, tempfile, time
from pathlib import Path

import numpy as np

from aladin.data.regions import TsvRegions, convert_regions


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder with features.tsv, features.lineidx, imageid2idx.json, predictions.tsv")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="number format of the store")
    parser.add_argument("--reads", type=int, default=2000, help="random images to read, from each of the two")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    parser.add_argument("--scratch", type=Path,
                        help="folder for the store while it is measured (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def median_seconds(read, ids):
    "Median seconds of one `read(image_id)`, once a first round has brought the files into the page cache."
    times = np.empty((2, len(ids)))
    for round in range(2):
        for i, image_id in enumerate(ids):
            start = time.perf_counter()
            read(image_id)
            times[round, i] = time.perf_counter() - start
    return float(np.median(times[1]))


def filler(source, ids):
    "A read that also copies every number into a batch, as a collator does."
    batch = np.zeros((max(source.num_regions(o) for o in set(ids)), source.dim), np.float32)
    def fill(image_id):
        regions = source.features(image_id)
        batch[:len(regions)] = regions
    return fill


def measure(args):
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        start = time.perf_counter()
        store = convert_regions(args.data, Path(scratch)/"store", dtype=args.dtype, progress=not args.json)
        seconds = time.perf_counter() - start
        sources = [TsvRegions(args.data), store]
        ids = np.random.default_rng(args.seed).choice(store.ids, args.reads).tolist()
        for o in ids[:50]:
            np.testing.assert_array_equal(
                store.features(o), sources[0].features(o).astype(args.dtype).astype(np.float32))
        tsv, mapped = (median_seconds(o.features, ids) for o in sources)
        tsv_fill, mapped_fill = (median_seconds(filler(o, ids), ids) for o in sources)
        return dict(images=len(store), dim=store.dim, dtype=args.dtype,
                    store_bytes=sum(store.info["files"].values()), conversion_seconds=seconds,
                    tsv_read_seconds=tsv, store_read_seconds=mapped, ratio=tsv/mapped,
                    tsv_fill_seconds=tsv_fill, store_fill_seconds=mapped_fill, fill_ratio=tsv_fill/mapped_fill,
                    reads=args.reads, python=platform.python_version(), numpy=np.__version__,
                    machine=platform.machine(), cpus=os.cpu_count())


def main():
    args = parse_args()
    m = measure(args)
    if args.json: return print(json.dumps(m, indent=1))
    rows = [("images", f"{m['images']:,}"),
            ("numbers a region", m["dim"]),
            ("store", f"{m['store_bytes']/1e6:.0f} MB, {m['dtype']}"),
            ("conversion", f"{m['conversion_seconds']:.1f} s"),
            ("read, TSV row", f"{m['tsv_read_seconds']*1e6:.1f} us"),
            ("read, store", f"{m['store_read_seconds']*1e6:.2f} us ({m['ratio']:.0f} times faster)"),
            ("read + copy into a batch, TSV row", f"{m['tsv_fill_seconds']*1e6:.1f} us"),
            ("read + copy into a batch, store",
             f"{m['store_fill_seconds']*1e6:.2f} us ({m['fill_ratio']:.0f} times faster)")]
    for name, value in rows: print(f"{name:<36}{value}")


if __name__ == "__main__": main()
