// From the int32 sums of a tile of 64 channels to INT8 in memory.
#pragma once

#include "hopper.cuh"

namespace int8_conv {

constexpr int kPixelPitch = 80;  // of 64 results in shared memory: rows of 16 bytes meet all banks

// What becomes of a thread's two channels. Results lie in [0, 127] / 127, so that the saturation of
// the FMA is ReLU and clipping.
struct Scales {
  float multiplier[2], bias[2], residual;

  __device__ Scales(const float* multipliers, const float* biases, float residual_multiplier,
                    int channel)
      : multiplier{multipliers[channel] / 127, multipliers[channel + 1] / 127},
        bias{biases[channel] / 127, biases[channel + 1] / 127},
        residual(residual_multiplier / 127) {}
};

// Where a tile lies.
struct Tile { int image, top, left; };

// Finish a tile of 8 columns and kRows rows. `sum` is what Mma leaves, its rows lane / 4 and + 8
// neighbouring channels; at `results` there is room for the tile, with the residual in it if there
// is one. `y` is the first of the 64 channels of the first image.
template <int kRows, bool kResidual>
__device__ __forceinline__ void finish_tile(const int32_t (&sum)[4 * kRows], const Scales& scales,
                                            int thread, int warpgroup, uint32_t results, int8_t* y,
                                            int channels, const Tile& tile, int height, int width) {
  const int warp = thread / 32, lane = thread % 32;
  const uint32_t mine = results + lane % 16 * kPixelPitch + warp * 16;
#pragma unroll
  for (int pair = 0; pair < kRows / 2; ++pair) {
    const uint32_t address = mine + pair * 16 * kPixelPitch;
    uint32_t packed[2];
    if (kResidual) load_pixels(address, packed);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t shifted = kResidual ? packed[half] ^ 0x80808080 : 0;  // plus 128
      float out[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {  // byte: pixel b / 2, channel b % 2
        float value = fmaf(static_cast<float>(sum[pair * 8 + half * 4 + b % 2 * 2 + b / 2]),
                           scales.multiplier[b % 2], scales.bias[b % 2]);
        if (kResidual) {
          // 0x4B000000 is 2^23, whose last bit is worth 1: with a byte there it is 2^23 + byte
          const float byte =
              __uint_as_float(__byte_perm(shifted, 0x4B000000, 0x7650 + b)) - (8388608.0f + 128.0f);
          value = fmaf(byte, scales.residual, value);
        }
        out[b] = fmaf(__saturatef(value), 127.0f, kRounder);
      }
      packed[half] = low_bytes(out[0], out[1], out[2], out[3]);
    }
    store_pixels(address, packed);
  }
  warpgroup_sync(warpgroup);
  // A thread has 16 channels of one column in every fourth row.
  constexpr int kChunks = (kRows + 3) / 4;
  const int column = lane / 4, chunk = lane % 4;
  uint4 values[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (4 * i + warp < kRows) {
      values[i] = load_shared(results + ((4 * i + warp) * 8 + column) * kPixelPitch + chunk * 16);
    }
  }
  const int64_t row_of_all = static_cast<int64_t>(tile.image) * height + tile.top + warp;
  y += (row_of_all * width + tile.left + column) * channels + chunk * 16;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int row = 4 * i + warp;
    if (row < kRows && tile.top + row < height && tile.left + column < width) {
      *reinterpret_cast<uint4*>(y + static_cast<int64_t>(4 * i) * width * channels) = values[i];
    }
  }
}

}  // namespace int8_conv
