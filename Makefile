# Tandem: `make demo` shows the whole product on a real model; `make test` runs the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: demo loadtest test test-lane-1 test-lane-2 test-nightly test-other-cpus check k8s-check format protos docs baseline

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off --upgrade pip
	$(BIN)/pip install --progress-bar off --quiet -c constraints.txt -e '.[all,cpu,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/tandem demo

DEMO_BUNDLE := runs/demo/bundle/manifest.json

$(DEMO_BUNDLE): | $(STAMP)
	$(BIN)/tandem demo

loadtest: $(STAMP) $(DEMO_BUNDLE)
	$(BIN)/python -m tandem.demo_load

# Two lanes of the same length, for two cores.
LANE_1 := tests/bench tests/bundle tests/deploy tests/estimators tests/export tests/faults/bundles \
          tests/faults/export tests/faults/storm tests/loadtest tests/tandem $(wildcard tests/test_*.py)

test: $(STAMP)
	$(MAKE) --jobs 2 --output-sync=target --no-print-directory test-lane-1 test-lane-2

test-lane-1:
	$(BIN)/pytest $(LANE_1)

test-lane-2:
	$(BIN)/pytest $(addprefix --ignore=,$(LANE_1))

# What takes minutes, or needs what is rarely there.
test-nightly: $(STAMP)
	$(BIN)/pytest -m nightly

# The tests of what rests on kernels, on other CPUs: those that torch and oneDNN can make of this one.
OTHER_CPUS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
              ONEDNN_MAX_CPU_ISA=AVX512_CORE ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI

KERNELS := tests/serve/models tests/serve/sampling tests/serve/engine tests/export

test-other-cpus: $(STAMP)
	for cpu in $(OTHER_CPUS); do echo "$$cpu"; env $$cpu $(BIN)/pytest $(or $(TESTS),$(KERNELS)) || exit 1; done

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/baseline.binpb
	scripts/make_protos --check
	scripts/make_docs --check
	scripts/make_monitoring --check

k8s-check: $(STAMP)
	scripts/check_k8s

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(STAMP)
	scripts/make_protos

docs: $(STAMP)
	scripts/make_docs

# The contract that `make check` holds the protos to. Renew it at a release, and only there: until
# the next one additions pass, and whatever breaks a client of that release fails.
baseline: $(STAMP)
	$(BIN)/buf build protos --path protos/tandem --exclude-source-info -o protos/baseline.binpb
