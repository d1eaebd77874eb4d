// Plays TensorRT towards a plugin library: loads it, makes plugins, asks them what TensorRT asks.
// tests/plugin_driver.py calls it through ctypes and mirrors TensorRT's structures.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>

using namespace nvinfer1;

namespace {

std::string messages;

class Logger final : public ILogger {
  void log(Severity severity, char const* text) noexcept override {
    messages += std::to_string(static_cast<int>(severity)) + " " + text + "\n";
  }
};

class Finder final : public ILoggerFinder {
  ILogger* findLogger() override { return &logger_; }
  Logger logger_;
};

// A dimension: a number, or -1 for one that is not known.
class Dimension final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  void set(int64_t value) {
    value_ = value;
    mImpl = this;
  }
  int64_t value() const { return value_; }
  bool isConstant() const noexcept override { return value_ >= 0; }
  int64_t getConstantValue() const noexcept override { return value_; }
  bool isSizeTensor() const noexcept override { return false; }

 private:
  int64_t value_ = 0;
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(int64_t value) noexcept override {
    constants_[count_].set(value);
    return &constants_[count_++];
  }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&,
                                  IDimensionExpr const&) noexcept override {
    return nullptr;
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&,
                                          IDimensionExpr const&) override {
    return nullptr;
  }

 private:
  Dimension constants_[16];
  int count_ = 0;
};

Finder finder;

IPluginCreatorInterface* const* creators = nullptr;
int32_t creatorCount = 0;

// The library's creator of a version; it has to have one.
IPluginCreatorV3One* creatorOf(int version) {
  for (int i = 0; i < creatorCount; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (creator->getPluginVersion() == std::to_string(version)) {
      return creator;
    }
  }
  std::abort();
}

template <typename Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

IPluginV3OneBuild* build(IPluginV3* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

extern "C" {

// The number of creators; -1 and a message when the library cannot be used.
int driver_open(char const* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    messages = dlerror();
    return -1;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  auto const getCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  auto const setFinder =
      reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  if (getCreators == nullptr || setFinder == nullptr) {
    messages = "a symbol is missing";
    return -1;
  }
  setFinder(&finder);
  creators = getCreators(creatorCount);
  return creatorCount;
}

// Let the library log through the driver, or as if there were no logger.
void driver_use_logger(char const* path, int use) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(use ? &finder
                                                                                    : nullptr);
  dlclose(library);
}

char const* driver_messages() { return messages.c_str(); }
void driver_forget_messages() { messages.clear(); }

int driver_tensorrt_major() { return NV_TENSORRT_MAJOR; }
size_t driver_size_of_desc() { return sizeof(DynamicPluginTensorDesc); }

char const* driver_creator_says(int version, int what) {
  IPluginCreatorV3One* const creator = creatorOf(version);
  switch (what) {
    case 0: return creator->getPluginName();
    case 1: return creator->getPluginVersion();
    case 2: return creator->getPluginNamespace();
    default: return creator->getInterfaceInfo().kind;
  }
}

PluginFieldCollection const* driver_field_names(int version) {
  return creatorOf(version)->getFieldNames();
}

IPluginV3* driver_create(int version, PluginFieldCollection const* fields, int runtimePhase) {
  TensorRTPhase const phase = runtimePhase ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD;
  return creatorOf(version)->createPlugin("nms", fields, phase);
}

void driver_destroy(IPluginV3* plugin) { delete plugin; }
IPluginV3* driver_clone(IPluginV3* plugin) { return plugin->clone(); }
IPluginV3* driver_attach(IPluginV3* plugin) { return runtime(plugin)->attachToContext(nullptr); }

PluginFieldCollection const* driver_fields(IPluginV3* plugin) {
  return runtime(plugin)->getFieldsToSerialize();
}

char const* driver_plugin_says(IPluginV3* plugin, int what) {
  auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  switch (what) {
    case 0: return core->getPluginName();
    case 1: return core->getPluginVersion();
    case 2: return core->getPluginNamespace();
    case 3: return core->getInterfaceInfo().kind;
    case 4: return build(plugin)->getInterfaceInfo().kind;
    case 5: return runtime(plugin)->getInterfaceInfo().kind;
    case 6: return build(plugin)->getTimingCacheID();
    default: return plugin->getInterfaceInfo().kind;
  }
}

int driver_has_capability(IPluginV3* plugin, int type) {
  return plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(type)) != nullptr;
}

int driver_format_limit(IPluginV3* plugin) { return build(plugin)->getFormatCombinationLimit(); }

int driver_output_types(IPluginV3* plugin, int inputs, int outputs, int32_t* types) {
  DataType const in[32]{};
  DataType out[8]{};
  int const status = build(plugin)->getOutputDataTypes(out, outputs, in, inputs);
  for (int i = 0; i < outputs; ++i) {
    types[i] = static_cast<int32_t>(out[i]);
  }
  return status;
}

// Output shapes from input shapes; -1 is the dynamic batch in both.
int driver_output_shapes(IPluginV3* plugin, Dims const* inputs, int count, Dims* outputs,
                         int outputCount) {
  Dimension dimensions[32][Dims::MAX_DIMS];
  DimsExprs in[32]{};
  DimsExprs out[8]{};
  for (int i = 0; i < count; ++i) {
    in[i].nbDims = inputs[i].nbDims;
    for (int j = 0; j < inputs[i].nbDims; ++j) {
      dimensions[i][j].set(inputs[i].d[j]);
      in[i].d[j] = &dimensions[i][j];
    }
  }
  Builder builder;
  int const status =
      build(plugin)->getOutputShapes(in, count, nullptr, 0, out, outputCount, builder);
  for (int i = 0; status == 0 && i < outputCount; ++i) {
    outputs[i].nbDims = out[i].nbDims;
    for (int j = 0; j < out[i].nbDims; ++j) {
      outputs[i].d[j] = static_cast<Dimension const*>(out[i].d[j])->value();
    }
  }
  return status;
}

int driver_supports(IPluginV3* plugin, int position, DynamicPluginTensorDesc const* tensors,
                    int inputs, int outputs) {
  return build(plugin)->supportsFormatCombination(position, tensors, inputs, outputs);
}

int driver_configure(IPluginV3* plugin, DynamicPluginTensorDesc const* tensors, int inputs,
                     int outputs) {
  return build(plugin)->configurePlugin(tensors, inputs, tensors + inputs, outputs);
}

size_t driver_workspace(IPluginV3* plugin, DynamicPluginTensorDesc const* tensors, int inputs,
                        int outputs) {
  return build(plugin)->getWorkspaceSize(tensors, inputs, tensors + inputs, outputs);
}

int driver_shape_change(IPluginV3* plugin, PluginTensorDesc const* tensors, int inputs,
                        int outputs) {
  return runtime(plugin)->onShapeChange(tensors, inputs, tensors + inputs, outputs);
}

int driver_enqueue(IPluginV3* plugin, PluginTensorDesc const* tensors, int inputs,
                   void const* const* inputData, void* const* outputData, void* workspace,
                   void* stream) {
  return runtime(plugin)->enqueue(tensors, tensors + inputs, inputData, outputData, workspace,
                                  static_cast<cudaStream_t>(stream));
}

}  // extern "C"
