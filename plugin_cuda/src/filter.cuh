// One read of the logits. Scores above the threshold become keys in the list of
// their class, or of their level where levels are cut, and their priors are decoded; nothing else
// is written.
#pragma once

#include <cooperative_groups.h>

#include "problem.cuh"
#include "tile.cuh"

namespace nms_opt {

constexpr int kPending = 512;  // candidates of a tile that are noted before they are scored

// exp for the sum of a softmax: its arguments are not positive, its relative error is 2^-22, and
// exp(0) is 1, so that no score is larger than its numerator.
__device__ inline float exp_term(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// The deltas of a prior as they are in memory: loaded before they are needed, converted after.
struct Deltas {
  uint32_t bits[4];
  bool is_half;

  __device__ void load(const Level& level, int image, int prior) {
    const int index = prior - level.first_prior, anchors = level.loc_anchors;
    const int anchor = index / level.loc_cells, cell = index % level.loc_cells;
    const int rows = (anchors * 4 + level.loc_vector - 1) / level.loc_vector;
    is_half = level.loc_dtype == NMS_OPT_FLOAT16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t offset =
          offset_of(image, i * anchors + anchor, cell, rows, level.loc_cells, level.loc_vector);
      bits[i] = is_half ? static_cast<const uint16_t*>(level.loc)[offset]
                        : static_cast<const uint32_t*>(level.loc)[offset];
    }
  }

  __device__ float operator[](int i) const {
    return is_half ? __half2float(__ushort_as_half(bits[i])) : __uint_as_float(bits[i]);
  }
};

// The lesser of both; NaN stays, which fminf would drop.
__device__ inline float bounded(float x, float bound) { return x > bound ? bound : x; }

// The box of a prior, corners, not clipped: CENTER_SIZE, in the order of operations of the
// operator's definition.
__device__ inline float4 decode(float4 corners, float4 variances, const Deltas& delta,
                                float bound) {
  const float width = corners.z - corners.x, height = corners.w - corners.y;
  const float x = delta[0] * variances.x * width + (corners.x + corners.z) * 0.5f;
  const float y = delta[1] * variances.y * height + (corners.y + corners.w) * 0.5f;
  const float half_width = expf(bounded(delta[2] * variances.z, bound)) * width * 0.5f;
  const float half_height = expf(bounded(delta[3] * variances.w, bound)) * height * 0.5f;
  return {x - half_width, y - half_height, x + half_width, y + half_height};
}

// What suppression and the rows see of a box, if boxes are clipped before it.
__device__ inline float4 clip(float4 box) {
  return {__saturatef(box.x), __saturatef(box.y), __saturatef(box.z), __saturatef(box.w)};
}

// A logit less the reference below which no score is above the threshold, with room for rounding.
__device__ inline float cut_of(const Problem& problem, float2 stats) {
  return problem.sigmoid ? problem.cut : problem.cut + logf(stats.y);
}

// What logits are compared with the cut by: the maximum, so that large logits lose nothing.
__device__ inline float reference_of(const Problem& problem, float2 stats) {
  return problem.sigmoid ? 0.0f : stats.x;
}

// Appends a candidate to the list of its level. The threads that do so together, whose level it
// is too, count as one: an image has no more than a counter for each level.
__device__ inline void add_to_level(const Problem& problem, int image, int level, uint64_t key) {
  const auto together = cooperative_groups::coalesced_threads();
  int* counter = problem.counters_of(image) + problem.num_classes + kOfLevels + level;
  int first = 0;
  if (together.thread_rank() == 0) first = atomicAdd(counter, static_cast<int>(together.size()));
  const int at = together.shfl(first, 0) + static_cast<int>(together.thread_rank());
  // What finds no room is counted: the cut goes to the logits then.
  if (at < kLevelListSize) problem.level_list_of(image, level)[at] = key;
}

// Appends a candidate to its list, if its score is above the threshold.
template <typename T, bool Linear, int Lanes>
__device__ void append(const Problem& problem, const Tile<T, Linear, Lanes>& tile, int image,
                       int level, int cls, int slot, int prior, float2 stats) {
  const float score = score_of(tile.logit_at(slot, cls), stats, problem.sigmoid);
  if (!(score > problem.confidence_threshold) || cls == problem.background) return;
  const uint64_t key = make_key(score, cls, prior, problem.num_priors);
  if (problem.level_top_k) {
    add_to_level(problem, image, level, key);
  } else {
    add_to_class(problem, image, cls, key);
  }
}

// What the steps of a tile hand on.
struct Scratch {
  float2 stats[kThreads];      // of each slot: maximum and sum of the softmax; NaN: void
  float best[kThreads];        // of each slot: greatest logit of the foreground; then `cut_of`
  uint16_t hopeful[kThreads];  // slots that may have a candidate
  uint16_t chosen[kThreads];   // those of them that still may when their sum is known
  uint16_t pending[kPending];  // class * kThreads + slot: likely candidates
  int num_hopeful, num_chosen, num_pending;
};

template <typename T, bool Linear, int Lanes>
__device__ void filter_tile(const Problem& problem, int index, int image, int tile_index,
                            char* data, Scratch& scratch) {
  const Level& level = problem.levels[index];
  const int num_classes = problem.num_classes, background = problem.background;
  const int first_cell = tile_index * level.tile_cells;
  const int num_cells = min(level.tile_cells, level.cells - first_cell);
  const auto prior_of = [&](int slot) {
    const int cell = Linear ? slot : slot / level.anchors;
    const int anchor = Linear ? 0 : slot % level.anchors;
    return level.first_prior + anchor * level.cells + first_cell + cell;
  };
  float2* stats = problem.stats + static_cast<int64_t>(image) * problem.num_priors;
  float4* boxes = problem.boxes + static_cast<int64_t>(image) * problem.num_priors;
  const int thread = threadIdx.x;
  if (thread == 0) scratch.num_hopeful = scratch.num_chosen = scratch.num_pending = 0;
  copy_tile<T, Linear>(data, level, image, first_cell, num_cells, level.anchors * num_classes);
  const Tile<T, Linear, Lanes> tile{data, level.anchors, level.conf_vector, level.row_pitch,
                                    level.conf_scale};
  wait_for_copies();
  __syncthreads();

  // 1. The maximum decides most slots: the sum of a softmax is at least that of its maximum.
  {
    const int lane = thread % Lanes, slot = thread / Lanes;
    const bool used = slot < num_cells * level.anchors;
    T best = lowest<T>(), behind = lowest<T>();
    if (used) {
      const auto take = [&](int, T value) { best = greater(best, value); };
      tile.template each<8>(slot, lane, Lanes, background, take);
      tile.template each<8>(slot, background + 1 + lane, Lanes, num_classes, take);
      if (background >= 0) {
        tile.template each<1>(slot, background, 1, background + 1,
                              [&](int, T value) { behind = value; });
      }
    }
    float best_logit = tile.logit(best);
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) {
      best_logit = fmaxf(best_logit, __shfl_xor_sync(~0u, best_logit, step));
    }
    if (used && lane == 0) {
      const float maximum = fmaxf(best_logit, tile.logit(behind));
      scratch.stats[slot].x = maximum;
      scratch.best[slot] = best_logit;
      if (best_logit - reference_of(problem, {maximum, 1.0f}) >= problem.cut) {
        scratch.hopeful[atomicAdd(&scratch.num_hopeful, 1)] = slot;
      } else {
        stats[prior_of(slot)] = {NAN, NAN};
      }
    }
  }
  __syncthreads();

  // 2. The others' sums, while what their boxes are made of is on its way.
  int own_slot = -1, own_prior = 0;
  Deltas delta;
  float4 corners, variances;
  if (thread < scratch.num_hopeful) {
    own_slot = scratch.hopeful[thread];
    own_prior = prior_of(own_slot);
    delta.load(level, image, own_prior);
    corners = problem.priors[own_prior];
    variances = problem.priors[problem.num_priors + own_prior];
  }
  constexpr int kLanes = 8;  // of a slot from here on; whatever `Lanes`, the sum is the same
  const int lane = thread % kLanes;
  const uint32_t group = ((1u << kLanes) - 1) << (thread % 32 - lane);
  for (int i = thread / kLanes; i < scratch.num_hopeful; i += kThreads / kLanes) {
    const int slot = scratch.hopeful[i];
    const float maximum = scratch.stats[slot].x;
    float sum = 0.0f, check = 0.0f;
    tile.template each<7>(slot, lane, kLanes, num_classes, [&](int, T value) {
      const float logit = tile.logit(value);
      sum += exp_term(logit - maximum);
      check = fmaf(logit, 0.0f, check);  // NaN from a logit that is not finite
    });
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      sum += __shfl_xor_sync(group, sum, step);
      check += __shfl_xor_sync(group, check, step);
    }
    if (lane == 0) scratch.stats[slot].y = check == 0.0f ? sum : NAN;
  }
  __syncthreads();
  if (own_slot >= 0) {
    const float4 box = decode(corners, variances, delta, problem.stretch_bound);
    float2 own = scratch.stats[own_slot];
    if (isnan(own.y) ||
        !(isfinite(box.x) && isfinite(box.y) && isfinite(box.z) && isfinite(box.w))) {
      own = {NAN, NAN};
    }
    stats[own_prior] = own;
    const float cut = cut_of(problem, own);
    if (!isnan(own.x) && scratch.best[own_slot] - reference_of(problem, own) >= cut) {
      boxes[own_prior] = problem.clip_before_nms ? clip(box) : box;
      scratch.best[own_slot] = cut;
      scratch.chosen[atomicAdd(&scratch.num_chosen, 1)] = own_slot;
    }
  }
  __syncthreads();

  // 3. Their candidates: likely ones first, which is a comparison, then the scores of those.
  for (int i = thread / kLanes; i < scratch.num_chosen; i += kThreads / kLanes) {
    const int slot = scratch.chosen[i];
    const float cut = scratch.best[slot], reference = reference_of(problem, scratch.stats[slot]);
    for (int first = lane; first < num_classes; first += 32 * kLanes) {
      uint32_t hits = 0, bit = 1;  // of every class of this lane
      tile.template each<4>(slot, first, kLanes, min(num_classes, first + 32 * kLanes),
                            [&](int, T value) {
                              if (tile.logit(value) - reference >= cut) hits |= bit;
                              bit += bit;
                            });
      if (!hits) continue;
      int at = atomicAdd(&scratch.num_pending, __popc(hits));
      for (; hits; hits &= hits - 1, ++at) {
        const int cls = first + (__ffs(hits) - 1) * kLanes;
        if (at < kPending) scratch.pending[at] = cls * kThreads + slot;
      }
    }
  }
  wait_for_previous_kernel();  // it clears the counters
  __syncthreads();
  if (scratch.num_pending <= kPending) {
    for (int i = thread; i < scratch.num_pending; i += kThreads) {
      const int cls = scratch.pending[i] / kThreads, slot = scratch.pending[i] % kThreads;
      append(problem, tile, image, index, cls, slot, prior_of(slot), scratch.stats[slot]);
    }
  } else {  // too many to note: every score of every chosen slot
    for (int i = 0; i < scratch.num_chosen; ++i) {
      const int slot = scratch.chosen[i];
      for (int cls = thread; cls < num_classes; cls += kThreads) {
        append(problem, tile, image, index, cls, slot, prior_of(slot), scratch.stats[slot]);
      }
    }
  }
}

template <typename T, int Lanes>
__device__ void filter_level(const Problem& problem, int index, int image, int tile_index,
                             char* data, Scratch& scratch) {
  if (problem.levels[index].conf_vector == 1) {
    filter_tile<T, true, Lanes>(problem, index, image, tile_index, data, scratch);
  } else {
    filter_tile<T, false, Lanes>(problem, index, image, tile_index, data, scratch);
  }
}

// Clears the counters. Grid: (images).
__global__ void __launch_bounds__(kThreads) clear(const __grid_constant__ Problem problem) {
  let_next_kernel_start();
  int* counters = problem.counters_of(blockIdx.x);
  for (int i = threadIdx.x; i < problem.num_classes + kNumCounters; i += kThreads) counters[i] = 0;
}

// Grid: (tiles of an image, images). `Lanes` threads for each slot at first.
template <int Lanes>
__global__ void __launch_bounds__(kThreads) filter(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(16) char data[];
  __shared__ Scratch scratch;
  let_next_kernel_start();
  const int tile = blockIdx.x, image = blockIdx.y;
  int index = 0;
#pragma unroll
  for (int i = 1; i < NMS_OPT_MAX_LEVELS; ++i) index += tile >= problem.first_tiles[i];
  const int tile_index = tile - problem.first_tiles[index];
  switch (problem.levels[index].conf_dtype) {
    case NMS_OPT_FLOAT16:
      filter_level<__half, Lanes>(problem, index, image, tile_index, data, scratch);
      break;
    case NMS_OPT_INT8:
      filter_level<int8_t, Lanes>(problem, index, image, tile_index, data, scratch);
      break;
    default: filter_level<float, Lanes>(problem, index, image, tile_index, data, scratch);
  }
}

}  // namespace nms_opt
