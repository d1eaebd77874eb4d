// 3x3 convolution, stride 1, padding 1, of as many channels as it makes, INT8 NHWC.
//
// The weights stay in registers as operand A of the warpgroup MMA: 64 output channels are its rows.
// Operand B is a tile of pixels in shared memory, swizzled: a tap is the same tile read from
// another start, so that nothing is loaded twice but the tile's border. One warpgroup loads, two
// multiply, in turns: while one of them writes its results, the other has the tensor cores. Results
// go through shared memory, over the residual where there is one, to full lines.
#pragma once

#include "finish.cuh"
#include "hopper.cuh"

namespace int8_conv {

struct Conv3x3 {
  const int8_t* x;       // [batch, height, width, channels]
  const int8_t* weight;  // [channels, 3, 3, channels]: output channel, row, column, input channel
  const float* multiplier;  // [channels]
  const float* bias;        // [channels]
  const int8_t* residual;   // as y
  float residual_multiplier;
  int8_t* y;  // [batch, height, width, channels]
  int height, width;
  int tiles, tiles_x, tiles_y;
};

template <int kChannels_>
struct Conv3x3Shape {
  static constexpr int kChannels = kChannels_;
  static constexpr int kBlocks = kChannels / 64;           // of output channels
  static constexpr int kRows = kChannels == 64 ? 30 : 14;  // of a tile of 8 columns
  static constexpr int kPixels = 8 * kRows;                // columns of the MMA
  static constexpr int kPitch = 10 * kChannels;            // a row of the tile, with borders
  static constexpr int kTile = (kRows + 2) * kPitch;
  static constexpr int kResults = kPixels * kPixelPitch;
  static constexpr int kStage = (kTile + kBlocks * kResults + 1023) / 1024 * 1024;
  static constexpr int kStages = 5;
  static constexpr int kSteps = 9 * kChannels / 32;
  static constexpr int kSharedBytes = kStages * kStage + 16 * kStages + 16;
  static_assert(kSharedBytes <= 227 * 1024);
};

constexpr int kConvThreads = 3 * kWarpgroup;

template <int kChannels, bool kResidual>
__global__ void __launch_bounds__(kConvThreads, 1) conv3x3_kernel(const Conv3x3 p) {
  using S = Conv3x3Shape<kChannels>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t full = stages + S::kStages * S::kStage, empty = full + 8 * S::kStages;
  const uint32_t turns = empty + 8 * S::kStages;  // of the consumers at the tensor cores
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(full + 8 * i, kWarpgroup);
      barrier_init(empty + 8 * i, kWarpgroup * S::kBlocks);
    }
    for (int i = 0; i < 2; ++i) barrier_init(turns + 8 * i, kWarpgroup);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warpgroup == 0) {  // loads
    fewer_registers<40>();
    constexpr int kLag = 2;                    // tiles under way
    constexpr int kPerPixel = kChannels / 16;  // chunks of 16 bytes
    const int chunk = thread % kPerPixel;
    int count = 0;
    const auto announce = [&](int stage) {
      fence_to_async();
      barrier_arrive(full + 8 * stage);
    };
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++count) {
      const int image = tile / (p.tiles_x * p.tiles_y);
      const int place = tile - image * p.tiles_x * p.tiles_y;
      const int top = place / p.tiles_x * S::kRows, left = place % p.tiles_x * 8;
      const int stage = count % S::kStages;
      barrier_wait(empty + 8 * stage, (count / S::kStages & 1) ^ 1);
      const uint32_t base = stages + stage * S::kStage;
      const int64_t image_start = static_cast<int64_t>(image) * p.height * p.width;
#pragma unroll 5
      for (int i = thread / kPerPixel; i < (S::kRows + 2) * 10; i += kWarpgroup / kPerPixel) {
        const int row = i / 10, column = i - row * 10;
        const int y = top + row - 1, x = left + column - 1;
        const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.height) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(p.width);
        const int64_t pixel = image_start + (inside ? y * p.width + x : 0);
        copy_async(base + swizzle<kChannels>(i * kChannels + chunk * 16),
                   p.x + pixel * kChannels + chunk * 16, inside);
      }
      if (kResidual) {
#pragma unroll 5
        for (int i = thread / kPerPixel; i < S::kPixels; i += kWarpgroup / kPerPixel) {
          const int y = top + i / 8, x = left + i % 8;
          const bool inside = y < p.height && x < p.width;
          const int64_t pixel = image_start + (inside ? y * p.width + x : 0);
          copy_async(base + S::kTile + chunk / 4 * S::kResults + i * kPixelPitch + chunk % 4 * 16,
                     p.residual + pixel * kChannels + chunk * 16, inside);
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
    more_registers<232>();
    const int consumer = warpgroup - 1;
    const int block = consumer % S::kBlocks;  // of output channels
    const int warp = thread / 32, lane = thread % 32, group = lane / 4, quad = lane % 4;
    // Rows of the MMA that a thread holds, lane / 4 and + 8, are neighbouring channels.
    const int channel = block * 64 + warp * 16 + 2 * group;
    uint32_t weight[S::kSteps * 4];
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const int8_t* k = p.weight + channel * 9 * kChannels + step * 32 + quad * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[step * 4 + i] =
            *reinterpret_cast<const uint32_t*>(k + i % 2 * 9 * kChannels + i / 2 * 16);
      }
    }
    const Scales scales(p.multiplier, p.bias, p.residual_multiplier, channel);

    constexpr int kStride = S::kBlocks == 1 ? 2 : 1;  // tiles alternate unless both take all
    int count = S::kBlocks == 1 ? consumer : 0;
    int turn = consumer == 0;  // the first one is the first consumer's
    for (int tile = blockIdx.x + count * gridDim.x; tile < p.tiles;
         tile += kStride * gridDim.x, count += kStride, turn ^= 1) {
      const int image = tile / (p.tiles_x * p.tiles_y);
      const int place = tile - image * p.tiles_x * p.tiles_y;
      const int top = place / p.tiles_x * S::kRows, left = place % p.tiles_x * 8;
      const int stage = count % S::kStages;
      barrier_wait(full + 8 * stage, count / S::kStages & 1);
      const uint32_t base = stages + stage * S::kStage;
      barrier_wait(turns + 8 * consumer, turn);
      int32_t sum[S::kPixels / 2];
      mma_fence();
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        const int tap = step / (kChannels / 32), part = step % (kChannels / 32);
        const uint32_t start = base + (tap / 3 * 10 + tap % 3) * kChannels + part * 32;
        Mma<S::kPixels>::run(sum, weight + step * 4,
                             swizzled_descriptor<kChannels>(start, S::kPitch), step > 0);
      }
      mma_commit();
      barrier_arrive(turns + 8 * (consumer ^ 1));
      mma_wait(sum);

      const uint32_t results = base + S::kTile + block * S::kResults;
      finish_tile<S::kRows, kResidual>(sum, scales, thread, consumer, results, shared,
                                       p.y + block * 64, kChannels, image, top, left, p.height,
                                       p.width);
      barrier_arrive(empty + 8 * stage);
    }
  }
}

}  // namespace int8_conv
