// The fourteen attributes of an NMS_OPT_TRT node: read with suspicion, written for serialisation.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace nms_opt_trt {

// NVIDIA's names; the meaning is that of graph_surgery/nms_function.py.
struct Attributes {
  int32_t numClasses;
  int32_t topK;
  int32_t keepTopK;
  int32_t backgroundLabelId;
  int32_t numLayers;
  int32_t inputOrder[3];
  int32_t shareLocation;
  int32_t varianceEncodedInTarget;
  int32_t confSigmoid;
  int32_t confSoftmax;
  int32_t isNormalized;
  int32_t codeType;
  float confidenceThreshold;
  float nmsThreshold;
};

// A field for every attribute; a name on its own, without data, says what a creator expects.
using Fields = std::array<nvinfer1::PluginField, 14>;

// Fields that point into `attributes`, which must outlive them.
Fields fieldsOf(Attributes const& attributes) noexcept;

// Fields without data.
Fields fieldNames() noexcept;

// Read every attribute. False, after a message that names the attribute and its value, unless each
// is there once, with the type and number of values it should have, and supported.
bool readAttributes(nvinfer1::PluginFieldCollection const* fields, Attributes& attributes) noexcept;

}  // namespace nms_opt_trt
