// libint8_layers.so; see int8_layers.h. Both kernels are bound by memory: a thread makes 16 bytes.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "int8_layers.h"

namespace {

constexpr int kThreads = 256;
constexpr int kHalves = 8;  // float16 in 16 bytes
constexpr int kBytes = 16;  // int8 in 16 bytes

__device__ int PixelOrZero(const int8_layers_pack_shape& s, const int8_t* image, int channel, int i,
                           int j) {
  const int block = s.block_rows * s.block_columns;
  const int c = channel / block;
  if (c >= s.channels) return 0;
  const int within = channel - c * block;
  const int row = s.first_row + i * s.block_rows + within / s.block_columns;
  const int column = s.first_column + j * s.block_columns + within % s.block_columns;
  if (row < 0 || row >= s.height || column < 0 || column >= s.width) return 0;
  return image[(static_cast<int64_t>(c) * s.height + row) * s.width + column];
}

__global__ void __launch_bounds__(kThreads)
    Pack(int8_layers_pack_shape s, const int8_t* __restrict__ x, uint4* __restrict__ y,
         int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int groups = s.depth / kHalves;
  const int group = static_cast<int>(index % groups);
  int64_t cell = index / groups;
  const int j = static_cast<int>(cell % s.columns);
  cell /= s.columns;
  const int i = static_cast<int>(cell % s.rows);
  const int8_t* image = x + cell / s.rows * s.channels * s.height * s.width;
  __half2 values[kHalves / 2];
#pragma unroll
  for (int pair = 0; pair < kHalves / 2; ++pair) {
    const int channel = group * kHalves + pair * 2;
    values[pair] = __halves2half2(__int2half_rn(PixelOrZero(s, image, channel, i, j)),
                                  __int2half_rn(PixelOrZero(s, image, channel + 1, i, j)));
  }
  y[index] = *reinterpret_cast<const uint4*>(values);
}

__device__ unsigned Requantize(unsigned four, float multiplier) {
  unsigned result = 0;
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    const int value = static_cast<int8_t>(four >> (8 * byte));
    const int rounded = __float2int_rn(static_cast<float>(value) * multiplier);
    result |= (static_cast<unsigned>(min(max(rounded, -128), 127)) & 255u) << (8 * byte);
  }
  return result;
}

__global__ void __launch_bounds__(kThreads)
    MaxPool(int8_layers_pool_shape s, float multiplier, const uint4* __restrict__ x,
            uint4* __restrict__ y, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int groups = s.channels / kBytes;
  const int group = static_cast<int>(index % groups);
  int64_t cell = index / groups;
  const int j = static_cast<int>(cell % s.columns);
  cell /= s.columns;
  const int i = static_cast<int>(cell % s.rows);
  const uint4* image = x + cell / s.rows * s.height * s.width * groups + group;
  const int top = i * s.stride_rows - s.top;
  const int left = j * s.stride_columns - s.left;
  uint4 best = make_uint4(0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u);
  for (int row = max(top, 0); row < min(top + s.kernel_rows, s.height); ++row) {
    for (int column = max(left, 0); column < min(left + s.kernel_columns, s.width); ++column) {
      const uint4 here = image[(static_cast<int64_t>(row) * s.width + column) * groups];
      best.x = __vmaxs4(best.x, here.x);
      best.y = __vmaxs4(best.y, here.y);
      best.z = __vmaxs4(best.z, here.z);
      best.w = __vmaxs4(best.w, here.w);
    }
  }
  best.x = Requantize(best.x, multiplier);
  best.y = Requantize(best.y, multiplier);
  best.z = Requantize(best.z, multiplier);
  best.w = Requantize(best.w, multiplier);
  y[index] = best;
}

bool Misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

template <typename... Sizes>
bool AllPositive(Sizes... sizes) {
  return ((sizes > 0) && ...);
}

int64_t Blocks(int64_t count) { return (count + kThreads - 1) / kThreads; }

int32_t Launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? INT8_LAYERS_OK : INT8_LAYERS_CUDA_ERROR + error;
}

}  // namespace

int32_t int8_layers_version(void) { return INT8_LAYERS_VERSION; }

const char* int8_layers_status_string(int32_t status) {
  switch (status) {
    case INT8_LAYERS_OK: return "no error";
    case INT8_LAYERS_BAD_SHAPE:
      return "a size is not positive, too large, or not the multiple that is needed";
    case INT8_LAYERS_NULL_POINTER: return "a pointer is null";
    case INT8_LAYERS_MISALIGNED_POINTER: return "a tensor is not aligned to 16 bytes";
    default:
      return status >= INT8_LAYERS_CUDA_ERROR
                 ? cudaGetErrorString(static_cast<cudaError_t>(status - INT8_LAYERS_CUDA_ERROR))
                 : "unknown status";
  }
}

int32_t int8_layers_pack(const int8_layers_pack_shape* shape, const int8_t* x, void* y,
                         int8_layers_stream stream) {
  if (!shape || !x || !y) return INT8_LAYERS_NULL_POINTER;
  const int8_layers_pack_shape& s = *shape;
  if (!AllPositive(s.batch, s.channels, s.height, s.width, s.rows, s.columns, s.depth, s.block_rows,
                   s.block_columns) ||
      s.depth % kHalves != 0 ||
      static_cast<int64_t>(s.channels) * s.block_rows * s.block_columns > s.depth)
    return INT8_LAYERS_BAD_SHAPE;
  if (Misaligned(y)) return INT8_LAYERS_MISALIGNED_POINTER;
  const int64_t count = static_cast<int64_t>(s.batch) * s.rows * s.columns * (s.depth / kHalves);
  if (Blocks(count) > std::numeric_limits<int32_t>::max()) return INT8_LAYERS_BAD_SHAPE;
  Pack<<<static_cast<unsigned>(Blocks(count)), kThreads, 0, stream>>>(s, x, static_cast<uint4*>(y),
                                                                      count);
  return Launched();
}

int32_t int8_layers_max_pool(const int8_layers_pool_shape* shape, float multiplier, const int8_t* x,
                             int8_t* y, int8_layers_stream stream) {
  if (!shape || !x || !y) return INT8_LAYERS_NULL_POINTER;
  const int8_layers_pool_shape& s = *shape;
  if (!AllPositive(s.batch, s.channels, s.height, s.width, s.rows, s.columns, s.kernel_rows,
                   s.kernel_columns, s.stride_rows, s.stride_columns) ||
      s.channels % kBytes != 0 || s.top < 0 || s.left < 0 || s.top >= s.kernel_rows ||
      s.left >= s.kernel_columns ||
      static_cast<int64_t>(s.rows - 1) * s.stride_rows - s.top >= s.height ||
      static_cast<int64_t>(s.columns - 1) * s.stride_columns - s.left >= s.width)
    return INT8_LAYERS_BAD_SHAPE;
  if (Misaligned(x) || Misaligned(y)) return INT8_LAYERS_MISALIGNED_POINTER;
  const int64_t count = static_cast<int64_t>(s.batch) * s.rows * s.columns * (s.channels / kBytes);
  if (Blocks(count) > std::numeric_limits<int32_t>::max()) return INT8_LAYERS_BAD_SHAPE;
  MaxPool<<<static_cast<unsigned>(Blocks(count)), kThreads, 0, stream>>>(
      s, multiplier, reinterpret_cast<const uint4*>(x), reinterpret_cast<uint4*>(y), count);
  return Launched();
}
