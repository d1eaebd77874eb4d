// A block for each class of each image puts the best of the class's candidates into
// order and suppresses.
#pragma once

#include "problem.cuh"
#include "select.cuh"

namespace nms_opt {

__device__ inline float load(const void* data, int dtype, int64_t offset) {
  switch (dtype) {
    case NMS_OPT_FLOAT16: return __half2float(static_cast<const __half*>(data)[offset]);
    case NMS_OPT_INT8: return static_cast<const int8_t*>(data)[offset];
    default: return static_cast<const float*>(data)[offset];
  }
}

// Visits the candidates of a class in a level once more, from the logits.
template <int Threads, typename Visit>
__device__ void each_candidate(const Problem& problem, const Level& level, int image, int cls,
                               Visit visit) {
  constexpr int kBatch = 4;  // on their way at once
  const float threshold = problem.confidence_threshold;
  const float2* stats = problem.stats + static_cast<int64_t>(image) * problem.num_priors;
  const int slots = level.anchors * level.cells;
  for (int first = threadIdx.x; first < slots; first += Threads * kBatch) {
    float logits[kBatch];
    float2 slot_stats[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int slot = first + i * Threads;
      slot_stats[i] = {NAN, NAN};
      if (slot >= slots) continue;
      const int anchor = level.anchors == 1 ? 0 : slot / level.cells;
      const int channel = cls * level.anchors + anchor;
      slot_stats[i] = stats[level.first_prior + slot];
      logits[i] = load(level.conf, level.conf_dtype,
                       offset_of(image, channel, slot - anchor * level.cells, level.conf_rows,
                                 level.cells, level.conf_vector));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (isnan(slot_stats[i].x)) continue;
      if (level.conf_dtype == NMS_OPT_INT8) logits[i] *= level.conf_scale;
      const float score = score_of(logits[i], slot_stats[i], problem.sigmoid);
      if (score > threshold) {
        visit(make_key(score, cls, level.first_prior + first + i * Threads, problem.num_priors));
      }
    }
  }
}

__device__ inline float area_of(float4 box) {
  const float width = box.z - box.x, height = box.w - box.y;
  return width > 0.0f && height > 0.0f ? width * height : 0.0f;
}

// Whether the IoU of two boxes is above the threshold, as rounded division has it.
__device__ inline bool suppresses(float4 a, float area_a, float4 b, float area_b, float threshold) {
  const float width = fminf(a.z, b.z) - fmaxf(a.x, b.x);
  const float height = fminf(a.w, b.w) - fmaxf(a.y, b.y);
  if (!(width > 0.0f && height > 0.0f && area_a > 0.0f && area_b > 0.0f)) return false;
  const float common = width * height, either = area_a + area_b - common;
  const float limit = threshold * either;
  if (fabsf(common - limit) > 1e-6f * either) return common > limit;  // not a close call
  return common / either > threshold;
}

// Greedy suppression among `count` boxes in order, 32 at a time. Returns how many stay, at most
// `limit`; their keys are moved to the front, in order. Bit j of gone(i): box 32 * i + j does not
// count.
template <int Threads, typename Gone>
__device__ int suppress_in_order(uint64_t* keys, const float4* boxes, const float* areas, int count,
                                 int limit, float threshold, const Gone& gone) {
  constexpr int kWarps = Threads / 32;
  __shared__ uint32_t overlaps[32];  // bit j of word i: i suppresses j, i < j
  __shared__ uint32_t removed[(NMS_OPT_MAX_TOP_K + 31) / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < (count + 31) / 32; i += Threads) removed[i] = gone(i);
  int kept = 0;
  for (int first = 0; first < count && kept < limit; first += 32) {
    const int size = min(32, count - first);
    const int own = first + min(lane, size - 1);
#pragma unroll
    for (int i = warp; i < 32; i += kWarps) {
      const int other = first + min(i, size - 1);
      const uint32_t hits = __ballot_sync(
          ~0u, suppresses(boxes[other], areas[other], boxes[own], areas[own], threshold));
      // Those behind it alone; bits behind the last box are never asked for.
      if (lane == 0) overlaps[i] = hits & ~((2u << i) - 1);
    }
    __syncthreads();
    // Every warp follows the 32 decisions by itself; rows that suppress nothing decide nothing.
    uint32_t alive = ~removed[first / 32] & (size < 32 ? (1u << size) - 1 : ~0u);
    const uint32_t row = overlaps[lane];
    uint32_t deciding = __ballot_sync(~0u, row != 0);
    while (deciding &= alive) {
      const int i = __ffs(deciding) - 1;
      deciding &= deciding - 1;
      alive &= ~__shfl_sync(~0u, row, i);
    }
    uint32_t stay = alive;
    while (kept + __popc(stay) > limit) stay ^= 1u << (31 - __clz(stay));
    if (warp == 0) {  // keys move to the front: read by all lanes, then written, never ahead
      const uint64_t key = keys[first + min(lane, size - 1)];
      __syncwarp();
      if (stay >> lane & 1) keys[kept + __popc(stay & ((1u << lane) - 1))] = key;
    }
    kept += __popc(stay);
    // Those that stay remove what they overlap behind the 32. A warp takes 32 of these boxes, or,
    // where there are fewer of them than warps, tests them with a part of those that stay.
    const int behind = max(0, (count - first - 1) / 32), parts = max(1, kWarps / max(1, behind));
    for (int unit = warp; unit < behind * parts; unit += kWarps) {
      const int group = first / 32 + 1 + unit / parts;
      const int other = min(group * 32 + lane, count - 1);
      bool hit = false;
#pragma unroll 4
      for (int i = unit % parts; i < size; i += parts) {
        hit |= (stay >> i & 1) && suppresses(boxes[first + i], areas[first + i], boxes[other],
                                             areas[other], threshold);
      }
      const uint32_t hits = __ballot_sync(~0u, hit);
      if (lane == 0 && hits) atomicOr(&removed[group], hits);
    }
    __syncthreads();
  }
  return kept;
}

// Grid: (classes, images). Shared memory: `suppress_shared_bytes`.
template <int Threads>
__global__ void __launch_bounds__(Threads) suppress(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(16) char data[];
  __shared__ Selection selection;
  auto* boxes = reinterpret_cast<float4*>(data);
  auto* unsorted = reinterpret_cast<uint64_t*>(boxes + problem.top_k);
  auto* keys = unsorted + key_room(problem.top_k);
  auto* areas = reinterpret_cast<float*>(keys + key_room(problem.top_k));
  let_next_kernel_start();
  const int cls = blockIdx.x, image = blockIdx.y, top_k = problem.top_k;
  int* counters = problem.counters_of(image);
  uint64_t* list = problem.list_of(image, cls);
  const float4* image_boxes = problem.boxes + static_cast<int64_t>(image) * problem.num_priors;

  wait_for_previous_kernel();
  int count = counters[cls];
  if (count == 0) return;
  int spilled = count > kListSize ? counters[problem.num_classes + kSpilled] : 0;
  if (spilled > kSpillSize) {
    const auto each = [&](auto visit) {
      for (int i = 0; i < problem.num_levels; ++i) {
        each_candidate<Threads>(problem, problem.levels[i], image, cls, visit);
      }
    };
    count = select_greatest<Threads>(each, top_k, kListSize, list, problem.keys, selection);
    spilled = 0;
  }
  if (count > min(top_k + kSlack, kListSize)) {
    const uint64_t* spill = problem.spill_of(image);
    const uint32_t first = cls * problem.num_priors;
    const auto each = [&](auto visit) {
      each_key<Threads>(min(count, kListSize), [&](int i) { return list[i]; }, visit);
      each_key<Threads>(
          spilled, [&](int i) { return spill[i]; },
          [&](uint64_t key) {
            if (key_place(key) - first < static_cast<uint32_t>(problem.num_priors)) visit(key);
          });
    };
    count =
        select_greatest<Threads>(each, top_k, top_k + kSlack, unsorted, problem.keys, selection);
  } else {
    for (int i = threadIdx.x; i < count; i += Threads) unsorted[i] = list[i];
    __syncthreads();
  }
  sort_keys<Threads>(unsorted, count, keys);
  count = min(count, top_k);
  for (int i = threadIdx.x; i < count; i += Threads) {
    boxes[i] = image_boxes[key_place(keys[i]) - cls * problem.num_priors];
    areas[i] = area_of(boxes[i]);
  }
  __syncthreads();
  const int kept = suppress_in_order<Threads>(keys, boxes, areas, count, problem.keep_top_k,
                                              problem.nms_threshold, [](int) { return 0u; });
  if (threadIdx.x == 0) {
    selection.count = atomicAdd(counters + problem.num_classes + kSurvivors, kept);
  }
  __syncthreads();
  uint64_t* survivors =
      problem.survivors + static_cast<int64_t>(image) * problem.survivors_size + selection.count;
  for (int i = threadIdx.x; i < kept; i += Threads) survivors[i] = keys[i];
}

inline size_t suppress_shared_bytes(const Problem& problem) {
  return problem.top_k * (sizeof(float4) + sizeof(float)) +
         2 * key_room(problem.top_k) * sizeof(uint64_t);
}

}  // namespace nms_opt
