// Messages to the application, through the logger that TensorRT offers.
#pragma once

#include <NvInferRuntime.h>

namespace nms_opt_trt {

// Where later messages go; null: to standard error.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Report an error, "NMS_OPT_TRT: " and the text, as printf makes it.
void logError(char const* format, ...) noexcept __attribute__((format(printf, 1, 2)));

}  // namespace nms_opt_trt
