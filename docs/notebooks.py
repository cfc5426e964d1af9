"""Notebooks as pages: exported cells become API entries with their source folded below, directives become what Sphinx
understands."""
import ast, importlib, operator, re
from pathlib import Path

import nbformat

import aladin._modidx
from api import Api

root = Path(__file__).resolve().parent.parent
nbs = root/"nbs"
PICTURES = {}  # name on the site -> file of the checkout, of the pictures that pages show
# in the order in which data flows through them
PACKAGES = ("", "data", "model", "training", "evaluation", "search", "runs", "view", "cli")


def exported(path):
    "The module that a notebook exports, None where it exports none."
    found = re.search(r"#\|\s*default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
    return found and found[1]


# module -> notebook
MODULES = {m: p for package in PACKAGES for p in sorted((nbs/package).glob("*.ipynb")) if (m := exported(p))}


def module_page(path): return f"modules/{path.relative_to(nbs).as_posix()}"


def symbols():
    "Where each public name of the package is described; of two with one name neither."
    found = {}
    for module, names in aladin._modidx.d["syms"].items():
        module = module.removeprefix("aladin.")
        for name in names:
            name = name.split(f"{module}.", 1)[1]
            if module in MODULES and not any(part.startswith("_") for part in name.split(".")):
                found.setdefault(name, []).append(module)
    return {name: f"{module_page(MODULES[m[0]])}#{name.lower().replace('.', '')}"
            for name, m in found.items() if len(m) == 1}


SYMBOLS = symbols()


def link_names(text, up):
    "Backticked names and notebooks become links to where they are described; headings, code blocks and links stay."
    def one(match):
        name = match[1].removesuffix("()")
        notebook = nbs/name.removeprefix("nbs/")
        target = SYMBOLS.get(name) or (module_page(notebook) if notebook in MODULES.values() else None)
        return f"[`{match[1]}`]({up}{target})" if target else match[0]
    parts = re.split(r"(```.*?```|^#.*?$|\[[^\]]*\]\([^)]*\))", text, flags=re.S | re.M)
    return "".join(p if i % 2 else re.sub(r"(?<!`)`([\w./]+(?:\(\))?)`(?!`)", one, p) for i, p in enumerate(parts))


def fix_links(text, source, up, staged):
    """Links to files of the checkout lead to the page that shows them; where none does, the words stay and the link
    goes. Pictures come along."""
    def one(match):
        image, label, target = match.groups()
        if re.match(r"\w+:|#", target): return match[0]
        path, _, anchor = target.partition("#")
        there = (source.parent/path).resolve()
        if not there.exists() and (root/path).exists(): there = root/path  # written as the README needs it
        name = there.relative_to(root).as_posix()
        if image:
            PICTURES[slug := name.replace("/", "-")] = root/name
            return f"![{label}]({up}pictures/{slug})"
        page = staged(name)
        return f"[{label}]({up}{page}{'#' + anchor if anchor else ''})" if page else label
    return re.sub(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)", one, text)


def directives(source):
    "The lines `#| name: value` of a cell, and the rest of it."
    own, rest = [], []
    for line in source.split("\n"): (own if line.startswith("#|") else rest).append(line)
    told = dict(re.match(r"#\|\s*([\w-]+):?\s*(.*)", line).groups() for line in own)
    return told, "\n".join(rest).strip("\n")


def defined(source):
    "Public functions and classes of a cell, and the methods that it patches into a class, by their full names."
    for o in ast.parse(source).body:
        if not isinstance(o, (ast.FunctionDef, ast.ClassDef)) or o.name.startswith("_"): continue
        patched = any(getattr(getattr(d, "func", d), "id", "") == "patch" for d in o.decorator_list)
        yield f"{o.args.args[0].annotation.id}.{o.name}" if patched else o.name


def has_figure(cell): return any({"image/png", "image/svg+xml"} & set(o.get("data", {})) for o in cell.outputs)


def code_cell(cell, told, source, path, markdown):
    "A code cell with tags for its directives and the alternative text of its figure."
    outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    for o in outputs:
        if "text/markdown" in o.get("data", {}): o.data["text/markdown"] = markdown(o.data["text/markdown"])
    new = nbformat.v4.new_code_cell(source, outputs=outputs)
    # how a figure was drawn is for those who ask
    folded = "export" in told or "exporti" in told or has_figure(cell) and source.count("\n") > 5
    new.metadata["tags"] = [
        tag for tag, on in {"hide-input": folded, "remove-input": told.get("echo") == "false"}.items() if on]
    if has_figure(cell):
        if not told.get("fig-alt"):
            raise SystemExit(f"{path}: a figure without `#| fig-alt: ...`, which describes it for those who cannot "
                             f"see it. Its cell: {source[:80]!r}")
        new.metadata["mystnb"] = dict(image=dict(alt=told["fig-alt"].strip('"')))
    return new


def cells(notebook, path, module, markdown):
    "The cells of the page."
    for cell in notebook.cells:
        told, source = directives(cell.source)
        if cell.cell_type == "markdown": yield nbformat.v4.new_markdown_cell(markdown(cell.source))
        elif cell.cell_type == "code" and source and "hide" not in told:
            for name in defined(source) if module and "export" in told else ():
                yield nbformat.v4.new_markdown_cell(Api(operator.attrgetter(name)(module)).markdown())
            yield code_cell(cell, told, source, path, markdown)


def page(path, target, up, staged, title=None):
    """One notebook as a page at `target`; `up` leads from its folder to the top of the site; `title` stands in for
    its own."""
    name = next((m for m, p in MODULES.items() if p == path), None)
    markdown = lambda text: link_names(fix_links(text, path, up, staged), up)
    made = list(cells(nbformat.read(path, 4), path.relative_to(root),
                      name and importlib.import_module(f"aladin.{name}"), markdown))
    if title: made[0].source = re.sub(r"^# .*", f"# {title}", made[0].source)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=dict(
        kernelspec=dict(name="python3", display_name="Python 3", language="python"))), target)


def heading(path):
    "Title and description of a notebook or a Markdown page."
    text = nbformat.read(path, 4).cells[0].source if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    lines = text.split("\n")
    return lines[0].removeprefix("# "), next((o[2:] for o in lines[1:4] if o.startswith("> ")), "")
