# One command each: `make demo` sets everything up and runs the four stages on the embedded model; `make test` tests it.
PYTHON ?= python3        # the interpreter that makes the virtual environment (3.10 - 3.13)
VENV ?= .venv
DEMO_EPOCHS ?= 6         # passes over the 60 demo utterances, each variant
DEMO_WAVS ?= 4           # test utterances decoded to sound, each variant

PYTHON := $(strip $(PYTHON))
VENV := $(strip $(VENV))
RUN := $(VENV)/bin/python
# several processes of one thread each; those of one file share what it prepares
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

.PHONY: help setup demo test test-fast lint format constraints check clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## create .venv and install what the scripts need (about 2 minutes, 5.4 GB)

$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and f"Python 3.10-3.13 is needed, {sys.version.split()[0]} was found: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

demo: setup  ## run all four stages on the embedded model and corpus (about 3 minutes on 2 cores)
	$(RUN) setup_cosyvoice.py --model-dir CosyVoice-tiny --verify-only --deep-verify
	$(RUN) utt2text_and_feature.py --jsonl json/train.jsonl
	$(RUN) utt2text_and_feature.py --jsonl json/test.jsonl
	PYTHON=$(RUN) bash s3.sh
	$(RUN) model_code.py --variant text_only --run-name demo_text_only --num-epochs $(DEMO_EPOCHS) --decode-wavs $(DEMO_WAVS)
	$(RUN) model_code.py --variant simple --run-name demo --num-epochs $(DEMO_EPOCHS) --decode-wavs $(DEMO_WAVS)
	@echo "Look at loss_curve.png and, in exp/demo/figures/, at *_mel.png (recording, true units, predicted units),"
	@echo "*_alignment.png (where each text token listens) and units.png. Listen to exp/demo/wavs/."

test: $(VENV)/.installed-dev  ## run the tests, several at a time (no network, no GPU)
	$(TEST)

test-fast: $(VENV)/.installed-dev  ## run the tests but for the slowest and the tiny recipe's (minutes)
	$(TEST) -m "not slow" --ignore-glob='tests/test_tiny_*'

lint: $(VENV)/.installed-dev  ## check the code's rules, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy taste CosyVoice/cosyvoice

format: $(VENV)/.installed-dev  ## put the code in its format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

constraints: $(VENV)/.installed-dev  ## look for newer releases of everything and pin them in constraints.txt (then: make test)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	{ sed -n '/^#/p;/^[^#]/q' constraints.txt; sed '/^-/d' requirements.txt requirements-dev.txt | $(RUN) -m uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate -; } > constraints.new
	mv constraints.new constraints.txt

check: test lint  ## what the continuous integration runs, without the demo

clean:  ## remove all features, units and runs (not the virtual environment, not downloaded models)
	rm -rf exp loss_curve.png .pytest_cache .ruff_cache .mypy_cache
	find utt2_output s3_output -mindepth 1 ! -name .gitkeep -delete
