"""Write README.md from nbs/index.ipynb: nbdev's own command wants Quarto, this wants only nbconvert."""
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def readme():
    "The home notebook as Markdown: directives dropped, cells marked `echo: false` shown by their output alone."
    notebook = nbformat.read(root/"nbs"/"index.ipynb", 4)
    for cell in notebook.cells:
        directives = [line for line in cell.source.splitlines() if line.startswith("#|")]
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        if any("echo: false" in d for d in directives): cell.source = ""
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = text.replace("```\n\n```\n", "").replace("```\nimport", "```python\nimport").replace("](../", "](")
    while "\n\n\n" in text: text = text.replace("\n\n\n", "\n\n")
    return text.strip() + "\n"


if __name__ == "__main__":
    target = root/"README.md"
    if "--check" in sys.argv: sys.exit(target.read_text(encoding="utf-8") != readme())
    target.write_text(readme(), encoding="utf-8")
