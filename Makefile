# Names of the MLPerf world; everything made at run time lies under BUILD_DIR.
BUILD_DIR ?= build
PYTHON ?= python3
export BUILD_DIR
ifneq ($(words $(BUILD_DIR)),1)
$(error BUILD_DIR='$(BUILD_DIR)': name a folder without spaces)
endif

# RUN_ARGS="--benchmarks=ssd-resnet34" (COCO, your WEIGHTS), retinanet (Open Images, the same), or
# ssd-resnet34-demo and retinanet-demo (what is shipped); the others: .venv/bin/harness make --help
RUN_ARGS ?= --benchmarks=ssd-resnet34
# Yours instead of the benchmark's; the side of its image, where the file does not tell it; which of
# its entries holds the weights, as ema, where not the first. As options, they stand in result.json.
OWN :=
ifdef WEIGHTS
export WEIGHTS
OWN += --weights "$$WEIGHTS"
endif
ifdef IMAGE_SIZE
export IMAGE_SIZE
OWN += --image-size "$$IMAGE_SIZE"
endif
ifdef ENTRY
export ENTRY
OWN += --entry "$$ENTRY"
endif

# The detector of the demo, of the command line alone
ifneq ($(origin MODEL),command line)
MODEL := ssd-resnet34
endif
ifeq ($(filter ssd-resnet34 retinanet,$(MODEL)),)
$(error MODEL='$(MODEL)': ssd-resnet34 or retinanet)
endif

BIN := .venv/bin
HARNESS := $(BIN)/python -m harness
DEMO := $(BUILD_DIR)/onnx/$(MODEL)-demo.nms.onnx
DEMO_INT8 := $(BUILD_DIR)/demo/$(MODEL)-demo.int8.cpu.onnx
TRITON := $(BUILD_DIR)/triton-server/bin/tritonserver
DEMO_CAL := $(BUILD_DIR)/demo/cal
DEMO_DATA := $(BUILD_DIR)/preprocessed_data
CUDA = $(shell find plugin_cuda tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

.PHONY: help attack demo test test-fast lint lint_python lint_types lint_cuda format bench bench_nms bench_triton \
  build_plugins triton_server demo_onnx predict download_data download_model preprocess_data calibrate \
  generate_engines run_harness run

help: ## This list
	@echo "make TARGET [NAME=VALUE…]; in the brackets of a target are names that it knows"
	@awk -F ':.*## ' '/^[a-z_ -]+:.*## / {printf "  %-29s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The virtual environment: the project and what its commands need, at the tested versions. Of two
# `make` at once, the second waits for the first, and installs only what that has not.
define INSTALL
	@mkdir -p .venv
	@flock -n .venv/lock true || echo "waiting for the lock of .venv, where another make may install"
	@flock .venv/lock sh -ec 'test -e $@ && test -z "$$(find $^ -newer $@)" && exit; \
	  test -x $(BIN)/pip || $(PYTHON) -m venv .venv; \
	  echo "installing into .venv; this takes some minutes, PyTorch most of them"; \
	  $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e $(PARTS); touch $@'
endef
.venv/installed: PARTS = ".[export,triton]" tox
.venv/test: PARTS = ".[test]"
.venv/lint: PARTS = ".[lint]"
.venv/installed: pyproject.toml constraints.txt
	$(INSTALL)
.venv/test .venv/lint: .venv/installed
	$(INSTALL)

# The whole route on a CPU, with the checkpoint and the images of demo/: FP32, and INT8 for CPUs.
demo: demo_onnx ## The whole route on a CPU [MODEL, WEIGHTS, IMAGE_SIZE, ENTRY]
	mkdir -p $(dir $(DEMO_INT8))
	$(HARNESS) preprocess $(DEMO) --dataset demo --val_only
	$(HARNESS) preprocess $(DEMO) --dataset demo --cal_only --preprocessed $(DEMO_CAL)
	$(BIN)/engine calibrate $(DEMO) --data $(DEMO_CAL) \
	  -o $(DEMO_INT8:.onnx=.json) --force
	$(BIN)/engine quantize $(DEMO) $(DEMO_INT8:.onnx=.json) $(DEMO_INT8) --target cpu --force
	$(HARNESS) preprocess $(DEMO_INT8) --dataset demo --val_only
	for model in $(DEMO) $(DEMO_INT8); do \
	  $(HARNESS) run $$model --dataset demo --scenarios Offline \
	    --test_mode AccuracyOnly,PerformanceOnly --min-duration 15 --min-queries 1 \
	    --pictures 8 || exit; \
	done

# What the demo checkpoint detects: IMAGES="a.jpg my-folder"; where that is one place, its name may
# have spaces. Yours: harness predict --help
IMAGES ?= demo/data/val
export IMAGES
predict: demo_onnx ## What it detects [IMAGES, MODEL, WEIGHTS, IMAGE_SIZE, ENTRY]
	@if test -e "$$IMAGES"; then set -- "$$IMAGES"; else set -- $(IMAGES); fi; \
	  $(HARNESS) predict $(DEMO) "$$@"

test: .venv/installed ## All tests, in an environment of their own
	$(BIN)/tox run -e py

# What needs no model, server or compiler: under a minute on two cores.
test-fast: .venv/test ## What needs no model, server or compiler
	$(BIN)/pytest -n 2 --dist loadfile -m "not (slow or gpu or triton or build or golden)"

# Random damage to what users give, and random cases against oracles, for so many minutes; then each
# command that writes, killed so many times. The counts at the end of both.
ATTACK_MINUTES ?= 10
ATTACK_KILLS ?= 5
attack: .venv/test ## Random damage, random cases, kills [ATTACK_MINUTES, ATTACK_KILLS]
	$(BIN)/python -m tests.attack $(ATTACK_MINUTES) $(ATTACK_SEED)
	$(BIN)/python -m tests.attack.kills $(ATTACK_KILLS) $(ATTACK_SEED)

# What CI checks of the sources, and each commit once `.venv/bin/pre-commit install` was run.
lint: lint_python lint_types lint_cuda ## What CI checks of the sources
lint_python: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
lint_types: .venv/lint
	$(BIN)/mypy
lint_cuda: .venv/lint
	$(BIN)/clang-format --dry-run --Werror $(CUDA)

# Writes imports, Python, CUDA and C++ as `make lint` wants them.
format: .venv/lint ## Write the sources as lint wants them
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA)

# Ratios against peers in one run, to docs/measurements/. Wants a quiet machine.
bench: demo_onnx ## Ratios against peers, to docs/measurements/
	$(BIN)/python -m harness.bench harness $(DEMO) -o docs/measurements/harness.json
	$(HARNESS) preprocess $(DEMO) --dataset demo
	$(BIN)/python -m engine.bench int8 $(DEMO) --images 64 -o docs/measurements/int8_demo.json \
	  --data $(DEMO_DATA)/demo-cal/float32_400x400
	$(BIN)/python -m engine.bench calibration $(DEMO) -o docs/measurements/calibration_sets.json \
	  --data $(DEMO_DATA)/demo-cal/float32_400x400 --val $(DEMO_DATA)/demo-val/float32_400x400 \
	  --annotations demo/data/annotations/instances_val.json

# Through a Triton server against the same engine without one, in turns.
bench_triton: demo_onnx triton_server ## The same, of Triton
	$(BIN)/python -m harness.bench triton $(DEMO) -o docs/measurements/triton.json

# The NMS kernels against their peers, on a GPU: needs torch, torchvision, CuPy and matplotlib.
bench_nms: ## The NMS kernels against their peers, on a GPU
	$(PYTHON) -m plugin_cuda
	$(PYTHON) -m plugin_cuda.bench -o docs/measurements/nms.json
	$(PYTHON) -m plugin_cuda.bench --plot docs/measurements/nms.json -o docs/nms.png

# The CUDA kernels and the TensorRT plugin, for every GPU that nvcc knows.
build_plugins: .venv/installed ## The CUDA kernels and the TensorRT plugin
	$(BIN)/build-plugin

# Triton Inference Server without a container: its Python backend alone, in its own environment.
triton_server: $(TRITON) ## Triton with its Python backend, without a container
$(TRITON): .venv/installed
	$(BIN)/python -m harness.triton.server $(BUILD_DIR)/triton-server

demo_onnx: .venv/installed ## The demo's ONNX file [MODEL, WEIGHTS, IMAGE_SIZE, ENTRY]
	$(HARNESS) make onnx --benchmarks=$(MODEL)-demo

# DOWNLOAD_ARGS="--benchmark retinanet --mirror URL"; data also takes --demo, which checks what is
# shipped.
download_data download_model: .venv/installed ## COCO or Open Images; official weights [DOWNLOAD_ARGS]
	$(HARNESS) download $(@:download_%=%) $(DOWNLOAD_ARGS)

# From the weights on; what is up to date by its hashes is used again, what is stale rebuilt.
preprocess_data: ## Images of a benchmark, INT8 [RUN_ARGS, WEIGHTS, IMAGE_SIZE, ENTRY]
calibrate: ## Its INT8 model, held against FP32 [the same]
generate_engines: ## Its engines [the same]
run_harness: ## LoadGen on them, and the table of results [the same]
run: ## Both [the same]
preprocess_data calibrate generate_engines run_harness run: .venv/installed
	@$(HARNESS) make $@ $(OWN) $(RUN_ARGS)
