// What level_top_k needs besides: each level's best, and suppression among any number of a class.
#pragma once

#include "problem.cuh"
#include "select.cuh"
#include "suppress.cuh"

namespace nms_opt {

constexpr int kCutThreads = 512;
constexpr int kPartThreads = 256;
constexpr int kPart = 512;  // candidates of a class that are put into order at once
static_assert(kPart <= NMS_OPT_MAX_TOP_K, "suppress_in_order has room");

// Hands the best level_top_k candidates of a level, over all its classes, to the lists of their
// classes. Grid: (levels, images). Shared memory: `cut_shared_bytes`.
__global__ void __launch_bounds__(kCutThreads) cut(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(16) char data[];
  __shared__ Selection selection;
  auto* best = reinterpret_cast<uint64_t*>(data);
  let_next_kernel_start();
  const int index = blockIdx.x, image = blockIdx.y, most = problem.level_top_k;
  const uint64_t* list = problem.level_list_of(image, index);

  wait_for_previous_kernel();
  int count = problem.counters_of(image)[problem.num_classes + kOfLevels + index];
  const bool overflowed = count > kLevelListSize;
  const auto each = [&](auto visit) {
    if (overflowed) {
      for (int cls = 0; cls < problem.num_classes; ++cls) {
        if (cls == problem.background) continue;
        each_candidate<kCutThreads>(problem, problem.levels[index], image, cls, visit);
      }
    } else {
      each_key<kCutThreads>(count, [&](int i) { return list[i]; }, visit);
    }
  };
  if (count > most) {
    count = select_greatest<kCutThreads>(each, most, most, best, problem.keys, selection);
    list = best;
  }
  for (int i = threadIdx.x; i < count; i += kCutThreads) {
    const uint64_t key = list[i];
    add_to_class(problem, image, key_place(key) / problem.num_priors, key);
  }
}

inline size_t cut_shared_bytes(const Problem& problem) {
  return problem.level_top_k * sizeof(uint64_t);
}

// `suppress` for what the cuts leave, of which a class may have more than fit into shared memory: a
// part after the other, from the greatest key down, each first held against the boxes that stayed.
// Grid: (classes, images). Shared memory: `suppress_parts_shared_bytes`.
__global__ void __launch_bounds__(kPartThreads)
    suppress_parts(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(16) char data[];
  __shared__ Selection selection;
  __shared__ uint32_t gone[kPart / 32];
  auto* boxes = reinterpret_cast<float4*>(data);
  auto* kept_boxes = boxes + kPart;
  auto* unsorted = reinterpret_cast<uint64_t*>(kept_boxes + problem.keep_top_k);
  auto* keys = unsorted + key_room(kPart);
  auto* areas = reinterpret_cast<float*>(keys + key_room(kPart));
  auto* kept_areas = areas + kPart;
  let_next_kernel_start();
  const int cls = blockIdx.x, image = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t first_place = cls * problem.num_priors;
  const float4* image_boxes = problem.boxes + static_cast<int64_t>(image) * problem.num_priors;
  const uint64_t* list = problem.list_of(image, cls);
  const uint64_t* spill = problem.spill_of(image);
  uint64_t* survivors = problem.survivors + static_cast<int64_t>(image) * problem.survivors_size;

  wait_for_previous_kernel();
  int* counters = problem.counters_of(image);
  int left = counters[cls], kept = 0;
  if (left == 0) return;
  const int listed = min(left, kListSize);
  const int spilled = left > kListSize ? counters[problem.num_classes + kSpilled] : 0;
  uint64_t bound = ~uint64_t{0};  // keys from it on have had their turn
  const auto each = [&](auto visit) {
    const auto visit_rest = [&](uint64_t key) {
      const bool own = key_place(key) - first_place < static_cast<uint32_t>(problem.num_priors);
      if (own && key < bound) visit(key);
    };
    each_key<kPartThreads>(listed, [&](int i) { return list[i]; }, visit_rest);
    each_key<kPartThreads>(spilled, [&](int i) { return spill[i]; }, visit_rest);
  };
  while (left > 0 && kept < problem.keep_top_k) {
    int count = left;
    if (count > kPart + kSlack) {
      count = select_greatest<kPartThreads>(each, kPart, kPart + kSlack, unsorted, problem.keys,
                                            selection);
    } else {
      if (threadIdx.x == 0) selection.count = 0;
      __syncthreads();
      each([&](uint64_t key) { unsorted[atomicAdd(&selection.count, 1)] = key; });
      __syncthreads();
    }
    sort_keys<kPartThreads>(unsorted, count, keys);
    count = min(count, kPart);
    left -= count;
    bound = keys[count - 1];
    for (int i = threadIdx.x; i < count; i += kPartThreads) {
      boxes[i] = image_boxes[key_place(keys[i]) - first_place];
      areas[i] = area_of(boxes[i]);
    }
    __syncthreads();
    for (int group = warp; group * 32 < count; group += kPartThreads / 32) {
      const int own = min(group * 32 + lane, count - 1);
      bool hit = false;
      for (int i = 0; i < kept; ++i) {
        hit |=
            suppresses(kept_boxes[i], kept_areas[i], boxes[own], areas[own], problem.nms_threshold);
      }
      const uint32_t hits = __ballot_sync(~0u, hit);
      if (lane == 0) gone[group] = hits;
    }
    __syncthreads();
    const int more =
        suppress_in_order<kPartThreads>(keys, boxes, areas, count, problem.keep_top_k - kept,
                                        problem.nms_threshold, [&](int i) { return gone[i]; });
    if (threadIdx.x == 0) {
      selection.count = atomicAdd(counters + problem.num_classes + kSurvivors, more);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < more; i += kPartThreads) {
      const uint64_t key = keys[i];
      survivors[selection.count + i] = key;
      kept_boxes[kept + i] = image_boxes[key_place(key) - first_place];
      kept_areas[kept + i] = area_of(kept_boxes[kept + i]);
    }
    kept += more;
    __syncthreads();
  }
}

inline size_t suppress_parts_shared_bytes(const Problem& problem) {
  return (kPart + problem.keep_top_k) * (sizeof(float4) + sizeof(float)) +
         2 * key_room(kPart) * sizeof(uint64_t);
}

}  // namespace nms_opt
