#include "attributes.h"

#include <cinttypes>
#include <cmath>
#include <cstring>

#include "log.h"
#include "nms_opt.h"

namespace nms_opt_trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct Entry {
  char const* name;
  PluginFieldType type;
  int32_t length;
  size_t offset;  // in Attributes
};

#define ENTRY(name, type, length) {#name, PluginFieldType::type, length, offsetof(Attributes, name)}

constexpr Entry kEntries[] = {
    ENTRY(numClasses, kINT32, 1),      ENTRY(topK, kINT32, 1),
    ENTRY(keepTopK, kINT32, 1),        ENTRY(confidenceThreshold, kFLOAT32, 1),
    ENTRY(nmsThreshold, kFLOAT32, 1),  ENTRY(backgroundLabelId, kINT32, 1),
    ENTRY(numLayers, kINT32, 1),       ENTRY(inputOrder, kINT32, 3),
    ENTRY(shareLocation, kINT32, 1),   ENTRY(varianceEncodedInTarget, kINT32, 1),
    ENTRY(confSigmoid, kINT32, 1),     ENTRY(confSoftmax, kINT32, 1),
    ENTRY(isNormalized, kINT32, 1),    ENTRY(codeType, kINT32, 1),
    ENTRY(levelTopK, kINT32, 1),       ENTRY(clipBeforeNms, kINT32, 1),
    ENTRY(bboxXformClip, kFLOAT32, 1),
};

#undef ENTRY

constexpr size_t kCount = std::tuple_size<Fields>::value;
constexpr size_t kOurs = 3;  // behind NVIDIA's
static_assert(sizeof kEntries / sizeof kEntries[0] == kCount, "one entry for each field");

// Index among the first `count` of kEntries; `count` when there is none.
size_t find(char const* name, size_t count) noexcept {
  size_t i = 0;
  while (i < count && std::strcmp(kEntries[i].name, name) != 0) {
    ++i;
  }
  return i;
}

bool typeFits(PluginFieldType found, PluginFieldType wanted) noexcept {
  return found == wanted || (wanted == PluginFieldType::kINT32 && found == PluginFieldType::kINT64);
}

// Copy a field whose type and length are right; false when a 64-bit integer does not fit.
bool copyValues(PluginField const& field, Entry const& entry, char* target) noexcept {
  auto const* source = static_cast<char const*>(field.data);
  for (int32_t i = 0; i < entry.length; ++i, target += 4) {
    if (field.type != PluginFieldType::kINT64) {
      std::memcpy(target, source + 4 * i, 4);
      continue;
    }
    int64_t wide;
    std::memcpy(&wide, source + 8 * i, 8);
    auto const narrow = static_cast<int32_t>(wide);
    if (narrow != wide) {
      logError("attribute %s = %" PRId64 " does not fit in 32 bits", entry.name, wide);
      return false;
    }
    std::memcpy(target, &narrow, 4);
  }
  return true;
}

bool readField(PluginField const& field, size_t count, Attributes& attributes,
               std::array<bool, kCount>& seen) noexcept {
  if (field.name == nullptr) {
    logError("an attribute without a name");
    return false;
  }
  size_t const index = find(field.name, count);
  if (index == count) {
    logError("attribute %.64s is not known", field.name);
    return false;
  }
  Entry const& entry = kEntries[index];
  if (seen[index]) {
    logError("attribute %s is there twice", entry.name);
    return false;
  }
  seen[index] = true;
  if (!typeFits(field.type, entry.type)) {
    logError("attribute %s has the field type %d, expected %s", entry.name,
             static_cast<int>(field.type),
             entry.type == PluginFieldType::kINT32 ? "5 (INT32) or 10 (INT64)" : "1 (FLOAT32)");
    return false;
  }
  if (field.length != entry.length) {
    logError("attribute %s has %d values, expected %d", entry.name, field.length, entry.length);
    return false;
  }
  if (field.data == nullptr) {
    logError("attribute %s has no data", entry.name);
    return false;
  }
  return copyValues(field, entry, reinterpret_cast<char*>(&attributes) + entry.offset);
}

bool inRange(char const* name, int32_t value, int32_t least, int32_t most) noexcept {
  if (value < least || value > most) {
    logError("attribute %s = %d is not in %d..%d", name, value, least, most);
    return false;
  }
  return true;
}

bool isFraction(char const* name, float value) noexcept {
  if (!(value >= 0 && value <= 1)) {  // NaN is none
    logError("attribute %s = %g is not in [0, 1]", name, value);
    return false;
  }
  return true;
}

bool is(char const* name, int32_t value, int32_t supported) noexcept {
  if (value != supported) {
    logError("attribute %s = %d is not supported, only %d", name, value, supported);
    return false;
  }
  return true;
}

bool isOneActivation(Attributes const& a) noexcept {
  if (!inRange("confSigmoid", a.confSigmoid, 0, 1) ||
      !inRange("confSoftmax", a.confSoftmax, 0, 1)) {
    return false;
  }
  if (a.confSigmoid == a.confSoftmax) {
    logError("attributes confSigmoid = %d and confSoftmax = %d: exactly one must be 1",
             a.confSigmoid, a.confSoftmax);
    return false;
  }
  return true;
}

bool isInputOrder(Attributes const& a) noexcept {
  int32_t const* order = a.inputOrder;
  int32_t const levels = a.numLayers;
  if (order[0] != 0 || order[1] != levels || order[2] != 2 * levels) {
    logError("attribute inputOrder = (%d, %d, %d) is not supported, only (0, %d, %d)", order[0],
             order[1], order[2], levels, 2 * levels);
    return false;
  }
  return true;
}

bool isTopK(Attributes const& a) noexcept {
  int32_t const all = a.numLayers * a.levelTopK;
  if (all == 0) {
    return inRange("topK", a.topK, 1, NMS_OPT_MAX_TOP_K);
  }
  if (a.topK != all) {
    logError(
        "attribute topK = %d is not supported with levelTopK = %d, only numLayers times it: %d",
        a.topK, a.levelTopK, all);
  }
  return a.topK == all;
}

bool isBound(char const* name, float value) noexcept {
  if (!(value >= 0 && std::isfinite(value))) {
    logError("attribute %s = %g is negative or not finite", name, value);
    return false;
  }
  return true;
}

bool areSupported(Attributes const& a) noexcept {
  return inRange("numClasses", a.numClasses, 1, NMS_OPT_MAX_CLASSES) &&
         inRange("numLayers", a.numLayers, 1, NMS_OPT_MAX_LEVELS) &&
         inRange("levelTopK", a.levelTopK, 0, NMS_OPT_MAX_LEVEL_TOP_K) && isTopK(a) &&
         inRange("keepTopK", a.keepTopK, 1, NMS_OPT_MAX_TOP_K) &&
         isFraction("confidenceThreshold", a.confidenceThreshold) &&
         isFraction("nmsThreshold", a.nmsThreshold) &&
         inRange("backgroundLabelId", a.backgroundLabelId, -1, a.numClasses - 1) &&
         isInputOrder(a) && inRange("clipBeforeNms", a.clipBeforeNms, 0, 1) &&
         isBound("bboxXformClip", a.bboxXformClip) && is("shareLocation", a.shareLocation, 1) &&
         is("varianceEncodedInTarget", a.varianceEncodedInTarget, 0) && isOneActivation(a) &&
         is("isNormalized", a.isNormalized, 1) && is("codeType", a.codeType, 1);
}

}  // namespace

Fields fieldsOf(Attributes const& attributes) noexcept {
  Fields fields = fieldNames();
  auto const* const start = reinterpret_cast<char const*>(&attributes);
  for (size_t i = 0; i < kCount; ++i) {
    fields[i].data = start + kEntries[i].offset;
  }
  return fields;
}

Fields fieldNames() noexcept {
  Fields fields;
  for (size_t i = 0; i < kCount; ++i) {
    fields[i] = PluginField(kEntries[i].name, nullptr, kEntries[i].type, kEntries[i].length);
  }
  return fields;
}

char const* textOf(Version version) noexcept { return version == Version::kONE ? "1" : "2"; }

int32_t numAttributes(Version version) noexcept {
  return static_cast<int32_t>(version == Version::kONE ? kCount - kOurs : kCount);
}

bool readAttributes(nvinfer1::PluginFieldCollection const* fields, Version version,
                    Attributes& attributes) noexcept {
  if (fields == nullptr || fields->nbFields < 0 ||
      (fields->nbFields > 0 && fields->fields == nullptr)) {
    logError("no attributes were given");
    return false;
  }
  auto const count = static_cast<size_t>(numAttributes(version));
  attributes = {};
  std::array<bool, kCount> seen{};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    if (!readField(fields->fields[i], count, attributes, seen)) {
      return false;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if (!seen[i]) {
      logError("attribute %s is missing; 'graph-surgery nms' writes all of them", kEntries[i].name);
      return false;
    }
  }
  return areSupported(attributes);
}

}  // namespace nms_opt_trt
