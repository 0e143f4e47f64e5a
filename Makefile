# Everything a developer types. The first use of a target makes .venv and installs what it needs; later uses install nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check experiments format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## tune γ on augmented digits and confirm it on fresh seeds (about 3 minutes on 2 cores)
	$(BIN)/gammaopt tune digits

test: $(VENV)/.test  ## run the tests
	@# One thread for each process: more of them wait for each other on the same cores, and a suite takes twice as long.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(VENV)/.test  ## run the slow statistical checks
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.test  ## lint, format check, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# In the order of the gallery. A stopped one goes on: finished cells are kept in runs/experiments.
EXPERIMENTS := phase_portrait loss_curves accuracy_vs_gamma hessian_spectrum catapult_silent_alignment agreement \
	linear_toy width_transfer depth architectures knee residual tuned_vs_one
# Their data are made, so that a data set of yours has no place in them.
WITHOUT_PAPER := catapult_silent_alignment linear_toy tuned_vs_one
PRESET ?= cpu
GIVEN := $(if $(filter command line,$(origin DATA)),$(DATA))
ifeq ($(PRESET),paper)
EXPERIMENTS := $(filter-out $(WITHOUT_PAPER),$(EXPERIMENTS))
ifeq ($(filter experiments,$(MAKECMDGOALS))$(GIVEN),experiments)
$(error the preset paper trains on a data set of yours; give its folder: DATA=PATH)
endif
endif

experiments: $(VENV)/.test  ## measure the paper's claims and rebuild experiments/README.md (PRESET=gpu, or paper DATA=PATH)
	@failed=; for name in $(EXPERIMENTS); do \
		echo "== $$name"; \
		$(BIN)/python experiments/$$name.py --preset $(PRESET) $(if $(GIVEN),--data "$(GIVEN)") || failed="$$failed $$name"; \
	done; \
	$(BIN)/python experiments/gallery.py || failed="$$failed gallery"; \
	if [ "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

format: $(VENV)/.test  ## format and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches; results of studies stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; run: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) can't make a virtual environment; on Debian or Ubuntu run: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	@echo "Installing into $(VENV); torch is several GB: about 3 minutes …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tune]'
	touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml
	@echo "Installing into $(VENV); torch is several GB: about 4 minutes …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tune,vision,mup,frameworks,postgres,slurm,dashboard,dev]'
	touch $@ $(VENV)/.demo
