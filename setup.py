"""Package metadata, read from settings.ini.

The wheel also holds files that are not Python: the experiment notebooks with their configurations, the manifests, the
published figures, and the model of `aladin demo`. In a checkout they are at the top level; `aladin.files.resource_dir`
finds them in either place."""
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
optional = ("slurm", "faiss", "search", "import", "evaluation", "export", "serve", "server-tests", "peers", "docs")

RESOURCES = {
    "experiments": ("nbs/experiments", ["*.ipynb", "Snakefile", "*/*.yaml", "profiles/*/*.yaml"]),
    "manifests": ("data_manifests", ["*.yaml"]),
    "reference": ("results/reference", ["*/*/seed-*/metrics.json"]),
    "demo": ("results/reference/demo", ["*.json", "model/*"]),
}
PAGES = ["search/pair.js", "search/pair.css", "search/service.html", "search/service.js", "search/service.css",
         "view/explorer.js", "view/explorer.css"]


class BuildWithResources(build_py):
    "Copies the resources into the package when a wheel is built."
    def run(self):
        super().run()
        if self.editable_mode: return
        for name, (folder, patterns) in RESOURCES.items():
            for path in sorted({p for pattern in patterns for p in (here/folder).glob(pattern) if p.is_file()}):
                target = Path(self.build_lib)/"aladin"/"resources"/name/path.relative_to(here/folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                copyfile(path, target)


setup(
    cmdclass={"build_py": BuildWithResources},
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8") if (here/"README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["aladin", "aladin.*"]),
    package_data={"aladin": PAGES},
    install_requires=cfg["requirements"].split(),
    extras_require={
        extra: cfg[f"{extra}_requirements"].split() for extra in optional
    } | {"dev": " ".join(cfg[f"{extra}_requirements"] for extra in ("dev", *optional)).split()},
    entry_points={
        "console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
)
