// NMS_OPT_TRT as a TensorRT plugin: IPluginV3, all of its state the attributes.
#pragma once

#include <NvInferRuntime.h>

#include "attributes.h"

namespace nms_opt_trt {

constexpr char const* kName = "NMS_OPT_TRT";
constexpr char const* kNamespace = "";

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(Version version, Attributes const& attributes) noexcept;
  Plugin(Plugin const&) = delete;  // the fields point into the object
  Plugin& operator=(Plugin const&) = delete;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  char const* getPluginName() const noexcept override { return kName; }
  char const* getPluginVersion() const noexcept override { return textOf(version_); }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t numOutputs,
                             nvinfer1::DataType const* inputTypes,
                             int32_t numInputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t numInputs,
                          nvinfer1::DimsExprs const* shapeInputs, int32_t numShapeInputs,
                          nvinfer1::DimsExprs* outputs, int32_t numOutputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t numInputs, int32_t numOutputs) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t numInputs,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t numOutputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t numInputs,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t numOutputs) const noexcept override;
  char const* getTimingCacheID() noexcept override { return timingCacheId_; }

  // IPluginV3OneRuntime
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t numInputs,
                        nvinfer1::PluginTensorDesc const* outputs,
                        int32_t numOutputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* inputs,
                  nvinfer1::PluginTensorDesc const* outputs, void const* const* inputData,
                  void* const* outputData, void* workspace, cudaStream_t stream) noexcept override;

 private:
  Version const version_;
  Attributes const attributes_;
  Fields const fields_;
  nvinfer1::PluginFieldCollection const collection_;
  char timingCacheId_[128];
};

}  // namespace nms_opt_trt
