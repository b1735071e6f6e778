# `make run` and `make test` set up what they need; nothing but Python 3.11+, git and make is assumed.
PYTHON ?= python3
BIN := .venv/bin

run: setup            ## a real session on the laptop recipe
	$(BIN)/elson run --recipe laptop

test: sync            ## sync check, notebook tests, pytest
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/pytest

setup: .venv/ready    ## .venv with the locked versions

.venv/ready: requirements.lock settings.ini setup.py pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

sync: setup           ## export notebooks and check that nothing was out of step
	$(BIN)/python tests/check_sync.py

lab: setup            ## JupyterLab on the notebooks, at the explorer of tier mixes
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/explore/tier_mixes.ipynb nbs

bench: setup          ## benchmarks; figures go to benchmarks/results
	$(BIN)/python benchmarks/plan_and_sample.py
	$(BIN)/python benchmarks/policies.py
	$(BIN)/python benchmarks/index_scale.py
	$(BIN)/python benchmarks/classify_domains.py
	$(BIN)/python benchmarks/tier_agreement.py
	$(BIN)/python benchmarks/explorer_latency.py
	$(BIN)/python benchmarks/audit_scale.py --out benchmarks/results/audit_scale.json
	$(BIN)/python benchmarks/dora_exact.py --out benchmarks/results/dora_exact.json
	$(BIN)/python benchmarks/dora_speed.py --out benchmarks/results/dora_speed.json
	$(BIN)/python benchmarks/phase_speed.py --out benchmarks/results/phase_speed.json
	$(BIN)/python benchmarks/kill_and_resume.py --out benchmarks/results/kill_and_resume.json
	$(BIN)/python benchmarks/forecast_check.py --out benchmarks/results/forecast_check.json
	$(BIN)/python benchmarks/exam_speed.py --out benchmarks/results/exam_speed.json

.PHONY: run test setup sync lab bench
