// The logits of a tile of slots in shared memory: how they get there, and how they are read.
#pragma once

#include "problem.cuh"

namespace nms_opt {

constexpr int kThreads = 128;
constexpr int kTileBytes = 44 * 1024;  // of a tile, at most

template <int Bytes>
struct Chunk;  // an integer of as many bytes
template <> struct Chunk<16> { using type = int4; };
template <> struct Chunk<8> { using type = int2; };
template <> struct Chunk<4> { using type = int; };
template <> struct Chunk<2> { using type = short; };
template <> struct Chunk<1> { using type = char; };

// Asynchronous where the GPU can.
template <int Bytes>
__device__ void copy_chunk(char* target, const char* source) {
#if __CUDA_ARCH__ >= 800
  if constexpr (Bytes >= 4) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    if constexpr (Bytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source));
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(source),
                   "n"(Bytes));
    }
    return;
  }
#endif
  using Integer = typename Chunk<Bytes>::type;
  *reinterpret_cast<Integer*>(target) = *reinterpret_cast<const Integer*>(source);
}

// Copies the rows of a tile, `Bytes` at a time. `conf` is the tile's first element.
template <int Bytes, typename T, bool Linear>
__device__ void copy_rows(char* tile, const Level& level, const T* conf, int num_cells,
                          int channels) {
  const auto* first = reinterpret_cast<const char*>(conf);
  const int thread = threadIdx.x;
  if constexpr (Linear) {  // many short rows of whole chunks, several at a time
    const int chunks = level.row_pitch / Bytes, rows = kThreads / chunks;
    const int row = thread / chunks, at = thread % chunks * Bytes;
    if (row >= rows || at >= num_cells * static_cast<int>(sizeof(T))) return;
    const int64_t row_bytes = static_cast<int64_t>(level.cells) * sizeof(T);
    const char* source = first + row * row_bytes + at;
    const int64_t source_step = rows * row_bytes;
    const int target_step = rows * level.row_pitch;
    char* target = tile + row * level.row_pitch + at;
#pragma unroll 4
    for (int i = row; i < channels; i += rows, source += source_step, target += target_step) {
      copy_chunk<Bytes>(target, source);
    }
  } else {  // few long rows
    const int vector = level.conf_vector;
    const int64_t row_bytes = static_cast<int64_t>(level.cells) * vector * sizeof(T);
    for (int row = 0; row < level.conf_rows; ++row) {
      const char* source = first + row * row_bytes;
      char* target = tile + row * level.row_pitch;
      // The last cell has but `channels` of its row: behind may be another tensor, or nothing.
      const int elements = (num_cells - 1) * vector + min(vector, channels - row * vector);
      const int bytes = elements * sizeof(T), whole = bytes / Bytes * Bytes;
#pragma unroll 4
      for (int at = thread * Bytes; at < whole; at += kThreads * Bytes) {
        copy_chunk<Bytes>(target + at, source + at);
      }
      const int rest = whole + thread * sizeof(T);
      if (rest < bytes) {
        *reinterpret_cast<T*>(target + rest) = *reinterpret_cast<const T*>(source + rest);
      }
    }
  }
}

template <typename T, bool Linear>
__device__ void copy_tile(char* tile, const Level& level, int image, int first_cell, int num_cells,
                          int channels) {
  const T* conf = static_cast<const T*>(level.conf) +
                  (static_cast<int64_t>(image) * level.conf_rows * level.cells + first_cell) *
                      level.conf_vector;
  switch (level.copy_bytes) {
    case 16: copy_rows<16, T, Linear>(tile, level, conf, num_cells, channels); break;
    case 8: copy_rows<8, T, Linear>(tile, level, conf, num_cells, channels); break;
    case 4: copy_rows<4, T, Linear>(tile, level, conf, num_cells, channels); break;
    default: copy_rows<sizeof(T), T, Linear>(tile, level, conf, num_cells, channels);
  }
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline float greater(float a, float b) { return fmaxf(a, b); }
__device__ inline __half greater(__half a, __half b) { return __hmax(a, b); }
__device__ inline int8_t greater(int8_t a, int8_t b) { return max(a, b); }

template <typename T>
__device__ T lowest();
template <> __device__ inline float lowest() { return -INFINITY; }
template <> __device__ inline __half lowest() { return __ushort_as_half(0xFC00); }  // -inf
template <> __device__ inline int8_t lowest() { return INT8_MIN; }

// The logits of the slots of a tile in shared memory.
template <typename T, bool Linear, int Lanes>
struct Tile {
  static constexpr int kPitch = kThreads / Lanes * sizeof(T);  // of a class, NCHW

  const char* data;
  int anchors, vector, pitch;
  float scale;

  // Visits classes first, first + step, … below `end` of one slot.
  template <int Unroll, typename Visit>
  __device__ void each(int slot, int first, int step, int end, Visit visit) const {
    if constexpr (Linear) {
      const char* at = data + first * kPitch + slot * sizeof(T);
#pragma unroll Unroll
      for (int cls = first; cls < end; cls += step, at += step * kPitch) {
        visit(cls, *reinterpret_cast<const T*>(at));
      }
    } else {
      const int cell = slot / anchors, channel = first * anchors + slot % anchors;
      const char* at = data + channel / vector * pitch + cell * vector * sizeof(T);
      int in_row = channel % vector;
#pragma unroll Unroll
      for (int cls = first; cls < end; cls += step) {
        visit(cls, reinterpret_cast<const T*>(at)[in_row]);
        in_row += step * anchors;
        while (in_row >= vector) in_row -= vector, at += pitch;
      }
    }
  }

  __device__ float logit(T value) const {
    if constexpr (sizeof(T) == 1) {
      return static_cast<float>(value) * scale;
    } else {
      return to_float(value);
    }
  }

  __device__ float logit_at(int slot, int cls) const {
    float result = 0.0f;
    each<1>(slot, cls, 1, cls + 1, [&](int, T value) { result = logit(value); });
    return result;
  }
};

}  // namespace nms_opt
