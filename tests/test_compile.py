"""training.compile: compiled layers give the values and gradients of plain ones, for batches of several sizes; needs a
C++ compiler."""
import shutil

import pytest
import torch

from aladin.data.ragged import Ragged
from aladin.model.configuration import AladinConfig
from aladin.model.model import AladinModel

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")


def test_compiled_layers_are_the_plain_ones():
    torch.manual_seed(0)
    model = AladinModel(AladinConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, region_dim=10,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, head_dropout=0.0)).train()

    def run(lengths):
        model.zero_grad()
        captions = Ragged(torch.arange(sum(lengths)) % 50, torch.tensor(lengths))
        out = model.backbone.encode_captions(captions).values
        (out*torch.arange(16)).sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    sizes = ([5, 3, 7], [4, 9], [6, 2, 2, 8, 3])
    plain = [run(lengths) for lengths in sizes]
    model.backbone.compile_layers()
    for lengths, expected in zip(sizes, plain):
        for a, b in zip(run(lengths), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*max(1, b.abs().max().item()))
