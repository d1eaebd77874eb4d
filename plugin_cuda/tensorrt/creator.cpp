// What the library exports: TensorRT's registry calls it when it loads a plugin library.
#include <new>

#include "log.h"
#include "plugin.h"

namespace nms_opt_trt {
namespace {

// For nodes of one version.
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Version version) noexcept
      : version_(version), collection_{numAttributes(version), fields_.data()} {}

  nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Attributes attributes;
    return readAttributes(fields, version_, attributes) ? new (std::nothrow)
                                                              Plugin(version_, attributes)
                                                        : nullptr;
  }

  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return kName; }
  char const* getPluginVersion() const noexcept override { return textOf(version_); }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Version const version_;
  Fields const fields_ = fieldNames();
  nvinfer1::PluginFieldCollection const collection_;
};

}  // namespace
}  // namespace nms_opt_trt

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nms_opt_trt::Creator one(nms_opt_trt::Version::kONE), two(nms_opt_trt::Version::kTWO);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&one, &two};
  count = 2;
  return creators;
}

// The TensorRT whose headers these are, as its getInferLibVersion() counts; read by engine build.
EXPORTED int32_t nmsOptTrtHeaders() {
  return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}

EXPORTED void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  nms_opt_trt::setLoggerFinder(finder);
}
