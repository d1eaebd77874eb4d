#include "plugin.h"

#include <cstdio>
#include <new>

#include "heads.h"
#include "log.h"
#include "nms_opt.h"

namespace nms_opt_trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = 1;

bool areCounts(Attributes const& attributes, int32_t inputs, int32_t outputs) noexcept {
  if (inputs != numInputs(attributes) || outputs != kNumOutputs) {
    logError(
        "%d inputs and %d outputs, expected %d (loc and conf of numLayers = %d levels, "
        "priors) and %d",
        inputs, outputs, numInputs(attributes), attributes.numLayers, kNumOutputs);
    return false;
  }
  return true;
}

bool isOk(int32_t status) noexcept {
  if (status != NMS_OPT_OK) {
    logError("%s", nms_opt_status_string(status));
  }
  return status == NMS_OPT_OK;
}

// What a run needs; the kernels check here what TensorRT's shapes do not tell.
template <typename Desc>
bool prepare(Attributes const& attributes, Desc const* inputs, nms_opt_config& config,
             int32_t& batch, size_t& workspace) noexcept {
  return makeConfig(attributes, inputs, config, batch) &&
         isOk(nms_opt_workspace_size(&config, batch, &workspace));
}

}  // namespace

Plugin::Plugin(Version version, Attributes const& attributes) noexcept
    : version_(version),
      attributes_(attributes),
      fields_(fieldsOf(attributes_)),
      collection_{numAttributes(version), fields_.data()} {
  // What the time of a run depends on besides types, formats and shapes.
  std::snprintf(timingCacheId_, sizeof timingCacheId_, "%d_%d_%d_%d_%d_%d_%a_%a_%d_%d_%a",
                NMS_OPT_VERSION, attributes.numClasses, attributes.topK, attributes.keepTopK,
                attributes.backgroundLabelId, attributes.confSigmoid,
                attributes.confidenceThreshold, attributes.nmsThreshold, attributes.levelTopK,
                attributes.clipBeforeNms, attributes.bboxXformClip);
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return new (std::nothrow) Plugin(version_, attributes_);
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

int32_t Plugin::getNbOutputs() const noexcept { return kNumOutputs; }

int32_t Plugin::getOutputDataTypes(DataType* types, int32_t numOutputs, DataType const*,
                                   int32_t numInputs) const noexcept {
  if (!areCounts(attributes_, numInputs, numOutputs)) {
    return kFailed;
  }
  types[0] = DataType::kFLOAT;
  types[1] = DataType::kINT32;
  return kOk;
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t numInputs,
                                nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                int32_t numOutputs, nvinfer1::IExprBuilder& builder) noexcept {
  if (!areCounts(attributes_, numInputs, numOutputs)) {
    return kFailed;
  }
  if (inputs[0].nbDims != 4) {
    logError("loc_0 has %d dimensions, expected 4: [N, C, H, W]", inputs[0].nbDims);
    return kFailed;
  }
  outputs[0].nbDims = 3;
  outputs[0].d[0] = inputs[0].d[0];
  outputs[0].d[1] = builder.constant(attributes_.keepTopK);
  outputs[0].d[2] = builder.constant(7);
  outputs[1].nbDims = 1;
  outputs[1].d[0] = inputs[0].d[0];
  return kOk;
}

bool Plugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                       int32_t numInputs, int32_t numOutputs) noexcept {
  return areCounts(attributes_, numInputs, numOutputs) &&
         isFormatSupported(attributes_, position, tensors);
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t numInputs,
                                DynamicPluginTensorDesc const*, int32_t numOutputs) noexcept {
  nms_opt_config config;
  int32_t batch;
  size_t workspace;
  bool const ok = areCounts(attributes_, numInputs, numOutputs) &&
                  prepare(attributes_, inputs, config, batch, workspace);
  return ok ? kOk : kFailed;
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t,
                                DynamicPluginTensorDesc const*, int32_t) const noexcept {
  nms_opt_config config;
  int32_t batch;
  size_t workspace;
  return prepare(attributes_, inputs, config, batch, workspace) ? workspace : 0;
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* inputs, int32_t numInputs,
                              PluginTensorDesc const*, int32_t numOutputs) noexcept {
  nms_opt_config config;
  int32_t batch;
  size_t workspace;
  bool const ok = areCounts(attributes_, numInputs, numOutputs) &&
                  prepare(attributes_, inputs, config, batch, workspace);
  return ok ? kOk : kFailed;
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*,
                        void const* const* inputData, void* const* outputData, void* workspace,
                        cudaStream_t stream) noexcept {
  nms_opt_config config;
  int32_t batch;
  size_t bytes;
  if (!prepare(attributes_, inputs, config, batch, bytes)) {
    return kFailed;
  }
  int32_t const levels = attributes_.numLayers;
  int32_t const status = nms_opt_run(
      &config, batch, inputData, inputData + levels,
      static_cast<float const*>(inputData[2 * levels]), static_cast<float*>(outputData[0]),
      static_cast<int32_t*>(outputData[1]), workspace, bytes, stream);
  return isOk(status) ? kOk : kFailed;
}

}  // namespace nms_opt_trt
