"""Write README.md from nbs/index.ipynb: nbdev's own command wants Quarto, this wants only nbconvert.

Cells marked `echo: false` show tables of results/; they are run each time, so that neither the notebook nor the README
can show older figures."""
import ast
import os
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
home = root/"nbs"/"index.ipynb"


def directives(cell): return [line for line in cell.source.splitlines() if line.startswith("#|")]


def run(source, names):
    "Run a cell's code; the value of its last line."
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), str(home), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(home), "eval"), names)


def with_tables(notebook):
    "The notebook with the outputs of its `echo: false` cells made again."
    names = {}
    os.chdir(root)
    for cell in notebook.cells:
        if any("echo: false" in d for d in directives(cell)):
            shown = run(cell.source, names)
            cell.outputs = [nbformat.v4.new_output(
                "execute_result", {"text/markdown": shown.data, "text/plain": repr(type(shown).__name__)})]
    return notebook


def readme(notebook):
    "The home notebook as Markdown: directives dropped, cells marked `echo: false` shown by their output alone."
    for cell in notebook.cells:
        hidden = any("echo: false" in d for d in directives(cell))
        cell.source = "" if hidden else "\n".join(
            line for line in cell.source.splitlines() if not line.startswith("#|"))
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = text.replace("```\n\n```\n", "").replace("```\nimport", "```python\nimport").replace("](../", "](")
    while "\n\n\n" in text: text = text.replace("\n\n\n", "\n\n")
    return text.strip() + "\n"


if __name__ == "__main__":
    target, notebook = root/"README.md", with_tables(nbformat.read(home, 4))
    if "--check" not in sys.argv: nbformat.write(notebook, home)
    text = readme(notebook)
    if "--check" in sys.argv: sys.exit(target.read_text(encoding="utf-8") != text)
    target.write_text(text, encoding="utf-8")
