/* INT8 convolutions for GPUs of compute capability 9.0, where cuDNN's are far from the hardware.
 *
 * Plain C, raw device pointers, one stream; nothing allocates, synchronises or keeps state, so a
 * run can be captured in a CUDA graph. Activations are NHWC, the stem's image is NCHW.
 *
 * With sum the exact integer convolution over zero-padded x,
 *   real = sum * multiplier[channel] + bias[channel] (+ residual * residual_multiplier)
 *   y    = round to nearest, ties to even, of min(max(real, 0), 127)
 * in float32: multiplier is x's scale times the weight's over y's, bias and the residual's scale
 * are divided by y's. A real within a few units in the last place of a tie may round either way.
 */
#ifndef INT8_CONV_H
#define INT8_CONV_H

#include <stdint.h>

#if defined(__GNUC__)
#define INT8_CONV_API __attribute__((visibility("default")))
#else
#define INT8_CONV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define INT8_CONV_VERSION 2 /* changes with any change to this header */

typedef struct CUstream_st* int8_conv_stream; /* cudaStream_t */

/* What a function returns; from INT8_CONV_CUDA_ERROR on, INT8_CONV_CUDA_ERROR + a cudaError_t. */
typedef enum {
  INT8_CONV_OK = 0,
  INT8_CONV_BAD_SHAPE, /* see the function */
  INT8_CONV_NULL_POINTER,
  INT8_CONV_MISALIGNED_POINTER, /* all: 16 bytes */
  INT8_CONV_WRONG_GPU,          /* the current device is not of compute capability 9.0 */
  INT8_CONV_CUDA_ERROR = 1000,
} int8_conv_status;

/* INT8_CONV_VERSION of the library. */
INT8_CONV_API int32_t int8_conv_version(void);

/* One English sentence for a status; never null, valid for the life of the process. */
INT8_CONV_API const char* int8_conv_status_string(int32_t status);

/* 3x3 convolution, stride 1, padding 1, of 64 or 256 channels to a multiple of 64, or of 128 to a
 * multiple of 128, 65536 at most.
 *
 * x           int8 [batch, height, width, inputs]
 * weight      int8 [outputs, 3, 3, inputs]: output channel, row, column, input channel
 * multiplier  float32 [outputs]; bias as well
 * residual    null, or int8 [batch, height, width, outputs]; may not be y
 * y           int8 [batch, height, width, outputs]
 */
INT8_CONV_API int32_t int8_conv_3x3(int32_t batch, int32_t height, int32_t width, int32_t inputs,
                                    int32_t outputs, const int8_t* x, const int8_t* weight,
                                    const float* multiplier, const float* bias,
                                    const int8_t* residual, float residual_multiplier, int8_t* y,
                                    int8_conv_stream stream);

/* 7x7 convolution, stride 2, padding 3, of 3 to 64 channels as above, then 3x3 max pooling, stride
 * 2, padding 1, of its y, then a second rounding: min(max(round(y * pool_multiplier), 0), 127).
 *
 * x        int8 [batch, 3, height, width]; height and width are multiples of 4
 * weight   int8 [64, 4, 4, 16]: row r and column s of the 7x7 filter for channel c lie at
 *          [channel, (r + 1) / 2, (s + 1) / 2, 4 * c + (r + 1) % 2 * 2 + (s + 1) % 2]; the other
 *          bytes are 0
 * y        int8 [batch, height / 4, width / 4, 64]
 */
INT8_CONV_API int32_t int8_conv_stem(int32_t batch, int32_t height, int32_t width, const int8_t* x,
                                     const int8_t* weight, const float* multiplier,
                                     const float* bias, float pool_multiplier, int8_t* y,
                                     int8_conv_stream stream);

#ifdef __cplusplus
}
#endif
#endif
