"""MaxSim of other packages for one caption against many images, for `make bench`: pip install 'aladin[peers]'

PyLate 1.6 and fast-plaid 1.7 demand other versions of torch and transformers. They take part where they are installed
without their requirements: pip install --no-deps pylate fast-plaid fastkmeans datasets dill multiprocess xxhash

Each function prepares what its package wants, outside of the measured time, and returns a function that gives the
scores of all images, float32 [images]. A package that is not installed raises ImportError."""
import tempfile

import numpy as np
import torch


def sentence_transformers(sets, words):
    "The function behind `MultiVectorEncoder.similarity`, on padded documents with their mask."
    from sentence_transformers.util import maxsim
    documents, mask = sets.padded(), sets.mask()
    return lambda: maxsim(words.values[None], documents, b_mask=mask)[0]


def pylate(sets, words):
    "`colbert_scores` on padded documents with their mask."
    from pylate.scores import colbert_scores
    documents, mask = sets.padded(), sets.mask()
    return lambda: colbert_scores(words.values[None], documents, documents_mask=mask)[0]


def maxsim_cpu(sets, words):
    "`maxsim_scores_variable` on a list of documents."
    from maxsim_cpu import maxsim_scores_variable
    documents = [o.numpy() for o in sets.values.split(sets.lengths.tolist())]
    return lambda: torch.from_numpy(np.asarray(maxsim_scores_variable(words.values.numpy(), documents), np.float32))


def fast_plaid(sets, words):
    "An index with codes of four bits: the candidates of all clusters are scored, so that each image has a score."
    from fast_plaid.search import FastPlaid
    folder = tempfile.TemporaryDirectory()
    index = FastPlaid(folder.name, device="cpu")
    index.create(list(sets.values.split(sets.lengths.tolist())))
    every = dict(top_k=len(sets), n_full_scores=len(sets), n_ivf_probe=2**14, show_progress=False)

    def scores(folder=folder):  # keeps the folder, which would be removed with its last reference
        found = torch.full((len(sets),), torch.nan)
        for image, score in index.search(words.values[None], **every)[0]: found[image] = score
        return found
    return scores


PEERS = dict(zip(("sentence-transformers", "PyLate", "maxsim-cpu", "fast-plaid"),
                 (sentence_transformers, pylate, maxsim_cpu, fast_plaid)))
