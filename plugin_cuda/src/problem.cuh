// One run as the kernels see it, and how keys order candidates.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "nms_opt.h"

namespace nms_opt {

// Candidates of a class that have a place in its list, and of an image that have one behind those.
// Beyond that they are found once more from the logits. The list has room for any top_k.
constexpr int kListSize = NMS_OPT_MAX_TOP_K;
constexpr int kSpillSize = 32768;

// Candidates of a level that have a place in its list, where each level is cut by itself. Beyond
// that they are found once more from the logits. What the cuts leave always has a place behind.
constexpr int kLevelListSize = 32768;
static_assert(NMS_OPT_MAX_LEVELS * NMS_OPT_MAX_LEVEL_TOP_K <= kSpillSize);

// Counters of an image behind those of its classes; the last are of the levels' candidates.
enum { kSurvivors, kSpilled, kOfLevels, kNumCounters = kOfLevels + NMS_OPT_MAX_LEVELS };

// A level of the pyramid. conf is seen as `anchors` x `cells` slots; with NCHW the anchors of a
// class follow one another just as its cells do, so there a slot is a cell and anchors is 1.
struct Level {
  const void* loc;
  const void* conf;
  int loc_dtype, loc_vector, loc_anchors, loc_cells;
  int conf_dtype, conf_vector, anchors, cells;
  float conf_scale;
  int conf_rows;    // channels / conf_vector, rounded up
  int first_prior;  // index of its first prior among all
  int tile_cells;   // cells of a tile
  int row_pitch;    // bytes from a row of channels to the next in a tile, a multiple of 16
  int copy_bytes;   // width of the copies that the alignment of conf allows
};

// All keys of a run are above `least`, by less than 2^bits.
struct KeyRange {
  uint64_t least;
  int bits;
};

struct Problem {
  // Index of the first tile of each level among those of an image; behind the levels INT_MAX. Apart
  // from the levels, so that a block finds its own with one read of constant memory.
  int first_tiles[NMS_OPT_MAX_LEVELS];
  Level levels[NMS_OPT_MAX_LEVELS];
  int num_levels;
  int num_priors;
  int num_classes;
  int background;
  int top_k;
  int keep_top_k;
  int level_top_k;  // 0: levels are not cut
  bool sigmoid;
  bool clip_before_nms;
  float stretch_bound;  // of dw and dh times their variance; infinite: none
  float confidence_threshold;
  float nms_threshold;
  float cut;  // the threshold as a logit, or as a logarithm without sigmoid, a little lower
  KeyRange keys;
  int survivors_size;  // of an image: every class at its limit

  const float4* priors;  // [2, num_priors]: corners, variances
  float* detections;     // [batch, keep_top_k, 7]
  int* num_detections;   // [batch]

  // Workspace.
  int* counters;          // [batch, num_classes + kNumCounters]: candidates of each class, others
  uint64_t* lists;        // [batch, num_classes, kListSize], keys, in no order
  uint64_t* spill;        // [batch, kSpillSize], keys of all classes, in no order
  uint64_t* survivors;    // [batch, survivors_size], keys, in no order
  uint64_t* level_lists;  // [batch, num_levels, kLevelListSize], keys, in no order; if cut
  float4* boxes;          // [batch, num_priors], set where a prior has a candidate
  float2* stats;  // [batch, num_priors]: maximum and sum; NaN where a prior has no candidate

  __device__ int* counters_of(int image) const {
    return counters + image * (num_classes + kNumCounters);
  }
  __device__ uint64_t* list_of(int image, int cls) const {
    return lists + (static_cast<int64_t>(image) * num_classes + cls) * kListSize;
  }
  __device__ uint64_t* spill_of(int image) const {
    return spill + static_cast<int64_t>(image) * kSpillSize;
  }
  __device__ uint64_t* level_list_of(int image, int level) const {
    return level_lists + (static_cast<int64_t>(image) * num_levels + level) * kLevelListSize;
  }
};

// The kernels of a run overlap: one starts when all blocks of its predecessor have, and waits for
// the predecessor's end where it needs it (programmatic dependent launch, Hopper and later).
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A candidate. Greater keys come first: higher score, then lower class, then lower prior. Scores
// are not negative, so their bits order as they do. No key is 0.
__device__ inline uint64_t make_key(float score, int cls, int prior, int num_priors) {
  const uint32_t place = static_cast<uint32_t>(cls) * num_priors + prior;
  return static_cast<uint64_t>(__float_as_uint(score)) << 32 | static_cast<uint32_t>(~place);
}

__device__ inline float key_score(uint64_t key) { return __uint_as_float(key >> 32); }

__device__ inline uint32_t key_place(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Appends a candidate to the list of its class.
__device__ inline void add_to_class(const Problem& problem, int image, int cls, uint64_t key) {
  int* counters = problem.counters_of(image);
  const int at = atomicAdd(counters + cls, 1);
  if (at < kListSize) {
    problem.list_of(image, cls)[at] = key;
  } else {
    // What finds no room here, either, is counted: suppression goes to the logits then.
    const int spilled = atomicAdd(counters + problem.num_classes + kSpilled, 1);
    if (spilled < kSpillSize) problem.spill_of(image)[spilled] = key;
  }
}

// The score of a logit, given the prior's maximum and sum of exponentials.
__device__ inline float score_of(float logit, float2 softmax, bool sigmoid) {
  return sigmoid ? 1.0f / (1.0f + expf(-logit)) : expf(logit - softmax.x) / softmax.y;
}

template <typename T>
__device__ float to_float(T value);
template <> __device__ inline float to_float(float value) { return value; }
template <> __device__ inline float to_float(__half value) { return __half2float(value); }
template <> __device__ inline float to_float(int8_t value) { return value; }

// Offset of an element in a head tensor; see nms_opt_format.
__device__ inline int64_t offset_of(int image, int channel, int cell, int rows, int cells,
                                    int vector) {
  const int64_t row = static_cast<int64_t>(image) * rows + channel / vector;
  return (row * cells + cell) * vector + channel % vector;
}

}  // namespace nms_opt
