"Modules import only modules above them, in the order in which data flows, and no private names."
import ast
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent
package = root/"aladin"
# a package imports only those before it
PACKAGES = ("data", "model", "training", "evaluation", "search", "runs", "view", "cli")
FRONT = ("__init__", "auto")  # the front door: it names modules below it, and imports them when they are used


def order():
    "Module -> its place: the top level first, then the packages, each in the order of its notebooks' numbers."
    places = {}
    for folder in ("", *PACKAGES):
        for notebook in sorted((root/"nbs"/folder).glob("[0-9]*.ipynb")):
            name = notebook.stem.split("_", 1)[1].removeprefix("the_")
            module = {"main": "__main__"}.get(name, name) if not folder else f"{folder}.{name}"
            places[module] = ((len(PACKAGES) + 1, 0) if module == "__main__"
                              else (("", *PACKAGES).index(folder), len(places)))
    return places


def module_of(path):
    "Dotted name of a file, without the package's own."
    return ".".join(path.relative_to(package).with_suffix("").parts)


def imports(path):
    "Every module of the package that a file imports, with the names that it takes, wherever the statement stands."
    here = module_of(path).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith("aladin."): yield a.name.removeprefix("aladin."), ["*"]
        elif isinstance(node, ast.ImportFrom):
            if node.level: base = ".".join([*here[:len(here) - node.level], *([node.module] if node.module else [])])
            elif node.module and node.module.startswith("aladin."): base = node.module.removeprefix("aladin.")
            else: continue
            if base: yield base, [a.name for a in node.names]


FILES = {module_of(p): p for p in sorted(package.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}
EDGES = {(here, there): names for here, path in FILES.items() for there, names in imports(path) if there in FILES}


def test_every_module_has_its_place(): assert set(FILES) == set(order())


def test_modules_import_only_downwards(capsys):
    places = order()
    upwards = [f"{here} imports {there}"
               for here, there in EDGES if here not in FRONT and places[here] <= places[there]]
    with capsys.disabled():
        between = {(a.split(".")[0], b.split(".")[0]) for a, b in EDGES}
        print(f"\n{len(FILES)} modules, {len(EDGES)} imports between modules, "
              f"{len({(a, b) for a, b in between if a != b})} between packages")
    assert EDGES and not upwards


def test_no_private_name_is_imported():
    private = [f"{here} imports {name} of {there}" for (here, there), names in EDGES.items()
               for name in names if name.startswith("_")]
    assert not private


def test_one_notebook_for_each_number():
    for folder in ("", *PACKAGES):
        numbers = Counter(p.name[:2] for p in (root/"nbs"/folder).glob("[0-9]*.ipynb"))
        assert numbers and max(numbers.values()) == 1, (folder, numbers)
