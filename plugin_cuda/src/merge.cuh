// The best of all classes of an image, in order, as rows.
#pragma once

#include "problem.cuh"
#include "select.cuh"

namespace nms_opt {

constexpr int kMergeThreads = 512;

// Grid: (images). Shared memory: `merge_shared_bytes`.
__global__ void __launch_bounds__(kMergeThreads) merge(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(16) char data[];
  __shared__ Selection selection;
  auto* unsorted = reinterpret_cast<uint64_t*>(data);
  auto* keys = unsorted + key_room(problem.keep_top_k);
  const int image = blockIdx.x, keep_top_k = problem.keep_top_k;
  const uint64_t* survivors =
      problem.survivors + static_cast<int64_t>(image) * problem.survivors_size;
  const float4* boxes = problem.boxes + static_cast<int64_t>(image) * problem.num_priors;

  wait_for_previous_kernel();
  int count = problem.counters_of(image)[problem.num_classes + kSurvivors];
  const auto each = [&](auto visit) {
    each_key<kMergeThreads>(count, [&](int i) { return survivors[i]; }, visit);
  };
  if (count > keep_top_k + kSlack) {
    count = select_greatest<kMergeThreads>(each, keep_top_k, keep_top_k + kSlack, unsorted,
                                           problem.keys, selection);
  } else {
    for (int i = threadIdx.x; i < count; i += kMergeThreads) unsorted[i] = survivors[i];
    __syncthreads();
  }
  sort_keys<kMergeThreads>(unsorted, count, keys);
  count = min(count, keep_top_k);

  float* rows = problem.detections + static_cast<int64_t>(image) * keep_top_k * 7;
  for (int i = threadIdx.x; i < keep_top_k; i += kMergeThreads) {
    float4 box = {0.0f, 0.0f, 0.0f, 0.0f};
    float score = 0.0f, label = -1.0f;
    if (i < count) {
      const uint32_t place = key_place(keys[i]);
      box = boxes[place % problem.num_priors];
      score = key_score(keys[i]);
      label = place / problem.num_priors;
    }
    float* row = rows + i * 7;
    row[0] = image;
    row[1] = __saturatef(box.y);
    row[2] = __saturatef(box.x);
    row[3] = __saturatef(box.w);
    row[4] = __saturatef(box.z);
    row[5] = score;
    row[6] = label;
  }
  if (threadIdx.x == 0) problem.num_detections[image] = count;
}

inline size_t merge_shared_bytes(const Problem& problem) {
  return 2 * key_room(problem.keep_top_k) * sizeof(uint64_t);
}

}  // namespace nms_opt
