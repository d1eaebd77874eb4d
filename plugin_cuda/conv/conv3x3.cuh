// 3x3 convolution, stride 1, padding 1, INT8 NHWC, of 64, 128 or 256 input channels.
//
// The weights stay in registers as operand A of the warpgroup MMA: 64 output channels are its rows.
// Operand B is a tile of pixels in shared memory, swizzled: a tap is the same tile read from
// another start, so that nothing is loaded twice but the tile's border. One warpgroup loads, two
// multiply, in turns: while one of them writes its results, the other has the tensor cores. Results
// go through shared memory, over the residual where there is one, to full lines.
//
// Registers hold the weights of 64 output and 128 input channels for each of the two. With 64 input
// channels they take every other tile; with 128, two blocks of output channels of the same tile;
// with 256, the two halves of the input channels, whose sums the second one adds. (It was slower to
// let each of them finish half of the rows.)
#pragma once

#include "finish.cuh"
#include "hopper.cuh"

namespace int8_conv {

struct Conv3x3 {
  const int8_t* x;          // [batch, height, width, inputs]
  const int8_t* weight;     // [outputs, 3, 3, inputs]: output channel, row, column, input channel
  const float* multiplier;  // [outputs]
  const float* bias;        // [outputs]
  const int8_t* residual;   // as y
  float residual_multiplier;
  int8_t* y;            // [batch, height, width, outputs]
  int outputs, slices;  // a slice is the output channels of a thread block
  int height, width;
  int tiles, tiles_x, tiles_y;
};

template <int kInputs_>
struct Conv3x3Shape {
  static constexpr int kInputs = kInputs_;
  static constexpr int kPart = kInputs < 128 ? kInputs : 128;  // input channels of a consumer
  static constexpr int kParts = kInputs / kPart;
  static constexpr int kBlocks = kInputs == 128 ? 2 : 1;  // of 64 output channels
  static constexpr int kOutputs = 64 * kBlocks;           // of a thread block
  static constexpr int kReaders = kParts * kBlocks;       // consumers that share a tile
  static constexpr int kRows = kInputs == 64 ? 30 : 14;   // of a tile of 8 columns
  static constexpr int kPixels = 8 * kRows;               // columns of the MMA
  static constexpr int kPitch = 10 * kPart;               // a row of the tile, with borders
  static constexpr int kTile = (kRows + 2) * kPitch;      // of one part
  static constexpr int kResults = kPixels * kPixelPitch;
  static constexpr int kStage = (kParts * kTile + kBlocks * kResults + 1023) / 1024 * 1024;
  static constexpr int kStages = kParts == 1 ? 5 : 4;
  static constexpr int kSums = kParts == 1 ? 0 : 64 * kPixels * 4;  // handed to the other one
  static constexpr int kSteps = 9 * kPart / 32;
  // Registers of a loading thread, and of a multiplying one: what the loading warpgroup gives up of
  // the 168 that each thread starts with, the two others share.
  static constexpr int kLoading = kInputs == 64 ? 56 : kInputs == 128 ? 40 : 24;
  static constexpr int kMultiplying = 168 + (168 - kLoading) / 2;
  static constexpr int kSharedBytes = kStages * kStage + kSums + 16 * kStages + 32;
  static_assert(kTile % 1024 == 0 || kParts == 1);
  static_assert(kSharedBytes <= 227 * 1024);
};

constexpr int kConvThreads = 3 * kWarpgroup;

template <int kInputs, bool kResidual>
__global__ void __launch_bounds__(kConvThreads, 1) conv3x3_kernel(const Conv3x3 p) {
  using S = Conv3x3Shape<kInputs>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t sums = stages + S::kStages * S::kStage;
  const uint32_t full = sums + S::kSums, empty = full + 8 * S::kStages;
  const uint32_t turns = empty + 8 * S::kStages;  // of the consumers at the tensor cores
  const uint32_t sums_full = turns + 16, sums_empty = turns + 24;
  const int warpgroup = uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
  const int slice = blockIdx.x % p.slices * S::kOutputs;
  const int first_tile = blockIdx.x / p.slices, tile_step = gridDim.x / p.slices;
  const auto tile_of = [&](int number) {
    const int image = number / (p.tiles_x * p.tiles_y);
    const int place = number - image * p.tiles_x * p.tiles_y;
    return Tile{image, place / p.tiles_x * S::kRows, place % p.tiles_x * 8};
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + 8 * i, kWarpgroup);
      barrier_init(empty + 8 * i, kWarpgroup * S::kReaders);
    }
    for (int i = 0; i < 4; ++i) barrier_init(turns + 8 * i, kWarpgroup);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warpgroup == 0) {  // loads
    fewer_registers<S::kLoading>();
    constexpr int kLag = 2;                  // tiles under way
    constexpr int kPerPixel = kInputs / 16;  // chunks of 16 bytes
    const int chunk = thread % kPerPixel;
    int count = 0;
    const auto announce = [&](int stage) {
      fence_to_async();
      barrier_arrive(full + 8 * stage);
    };
    for (int number = first_tile; number < p.tiles; number += tile_step, ++count) {
      const Tile tile = tile_of(number);
      const int stage = count % S::kStages;
      barrier_wait(empty + 8 * stage, (count / S::kStages & 1) ^ 1);
      const uint32_t base = stages + stage * S::kStage;
      const int64_t image_start = static_cast<int64_t>(tile.image) * p.height * p.width;
      constexpr int kPartChunks = S::kPart / 16;
      const uint32_t part = base + chunk / kPartChunks * S::kTile;
#pragma unroll 5
      for (int i = thread / kPerPixel; i < (S::kRows + 2) * 10; i += kWarpgroup / kPerPixel) {
        const int row = i / 10, column = i - row * 10;
        const int y = tile.top + row - 1, x = tile.left + column - 1;
        const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.height) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
        const int64_t pixel = image_start + (inside ? y * p.width + x : 0);
        copy_async(part + swizzle<S::kPart>(i * S::kPart + chunk % kPartChunks * 16),
                   p.x + pixel * kInputs + chunk * 16, inside);
      }
      if (kResidual) {
        constexpr int kOfResidual = S::kOutputs / 16;
        const int piece = thread % kOfResidual;
        const uint32_t results = base + S::kParts * S::kTile + piece / 4 * S::kResults;
#pragma unroll 5
        for (int i = thread / kOfResidual; i < S::kPixels; i += kWarpgroup / kOfResidual) {
          const int y = tile.top + i / 8, x = tile.left + i % 8;
          const bool inside = y < p.height && x < p.width;
          const int64_t pixel = image_start + (inside ? y * p.width + x : 0);
          copy_async(results + i * kPixelPitch + piece % 4 * 16,
                     p.residual + pixel * p.outputs + slice + piece * 16, inside);
        }
      }
      copies_commit();
      if (count >= kLag) {
        copies_wait<kLag>();
        announce((count - kLag) % S::kStages);
      }
    }
    copies_wait<0>();
    for (int i = count < kLag ? 0 : count - kLag; i < count; ++i) announce(i % S::kStages);
  } else {
    more_registers<S::kMultiplying>();
    const int consumer = warpgroup - 1;
    const int block = consumer % S::kBlocks;  // of output channels
    const int part = consumer % S::kParts;    // of input channels
    const int warp = thread / 32, lane = thread % 32, group = lane / 4, quad = lane % 4;
    // Rows of the MMA that a thread holds, lane / 4 and + 8, are neighbouring channels.
    const int channel = slice + block * 64 + warp * 16 + 2 * group;
    constexpr int kTapSteps = S::kPart / 32;
    uint32_t weight[S::kSteps * 4];
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const int8_t* k = p.weight + (channel * 9 + step / kTapSteps) * kInputs + part * S::kPart +
                        step % kTapSteps * 32 + quad * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[step * 4 + i] =
            *reinterpret_cast<const uint32_t*>(k + i % 2 * 9 * kInputs + i / 2 * 16);
      }
    }
    const Scales scales(p.multiplier, p.bias, p.residual_multiplier, channel);

    constexpr int kStride = S::kReaders == 1 ? 2 : 1;  // tiles alternate unless both take all
    int count = S::kReaders == 1 ? consumer : 0;
    int turn = consumer == 0;  // the first one is the first consumer's
    for (int number = first_tile + count * tile_step; number < p.tiles;
         number += kStride * tile_step, count += kStride, turn ^= 1) {
      const int stage = count % S::kStages;
      barrier_wait(full + 8 * stage, count / S::kStages & 1);
      const uint64_t pixels =
          swizzled_descriptor<S::kPart>(stages + stage * S::kStage + part * S::kTile, S::kPitch);
      barrier_wait(turns + 8 * consumer, turn);
      int32_t sum[S::kPixels / 2];
      mma_fence();
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        const int tap = step / kTapSteps;
        const int start = (tap / 3 * 10 + tap % 3) * S::kPart + step % kTapSteps * 32;
        Mma<S::kPixels>::run(sum, weight + step * 4, advance(pixels, start), step > 0);
      }
      mma_commit();
      barrier_arrive(turns + 8 * (consumer ^ 1));
      const Tile tile = tile_of(number);
      mma_wait(sum);

      if constexpr (S::kParts > 1) {
        if (consumer == 0) {
          barrier_arrive(empty + 8 * stage);
          barrier_wait(sums_empty, (count & 1) ^ 1);
          store_sums(sums + thread * 16, sum);
          barrier_arrive(sums_full);
          continue;
        }
        barrier_wait(sums_full, count & 1);
        add_sums(sums + thread * 16, sum);
        barrier_arrive(sums_empty);
      }
      const uint32_t results =
          stages + stage * S::kStage + S::kParts * S::kTile + block * S::kResults;
      finish_tile<S::kRows, kResidual>(sum, scales, thread, consumer, results,
                                       p.y + slice + block * 64, p.outputs, tile, p.height,
                                       p.width);
      barrier_arrive(empty + 8 * stage);
    }
  }
}

}  // namespace int8_conv
