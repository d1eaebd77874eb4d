// The C functions of nms_opt.h: checks, the layout of the workspace, the launches.
#include "nms_opt.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cut.cuh"
#include "filter.cuh"
#include "merge.cuh"
#include "suppress.cuh"

namespace {

using namespace nms_opt;

constexpr size_t kAlignment = 256;  // of the parts of the workspace

// Fewer slots than these do not fill a large GPU: then each gets more threads.
constexpr int64_t kFewSlots = 100'000;
constexpr int kFewSlotsLanes = 4;
static_assert(kThreads / kFewSlotsLanes * 4 * NMS_OPT_MAX_CLASSES <= kTileBytes);

int element_size(int32_t dtype) {
  return dtype == NMS_OPT_FLOAT32 ? 4 : dtype == NMS_OPT_FLOAT16 ? 2 : 1;
}

bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool is_fraction(float value) { return value >= 0.0f && value <= 1.0f; }  // false for NaN

// Bytes from a row of channels to the next in a tile.
int64_t row_pitch_of(const nms_opt_format& conf, int cells) {
  return (static_cast<int64_t>(cells) * conf.vector * element_size(conf.dtype) + 15) / 16 * 16;
}

// Shared memory of a tile of so many cells.
int64_t tile_bytes(const nms_opt_format& conf, int channels, int cells) {
  return ((channels + static_cast<int64_t>(conf.vector) - 1) / conf.vector) *
         row_pitch_of(conf, cells);
}

int32_t check_level(const nms_opt_level& level, int32_t num_classes) {
  constexpr int kMaxSide = 1 << 14, kMaxVector = 1 << 16;
  if (level.height < 1 || level.height > kMaxSide || level.width < 1 || level.width > kMaxSide ||
      level.anchors < 1 || level.anchors > NMS_OPT_MAX_ANCHORS) {
    return NMS_OPT_BAD_LEVEL_SHAPE;
  }
  const nms_opt_format &loc = level.loc, &conf = level.conf;
  if ((loc.dtype != NMS_OPT_FLOAT32 && loc.dtype != NMS_OPT_FLOAT16) || loc.vector < 1 ||
      loc.vector > kMaxVector) {
    return NMS_OPT_BAD_LOC_FORMAT;
  }
  if (conf.dtype < NMS_OPT_FLOAT32 || conf.dtype > NMS_OPT_INT8 || conf.vector < 1 ||
      conf.vector > kMaxVector) {
    return NMS_OPT_BAD_CONF_FORMAT;
  }
  if (conf.dtype == NMS_OPT_INT8 && !(conf.scale > 0.0f && std::isfinite(conf.scale))) {
    return NMS_OPT_BAD_CONF_FORMAT;
  }
  // One cell of all channels must fit into shared memory.
  const int channels = level.anchors * num_classes;
  if (conf.vector > 1 && tile_bytes(conf, channels, 1) > kTileBytes) {
    return NMS_OPT_BAD_CONF_FORMAT;
  }
  return NMS_OPT_OK;
}

int32_t check(const nms_opt_config* config, int32_t batch) {
  if (!config) return NMS_OPT_NULL_POINTER;
  if (config->num_levels < 1 || config->num_levels > NMS_OPT_MAX_LEVELS) {
    return NMS_OPT_BAD_NUM_LEVELS;
  }
  if (config->num_classes < 1 || config->num_classes > NMS_OPT_MAX_CLASSES) {
    return NMS_OPT_BAD_NUM_CLASSES;
  }
  if (config->background_class < -1 || config->background_class >= config->num_classes) {
    return NMS_OPT_BAD_BACKGROUND_CLASS;
  }
  if (config->level_top_k < 0 || config->level_top_k > NMS_OPT_MAX_LEVEL_TOP_K) {
    return NMS_OPT_BAD_LEVEL_TOP_K;
  }
  const int all = config->num_levels * config->level_top_k;  // 0: levels are not cut
  if (config->top_k < 1 || (all ? config->top_k != all : config->top_k > NMS_OPT_MAX_TOP_K)) {
    return NMS_OPT_BAD_TOP_K;
  }
  if (config->keep_top_k < 1 || config->keep_top_k > NMS_OPT_MAX_TOP_K) {
    return NMS_OPT_BAD_KEEP_TOP_K;
  }
  if (config->sigmoid != 0 && config->sigmoid != 1) return NMS_OPT_BAD_SIGMOID;
  if (!is_fraction(config->confidence_threshold)) return NMS_OPT_BAD_CONFIDENCE_THRESHOLD;
  if (!is_fraction(config->nms_threshold)) return NMS_OPT_BAD_NMS_THRESHOLD;
  if (config->clip_before_nms != 0 && config->clip_before_nms != 1) {
    return NMS_OPT_BAD_CLIP_BEFORE_NMS;
  }
  if (!(config->bbox_xform_clip >= 0.0f && std::isfinite(config->bbox_xform_clip))) {
    return NMS_OPT_BAD_BBOX_XFORM_CLIP;
  }
  int64_t priors = 0;
  for (int i = 0; i < config->num_levels; ++i) {
    const nms_opt_level& level = config->levels[i];
    if (const int32_t status = check_level(level, config->num_classes)) return status;
    priors += static_cast<int64_t>(level.anchors) * level.height * level.width;
  }
  if (priors * config->num_classes > INT32_MAX) return NMS_OPT_BAD_LEVEL_SHAPE;
  if (batch < 1 || batch > NMS_OPT_MAX_BATCH) return NMS_OPT_BAD_BATCH;
  return NMS_OPT_OK;
}

// Threads for each slot of a tile: 1, or more where there are few slots or many classes.
int lanes_of(const nms_opt_config& config, int batch) {
  int64_t slots = 0;
  bool fits = true;
  for (int i = 0; i < config.num_levels; ++i) {
    const nms_opt_level& level = config.levels[i];
    slots += static_cast<int64_t>(batch) * level.anchors * level.height * level.width;
    const int tile = kThreads * config.num_classes * element_size(level.conf.dtype);
    if (level.conf.vector == 1 && tile > kTileBytes) fits = false;
  }
  return fits && slots >= kFewSlots ? 1 : kFewSlotsLanes;
}

// The kernels' view of a level whose conf begins at `conf`.
Level make_level(const nms_opt_level& level, int num_classes, int tile_slots, const void* loc,
                 const void* conf) {
  Level result{};
  result.loc = loc;
  result.conf = conf;
  result.loc_dtype = level.loc.dtype;
  result.loc_vector = level.loc.vector;
  result.loc_anchors = level.anchors;
  result.loc_cells = level.height * level.width;
  result.conf_dtype = level.conf.dtype;
  result.conf_vector = level.conf.vector;
  result.conf_scale = level.conf.scale;
  const bool linear = level.conf.vector == 1;
  result.anchors = linear ? 1 : level.anchors;
  result.cells = linear ? level.anchors * result.loc_cells : result.loc_cells;
  const int vector = result.conf_vector, channels = result.anchors * num_classes;
  result.conf_rows = (channels + vector - 1) / vector;

  const int size = element_size(level.conf.dtype);
  result.tile_cells = tile_slots / result.anchors;
  while (tile_bytes(level.conf, channels, result.tile_cells) > kTileBytes) --result.tile_cells;
  result.row_pitch = static_cast<int>(row_pitch_of(level.conf, result.tile_cells));

  // Rows follow one another, and so do tiles, at multiples of these.
  const int64_t row_step = static_cast<int64_t>(result.cells) * vector * size;
  const int tile_step = result.tile_cells * vector * size;
  result.copy_bytes = 16;
  while (result.copy_bytes > size &&
         !(is_aligned(conf, result.copy_bytes) && row_step % result.copy_bytes == 0 &&
           tile_step % result.copy_bytes == 0)) {
    result.copy_bytes /= 2;
  }
  return result;
}

// A logit, or with softmax a logarithm of a score, below which no score exceeds the threshold. The
// margin is that of float32: a score that rounds up to 1 comes from a finite logit.
float cut_of(double threshold, bool sigmoid) {
  if (!sigmoid) return static_cast<float>(std::log(threshold) - 1e-3);
  const double rest = 1.0 - threshold + 1e-9;
  return static_cast<float>(std::log(threshold / rest) - 1e-3 - 1e-6 / rest);
}

// The keys of scores above a threshold and not above 1; see `make_key`.
KeyRange key_range_of(float threshold) {
  uint32_t least, range;
  const float one = 1.0f;
  std::memcpy(&least, &threshold, sizeof(least));
  std::memcpy(&range, &one, sizeof(range));
  range -= least;
  int bits = 32;
  for (; range; range /= 2) ++bits;
  return {static_cast<uint64_t>(least) << 32, bits};
}

// Everything of a run but its pointers, which are null where `loc` and `conf` are.
Problem make_problem(const nms_opt_config& config, int lanes, const void* const* loc,
                     const void* const* conf, int* num_tiles) {
  Problem problem{};
  problem.num_levels = config.num_levels;
  problem.num_classes = config.num_classes;
  problem.background = config.background_class;
  problem.top_k = config.top_k;
  problem.keep_top_k = config.keep_top_k;
  problem.level_top_k = config.level_top_k;
  problem.sigmoid = config.sigmoid;
  problem.clip_before_nms = config.clip_before_nms;
  problem.stretch_bound = config.bbox_xform_clip > 0.0f ? config.bbox_xform_clip : INFINITY;
  problem.confidence_threshold = config.confidence_threshold;
  problem.nms_threshold = config.nms_threshold;
  problem.cut = cut_of(config.confidence_threshold, config.sigmoid);
  problem.keys = key_range_of(config.confidence_threshold + 0.0f);  // + 0: no negative zero
  problem.survivors_size = config.num_classes * std::min(config.top_k, config.keep_top_k);
  if (config.level_top_k) problem.survivors_size = std::min(problem.survivors_size, config.top_k);
  std::fill_n(problem.first_tiles, NMS_OPT_MAX_LEVELS, INT_MAX);
  int tiles = 0;
  for (int i = 0; i < config.num_levels; ++i) {
    Level& level = problem.levels[i];
    level = make_level(config.levels[i], config.num_classes, kThreads / lanes,
                       loc ? loc[i] : nullptr, conf ? conf[i] : nullptr);
    level.first_prior = problem.num_priors;
    problem.first_tiles[i] = tiles;
    problem.num_priors += level.anchors * level.cells;
    tiles += (level.cells + level.tile_cells - 1) / level.tile_cells;
  }
  if (num_tiles) *num_tiles = tiles;
  return problem;
}

// Places the parts of the workspace one behind the other; returns their size.
size_t place_workspace(Problem& problem, int batch, void* workspace) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, size_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        static_cast<char*>(workspace) + used);
    used += (count * sizeof(*pointer) + kAlignment - 1) / kAlignment * kAlignment;
  };
  const size_t images = batch;
  take(problem.counters, images * (problem.num_classes + kNumCounters));
  take(problem.lists, images * problem.num_classes * kListSize);
  take(problem.spill, images * kSpillSize);
  take(problem.survivors, images * problem.survivors_size);
  if (problem.level_top_k) take(problem.level_lists, images * problem.num_levels * kLevelListSize);
  take(problem.boxes, images * problem.num_priors);
  take(problem.stats, images * problem.num_priors);
  return used;
}

int32_t check_pointers(const nms_opt_config& config, const void* const* loc,
                       const void* const* conf, const float* priors, const float* detections,
                       const int32_t* num_detections, const void* workspace) {
  if (!loc || !conf || !priors || !detections || !num_detections || !workspace) {
    return NMS_OPT_NULL_POINTER;
  }
  for (int i = 0; i < config.num_levels; ++i) {
    if (!loc[i] || !conf[i]) return NMS_OPT_NULL_POINTER;
    if (!is_aligned(loc[i], element_size(config.levels[i].loc.dtype)) ||
        !is_aligned(conf[i], element_size(config.levels[i].conf.dtype))) {
      return NMS_OPT_MISALIGNED_POINTER;
    }
  }
  const bool aligned = is_aligned(priors, 16) && is_aligned(detections, 4) &&
                       is_aligned(num_detections, 4) && is_aligned(workspace, 16);
  return aligned ? NMS_OPT_OK : NMS_OPT_MISALIGNED_POINTER;
}

// Whether the kernels wait for each other: those compiled for Hopper or later do. A GPU that knows
// how to may run code that does not, from PTX of an older architecture.
cudaError_t can_overlap(bool* result) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, merge);
  *result = attributes.ptxVersion >= 90;
  return error;
}

}  // namespace

int32_t nms_opt_version(void) { return NMS_OPT_VERSION; }

const char* nms_opt_status_string(int32_t status) {
  switch (status) {
    case NMS_OPT_OK: return "success";
    case NMS_OPT_BAD_NUM_LEVELS: return "num_levels is not from 1 to 8";
    case NMS_OPT_BAD_NUM_CLASSES: return "num_classes is not from 1 to 352";
    case NMS_OPT_BAD_BACKGROUND_CLASS:
      return "background_class is neither -1 nor one of the classes";
    case NMS_OPT_BAD_TOP_K:
      return "top_k is not from 1 to 1024, or with level_top_k not num_levels times as much";
    case NMS_OPT_BAD_KEEP_TOP_K: return "keep_top_k is not from 1 to 1024";
    case NMS_OPT_BAD_SIGMOID: return "sigmoid is neither 0 nor 1";
    case NMS_OPT_BAD_CONFIDENCE_THRESHOLD: return "confidence_threshold is not in [0, 1]";
    case NMS_OPT_BAD_NMS_THRESHOLD: return "nms_threshold is not in [0, 1]";
    case NMS_OPT_BAD_LEVEL_SHAPE:
      return "a level's height or width is not from 1 to 16384, its anchors are not from 1 to 32, "
             "or the levels have more than 2^31 - 1 scores";
    case NMS_OPT_BAD_LOC_FORMAT:
      return "a loc format is not float32 or float16 with a vector from 1 to 65536";
    case NMS_OPT_BAD_CONF_FORMAT:
      return "a conf format is not float32, float16 or int8 with a positive scale, its vector is "
             "not from 1 to 65536, or a cell of it needs more than 45056 bytes";
    case NMS_OPT_BAD_BATCH: return "batch is not from 1 to 65535";
    case NMS_OPT_NULL_POINTER: return "a pointer is null";
    case NMS_OPT_MISALIGNED_POINTER:
      return "a pointer is misaligned: priors and workspace to 16 bytes, others to their type";
    case NMS_OPT_WORKSPACE_TOO_SMALL: return "the workspace is smaller than needed";
    case NMS_OPT_BAD_LEVEL_TOP_K: return "level_top_k is not from 0 to 1024";
    case NMS_OPT_BAD_CLIP_BEFORE_NMS: return "clip_before_nms is neither 0 nor 1";
    case NMS_OPT_BAD_BBOX_XFORM_CLIP: return "bbox_xform_clip is negative or not finite";
    default: break;
  }
  if (status < NMS_OPT_CUDA_ERROR) return "unknown status";
  return cudaGetErrorString(static_cast<cudaError_t>(status - NMS_OPT_CUDA_ERROR));
}

int32_t nms_opt_workspace_size(const nms_opt_config* config, int32_t batch, size_t* bytes) {
  if (const int32_t status = check(config, batch)) return status;
  if (!bytes) return NMS_OPT_NULL_POINTER;
  Problem problem = make_problem(*config, kFewSlotsLanes, nullptr, nullptr, nullptr);
  *bytes = place_workspace(problem, batch, nullptr);
  return NMS_OPT_OK;
}

int32_t nms_opt_run(const nms_opt_config* config, int32_t batch, const void* const* loc,
                    const void* const* conf, const float* priors, float* detections,
                    int32_t* num_detections, void* workspace, size_t workspace_bytes,
                    nms_opt_stream stream) {
  if (const int32_t status = check(config, batch)) return status;
  if (const int32_t status =
          check_pointers(*config, loc, conf, priors, detections, num_detections, workspace)) {
    return status;
  }
  int num_tiles = 0;
  const int lanes = lanes_of(*config, batch);
  Problem problem = make_problem(*config, lanes, loc, conf, &num_tiles);
  if (place_workspace(problem, batch, workspace) > workspace_bytes) {
    return NMS_OPT_WORKSPACE_TOO_SMALL;
  }
  problem.priors = reinterpret_cast<const float4*>(priors);
  problem.detections = detections;
  problem.num_detections = num_detections;

  size_t filter_bytes = 0;
  for (int i = 0; i < problem.num_levels; ++i) {
    const Level& level = problem.levels[i];
    filter_bytes = std::max(filter_bytes, static_cast<size_t>(level.conf_rows) * level.row_pitch);
  }
  bool overlap = false;
  cudaError_t error = can_overlap(&overlap);
  const auto start = [&](auto kernel, dim3 grid, int threads, size_t shared, bool dependent) {
    if (error != cudaSuccess) return;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = grid;
    launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared;
    launch.stream = stream;
    launch.attrs = &attribute;
    launch.numAttrs = dependent && overlap ? 1 : 0;
    error = cudaLaunchKernelEx(&launch, kernel, problem);
  };
  start(clear, dim3(batch), kThreads, 0, false);
  const dim3 tiles(num_tiles, batch), classes(problem.num_classes, batch);
  if (lanes == 1) {
    start(filter<1>, tiles, kThreads, filter_bytes, true);
  } else {
    start(filter<kFewSlotsLanes>, tiles, kThreads, filter_bytes, true);
  }
  if (problem.level_top_k) {
    start(cut, dim3(problem.num_levels, batch), kCutThreads, cut_shared_bytes(problem), true);
    start(suppress_parts, classes, kPartThreads, suppress_parts_shared_bytes(problem), true);
  } else if (lanes == 1) {
    start(suppress<128>, classes, 128, suppress_shared_bytes(problem), true);
  } else {
    start(suppress<512>, classes, 512, suppress_shared_bytes(problem), true);
  }
  start(merge, dim3(batch), kMergeThreads, merge_shared_bytes(problem), true);
  return error == cudaSuccess ? NMS_OPT_OK : NMS_OPT_CUDA_ERROR + error;
}
