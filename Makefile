# Names of the MLPerf world; everything made at run time lies under BUILD_DIR.
BUILD_DIR ?= build
PYTHON ?= python3
export BUILD_DIR

BIN := .venv/bin
ONNX := $(BUILD_DIR)/onnx/ssd-resnet34-demo.onnx
SURGERED := $(BUILD_DIR)/onnx/ssd-resnet34-demo.nms.onnx
DEMO_LOGS := $(BUILD_DIR)/logs/demo

.PHONY: demo test bench

# The virtual environment: the project and what its commands need, at the tested versions.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv; this takes a minute or two"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export]' tox
	touch $@

# The whole route on a CPU, with the checkpoint and the images of demo/.
demo: .venv/installed
	mkdir -p $(BUILD_DIR)/onnx
	$(BIN)/export-onnx --weights demo/ssd-resnet34-demo.safetensors -o $(ONNX) --force
	$(BIN)/graph-surgery nms $(ONNX) $(SURGERED)
	$(BIN)/harness preprocess $(SURGERED) --dataset demo
	rm -rf $(DEMO_LOGS)
	$(BIN)/harness run $(SURGERED) --dataset demo --scenarios Offline \
	  --test_mode AccuracyOnly,PerformanceOnly --min-duration 20 --min-queries 1 \
	  --pictures 8 --log-dir $(DEMO_LOGS)

test: .venv/installed
	$(BIN)/tox run -e py

# Ratios against peers in one run, to docs/measurements/. Wants a quiet machine.
bench: .venv/installed
	$(BIN)/python -m harness.bench $(SURGERED) -o docs/measurements/harness.json
