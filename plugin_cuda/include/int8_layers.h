/* What stands beside INT8 convolutions of another library, on any GPU.
 *
 * Plain C, raw device pointers, one stream; nothing allocates, synchronises or keeps state, so a
 * run can be captured in a CUDA graph. The library loads without a GPU.
 */
#ifndef INT8_LAYERS_H
#define INT8_LAYERS_H

#include <stdint.h>

#if defined(__GNUC__)
#define INT8_LAYERS_API __attribute__((visibility("default")))
#else
#define INT8_LAYERS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define INT8_LAYERS_VERSION 1 /* changes with any change to this header */

typedef struct CUstream_st* int8_layers_stream; /* cudaStream_t */

/* What a function returns; from INT8_LAYERS_CUDA_ERROR on, that + a cudaError_t. */
typedef enum {
  INT8_LAYERS_OK = 0,
  INT8_LAYERS_BAD_SHAPE, /* see the function */
  INT8_LAYERS_NULL_POINTER,
  INT8_LAYERS_MISALIGNED_POINTER, /* NHWC tensors: 16 bytes */
  INT8_LAYERS_CUDA_ERROR = 1000,
} int8_layers_status;

/* INT8_LAYERS_VERSION of the library. */
INT8_LAYERS_API int32_t int8_layers_version(void);

/* One English sentence for a status; never null, valid for the life of the process. */
INT8_LAYERS_API const char* int8_layers_status_string(int32_t status);

typedef struct {
  int32_t batch;
  int32_t channels; /* of the image */
  int32_t height;
  int32_t width;
  int32_t rows; /* of the result */
  int32_t columns;
  int32_t depth;      /* channels of the result: a multiple of 8, at least channels * block_rows *
                         block_columns */
  int32_t block_rows; /* pixels of a cell */
  int32_t block_columns;
  int32_t first_row; /* of pixels, in the first cell; below 0: cells of padding */
  int32_t first_column;
} int8_layers_pack_shape;

/* Space to depth: every cell of block_rows x block_columns pixels becomes one pixel of float16.
 *
 * x  int8 [batch, channels, height, width]
 * y  float16 [batch, rows, columns, depth]; channel (c * block_rows + a) * block_columns + b of
 *    cell (i, j) is pixel (first_row + i * block_rows + a, first_column + j * block_columns + b) of
 *    channel c. Outside of the image, and in the channels left, 0.
 */
INT8_LAYERS_API int32_t int8_layers_pack(const int8_layers_pack_shape* shape, const int8_t* x,
                                         void* y, int8_layers_stream stream);

typedef struct {
  int32_t batch;
  int32_t channels; /* a multiple of 16 */
  int32_t height;
  int32_t width;
  int32_t rows; /* of the result */
  int32_t columns;
  int32_t kernel_rows;
  int32_t kernel_columns;
  int32_t stride_rows;
  int32_t stride_columns;
  int32_t top; /* padding */
  int32_t left;
} int8_layers_pool_shape;

/* Max pooling and requantisation: y = clip(round to nearest even(max(x) * multiplier), -128, 127).
 * Padding never wins; every window has to hold a pixel.
 *
 * x  int8 [batch, height, width, channels]
 * y  int8 [batch, rows, columns, channels]
 */
INT8_LAYERS_API int32_t int8_layers_max_pool(const int8_layers_pool_shape* shape, float multiplier,
                                             const int8_t* x, int8_t* y, int8_layers_stream stream);

#ifdef __cplusplus
}
#endif
#endif
