// The stem of a ResNet: 7x7 convolution, stride 2, padding 3, of 3 channels to 64, ReLU,
// quantisation, 3x3 max pooling, stride 2, padding 1, quantisation; INT8 NCHW in, NHWC out.
//
// Four image pixels (2x2) of three channels, 12 bytes, and 4 bytes without meaning make one pixel
// of half the size, on which the convolution is 4x4 with stride 1: 16 taps of 16 bytes, 8 steps of
// the warpgroup MMA, whose operand B can start at every such pixel. The weights stay in registers.
//
// A consumer warpgroup goes down a strip of 60 pooled columns. Quantisation is monotone, so the
// maximum is taken of the int32 sums: down the columns in registers, across them from the
// neighbouring lane; only what is left is quantised. A row of the convolution is never stored.
#pragma once

#include <climits>

#include "finish.cuh"
#include "hopper.cuh"

namespace int8_conv {

struct Stem {
  const int8_t* x;          // [batch, 3, height, width]
  const int8_t* weight;     // [64, 4, 4, 16]: channel, row and column of half size, byte
  const float* multiplier;  // [64]
  const float* bias;        // [64]
  float pool_multiplier;
  int8_t* y;  // [batch, height / 4, width / 4, 64]
  int height, width;
  int tiles, strips, segments, segment_rows;
};

struct StemShape {
  static constexpr int kColumns = 60;        // pooled, of a strip
  static constexpr int kConvColumns = 128;   // 121 of them count
  static constexpr int kPitch = 132 * 16;    // a row of half size
  static constexpr int kStage = 2 * kPitch;  // two rows
  static constexpr int kStages = 10;
  static constexpr int kResults = 64 * kPixelPitch;
  static constexpr int kConsumer = kStages * kStage + 2 * kResults;
  static constexpr int kSharedBytes = 2 * (kConsumer + 16 * kStages) + 128;
  static_assert(kSharedBytes <= 227 * 1024);
};

// What a strip's segment of rows is; `kBorder` stages of two rows more than rows are needed.
struct StemTile {
  static constexpr int kBorder = 3;
  int image, column, row, rows;  // pooled

  __device__ StemTile(const Stem& p, int tile) {
    image = tile / (p.strips * p.segments);
    const int place = tile - image * p.strips * p.segments;
    column = place % p.strips * StemShape::kColumns;
    row = place / p.strips * p.segment_rows;
    rows = min(p.segment_rows, p.height / 4 - row);
  }
};

// Start on a row of the convolution: sums[channel, 128 columns] over four rows of half size.
__device__ __forceinline__ void start_row(int32_t (&sum)[64], const uint32_t (&weight)[32],
                                          const uint32_t (&rows)[4]) {
  mma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    // columns start one pixel late: the strip's first one is there for alignment
    const uint64_t row = pixels_descriptor(rows[step / 2], 16, 128);
    Mma<128>::run(sum, weight + step * 4, advance(row, (1 + step % 2 * 2) * 16), step > 0);
  }
  mma_commit();
}

__device__ __forceinline__ void keep_max(int32_t (&most)[64], const int32_t (&other)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) most[i] = max(most[i], other[i]);
}

// From the maxima down the columns to those of 64 pooled pixels; [j][c] is pixel 4 * j + lane % 4
// of the thread's channel c.
__device__ __forceinline__ void pool_columns(int32_t (&most)[64], int lane, bool first_strip,
                                             int32_t (&pooled)[16][2]) {
  const int quad = lane % 4, right = (lane & ~3) | ((quad + 1) & 3);
  if (first_strip && quad == 0) most[0] = most[2] = INT_MIN;  // left of the image
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t first = most[4 * j + 2 * c], later = j < 15 ? most[4 * j + 4 + 2 * c] : first;
      const int32_t next = __shfl_sync(0xFFFFFFFF, quad == 0 ? later : first, right);
      pooled[j][c] = max(max(first, most[4 * j + 2 * c + 1]), next);
    }
  }
}

// Quantise twice, and store the pooled pixels with their channels together.
__device__ __forceinline__ void store_pooled(const int32_t (&pooled)[16][2], const Scales& scales,
                                             float pool_multiplier, int lane, uint32_t target) {
  // A matrix column 2q is pixel 8t + q, 2q + 1 is pixel 8t + 4 + q.
  const int row = lane % 8;
  target += (lane % 16 / 8 * 8 + row % 2 * 4 + row / 2) * kPixelPitch;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t packed[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float out[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {  // byte: pixel b / 2, channel b % 2
        const float sum = static_cast<float>(pooled[4 * t + 2 * half + b / 2][b % 2]);
        const float value = __saturatef(fmaf(sum, scales.multiplier[b % 2], scales.bias[b % 2]));
        const float quantised = fmaf(value, 127.0f, kRounder) - kRounder;
        out[b] = fminf(fmaf(quantised, pool_multiplier, kRounder), kRounder + 127.0f);
      }
      packed[half] = low_bytes(out[0], out[1], out[2], out[3]);
    }
    store_pixels(target + t * 16 * kPixelPitch, packed);
  }
}

constexpr int kStemThreads = 3 * kWarpgroup;

__global__ void __launch_bounds__(kStemThreads, 1) stem_kernel(const Stem p) {
  using S = StemShape;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warpgroup = uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
  const uint32_t start = shared_address(shared);
  const uint32_t barriers = start + 2 * S::kConsumer;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * S::kStages; ++i) {
      barrier_init(barriers + 16 * i, 64);
      barrier_init(barriers + 16 * i + 8, kWarpgroup);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int consumer = uniform(warpgroup == 0 ? thread / 64 : warpgroup - 1);
  const uint32_t ring = start + consumer * S::kConsumer;
  const uint32_t full = barriers + consumer * 16 * S::kStages, empty = full + 8;
  const int first_tile = blockIdx.x * 2 + consumer, tile_step = gridDim.x * 2;

  if (warpgroup == 0) {  // 64 threads fill the stages of each consumer
    fewer_registers<40>();
    const int item = thread % 64;  // two pixels of half size: four bytes of every image row
    int count = 0;
    for (int number = first_tile; number < p.tiles; number += tile_step) {
      const StemTile tile(p, number);
      const int x = tile.column * 4 - 8 + item * 4;
      const bool inside_x = item < 63 && static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
      const int8_t* image = p.x + static_cast<int64_t>(tile.image) * 3 * p.height * p.width + x;
      const int stages = tile.rows + StemTile::kBorder;
      uint32_t word[12];
      const auto load = [&](int stage) {  // stage: rows 2 * (tile.row - 2 + stage), + 1
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int y = 4 * (tile.row - 2 + stage) + i;
          const bool inside =
              inside_x && static_cast<unsigned>(y) < static_cast<unsigned>(p.height);
#pragma unroll
          for (int c = 0; c < 3; ++c) {
            word[i * 3 + c] = 0;
            if (inside) {
              word[i * 3 + c] = __ldg(reinterpret_cast<const uint32_t*>(
                  image + (static_cast<int64_t>(c) * p.height + y) * p.width));
            }
          }
        }
      };
      load(0);
      for (int stage = 0; stage < stages; ++stage, ++count) {
        const int slot = count % S::kStages;
        barrier_wait(empty + 16 * slot, (count / S::kStages & 1) ^ 1);
        if (item < 63) {
          const uint32_t target = ring + slot * S::kStage + item * 32;
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            uint32_t half[2][3];
#pragma unroll
            for (int c = 0; c < 3; ++c) {
              const uint32_t upper = word[row * 6 + c], lower = word[row * 6 + 3 + c];
              half[0][c] = __byte_perm(upper, lower, 0x5410);
              half[1][c] = __byte_perm(upper, lower, 0x7632);
            }
#pragma unroll
            for (int pixel = 0; pixel < 2; ++pixel) {
              asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                               target + row * S::kPitch + pixel * 16),
                           "r"(half[pixel][0]), "r"(half[pixel][1]), "r"(half[pixel][2]), "r"(0)
                           : "memory");
            }
          }
        }
        fence_to_async();
        barrier_arrive(full + 16 * slot);
        if (stage + 1 < stages) load(stage + 1);
      }
    }
  } else {
    more_registers<232>();
    const int warp = thread / 32, lane = thread % 32, group = lane / 4, quad = lane % 4;
    const int channel = warp * 16 + 2 * group;
    uint32_t weight[32];
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const int8_t* k = p.weight + channel * 256 + step * 32 + quad * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[step * 4 + i] = *reinterpret_cast<const uint32_t*>(k + i % 2 * 256 + i / 2 * 16);
      }
    }
    const Scales scales(p.multiplier, p.bias, 0.0f, channel);
    int count = 0;  // stages of earlier tiles
    int staging = 0;
    const uint32_t staged = ring + S::kStages * S::kStage;
    const auto row_of = [&](int stage, int row) {
      return ring + (count + stage) % S::kStages * S::kStage + row * S::kPitch;
    };
    const auto await = [&](int stage) {
      barrier_wait(full + 16 * ((count + stage) % S::kStages), (count + stage) / S::kStages & 1);
    };
    const auto release = [&](int stage) {
      barrier_arrive(empty + 16 * ((count + stage) % S::kStages));
    };
    for (int number = first_tile; number < p.tiles; number += tile_step) {
      const StemTile tile(p, number);
      // The rows of the convolution alternate between two sets of sums: of a pooled row's three,
      // the second is added to the maxima, the third is kept for the next one, whose first it is.
      int32_t most[64], last[64];
      await(0);
      await(1);
      await(2);
      start_row(last, weight, {row_of(0, 1), row_of(1, 0), row_of(1, 1), row_of(2, 0)});
      mma_wait(last);
      release(0);
      if (tile.row == 0) {  // above the image
#pragma unroll
        for (int i = 0; i < 64; ++i) last[i] = INT_MIN;
      }
      const auto start_second = [&](int row) {
        start_row(most, weight,
                  {row_of(row + 1, 0), row_of(row + 1, 1), row_of(row + 2, 0), row_of(row + 2, 1)});
      };
      start_second(0);
      for (int row = 0; row < tile.rows; ++row) {
        mma_wait(most);
        keep_max(most, last);
        await(row + 3);
        start_row(last, weight,
                  {row_of(row + 1, 1), row_of(row + 2, 0), row_of(row + 2, 1), row_of(row + 3, 0)});
        mma_wait(last);
        release(row + 1);
        keep_max(most, last);
        int32_t pooled[16][2];
        pool_columns(most, lane, tile.column == 0, pooled);
        start_second(row + 1);  // under way during the rest; the last one is for nothing
        const uint32_t results = staged + staging * S::kResults;
        staging ^= 1;
        store_pooled(pooled, scales, p.pool_multiplier, lane, results + warp * 16);
        warpgroup_sync(consumer);
        const int columns = min(S::kColumns, p.width / 4 - tile.column);
        int8_t* y = p.y + ((static_cast<int64_t>(tile.image) * (p.height / 4) + tile.row + row) *
                               (p.width / 4) +
                           tile.column) *
                              64;
        for (int i = thread; i < columns * 4; i += kWarpgroup) {
          *reinterpret_cast<uint4*>(y + i * 16) = *reinterpret_cast<const uint4*>(
              shared + (results - start) + i / 4 * kPixelPitch + i % 4 * 16);
        }
      }
      mma_wait(most);
      release(tile.rows + 1);
      release(tile.rows + 2);
      count += tile.rows + StemTile::kBorder;
    }
  }
}

}  // namespace int8_conv
