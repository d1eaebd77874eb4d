# Names of the MLPerf world; everything made at run time lies under BUILD_DIR.
BUILD_DIR ?= build
PYTHON ?= python3
export BUILD_DIR

# RUN_ARGS="--benchmarks=ssd-resnet34" (COCO, your WEIGHTS) or ssd-resnet34-demo (what is shipped).
RUN_ARGS ?= --benchmarks=ssd-resnet34
BENCHMARK := $(patsubst --benchmarks=%,%,$(filter --benchmarks=%,$(RUN_ARGS)))
ifeq ($(filter $(BENCHMARK),ssd-resnet34 ssd-resnet34-demo),)
$(error RUN_ARGS names no benchmark; valid: --benchmarks=ssd-resnet34, --benchmarks=ssd-resnet34-demo)
endif
DATASET := $(if $(filter %-demo,$(BENCHMARK)),demo,coco)
WEIGHTS ?= $(BUILD_DIR)/models/ssd-resnet34/resnet34-ssd1200.pytorch
DEMO_WEIGHTS := demo/ssd-resnet34-demo.safetensors

BIN := .venv/bin
ONNX := $(BUILD_DIR)/onnx
DEMO := $(ONNX)/ssd-resnet34-demo.nms.onnx
DEMO_LOGS := $(BUILD_DIR)/logs/demo
FP32 := $(ONNX)/$(BENCHMARK).nms.onnx
INT8 := $(ONNX)/$(BENCHMARK).int8.onnx
CAL_DATA := $(BUILD_DIR)/preprocessed_data/$(BENCHMARK)-cal
CACHE := $(BUILD_DIR)/calibration/$(BENCHMARK).json

.PHONY: demo test bench bench_nms build_plugins calibrate FORCE

# The virtual environment: the project and what its commands need, at the tested versions.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv; this takes a minute or two"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export]' tox
	touch $@

# The whole route on a CPU, with the checkpoint and the images of demo/.
demo: $(DEMO)
	$(BIN)/harness preprocess $(DEMO) --dataset demo
	rm -rf $(DEMO_LOGS)
	$(BIN)/harness run $(DEMO) --dataset demo --scenarios Offline \
	  --test_mode AccuracyOnly,PerformanceOnly --min-duration 20 --min-queries 1 \
	  --pictures 8 --log-dir $(DEMO_LOGS)

test: .venv/installed
	$(BIN)/tox run -e py

# Ratios against peers in one run, to docs/measurements/. Wants a quiet machine.
bench: $(DEMO)
	$(BIN)/python -m harness.bench $(DEMO) -o docs/measurements/harness.json
	$(BIN)/harness preprocess $(DEMO) --dataset demo --split cal
	$(BIN)/python -m engine.bench $(DEMO) --images 64 -o docs/measurements/int8_demo.json \
	  --data $(BUILD_DIR)/preprocessed_data/demo-cal/float32_400x400

# The NMS kernels against their peers, on a GPU: needs torch, torchvision, CuPy and matplotlib.
bench_nms:
	$(PYTHON) -m plugin_cuda
	$(PYTHON) -m plugin_cuda.bench -o docs/measurements/nms.json
	$(PYTHON) -m plugin_cuda.bench --plot docs/measurements/nms.json -o docs/nms.png

# The CUDA kernels and the TensorRT plugin, for every GPU that nvcc knows.
build_plugins: .venv/installed
	$(BIN)/build-plugin

# The INT8 graph and its scales. The commands leave alone what is up to date by its hashes.
calibrate: $(INT8)

CODE := $(wildcard export/*.py graph_surgery/*.py)

$(DEMO): $(DEMO_WEIGHTS)
$(ONNX)/ssd-resnet34.nms.onnx: $(WEIGHTS)
$(ONNX)/%.nms.onnx: $(CODE) | .venv/installed
	mkdir -p $(@D)
	$(BIN)/export-onnx --weights $(filter-out %.py,$^) -o $(ONNX)/$*.onnx --force
	$(BIN)/graph-surgery nms $(ONNX)/$*.onnx $@

$(CACHE): $(FP32) FORCE
	mkdir -p $(@D)
	$(BIN)/harness preprocess $(FP32) --dataset $(DATASET) --split cal --preprocessed $(CAL_DATA)
	$(BIN)/engine calibrate $(FP32) --data $(CAL_DATA) -o $@

$(INT8): $(FP32) $(CACHE)
	$(BIN)/engine quantize $(FP32) $(CACHE) $@
