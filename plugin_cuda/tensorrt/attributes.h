// The attributes of an NMS_OPT_TRT node: read with suspicion, written for serialisation.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace nms_opt_trt {

// NVIDIA's names, and of version 2 ours; the meaning is that of graph_surgery/nms_function.py.
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
  int32_t levelTopK;
  int32_t clipBeforeNms;
  float bboxXformClip;
};

// The version of the operator: which attributes its nodes carry.
enum class Version : int32_t { kONE = 1, kTWO = 2 };

// As TensorRT and ONNX have it.
char const* textOf(Version version) noexcept;

// How many attributes nodes of a version carry.
int32_t numAttributes(Version version) noexcept;

// A field for every attribute, those of version 1 first; a name on its own, without data, says what
// a creator expects.
using Fields = std::array<nvinfer1::PluginField, 17>;

// Fields that point into `attributes`, which must outlive them.
Fields fieldsOf(Attributes const& attributes) noexcept;

// Fields without data.
Fields fieldNames() noexcept;

// Read every attribute of a version; others are 0. False, after a message that names the attribute
// and its value, unless each is there once, with the type and number of values it should have, and
// supported.
bool readAttributes(nvinfer1::PluginFieldCollection const* fields, Version version,
                    Attributes& attributes) noexcept;

}  // namespace nms_opt_trt
