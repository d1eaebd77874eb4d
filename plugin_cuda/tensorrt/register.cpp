// libnmsoptplugin_register.so: to open it is to register libnmsoptplugin.so, which lies beside it,
// with the TensorRT of the process. For programs that open a plugin library and do no more.
//
// The layout of the registry changed between TensorRT 10 and 11, so it is called only when the
// process has the major version of the headers that this file was compiled with.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <climits>
#include <cstdio>
#include <cstring>

#include "log.h"

#define TEXT_OF(macro) TEXT(macro)
#define TEXT(number) #number

namespace nms_opt_trt {
namespace {

constexpr char kPlugin[] = "libnmsoptplugin.so";
constexpr char kTensorRT[] = "libnvinfer.so." TEXT_OF(NV_TENSORRT_MAJOR);

// The path of the plugin's library: the folder of this one, which a constant in it gives away.
void pluginPath(char (&path)[PATH_MAX]) noexcept {
  Dl_info self{};
  dladdr(kPlugin, &self);
  char const* const name = self.dli_fname != nullptr ? self.dli_fname : "";
  char const* const slash = std::strrchr(name, '/');
  int const folder = slash != nullptr ? static_cast<int>(slash + 1 - name) : 0;
  std::snprintf(path, PATH_MAX, "%.*s%s", folder, name, kPlugin);
}

__attribute__((constructor)) void registerPlugin() noexcept {
  // By name, for it may have been opened without making its symbols global; never closed, so that
  // the registry lasts as long as this library, which is not unloaded either (linked so).
  void* const library = dlopen(kTensorRT, RTLD_LAZY | RTLD_NOLOAD);
  void* const scope = library != nullptr ? library : RTLD_DEFAULT;  // or linked into the program
  auto* const version =
      reinterpret_cast<decltype(&getInferLibVersion)>(dlsym(scope, "getInferLibVersion"));
  auto* const registry =
      reinterpret_cast<decltype(&getPluginRegistry)>(dlsym(scope, "getPluginRegistry"));
  if (version == nullptr || registry == nullptr) {
    logError("not registered: this process has not loaded %s, which has to come first", kTensorRT);
    return;
  }
  // 10000 a major version since TensorRT 10, and in TensorRT-RTX, which has versions of its own.
  if (version() / 10000 != NV_TENSORRT_MAJOR) {
    logError(
        "not registered: getInferLibVersion() of this process is %d, this library is for "
        "TensorRT %d",
        version(), NV_TENSORRT_MAJOR);
    return;
  }
  char path[PATH_MAX];
  pluginPath(path);
  if (registry()->loadLibrary(path) == nullptr) {
    logError(
        "not registered: %s is missing or damaged, or a plugin of that name was registered "
        "before",
        path);
  }
}

}  // namespace
}  // namespace nms_opt_trt
