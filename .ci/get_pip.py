"""Install pip into the virtual environment that runs this: Debian's python3 without python3-venv makes environments
that lack it. The file comes from the package index (PIP_INDEX_URL, else PyPI) and is checked against the digest
below."""
import hashlib
import os
import re
import runpy
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

WHEEL = "pip-26.3-py3-none-any.whl"
SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def fetch(folder):
    "The pip wheel, checked."
    page = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    try:
        links = re.findall(r'href="([^"]+)"', urllib.request.urlopen(page, timeout=60).read().decode())
        link = next((o for o in links if o.split("#")[0].endswith("/" + WHEEL) or o.split("#")[0] == WHEEL), None)
        if link is None: sys.exit(f"{page} has no {WHEEL}: install python3-venv and call make again")
        content = urllib.request.urlopen(urllib.parse.urljoin(page, link.split("#")[0]), timeout=60).read()
    except OSError as e:
        sys.exit(f"{page}: {e}: pip cannot be fetched; check the network, or install python3-venv, and call make again")
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{page}: {WHEEL} has another digest than expected; not installed")
    (Path(folder)/WHEEL).write_bytes(content)
    return str(Path(folder)/WHEEL)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch(folder)
        sys.path.insert(0, wheel)
        sys.argv = ["pip", "install", "--quiet", "--no-index", "--no-compile", wheel]
        runpy.run_module("pip", run_name="__main__", alter_sys=True)
