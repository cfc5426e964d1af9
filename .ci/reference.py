"""Replace the published figures of a data set by those of a run: python .ci/reference.py results/scenes

Copies what git keeps of the run (tables, figures, executed notebooks, records) to results/reference/<data set>, in
place of the runs and tables that are there; files of other commands, such as search.md or batches.md, stay. From the
scenes it also takes the model of `aladin demo`. Refuses uncommitted changes, and runs that were made with some: each
published figure has a commit beside it that makes it again. Then run `make export`, which writes the tables of the
README, and commit."""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from aladin.runs.stages import report
from aladin.files import InputError, atomic_dir, read_json

root = Path(__file__).resolve().parent.parent
KEPT = (".md", ".csv", ".png", ".json", ".ipynb")
LEFT_OUT = ("graph.json", ".failed.ipynb")


def git(*words, check=True):
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if check and done.returncode: sys.exit(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout


def published_files(folder, target):
    "Files of a run that git keeps under `target`, relative to `folder`."
    files = [p.relative_to(folder) for p in sorted(folder.rglob("*"))
             if p.is_file() and p.suffix in KEPT and not p.name.endswith(LEFT_OUT)]
    files = [f for f in files if not any(part.startswith(".") for part in f.parts)]
    ignored = set(git("check-ignore", *[str(target/f) for f in files], check=False).splitlines()) if files else set()
    return [f for f in files if str(target/f) not in ignored]


def check_committed(folder):
    "Refuse uncommitted changes, now and when the runs were made."
    if changed := git("status", "--porcelain").splitlines():
        raise InputError(root, "git", "no uncommitted changes", f"{len(changed)}, such as {changed[0].strip()}",
                         "commit them and make the run again")
    runs = sorted(folder.glob("*/seed-*/metrics.json"))
    if not runs:
        raise InputError(folder, "folder", "runs with a metrics.json", "none",
                         "name a folder that aladin results wrote, such as results/scenes")
    for path in runs:
        made = read_json(path)["made by"]
        if made["uncommitted_changes"] or not made["commit"]:
            raise InputError(path, "made by", "a run of a commit", "a run with uncommitted changes, or outside git",
                             "make the run again from a commit")


def publish(folder):
    "Write results/reference/<data set>, whole or not at all; its path."
    check_committed(folder)
    target = Path("results")/"reference"/folder.resolve().name
    old = root/target
    with atomic_dir(old, overwrite=True) as part:
        if old.is_dir(): shutil.copytree(old, part, dirs_exist_ok=True)
        for run in part.glob("*/seed-*"): shutil.rmtree(run)
        for file in published_files(folder, target):
            (part/file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder/file, part/file)
        for empty in [p for p in part.iterdir() if p.is_dir() and not any(p.iterdir())]: empty.rmdir()
        report(part, compare=False)
    return target


DEMO = "alad-alignment-and-matching-distill/seed-88"  # the run whose model comes with the package


def publish_demo(folder):
    "Write results/reference/demo, the model of `aladin demo` with the record of its training, from the scenes' runs."
    run, target = folder/DEMO, Path("results")/"reference"/"demo"
    if folder.resolve().name != "scenes" or not (run/"model").is_dir(): return None
    with atomic_dir(root/target, overwrite=True) as part:
        shutil.copytree(run/"model", part/"model")
        for name in ("training.json", "metrics.json"): shutil.copyfile(run/name, part/name)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a data set that aladin results wrote")
    run = parser.parse_args().run
    try: target = publish(run)
    except InputError as e: sys.exit(str(e))
    demo = publish_demo(run)
    if demo: print(f"{demo} has the model of {DEMO}")
    print(f"{target} is replaced:\n{git('status', '--short', '--', str(target))}next: make export, then commit")
