// A peer for comparison: the stages of a multi-pass SSD postprocessing that are no library call.
// NCHW: a level's loc is [N, 4, slots], its conf [N, C, slots]; slots = anchors * height * width.
#ifdef HALF
struct HEAD {  // __half without its header, which a run-time compiler may not find
  unsigned short bits;
  __device__ operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};
#else
using HEAD = float;
#endif

struct LevelTable {  // of every level
  const HEAD* loc;
  const HEAD* conf;
  long long slots;
  long long first;  // its first prior
};

__device__ int level_of(const LevelTable* levels, int num_levels, int prior) {
  int level = 0;
  while (level + 1 < num_levels && prior >= levels[level + 1].first) ++level;
  return level;
}

// All boxes [N, P], a thread for each.
extern "C" __global__ void decode(const LevelTable* levels, int num_levels, int num_priors,
                                  int batch, const float4* priors, float4* boxes) {
  const long long index = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (index >= static_cast<long long>(batch) * num_priors) return;
  const int image = index / num_priors, prior = index % num_priors;
  const LevelTable level = levels[level_of(levels, num_levels, prior)];
  const HEAD* loc = level.loc + image * 4 * level.slots + (prior - level.first);
  const float4 corners = priors[prior], variances = priors[num_priors + prior];
  const float width = corners.z - corners.x, height = corners.w - corners.y;
  const float x = static_cast<float>(loc[0]) * variances.x * width + (corners.x + corners.z) * 0.5f;
  const float y =
      static_cast<float>(loc[level.slots]) * variances.y * height + (corners.y + corners.w) * 0.5f;
  const float half_w = expf(static_cast<float>(loc[2 * level.slots]) * variances.z) * width * 0.5f;
  const float half_h = expf(static_cast<float>(loc[3 * level.slots]) * variances.w) * height * 0.5f;
  boxes[index] = make_float4(x - half_w, y - half_h, x + half_w, y + half_h);
}

// Logits of all levels to float [N, C, P], a thread for each.
extern "C" __global__ void permute(const LevelTable* levels, int num_levels, int num_priors,
                                   int num_classes, int batch, float* logits) {
  const long long index = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (index >= static_cast<long long>(batch) * num_classes * num_priors) return;
  const int prior = index % num_priors;
  const long long row = index / num_priors;  // image * num_classes + class
  const LevelTable level = levels[level_of(levels, num_levels, prior)];
  logits[index] = static_cast<float>(level.conf[row * level.slots + (prior - level.first)]);
}

__device__ float area(float4 box) {
  return fmaxf(box.z - box.x, 0.0f) * fmaxf(box.w - box.y, 0.0f);
}

// Greedy suppression of one class of one image by a block: a barrier for every kept box.
// scores [N, C, K] in descending order, -1 written where a box goes; index [N, C, K] of priors.
extern "C" __global__ void suppress(const float4* boxes, const long long* index, float* scores,
                                    int num_priors, int num_classes, int top_k, int background,
                                    float confidence_threshold, float nms_threshold) {
  extern __shared__ float4 own[];
  bool* alive = reinterpret_cast<bool*>(own + top_k);
  const int cls = blockIdx.x, image = blockIdx.y;
  const long long row = (static_cast<long long>(image) * num_classes + cls) * top_k;
  for (int i = threadIdx.x; i < top_k; i += blockDim.x) {
    alive[i] = cls != background && scores[row + i] > confidence_threshold;
    if (alive[i]) own[i] = boxes[static_cast<long long>(image) * num_priors + index[row + i]];
  }
  __syncthreads();
  for (int i = 0; i < top_k; ++i) {
    if (!alive[i]) continue;  // the same for every thread
    for (int j = i + 1 + threadIdx.x; j < top_k; j += blockDim.x) {
      if (!alive[j]) continue;
      const float width = fmaxf(fminf(own[i].z, own[j].z) - fmaxf(own[i].x, own[j].x), 0.0f);
      const float height = fmaxf(fminf(own[i].w, own[j].w) - fmaxf(own[i].y, own[j].y), 0.0f);
      const float common = width * height;
      if (common / (area(own[i]) + area(own[j]) - common) > nms_threshold) alive[j] = false;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < top_k; i += blockDim.x) {
    if (!alive[i]) scores[row + i] = -1.0f;
  }
}

// Rows of the keep_top_k best, a block for each image. detections are zero before.
extern "C" __global__ void gather(const float4* boxes, const long long* index, const float* best,
                                  const long long* place, int num_priors, int num_classes,
                                  int top_k, int keep_top_k, float* detections, int* count) {
  const int image = blockIdx.x;
  for (int i = threadIdx.x; i < keep_top_k; i += blockDim.x) {
    const float score = best[image * keep_top_k + i];
    float* row = detections + (static_cast<long long>(image) * keep_top_k + i) * 7;
    row[0] = image;
    row[6] = -1.0f;
    if (!(score > 0.0f)) continue;
    const long long at = place[image * keep_top_k + i];  // class * top_k + rank
    const long long prior = index[static_cast<long long>(image) * num_classes * top_k + at];
    const float4 box = boxes[static_cast<long long>(image) * num_priors + prior];
    row[1] = __saturatef(box.y);
    row[2] = __saturatef(box.x);
    row[3] = __saturatef(box.w);
    row[4] = __saturatef(box.z);
    row[5] = score;
    row[6] = at / top_k;
    atomicAdd(count + image, 1);
  }
}
