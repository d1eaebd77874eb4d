#include "heads.h"

#include <algorithm>

#include "log.h"

namespace nms_opt_trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

// The formats that convolutions write their float or INT8 results in (NvInferRuntime.h,
// TensorFormat), so that no reformatting pass over the heads is needed:
//   kLINEAR  every type; small and pre-tensor-core kernels
//   kCHW32   float32, float16, INT8: interleaved INT8 kernels, whatever they write
//   kHWC8    float16: tensor cores, NHWC;  kHWC16  float16, INT8: the same, wider rows
//   kHWC     float32: TF32 tensor cores, NHWC
// Left out: kCHW2 and kCHW4, of kernels without tensor cores; kCHW16 and the formats of DLA, which
// runs no plugins; those with a depth.
int32_t vectorOf(PluginTensorDesc const& tensor, int32_t channels) noexcept {
  DataType const type = tensor.type;
  switch (tensor.format) {
    case TensorFormat::kLINEAR: return 1;
    case TensorFormat::kCHW32: return 32;
    case TensorFormat::kHWC8: return type == DataType::kHALF ? (channels + 7) / 8 * 8 : 0;
    case TensorFormat::kHWC16: return type != DataType::kFLOAT ? (channels + 15) / 16 * 16 : 0;
    case TensorFormat::kHWC: return type == DataType::kFLOAT ? channels : 0;
    default: return 0;
  }
}

// INT8 counts with a scale alone. Tensors with a dynamic range have one (TensorRT 10, weakly
// typed); those of a strongly typed graph have none, and need a DequantizeLinear in the graph.
bool isHeadFormat(PluginTensorDesc const& tensor, bool conf) noexcept {
  bool const isType = tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF ||
                      (conf && tensor.type == DataType::kINT8 && tensor.scale > 0);
  return isType && vectorOf(tensor, 1) != 0;
}

nms_opt_format formatOf(PluginTensorDesc const& tensor, int32_t channels) noexcept {
  nms_opt_dtype const type = tensor.type == DataType::kHALF   ? NMS_OPT_FLOAT16
                             : tensor.type == DataType::kINT8 ? NMS_OPT_INT8
                                                              : NMS_OPT_FLOAT32;
  return {type, vectorOf(tensor, channels), tensor.scale};
}

// A count that int32_t of nms_opt.h holds.
bool isSize(int64_t value) noexcept { return value >= 1 && value <= INT32_MAX; }

bool isHeadShape(Dims const& dims, Dims const& first, char const* kind, int32_t level) noexcept {
  if (dims.nbDims != 4) {
    logError("%s_%d has %d dimensions, expected 4: [N, C, H, W]", kind, level, dims.nbDims);
    return false;
  }
  if (dims.d[0] != first.d[0]) {
    logError("%s_%d is a batch of %lld, loc_0 one of %lld", kind, level,
             static_cast<long long>(dims.d[0]), static_cast<long long>(first.d[0]));
    return false;
  }
  for (int i = 0; i < 4; ++i) {
    if (!isSize(dims.d[i])) {
      logError("%s_%d: its dimension %d is %lld", kind, level, i,
               static_cast<long long>(dims.d[i]));
      return false;
    }
  }
  return true;
}

bool makeLevel(Attributes const& attributes, PluginTensorDesc const* inputs, int32_t i,
               nms_opt_level& level) noexcept {
  PluginTensorDesc const& loc = inputs[i];
  PluginTensorDesc const& conf = inputs[attributes.numLayers + i];
  if (!isHeadShape(loc.dims, inputs[0].dims, "loc", i) ||
      !isHeadShape(conf.dims, inputs[0].dims, "conf", i)) {
    return false;
  }
  if (loc.dims.d[2] != conf.dims.d[2] || loc.dims.d[3] != conf.dims.d[3]) {
    logError("loc_%d has %lld x %lld cells, conf_%d %lld x %lld", i,
             static_cast<long long>(loc.dims.d[2]), static_cast<long long>(loc.dims.d[3]), i,
             static_cast<long long>(conf.dims.d[2]), static_cast<long long>(conf.dims.d[3]));
    return false;
  }
  int64_t const locChannels = loc.dims.d[1];
  int64_t const confChannels = conf.dims.d[1];
  int64_t const anchors = locChannels / 4;
  if (locChannels % 4 != 0 || anchors > NMS_OPT_MAX_ANCHORS) {
    logError("loc_%d has %lld channels, not 4 for each of 1..%d anchors", i,
             static_cast<long long>(locChannels), NMS_OPT_MAX_ANCHORS);
    return false;
  }
  if (confChannels != anchors * attributes.numClasses) {
    logError(
        "conf_%d has %lld channels, expected %lld: %lld anchors, as loc_%d has, of "
        "numClasses = %d",
        i, static_cast<long long>(confChannels),
        static_cast<long long>(anchors * attributes.numClasses), static_cast<long long>(anchors), i,
        attributes.numClasses);
    return false;
  }
  level.height = static_cast<int32_t>(loc.dims.d[2]);
  level.width = static_cast<int32_t>(loc.dims.d[3]);
  level.anchors = static_cast<int32_t>(anchors);
  level.loc = formatOf(loc, static_cast<int32_t>(locChannels));
  level.conf = formatOf(conf, static_cast<int32_t>(confChannels));
  return true;
}

bool arePriors(Dims const& dims, int64_t numPriors) noexcept {
  if (dims.nbDims != 3 || dims.d[0] != 2 || dims.d[1] != 4 * numPriors || dims.d[2] != 1) {
    logError(
        "priors have %d dimensions and %lld values a plane, expected [2, %lld, 1]: four for "
        "each of the %lld priors of the heads",
        dims.nbDims, dims.nbDims > 1 ? static_cast<long long>(dims.d[1]) : 0LL,
        static_cast<long long>(4 * numPriors), static_cast<long long>(numPriors));
    return false;
  }
  return true;
}

}  // namespace

bool isFormatSupported(Attributes const& attributes, int32_t position,
                       DynamicPluginTensorDesc const* tensors) noexcept {
  PluginTensorDesc const& tensor = tensors[position].desc;
  int32_t const levels = attributes.numLayers;
  if (position < 2 * levels) {
    bool const conf = position >= levels;
    PluginTensorDesc const& first = tensors[conf ? levels : 0].desc;
    return isHeadFormat(tensor, conf) && tensor.type == first.type && tensor.format == first.format;
  }
  bool const isCount = position == numInputs(attributes) + 1;
  return tensor.format == TensorFormat::kLINEAR &&
         tensor.type == (isCount ? DataType::kINT32 : DataType::kFLOAT);
}

bool makeConfig(Attributes const& attributes, PluginTensorDesc const* inputs,
                nms_opt_config& config, int32_t& batch) noexcept {
  config = {};
  config.num_levels = attributes.numLayers;
  config.num_classes = attributes.numClasses;
  config.background_class = attributes.backgroundLabelId;
  config.top_k = attributes.topK;
  config.keep_top_k = attributes.keepTopK;
  config.sigmoid = attributes.confSigmoid;
  config.confidence_threshold = attributes.confidenceThreshold;
  config.nms_threshold = attributes.nmsThreshold;
  config.level_top_k = attributes.levelTopK;
  config.clip_before_nms = attributes.clipBeforeNms;
  config.bbox_xform_clip = attributes.bboxXformClip;
  int64_t numPriors = 0;
  for (int32_t i = 0; i < attributes.numLayers; ++i) {
    nms_opt_level& level = config.levels[i];
    if (!makeLevel(attributes, inputs, i, level)) {
      return false;
    }
    int64_t const cells = static_cast<int64_t>(level.height) * level.width;
    numPriors += level.anchors * std::min<int64_t>(cells, INT32_MAX);
    if (!isSize(4 * numPriors)) {
      logError("the heads have too many priors");
      return false;
    }
  }
  batch = static_cast<int32_t>(inputs[0].dims.d[0]);
  return arePriors(inputs[2 * attributes.numLayers].dims, numPriors);
}

bool makeConfig(Attributes const& attributes, DynamicPluginTensorDesc const* inputs,
                nms_opt_config& config, int32_t& batch) noexcept {
  PluginTensorDesc largest[kMaxInputs];
  for (int32_t i = 0; i < numInputs(attributes); ++i) {
    Dims const& least = inputs[i].min;
    largest[i] = inputs[i].desc;
    largest[i].dims = inputs[i].max;
    for (int32_t j = 1; j < largest[i].dims.nbDims; ++j) {
      if (least.d[j] != largest[i].dims.d[j]) {
        logError("input %d: its dimension %d is dynamic; only the batch may be", i, j);
        return false;
      }
    }
  }
  return makeConfig(attributes, largest, config, batch);
}

}  // namespace nms_opt_trt
