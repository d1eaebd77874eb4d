#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace nms_opt_trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

nvinfer1::ILogger* findLogger() noexcept {
  nvinfer1::ILoggerFinder* const finder = loggerFinder.load();
  try {
    return finder != nullptr ? finder->findLogger() : nullptr;
  } catch (...) {  // the interface does not promise otherwise
    return nullptr;
  }
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { loggerFinder.store(finder); }

void logError(char const* format, ...) noexcept {
  char text[512];
  int const start = std::snprintf(text, sizeof text, "NMS_OPT_TRT: ");
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + start, sizeof text - start, format, arguments);
  va_end(arguments);
  if (nvinfer1::ILogger* const logger = findLogger()) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

}  // namespace nms_opt_trt
