"A small index with an exported encoder, and `aladin serve` over it as a process."
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import torch

from aladin.data.scenes import write_scenes
from aladin.data.splits import open_split
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel, load_model, save_model
from aladin.search.export import export_onnx
from aladin.search.index import SearchIndex
from small_inputs import with_processor

COMMAND = [sys.executable, "-m", "aladin"]


def make_index(folder, pictures=30):
    "folder/data, folder/model with random weights, folder/index with encoder/."
    write_scenes(folder/"data", train=4, minival=4, test=pictures, seed=2, progress=False)
    test = open_split(folder/"data", "test")
    torch.manual_seed(0)
    config = AladinConfig(
        vocab_size=len(test.processor.tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, region_dim=test.regions.dim, max_tokens=40, drop_last_word=False)
    save_model(with_processor(AladinModel(config), folder/"data"), folder/"model")
    model = load_model(folder/"model")
    index = SearchIndex.build(model, open_split(folder/"data", "test", model.processor), folder/"index", progress=False)
    export_onnx(index, folder/"index"/"encoder", 10)
    return folder


class Served:
    "`aladin serve` as a process; `command` replaces the first words of the command line."
    def __init__(self, index, *words, command=COMMAND, port=0, token="", **environment):
        words = [*command, "serve", index, "--port", port, *words]
        env = os.environ | dict(OMP_NUM_THREADS="1") | environment
        self.process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        line = self.process.stdout.readline()
        assert line.startswith("serving "), self.process.communicate(timeout=30)[1]
        self.folder, self.url, self.token = index, line.split()[-1], token

    def __enter__(self): return self

    def __exit__(self, *_):
        if self.process.poll() is None: self.process.kill()
        self.process.communicate()

    def ask(self, path, body=None, token=None, **headers):
        "Status, headers and content of an answer; JSON as a value."
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        token = self.token if token is None else token
        if token: headers["Authorization"] = f"Bearer {token}"
        asked = urllib.request.Request(self.url + path, data, headers)
        try: reply = urllib.request.urlopen(asked, timeout=60)
        except urllib.error.HTTPError as e: reply = e
        with reply: text = reply.read()
        return (reply.status, reply.headers,
                json.loads(text) if reply.headers.get_content_type() == "application/json" else text)

    def hits(self, path="/search", **body):
        status, _, found = self.ask(path, body)
        assert status == 200, found
        return found["hits"]

    def stop(self):
        "Exit status and standard error after SIGTERM."
        self.process.send_signal(signal.SIGTERM)
        error = self.process.communicate(timeout=60)[1]
        return self.process.returncode, error

    def kill(self):
        self.process.kill()
        self.process.wait()

    @property
    def port(self): return int(self.url.rsplit(":", 1)[1])
