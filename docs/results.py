"""Result pages from results/reference/: they read the same files that the tables and figures were written to, so they
cannot disagree."""
import base64, csv, re, shutil

import nbformat
import yaml

from aladin.files import read_json

WAYS = [f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


def slug(name): return re.sub(r"[^\w.-]", "-", name)


def toctree(*pages, hidden=True):
    return "\n".join(["```{toctree}", ":maxdepth: 1", *[":hidden:"]*hidden, "", *pages, "```", ""])


def figure(name, alt, width=""):
    return (f"```{{image}} {name}\n:alt: {' '.join(alt.split())}\n" + (f":width: {width}\n" if width else "")
            + "```\n")


def markdown_table(head, rows):
    "Cells as they are; numbers to the right where the whole column is one."
    right = ["---:" if all(re.fullmatch(r"[\d.,±\s-]*", str(r[i])) for r in rows) else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(str(v) for v in row) + " |" for row in [head, right, *rows]) + "\n"


def provenance(made):
    "Where, when and with what a run was made."
    machine, versions = made["machine"], ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    return (f"Commit `{made['commit'][:9]}`{' with uncommitted changes' if made['uncommitted_changes'] else ''}, "
            f"seed {made['seed']}, {made['date']}; {machine['processor']}, {machine['cores']} cores, "
            f"{machine['threads']} threads, {machine['accelerator'] or 'no accelerator'}; {versions}.")


def runs_of(folder):
    "Configuration -> its runs that have metrics, by seed."
    found = {}
    for path in sorted(folder.glob("*/seed-*/metrics.json")):
        found.setdefault(path.parent.parent.name, []).append(path.parent)
    return found


def seeds_table(runs):
    "What each seed reached on the test set."
    rows = []
    for run in runs:
        m = read_json(run/"metrics.json")
        for head, h in m["heads"].items():
            rows.append([m["seed"], head, *[f"{h[way][f'r{k}']:.1f}" for way in ("i2t", "t2i") for k in (1, 5, 10)],
                         f"{h['rsum']:.1f}", f"{m['train_seconds']:.0f}"])
    return markdown_table(["seed", "head", *WAYS, "rsum", "train seconds"], rows)


def attention_page(run, target, name):
    "The figures of a run's attention notebook under the lines printed with them."
    notebook, parts, number = nbformat.read(run/"attention.ipynb", 4), [], 0
    for output in (o for c in notebook.cells if c.cell_type == "code" for o in c.outputs):
        if output.get("name") == "stdout": parts.append(output.text.strip())
        elif "image/png" in output.get("data", {}):
            number += 1
            file = target.with_name(f"{target.stem}-{number}.png")
            file.write_bytes(base64.b64decode(output.data["image/png"]))
            said = next((p for p in reversed(parts) if not p.startswith("```")), "")
            parts.append(figure(file.name, "The caption above its words: for each word the picture with the region it "
                                           f"points at. {said}"))
    about = notebook.cells[0].source.partition("\n")[2].strip()
    target.write_text(f"# Attention, {run.name.replace('-', ' ')}\n\n`{name}`. {about}\n\n" + "\n\n".join(parts)
                      + f"\n\n{provenance(read_json(run/'metrics.json')['made by'])}\n", encoding="utf-8")


def run_page(name, runs, out):
    "One configuration: every seed's figures, curves, attention, settings, provenance."
    out.mkdir(parents=True, exist_ok=True)
    pages, text = [], [f"# {name}\n", "Recalls on the test set in percent, of each seed.\n", seeds_table(runs)]
    for run in runs:
        text.append(f"## {run.name.replace('-', ' ').capitalize()}\n")
        if (run/"curves.png").exists():
            shutil.copy(run/"curves.png", out/f"{run.name}-curves.png")
            text.append(figure(f"{run.name}-curves.png", f"Training curves of {name}, {run.name}: loss over the steps "
                                                         "on the left, rsum on minival of each head on the right"))
        if (run/"attention.ipynb").exists():
            pages.append(f"{run.name}-attention")
            attention_page(run, out/f"{pages[-1]}.md", name)
            text.append(f"[What its words point at]({pages[-1]}.md)\n")
        text.append(provenance(read_json(run/"metrics.json")["made by"]) + "\n")
    settings = yaml.safe_dump(read_json(runs[0]/"metrics.json")["config"], sort_keys=False)
    text += ["## Settings\n",
             f"Of {runs[0].name}; the other seeds differ in the seed alone.\n" if len(runs) > 1 else "",
             f"```yaml\n{settings}```\n", toctree(*pages) if pages else ""]
    (out/"index.md").write_text("\n".join(text), encoding="utf-8")


def lengths_section(folder, out):
    "The sweep over lengths: a row for each border between tags and regions."
    head, *rows = list(csv.reader((folder/"lengths.csv").open(encoding="utf-8")))
    shutil.copy(folder/"lengths.png", out/"lengths.png")
    one = read_json(next(folder.glob("tokens-*/training.json")))
    return ["## Lengths\n",
            f"{one['config']['name']}, one training for each border between tags and regions, on minival.\n",
            markdown_table(head, [[f"{float(v):.1f}" if "." in v else v for v in r] for r in rows]),
            figure("lengths.png", "The alignment head's rsum on minival over the most tags of an image, their number "
                                  "with the regions being fixed"),
            provenance(one["made by"]) + "\n"]


def data_page(folder, out):
    "One data set: the tables and figures of its report, and a page for each configuration."
    out.mkdir(parents=True, exist_ok=True)
    runs = runs_of(folder)
    text = [f"# {folder.name}\n",
            "Means over the seeds, ± their standard deviation; a click on a column's heading sorts by it.\n",
            (folder/"table.md").read_text(encoding="utf-8")]
    for name, alt in {
            "results.png": "Bars: the rsum of every configuration and head, the figures of the table above",
            "efficiency.png": "Points: text-to-image recall of every configuration and head over the milliseconds a "
                              "query takes"}.items():
        if (folder/name).exists():
            shutil.copy(folder/name, out/name)
            text.append(figure(name, f"{alt}, on {folder.name}"))
    for path in sorted(folder.glob("*.md")):
        if path.name == "table.md": continue
        text += [f"## {path.stem.capitalize()}\n", path.read_text(encoding="utf-8")]
        if (drawn := path.with_suffix(".png")).exists():
            shutil.copy(drawn, out/drawn.name)
            text.append(figure(drawn.name, f"{path.stem.capitalize()}: the figures of the table above, drawn"))
    if (folder/"lengths"/"lengths.csv").exists(): text += lengths_section(folder/"lengths", out)
    text.append("## The runs\n")
    for name in runs:
        run_page(name, runs[name], out/slug(name))
        text.append(f"- [{name}]({slug(name)}/index.md), {len(runs[name])} seed{'s'*(len(runs[name]) > 1)}")
    text.append("\n" + toctree(*[f"{slug(n)}/index" for n in runs]))
    (out/"index.md").write_text("\n".join(text), encoding="utf-8")


def published(path):
    "The figures of the papers, for comparison."
    head, *rows = list(csv.reader(path.open(encoding="utf-8")))
    return markdown_table(head, rows)


def stage(results, out):
    "All result pages."
    names = sorted(p.parent.name for p in results.glob("*/table.md"))
    for name in names: data_page(results/name, out/name)
    parts = ["# Results\n",
             "Made from the files in `results/reference/`, which `make results` and `make bench` wrote: each has its "
             "commit, seed, versions, machine and times beside it.\n"]
    parts += [f"- [{n}]({n}/index.md)" for n in names]
    measured = sorted(results.glob("*.md"))
    for path in measured:
        for file in (path, path.with_suffix(".png")):
            if file.exists(): shutil.copy(file, out/file.name)
        parts.append(f"- [{path.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}]({path.name})")
    if (results/"published.csv").exists(): parts += ["\n## Published figures\n", published(results/"published.csv")]
    pages = [f"{n}/index" for n in names] + [p.stem for p in measured]
    (out/"index.md").write_text("\n".join([*parts, "", toctree(*pages) if pages else ""]), encoding="utf-8")
