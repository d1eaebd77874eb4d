// As much of libnvinfer.so as registers a plugin library; writes what it is asked to standard
// output. It compiles with the headers of TensorRT 10 and 11.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

using namespace nvinfer1;

namespace {

class Registry final : public IPluginRegistry {
 public:
  // Null for what cannot be opened, has no creators, or registers nothing but names and versions
  // that are there.
  PluginLibraryHandle loadLibrary(char const* path) noexcept override {
    std::string names;
    void* const library = dlopen(path, RTLD_LAZY);
    void* const symbol = library != nullptr ? dlsym(library, "getCreators") : nullptr;
    if (symbol != nullptr) {
      int32_t count = 0;
      auto* const creators =
          reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(symbol)(count);
      for (int32_t i = 0; i < count; ++i) {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        std::string const name =
            std::string(" ") + creator->getPluginName() + " " + creator->getPluginVersion();
        if (names_.insert(name).second) {
          names += name;
        }
      }
    }
    std::printf("%s:%s\n", path, names.c_str());
    std::fflush(stdout);
    return names.empty() ? nullptr : library;
  }

  int32_t size() const noexcept { return static_cast<int32_t>(names_.size()); }

  void setErrorRecorder(IErrorRecorder*) noexcept override { std::abort(); }
  IErrorRecorder* getErrorRecorder() const noexcept override { std::abort(); }
  bool isParentSearchEnabled() const override { std::abort(); }
  void setParentSearchEnabled(bool) override { std::abort(); }
  void deregisterLibrary(PluginLibraryHandle) noexcept override { std::abort(); }
  bool registerCreator(IPluginCreatorInterface&, char const*) noexcept override { std::abort(); }
  IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { std::abort(); }
  IPluginCreatorInterface* getCreator(char const*, char const*, char const*) noexcept override {
    std::abort();
  }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { std::abort(); }
  IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept override {
    std::abort();
  }
  int32_t releasePluginResource(char const*) noexcept override { std::abort(); }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override {
    std::abort();
  }
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, char const*) noexcept override { std::abort(); }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { std::abort(); }
  IPluginCreator* getPluginCreator(char const*, char const*, char const*) noexcept override {
    std::abort();
  }
  bool deregisterCreator(IPluginCreator const&) noexcept override { std::abort(); }
#endif

 private:
  std::set<std::string> names_;
};

Registry registry;

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED IPluginRegistry* getPluginRegistry() noexcept { return &registry; }

// How many plugins there are.
EXPORTED int32_t fakeNvinferPlugins() noexcept { return registry.size(); }

// Of the headers, unless the environment says otherwise.
EXPORTED int32_t getInferLibVersion() noexcept {
  char const* const version = std::getenv("FAKE_NVINFER_VERSION");
  return version != nullptr ? std::atoi(version) : NV_TENSORRT_VERSION;
}
