# Two commands matter: `make results` and `make test`. `make help` lists all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= results
SIZE ?= full
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt

# Without byte-code files every kernel start would compile torch and its friends anew.
unexport PYTHONDONTWRITEBYTECODE
# What runs in .venv finds the commands of .venv first.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: lint help venv dev results reproduce reference test bench docs lab export clean

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "Variables of make results:"
	@echo "  DATA=folder      captions and key files, in the COCO-IR layout (default: the embedded scenes)"
	@echo "  FEATURES=folder  region features, a TSV folder or a region store (default: DATA)"
	@echo "  NAME=name        name of the data set in the results"
	@echo "  SETTINGS=name    how the configurations are scaled (default: by NAME, else default)"
	@echo "  SIZE=tiny|full   tiny takes minutes and only shows that everything runs (default: full)"
	@echo "  SEED=number      first training seed (default: the configurations')"
	@echo "  SEEDS=number     how many seeds: the table then gives mean and standard deviation (default: 1)"
	@echo "  CONFIGURATION='name ...'  only these (default: all six)"
	@echo "  JOBS=number      CPU cores to use (default: all)"
	@echo "  THREADS=number   CPU threads of one run (default: 1)"
	@echo "  VOCABULARY=file  a vocab.txt (default: the data's own, or one made from its captions)"
	@echo "  PICTURES=folder  pictures for the attention figures and for ZERO_SHOT (default: DATA)"
	@echo "  ZERO_SHOT='model ...'  folders of models with two towers, such as CLIP, that get a row without training"
	@echo "  FORCE=1          redo what is already there"
	@echo "  OUT=folder       where the results are written (default: results)"
	@echo "Variable of all: PYTHON=command that makes .venv (default: python3). To start afresh: rm -rf .venv"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11, which constraints.txt needs: name another with make PYTHON=python3.11" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(BIN)/python .ci/get_pip.py; }
	@touch $@

$(VENV)/.core: $(VENV)/.made settings.ini setup.py pyproject.toml constraints.txt
	@echo "installing the package into $(VENV) (1.2 GB with a CPU build of torch, more with CUDA: minutes on a slow line)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the development tools into $(VENV)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo "installing the tools of the docs into $(VENV)"
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

venv: $(VENV)/.core ## make .venv with the package alone

dev: $(VENV)/.dev ## make .venv with the development tools as well

results: $(VENV)/.core ## train, evaluate and compare every configuration; write tables and figures
	@$(RUN) $(BIN)/aladin results --out "$(OUT)" --size $(SIZE) $(if $(DATA),--data "$(DATA)") $(if $(FEATURES),--features "$(FEATURES)") \
	  $(if $(NAME),--name "$(NAME)") $(if $(SETTINGS),--settings "$(SETTINGS)") $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(foreach c,$(CONFIGURATION),--configuration "$(c)") $(if $(JOBS),--jobs $(JOBS)) $(if $(THREADS),--threads $(THREADS)) $(if $(VOCABULARY),--vocabulary "$(VOCABULARY)") \
	  $(if $(PICTURES),--pictures "$(PICTURES)") $(if $(ZERO_SHOT),--zero-shot $(ZERO_SHOT)) $(if $(FORCE),--force)

reproduce: $(VENV)/.core ## compare the runs of OUT/NAME (default: results/scenes) with the published ones
	@$(RUN) $(BIN)/aladin reproduce "$(OUT)/$(or $(NAME),scenes)"

reference: $(VENV)/.dev ## for maintainers: publish the runs of OUT/NAME (default: results/scenes) in results/reference
	@$(RUN) $(BIN)/python .ci/reference.py "$(OUT)/$(or $(NAME),scenes)"

test: $(VENV)/.dev ## run the notebooks as tests, and the tests of tests/
	ALADIN_DEVICE=cpu OMP_NUM_THREADS=1 $(RUN) $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations 20

lint: $(VENV)/.dev ## check the style of notebooks and modules: line length, unused names
	$(RUN) $(BIN)/ruff check

bench: $(VENV)/.core ## measure speed and memory, into results/benchmarks.md and training.md (25 minutes; LONG=1: COCO's size too)
	$(RUN) $(BIN)/python benchmarks/bench.py --out "$(OUT)" $(if $(LONG),--long) $(if $(THREADS),--threads $(THREADS))
	$(RUN) $(BIN)/python benchmarks/training.py --out "$(OUT)" $(if $(THREADS),--threads $(THREADS))

docs: $(VENV)/.docs ## write the docs site into _docs, from the notebooks, the results and the manifests
	$(RUN) $(BIN)/python docs/build.py

lab: $(VENV)/.dev ## open JupyterLab at a start page: explorer, experiments, modules
	$(RUN) $(BIN)/jupyter lab --notebook-dir=nbs --LabApp.default_url=/lab/tree/start.ipynb

export: $(VENV)/.dev ## write aladin/*.py, README.md and the lists of the start page from the notebooks, clean the notebooks
	$(RUN) $(BIN)/nbdev_export
	$(RUN) $(BIN)/nbdev_clean
	$(RUN) $(BIN)/python .ci/readme.py
	$(RUN) $(BIN)/python .ci/start.py

clean: ## remove caches and build products; .venv and results stay
	rm -rf build dist _docs _proc .pytest_cache *.egg-info
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
