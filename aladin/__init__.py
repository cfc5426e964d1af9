"""Image-text retrieval after ALADIN: a late-interaction teacher over tokens and regions, distilled into a dual-encoder student."""
__version__ = "0.2.0"

import importlib
from . import auto

_PUBLIC = {  # name -> module, and the name in it where that differs; imported when first used
    "AladinModel": "model.card", "AladinProcessor": "data.processor", "SearchIndex": "search.index",
    "open_split": "data.splits", "open_images": "data.splits", "extract": "data.extract",
    "train": ("runs.stages", "train_run"), "evaluate": ("evaluation.metrics", "evaluate_model"),
    "load_config": "model.authors_config", "demo": "search.demo",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    "Import a public name when it is first used: `import aladin` alone takes milliseconds."
    if name not in _PUBLIC: raise AttributeError(f"module 'aladin' has no attribute {name!r}")
    where = _PUBLIC[name]
    module, inner = (where, name) if isinstance(where, str) else where
    value = getattr(importlib.import_module(f"aladin.{module}"), inner)
    globals()[name] = value
    return value


def __dir__(): return sorted([*globals(), *_PUBLIC])


auto.install()
