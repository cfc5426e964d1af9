"""Write the lists of nbs/start.ipynb, the page that `make lab` opens: tutorials, experiments and modules with the
summary of each."""
import re, sys
from pathlib import Path

import nbformat

nbs = Path(__file__).resolve().parent.parent/"nbs"
STEPS = ("prepare", "pretrain", "train", "evaluate", "attention", "report")
TITLE = "# Start\n\n> Where to go from here"
TEXT = """**[Explore](explore.ipynb)**: type a caption, see what each head finds and which region each word points at. \
Run all cells; without a trained model a small one is made first.

## Tutorials

One task each, from start to end.

{tutorials}

## Experiments

Papermill runs these, one for each step of the graph; `make results` runs the graph. Each can be opened and run by \
hand, its parameters in the first code cell.

{experiments}

## Modules

Each notebook explains, exports, shows and tests one module of the package. `make export` writes the modules after an \
edit.

{modules}"""
# in the order in which data flows through them
PACKAGES = ("", "data", "model", "training", "evaluation", "search", "runs", "view", "cli")


def entry(path):
    "A link with the notebook's title, and its description or first sentence."
    title, _, rest = nbformat.read(path, 4).cells[0].source.partition("\n")
    about = " ".join(rest.strip().split("\n\n")[0].split())
    about = about[2:] if about.startswith("> ") else re.split(r"[:;(.] ?", about)[0].strip()
    return f"- [{title.removeprefix('# ')}]({path.relative_to(nbs).as_posix()})" + (f": {about}" if about else "")


def modules():
    "The notebooks of each package, below its name."
    for package in PACKAGES:
        if package: yield f"\n`aladin.{package}`\n"
        yield from map(entry, sorted((nbs/package).glob("[0-9]*.ipynb")))


def source():
    "The text with its lists."
    steps = [*STEPS, *sorted(p.stem for p in (nbs/"experiments").glob("*.ipynb") if p.stem not in STEPS)]
    lists = dict(tutorials=sorted((nbs/"tutorials").glob("*.ipynb")),
                 experiments=[nbs/"experiments"/f"{n}.ipynb" for n in steps])
    return TEXT.format(modules="\n".join(modules()), **{k: "\n".join(map(entry, v)) for k, v in lists.items()})


if __name__ == "__main__":
    notebook = nbformat.read(nbs/"start.ipynb", 4)
    if "--check" in sys.argv: sys.exit([c.source for c in notebook.cells] != [TITLE, source()])
    for cell, text in zip(notebook.cells, (TITLE, source()), strict=True): cell.source = text
    nbformat.write(notebook, nbs/"start.ipynb")
