// Selection and sorting within a block, of keys that are all different.
#pragma once

#include "problem.cuh"

namespace nms_opt {

constexpr int kDigitBits = 10;
constexpr int kBins = 1 << kDigitBits;

// What a selection of k keys may bring besides: it mostly ends after one round then.
constexpr int kSlack = 15;

// Keys of an array for the selection and sorting of k keys.
__host__ __device__ constexpr int key_room(int k) { return (k + kSlack + 2) / 2 * 2; }

struct Selection {
  int histogram[kBins];
  int warp_sums[32];
  int digit, above, inside;  // the digit of the k-th key; keys with a greater one, with this one
  int count;
};

// Visits keys in memory, several on their way at once. `load(i)` gives a key.
template <int Threads, typename Load, typename Visit>
__device__ void each_key(int count, Load load, Visit visit) {
  constexpr int kBatch = 8;
  for (int first = threadIdx.x; first < count; first += Threads * kBatch) {
    uint64_t batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * Threads;
      batch[i] = at < count ? load(at) : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (batch[i]) visit(batch[i]);
    }
  }
}

// Finds the digit at which the histogram, summed from the top, reaches `wanted`.
template <int Threads>
__device__ void find_digit(Selection& shared, int wanted) {
  constexpr int kPerThread = kBins / Threads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;  // thread 0 has the top
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum += shared.histogram[top - i];
  int before = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) shared.warp_sums[warp] = before;
  __syncthreads();
  before -= sum;
  for (int i = 0; i < warp; ++i) before += shared.warp_sums[i];
  if (before < wanted && before + sum >= wanted) {
    int digit = top;
    while (before + shared.histogram[digit] < wanted) before += shared.histogram[digit--];
    shared.digit = digit;
    shared.above = before;
    shared.inside = shared.histogram[digit];
  }
  __syncthreads();
}

// Copies the k greatest keys of a source, and at most `room` - k more of the next greatest, to
// `out`, in no order; returns their number. `each(visit)` visits the source's keys, at least
// k. Radix selection, from the top digit down, until what is left fits. The digits are those
// of the distance to the least possible key, so that the first one tells scores well apart.
template <int Threads, typename Each>
__device__ int select_greatest(const Each& each, int k, int room, uint64_t* out, KeyRange range,
                               Selection& shared) {
  int known = range.bits, shift = range.bits - kDigitBits;
  int chosen = 0;  // keys whose known digits are greater than the prefix
  uint64_t prefix = 0;
  while (true) {
    for (int i = threadIdx.x; i < kBins; i += Threads) shared.histogram[i] = 0;
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    each([&](uint64_t key) {
      const uint64_t distance = key - range.least;
      if (distance >> known == prefix >> known) {
        atomicAdd(&shared.histogram[distance >> shift & (kBins - 1)], 1);
      }
    });
    __syncthreads();
    find_digit<Threads>(shared, k - chosen);
    // The last digit overlaps what is known, and agrees with it.
    prefix = (prefix >> known << known) | static_cast<uint64_t>(shared.digit) << shift;
    if (chosen + shared.above + shared.inside <= room) break;
    chosen += shared.above;
    known = shift;
    shift = max(shift - kDigitBits, 0);
  }
  each([&](uint64_t key) {
    if ((key - range.least) >> shift >= prefix >> shift) out[atomicAdd(&shared.count, 1)] = key;
  });
  __syncthreads();
  const int count = shared.count;
  __syncthreads();  // the next selection counts in the same place
  return count;
}

// Sorts keys into descending order, from one place in shared memory to another: the place of a key
// is the number of greater ones. `keys` is aligned to 16 bytes and has room for one more.
template <int Threads>
__device__ void sort_keys(uint64_t* keys, int count, uint64_t* sorted) {
  if (threadIdx.x == 0) keys[count] = 0;
  __syncthreads();
  const auto* pairs = reinterpret_cast<const ulonglong2*>(keys);
  const int num_pairs = (count + 1) / 2;
  int lanes = 1;  // for each key
  while (lanes < 32 && lanes * 2 * count <= Threads) lanes *= 2;
  const int lane = threadIdx.x % lanes;
  // Rounds of all threads, so that every lane takes part in the sums.
  for (int first = 0; first < count; first += Threads / lanes) {
    const int i = first + threadIdx.x / lanes;
    const uint64_t key = i < count ? keys[i] : 0;
    int place = 0;
#pragma unroll 8
    for (int j = lane; j < num_pairs; j += lanes) {
      const ulonglong2 pair = pairs[j];
      place += (pair.x > key) + (pair.y > key);
    }
    for (int step = 1; step < lanes; step *= 2) place += __shfl_xor_sync(~0u, place, step);
    if (lane == 0 && i < count) sorted[place] = key;
  }
  __syncthreads();
}

}  // namespace nms_opt
