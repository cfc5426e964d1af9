#!/usr/bin/env python3
"""`aladin serve` under load: requests a second, time of a request, memory and start, with torch and without; a longer
index and a kill meanwhile.

The index is the demo's, a thousand drawn scenes with their captions. The client is part of this file: coroutines on the
loopback interface, each with one HTTP/1.1 connection that stays open, each asking the next caption as soon as it has an
answer. It needs no package and little CPU time, and it sees every failed request; it runs on the same cores as the
service and takes its share of them. Writes serve.json and serve.md."""
import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from aladin.data.scenes import write_scenes
from aladin.data.splits import open_split
from aladin.files import atomic_write, write_json
from aladin.runs.record import provenance
from aladin.search.demo import demo
from aladin.search.export import export_onnx


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="duration of each measurement (default: 20)")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--added", type=int, default=500, help="pictures that are added under load")
    parser.add_argument("--folder", type=Path, help="where the demo is or is made (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser.parse_args()


def spread(values):
    return dict(zip(("median_ms", "p95_ms", "p99_ms", "longest_ms"),
                    np.percentile(1000*np.array(values), [50, 95, 99, 100])))


class Served:
    "`aladin serve` as a process."
    def __init__(self, index, *words, port=0):
        start = time.perf_counter()
        command = [sys.executable, "-m", "aladin", "serve", index, "--port", port, *words]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line: raise SystemExit("the service did not start")
        self.port = int(line.rsplit(":", 1)[1])
        asyncio.run(one(self.port, "GET", "/health"))
        self.start_seconds = time.perf_counter() - start

    def resident(self):
        return 1024*next(int(line.split()[1]) for line in open(f"/proc/{self.process.pid}/status")
                         if line.startswith("VmHWM"))

    def processor(self):
        "Seconds of CPU time so far."
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12]))/os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self):
        self.process.kill()
        self.process.wait()


async def request(reader, writer, method, path, body=b""):
    "Status and content of an answer on an open connection."
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split(" ")[1]), await reader.readexactly(length)


async def one(port, method, path, body=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = await request(reader, writer, method, path, body)
    writer.close()
    return answer


async def client(port, bodies, number, step, until, times, failed):
    "Ask one caption after another on one connection."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not until():
        start = time.perf_counter()
        try: status, _ = await request(reader, writer, "POST", "/search", bodies[number % len(bodies)])
        except (OSError, asyncio.IncompleteReadError) as e:
            failed.append(repr(e))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        times.append(time.perf_counter() - start)
        if status != 200: failed.append(status)
        number += step
    writer.close()


async def load(port, bodies, connections, until):
    "The times of all requests, and what failed."
    times, failed = [], []
    await asyncio.gather(*[client(port, bodies, n, connections, until, times, failed) for n in range(connections)])
    return times, failed


def after(seconds):
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def measure(served, bodies, connections, seconds):
    asyncio.run(load(served.port, bodies, connections, after(2)))  # warm up
    start, used, own = time.perf_counter(), served.processor(), time.process_time()
    times, failed = asyncio.run(load(served.port, bodies, connections, after(seconds)))
    took = time.perf_counter() - start
    return dict(connections=connections, requests=len(times), failed=len(failed), seconds=took,
                per_second=len(times)/took, cores=(served.processor() - used)/took,
                client_cores=(time.process_time() - own)/took) | spread(times)


def extend_under_load(served, index, folder, bodies, args):
    "Add pictures from another process while sixteen connections ask, until the service has them."
    adding = subprocess.Popen([sys.executable, "-m", "aladin", "index", "--model", str(model_folder(index)),
                               "--data", str(folder/"more"), "--split", "test", "--out", str(index)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start, seen, limit = time.perf_counter(), [], after(300)

    async def watch():
        while not limit() and (not seen or seen[-1] < args.pictures + args.added):
            seen.append(json.loads((await one(served.port, "GET", "/health"))[1])["pictures"])
            await asyncio.sleep(.2)
        return time.perf_counter() - start

    async def both():
        watching = asyncio.create_task(watch())
        found = await load(served.port, bodies, 16, watching.done)
        return found, await watching

    (times, failed), took = asyncio.run(both())
    return dict(pictures=seen[-1], added=args.added, status=adding.wait(), seconds=took, requests=len(times),
                failed=len(failed)) | spread(times)


def model_folder(index): return Path(json.loads((index/"index.json").read_text())["model_folder"])


def kill_and_restart(served, index, words, bodies):
    "kill -9, then the same port again: seconds until the first answer, and whether the answers are the same."
    def first(port):
        return [h["id"] for h in json.loads(asyncio.run(one(port, "POST", "/search", bodies[0]))[1])["hits"]]
    before, port = first(served.port), served.port
    served.kill()
    again = Served(index, *words, port=port)
    return dict(seconds=again.start_seconds, same=first(port) == before), again


def prepare(args, folder):
    "The demo with an encoder, more scenes to add, and the captions as request bodies."
    made = demo(folder, args.pictures, progress=False)
    if not (made.folder/"index"/"encoder").exists(): export_onnx(made.index, made.folder/"index"/"encoder", 100)
    if not (made.folder/"more").exists():
        write_scenes(made.folder/"more", train=0, minival=0, test=args.pictures + args.added, seed=0, progress=False)
    captions = open_split(made.folder/"scenes", "test").captions
    order = np.random.default_rng(args.seed).permutation(len(captions))
    return made.folder, [json.dumps(dict(text=captions[c], k=10)).encode() for c in order]


def measure_encoder(name, words, folder, bodies, args):
    "All measurements of one way to encode, on a copy of the index."
    index = folder/f"index-{name}"
    shutil.rmtree(index, ignore_errors=True)
    shutil.copytree(folder/"index", index)
    served = Served(index, *words)
    row = dict(encoder=name, start_seconds=served.start_seconds)
    row["load"] = [measure(served, bodies, c, args.seconds) for c in args.connections]
    row["resident_bytes"] = served.resident()
    row["extended"] = extend_under_load(served, index, folder, bodies, args)
    row["restart"], served = kill_and_restart(served, index, words, bodies)
    row["exit_status"] = served.stop()
    return row


def markdown(m, made):
    at = made["machine"]
    lines = ["# Benchmark of the service", "",
             f"Made by `python benchmarks/serve.py` at commit {(made['commit'] or '')[:9]} on {made['date']}: "
             f"{at['processor']}, {m['cores']} cores, OMP_NUM_THREADS={m['threads']}, "
             f"torch {made['versions']['torch']}.", "",
             f"`aladin serve` over {m['pictures']:,} scenes. Every request is a search in two stages with k = 10 and "
             "100 candidates, for a caption of the data set. The client runs on the same machine, in one process, with "
             f"one request after another on each connection; {m['seconds_each']:g} s for each row, after 2 s to warm "
             "up.", "",
             "| encoder | connections | requests a second | median | p95 | p99 | longest | failed "
             "| cores of the service | cores of the client |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {o['encoder']} | {r['connections']} | {r['per_second']:.0f} | {r['median_ms']:.1f} ms | "
              f"{r['p95_ms']:.1f} ms | {r['p99_ms']:.1f} ms | {r['longest_ms']:.0f} ms | {r['failed']} | "
              f"{r['cores']:.2f} | {r['client_cores']:.2f} |" for o in m["encoders"] for r in o["load"]]
    lines += ["",
              "| encoder | ready after | largest resident memory | requests while the index is extended | failed "
              "| p99 meanwhile | ready after kill -9 | same answers |",
              "|---|---:|---:|---:|---:|---:|---:|---|"]
    lines += [f"| {o['encoder']} | {o['start_seconds']:.1f} s | {o['resident_bytes']/1e6:.0f} MB | "
              f"{o['extended']['requests']:,} in {o['extended']['seconds']:.0f} s, {o['extended']['added']} pictures "
              f"added | {o['extended']['failed']} | {o['extended']['p99_ms']:.0f} ms | "
              f"{o['restart']['seconds']:.1f} s | {'yes' if o['restart']['same'] else 'no'} |" for o in m["encoders"]]
    return "\n".join(lines + ["", "`onnx` is `--onnx`, which imports no torch. \"Ready\" is the first answer of "
                                  "`/health`, from the start of Python. While the index is extended, another process "
                                  "encodes pictures on the same cores."]) + "\n"


def main():
    args = parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder, bodies = prepare(args, args.folder or Path(scratch)/"demo")
        rows = [measure_encoder(name, words, folder, bodies, args)
                for name, words in (("onnx", ["--onnx"]), ("torch", []))]
    made = provenance(args.seed)
    m = dict(pictures=args.pictures, cores=len(os.sched_getaffinity(0)), seconds_each=args.seconds,
             threads=os.environ.get("OMP_NUM_THREADS", "not set"), encoders=rows)
    write_json(args.out/"serve.json", m | {"seconds": round(time.perf_counter() - start, 1), "made by": made})
    text = markdown(m, made)
    with atomic_write(args.out/"serve.md") as part: part.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
