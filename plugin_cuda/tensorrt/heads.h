// Tensors as TensorRT describes them, to the problem as the kernels take it.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

#include "attributes.h"
#include "nms_opt.h"

namespace nms_opt_trt {

constexpr int32_t kNumOutputs = 2;
constexpr int32_t kMaxInputs = 2 * NMS_OPT_MAX_LEVELS + 1;

// loc of every level, conf of every level, priors.
inline int32_t numInputs(Attributes const& attributes) noexcept {
  return 2 * attributes.numLayers + 1;
}

// Whether tensor `position` may have its type and format, given those before it.
bool isFormatSupported(Attributes const& attributes, int32_t position,
                       nvinfer1::DynamicPluginTensorDesc const* tensors) noexcept;

// The problem that the inputs pose and its number of images. False, after a message, when a shape
// contradicts the attributes or another shape.
bool makeConfig(Attributes const& attributes, nvinfer1::PluginTensorDesc const* inputs,
                nms_opt_config& config, int32_t& batch) noexcept;

// The same for the largest shapes of a profile; all but the batch must be fixed.
bool makeConfig(Attributes const& attributes, nvinfer1::DynamicPluginTensorDesc const* inputs,
                nms_opt_config& config, int32_t& batch) noexcept;

}  // namespace nms_opt_trt
