"""The docs site from the notebooks, the results, the manifests and docs/pages: `make docs`.

Pages are staged as Markdown and notebooks with their stored outputs (the tests run every notebook from top to bottom),
then Sphinx builds them; any warning, such as a link to nowhere, ends the build."""
import argparse, json, re, shutil, tempfile
from pathlib import Path

import nbformat

import results
from aladin.files import atomic_dir, read_json
from aladin.data.manifests import list_manifests, load_manifest
from notebooks import MODULES, PACKAGES, PICTURES, fix_links, heading, link_names, module_page, nbs, page, root
from results import markdown_table, toctree

docs = Path(__file__).resolve().parent
TUTORIALS = sorted((nbs/"tutorials").glob("*.ipynb"))
STEPS = ("prepare", "pretrain", "train", "evaluate", "attention", "report")
EXPERIMENTS = ([nbs/"experiments"/f"{n}.ipynb" for n in STEPS]
               + [p for p in sorted((nbs/"experiments").glob("*.ipynb")) if p.stem not in STEPS])


def staged(path):
    "Where the site shows a file of the checkout; None where it does not."
    name = path.removesuffix("/")
    if name == "nbs/index.ipynb": return "guide.ipynb"
    if name in ("nbs", "aladin"): return "modules/index.md"
    if re.fullmatch(r"results/reference(/.*)?", name): name = name.replace("results/reference", "results", 1)
    if re.fullmatch(r"results/[\w.-]+\.md", name): return name
    if at := re.fullmatch(r"(results/[\w.-]+)/\w+\.md", name): return f"{at[1]}/index.md"
    if name in ("nbs/experiments/configurations", "nbs/experiments/settings"): return "experiments/configurations.md"
    if re.fullmatch(r"results(/[\w.-]+)?", name): return f"{name}/index.md"
    if name == "data_manifests": return "reference/manifests.md"
    if name == "nbs/tutorials": return "tutorials/index.md"
    if (page := docs/"pages"/name.removeprefix("docs/pages/")).is_file() and name.startswith("docs/pages/"):
        return f"reference/{page.name}"
    path = root/name
    if path in MODULES.values(): return module_page(path)
    if path in TUTORIALS or path in EXPERIMENTS or path == nbs/"explore.ipynb": return path.relative_to(nbs).as_posix()


def section(out, title, about, pages, lines):
    "The index page of a section."
    (out/"index.md").write_text(
        f"# {title}\n\n{about}\n\n" + "\n".join(lines) + "\n\n" + toctree(*pages), encoding="utf-8")


def listing(path, target): return "- [{}]({}): {}".format(heading(path)[0], target, heading(path)[1])


PACKAGE_TITLES = {"": "Basics", "data": "Data", "model": "Model", "training": "Training", "evaluation": "Evaluation",
                  "search": "Search", "runs": "Runs", "view": "Figures and explorer", "cli": "Command line"}


def stage_modules(stage):
    "A page for each module, and an index page for each package."
    for path in MODULES.values():
        page(path, stage/module_page(path), "../" if path.parent == nbs else "../../", staged)
    tops = []
    for package in PACKAGES:
        own = {m: p for m, p in MODULES.items() if p.parent == nbs/package}
        lines = [f"{listing(p, p.name)} (`aladin.{m}`)" for m, p in own.items()]
        if not package:
            top_lines, tops = lines, [p.stem for p in own.values()]
            continue
        section(stage/"modules"/package, PACKAGE_TITLES[package], f"The modules of `aladin.{package}`.",
                [p.stem for p in own.values()], lines)
        tops.append(f"{package}/index")
    about = ("Each notebook explains, exports, shows and tests one module. Packages are listed in the order in which "
             "data flows through them; a package imports only packages above it. Each page has the notebook's text, "
             "its examples with their output, and the parameters of every public function and class; the source is "
             "folded below each.")
    packages = [f"- [{PACKAGE_TITLES[p]}]({p}/index.md): "
                + ", ".join(f"[{m.split('.')[1]}]({q.relative_to(nbs).as_posix()})"
                            for m, q in MODULES.items() if q.parent == nbs/p)
                for p in PACKAGES if p]
    section(stage/"modules", "Modules", about, tops, [*top_lines, "", *packages])


def stage_notebooks(stage):
    "Modules, tutorials, experiments, explorer and guide."
    stage_modules(stage)
    for path in [*TUTORIALS, *EXPERIMENTS]: page(path, stage/path.parent.name/path.name, "../", staged)
    page(nbs/"index.ipynb", stage/"guide.ipynb", "", staged, "Guide")
    if (nbs/"explore.ipynb").exists(): page(nbs/"explore.ipynb", stage/"explore.ipynb", "", staged)
    if TUTORIALS:
        section(stage/"tutorials", "Tutorials", "One task each, from start to end.", [p.stem for p in TUTORIALS],
                [listing(p, p.name) for p in TUTORIALS])
    section(stage/"experiments", "Experiments",
            "The notebooks that papermill runs, one for each step of the graph, and the settings they are given.",
            [*[p.stem for p in EXPERIMENTS], "configurations"],
            [f"- [{heading(p)[0]}]({p.name})" for p in EXPERIMENTS]
            + ["- [Configurations and settings](configurations.md)"])
    (stage/"experiments"/"configurations.md").write_text(configurations(), encoding="utf-8")


def configurations():
    "Every YAML file of the experiments, as it is."
    parts = ["# Configurations and settings\n",
             "A configuration states what it changes of the authors' values; settings say how a data set scales all "
             "of them.\n"]
    for kind in ("configurations", "settings"):
        parts.append(f"## {kind.capitalize()}\n")
        for path in sorted((nbs/"experiments"/kind).glob("*.yaml")):
            parts.append(f"### {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(parts)


def manifests():
    "What each data set and checkpoint consists of."
    parts = ["# Manifests\n",
             "What each data set and checkpoint consists of, where it is had and under which licence. "
             "`aladin fetch NAME --out FOLDER` fetches, `aladin verify NAME FOLDER` checks.\n"]
    for name in list_manifests():
        m = load_manifest(name)
        rows = [[f"`{f.path}`", f"{f.size:,}" if f.size else "",
                 f"`{(f.sha256 or f.md5)[:16]}…`" if f.sha256 or f.md5 else "", f.note or ""] for f in m.files]
        told = {"kind": m.kind, "licence": m.licence, "cite": m.citation,
                "homepage": f"<{m.homepage}>" if m.homepage.startswith("http") else m.homepage}
        parts += [f"## {name}\n", f"{m.title}.\n" if not m.title.endswith(".") else m.title + "\n",
                  *[f"- {k}: {v}" for k, v in told.items()], "", f"{m.note}\n" if m.note else "",
                  markdown_table(["file", "bytes", "digest", "what it holds"], rows)]
    return "\n".join(parts)


def stage_reference(stage):
    "Manifests, and the written pages."
    out = stage/"reference"
    out.mkdir()
    (out/"manifests.md").write_text(manifests(), encoding="utf-8")
    pages = [p for p in sorted((docs/"pages").glob("*.md")) if p.stem != "home"]
    for path in pages:
        (out/path.name).write_text(
            link_names(fix_links(path.read_text(encoding="utf-8"), path, "../", staged), "../"), encoding="utf-8")
    section(out, "Reference",
            "How to search, evaluate, train and run at any scale; what the files look like and where they come from; "
            "how the package differs from the authors' code and from others.",
            ["manifests", *[p.stem for p in pages]],
            ["- [Manifests](manifests.md): what each data set and checkpoint consists of",
             *[listing(p, p.name) for p in pages]])


def between(text, start, end):
    "A part of the README."
    return text.partition(start)[2].partition(end)[0].strip()


def stage_home(stage):
    "The home page: docs/pages/home.md with the README's first words, the results as they are, and pairs that move."
    cells = [c.source for c in nbformat.read(nbs/"index.ipynb", 4).cells]
    shown = read_json(docs/"pairs.json")
    table = (root/"results"/"reference"/"scenes"/"table.md").read_text(encoding="utf-8").split("\n\n")[0]
    pages = {"tutorials/index": "one task each, from start to end",
             "guide": "the README",
             "explore": "the explorer in JupyterLab",
             "modules/index": "each part of the package, explained, with its API",
             "experiments/index": "the notebooks that papermill runs, and their settings",
             "results/index": "tables, figures and attention pages of every run",
             "reference/index": "search, evaluation, training, runs, speed, file formats, differences from the "
                                "authors' code, glossary"}
    if not TUTORIALS: del pages["tutorials/index"]
    fill = dict(title=cells[0], intro=cells[1].partition("\n\n")[0].strip(),
                first=between(cells[1], "## The first minute", "## Two commands"),
                commands=between(cells[1], "## Two commands", "## Search your own"), table=table,
                made=f"The run: seed {shown['made by']['seed']}, commit `{shown['made by']['commit'][:9]}`.",
                seeds="means ± standard deviations over the seeds" if "±" in table else "one seed",
                sections="\n".join(f"- {{doc}}`{page}`: {about}" for page, about in pages.items()))
    text = (docs/"pages"/"home.md").read_text(encoding="utf-8")
    for name, value in fill.items(): text = text.replace(f"{{{{{name}}}}}", value)
    (stage/"index.md").write_text(
        link_names(fix_links(text, docs/"pages"/"home.md", "", staged), "") + "\n" + toctree(*pages), encoding="utf-8")
    view = (root/"aladin"/"search"/"pair.js").read_text(encoding="utf-8")
    files = stage/"_static"
    files.mkdir()
    # one plain script, so that the page works from a folder too
    (files/"pairs.js").write_text(f"const pairs = {json.dumps(shown['pairs'])};\n{view}", encoding="utf-8")
    shutil.copy(root/"aladin"/"search"/"pair.css", files/"pair.css")


def stage_all(stage):
    stage_notebooks(stage)
    (stage/"results").mkdir()
    results.stage(root/"results"/"reference", stage/"results")
    stage_reference(stage)
    stage_home(stage)
    (stage/"pictures").mkdir()
    for name, path in PICTURES.items(): shutil.copy(path, stage/"pictures"/name)


def build(out):
    "Stage and build; `out` is replaced only by a whole site."
    from sphinx.cmd.build import build_main
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)/"pages"
        stage.mkdir()
        stage_all(stage)
        site = Path(folder)/"site"  # myst-nb writes beside it
        if code := build_main(["-W", "-D", f"html_static_path={docs/'static'},{stage/'_static'}", "--keep-going", "-q",
                               "-b", "html", "-c", str(docs), "-d", str(Path(folder)/"doctrees"),
                               str(stage), str(site)]):
            raise SystemExit(code)
        with atomic_dir(out, overwrite=True) as part: shutil.copytree(site, part, dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=root/"_docs", help="folder of the site (default: _docs)")
    build(Path(parser.parse_args().out).resolve())
