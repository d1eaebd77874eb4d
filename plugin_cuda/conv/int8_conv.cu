// The C functions of int8_conv.h: checks and launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "conv3x3.cuh"
#include "int8_conv.h"
#include "stem.cuh"

namespace {

using namespace int8_conv;

constexpr int kMaxSide = 1 << 14;
constexpr int kMaxBatch = 1 << 16;
constexpr int kMaxOutputs = 1 << 16;

struct Device {
  int32_t status = INT8_CONV_OK;
  int multiprocessors = 0;
};

Device device() {
  int number = 0, major = 0, minor = 0;
  Device found;
  cudaError_t error = cudaGetDevice(&number);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
  if (!error) {
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, number);
  }
  if (error)
    found.status = INT8_CONV_CUDA_ERROR + error;
  else if (major != 9 || minor != 0)
    found.status = INT8_CONV_WRONG_GPU;
  return found;
}

int32_t check_pointers(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (!pointer) return INT8_CONV_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return INT8_CONV_MISALIGNED_POINTER;
  }
  return INT8_CONV_OK;
}

template <typename Kernel, typename Params>
int32_t launch(Kernel kernel, int blocks, int threads, int bytes, const Params& params,
               cudaStream_t stream) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (!error) {
    kernel<<<blocks, threads, bytes, stream>>>(params);
    error = cudaGetLastError();
  }
  return error ? INT8_CONV_CUDA_ERROR + error : INT8_CONV_OK;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int kInputs>
int32_t run_conv3x3(Conv3x3 p, int batch, int multiprocessors, cudaStream_t stream) {
  using S = Conv3x3Shape<kInputs>;
  p.slices = p.outputs / S::kOutputs;
  p.tiles_x = ceil_div(p.width, 8);
  p.tiles_y = ceil_div(p.height, S::kRows);
  const int64_t tiles = static_cast<int64_t>(batch) * p.tiles_x * p.tiles_y;
  if (tiles > INT32_MAX / 4) return INT8_CONV_BAD_SHAPE;
  p.tiles = static_cast<int>(tiles);
  // Every slice has as many thread blocks, and they are at the same tile at about the same time.
  const int blocks = p.slices * std::min(p.tiles, std::max(1, multiprocessors / p.slices));
  const auto kernel = p.residual ? conv3x3_kernel<kInputs, true> : conv3x3_kernel<kInputs, false>;
  return launch(kernel, blocks, kConvThreads, S::kSharedBytes, p, stream);
}

}  // namespace

extern "C" {

int32_t int8_conv_version(void) { return INT8_CONV_VERSION; }

const char* int8_conv_status_string(int32_t status) {
  switch (status) {
    case INT8_CONV_OK: return "no error";
    case INT8_CONV_BAD_SHAPE: return "a shape that the kernel does not take";
    case INT8_CONV_NULL_POINTER: return "a pointer is null";
    case INT8_CONV_MISALIGNED_POINTER: return "a pointer is not aligned to 16 bytes";
    case INT8_CONV_WRONG_GPU: return "the GPU is not of compute capability 9.0";
    default: break;
  }
  if (status >= INT8_CONV_CUDA_ERROR) {
    return cudaGetErrorString(static_cast<cudaError_t>(status - INT8_CONV_CUDA_ERROR));
  }
  return "unknown status";
}

int32_t int8_conv_3x3(int32_t batch, int32_t height, int32_t width, int32_t inputs, int32_t outputs,
                      const int8_t* x, const int8_t* weight, const float* multiplier,
                      const float* bias, const int8_t* residual, float residual_multiplier,
                      int8_t* y, int8_conv_stream stream) {
  if (batch < 1 || batch > kMaxBatch || height < 1 || height > kMaxSide || width < 1 ||
      width > kMaxSide || (inputs != 64 && inputs != 128 && inputs != 256) || outputs < 1 ||
      outputs > kMaxOutputs || outputs % (inputs == 128 ? 128 : 64)) {
    return INT8_CONV_BAD_SHAPE;
  }
  if (int32_t status = check_pointers({x, weight, multiplier, bias, residual ? residual : x, y})) {
    return status;
  }
  const Device gpu = device();
  if (gpu.status) return gpu.status;
  Conv3x3 p{};
  p.x = x, p.weight = weight, p.multiplier = multiplier, p.bias = bias, p.y = y;
  p.residual = residual, p.residual_multiplier = residual_multiplier;
  p.outputs = outputs, p.height = height, p.width = width;
  const auto run = inputs == 64    ? run_conv3x3<64>
                   : inputs == 128 ? run_conv3x3<128>
                                   : run_conv3x3<256>;
  return run(p, batch, gpu.multiprocessors, stream);
}

int32_t int8_conv_stem(int32_t batch, int32_t height, int32_t width, const int8_t* x,
                       const int8_t* weight, const float* multiplier, const float* bias,
                       float pool_multiplier, int8_t* y, int8_conv_stream stream) {
  if (batch < 1 || batch > kMaxBatch || height < 4 || height > kMaxSide || height % 4 ||
      width < 4 || width > kMaxSide || width % 4) {
    return INT8_CONV_BAD_SHAPE;
  }
  if (int32_t status = check_pointers({x, weight, multiplier, bias, y})) return status;
  const Device gpu = device();
  if (gpu.status) return gpu.status;
  const int rows = height / 4, strips = ceil_div(width / 4, StemShape::kColumns);
  // Long segments repeat fewer border rows, short ones fill the GPU: the fewest rows in a row
  // count.
  const int64_t consumers = 2 * static_cast<int64_t>(gpu.multiprocessors);
  int best = rows;
  double best_cost = 0;
  for (int segment = 1; segment <= rows; ++segment) {
    const int64_t tiles = static_cast<int64_t>(batch) * strips * ceil_div(rows, segment);
    const double cost = static_cast<double>((tiles + consumers - 1) / consumers) * (segment + 2.0);
    if (segment == 1 || cost < best_cost) best = segment, best_cost = cost;
  }
  const int segments = ceil_div(rows, best);
  const int64_t tiles = static_cast<int64_t>(batch) * strips * segments;
  if (tiles > INT32_MAX / 4) return INT8_CONV_BAD_SHAPE;
  const Stem p{x,      weight,          multiplier,
               bias,   pool_multiplier, y,
               height, width,           static_cast<int>(tiles),
               strips, segments,        best};
  const int blocks = static_cast<int>(std::min<int64_t>((tiles + 1) / 2, gpu.multiprocessors));
  return launch(stem_kernel, blocks, kStemThreads, StemShape::kSharedBytes, p, stream);
}

}  // extern "C"
