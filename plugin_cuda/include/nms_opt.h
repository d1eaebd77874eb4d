/* NMS_OPT_TRT on a GPU: detections straight from the outputs of the head convolutions of an SSD or
 * a RetinaNet.
 *
 * Plain C, raw device pointers, one stream. No function allocates, synchronises with the host or
 * keeps state, so a run can be captured in a CUDA graph; the library loads without a GPU.
 *
 * Meaning of the result: the operator's definition in graph_surgery/nms_function.py. Rows come in
 * descending score; equal scores in ascending class, then ascending prior; the same inputs give
 * the same bits. No candidate is ever dropped for want of room.
 */
#ifndef NMS_OPT_H
#define NMS_OPT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define NMS_OPT_API __attribute__((visibility("default")))
#else
#define NMS_OPT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define NMS_OPT_VERSION 2 /* changes with any change to this header */

#define NMS_OPT_MAX_LEVELS 8
#define NMS_OPT_MAX_ANCHORS 32
#define NMS_OPT_MAX_CLASSES 352
#define NMS_OPT_MAX_TOP_K 1024 /* for keep_top_k, and for top_k without level_top_k */
#define NMS_OPT_MAX_LEVEL_TOP_K 1024
#define NMS_OPT_MAX_BATCH 65535

typedef struct CUstream_st* nms_opt_stream; /* cudaStream_t */

typedef enum {
  NMS_OPT_FLOAT32 = 0,
  NMS_OPT_FLOAT16 = 1,
  NMS_OPT_INT8 = 2, /* conf alone */
} nms_opt_dtype;

/* How a head tensor of `channels` x height x width lies in memory.
 *
 * `vector` channels of a cell are stored together: element (image, channel, cell) is at
 * ((image * ceil(channels / vector) + channel / vector) * height * width + cell) * vector
 *   + channel % vector.
 * 1 is NCHW; 2, 4, 16, 32 are NCHW with vectorised channels (TensorRT's CHW2, CHW4, CHW16, CHW32);
 * a number of at least `channels` is NHWC, its rows padded to that length. So a merged NHWC head
 * gives both tensors: the loc pointer is its start, the conf pointer lies anchors * 4 channels
 * further, `vector` is the merged row for both. Padding is never read as data. With another vector
 * than 1, the channels of a conf cell, each group of `vector` rounded up to 16 bytes, take at most
 * 45056 bytes.
 */
typedef struct {
  int32_t dtype;  /* nms_opt_dtype */
  int32_t vector; /* from 1 to 65536 */
  float scale;    /* real value of one step, with NMS_OPT_INT8; otherwise ignored */
} nms_opt_format;

/* loc has anchors * 4 channels, channel = coordinate * anchors + anchor (dx, dy, dw, dh);
 * conf has anchors * num_classes channels, channel = class * anchors + anchor.
 * Prior of the level: anchor * height * width + cell. */
typedef struct {
  int32_t height;
  int32_t width;
  int32_t anchors;
  nms_opt_format loc;
  nms_opt_format conf;
} nms_opt_level;

typedef struct {
  int32_t num_levels;
  int32_t num_classes;        /* background included */
  int32_t background_class;   /* -1: none */
  int32_t top_k;              /* candidates of a class that enter suppression; with level_top_k
                               * num_levels times as much, which caps nothing */
  int32_t keep_top_k;         /* rows of an image */
  int32_t sigmoid;            /* 0: scores are the softmax over classes; 1: sigmoid of each logit */
  float confidence_threshold; /* in [0, 1]; a candidate's score is larger */
  float nms_threshold;        /* in [0, 1]; a suppressed box's IoU is larger */
  int32_t level_top_k;        /* of each level, over all its classes, the best so many candidates
                               * go on: of equal scores the lower class, then prior. 0: all */
  int32_t clip_before_nms;    /* 1: boxes are clipped to [0, 1] before suppression; 0: after */
  float bbox_xform_clip;      /* upper bound of dw and dh times their variance; 0: none */
  nms_opt_level levels[NMS_OPT_MAX_LEVELS];
} nms_opt_config;

/* What a function returns; from NMS_OPT_CUDA_ERROR on, NMS_OPT_CUDA_ERROR + a cudaError_t. */
typedef enum {
  NMS_OPT_OK = 0,
  NMS_OPT_BAD_NUM_LEVELS,
  NMS_OPT_BAD_NUM_CLASSES,
  NMS_OPT_BAD_BACKGROUND_CLASS,
  NMS_OPT_BAD_TOP_K,
  NMS_OPT_BAD_KEEP_TOP_K,
  NMS_OPT_BAD_SIGMOID,
  NMS_OPT_BAD_CONFIDENCE_THRESHOLD,
  NMS_OPT_BAD_NMS_THRESHOLD,
  NMS_OPT_BAD_LEVEL_SHAPE, /* height, width or anchors; or too many priors */
  NMS_OPT_BAD_LOC_FORMAT,
  NMS_OPT_BAD_CONF_FORMAT,
  NMS_OPT_BAD_BATCH,
  NMS_OPT_NULL_POINTER,
  NMS_OPT_MISALIGNED_POINTER, /* priors and workspace: 16 bytes; others: their type */
  NMS_OPT_WORKSPACE_TOO_SMALL,
  NMS_OPT_BAD_LEVEL_TOP_K,
  NMS_OPT_BAD_CLIP_BEFORE_NMS,
  NMS_OPT_BAD_BBOX_XFORM_CLIP,
  NMS_OPT_CUDA_ERROR = 1000,
} nms_opt_status;

/* NMS_OPT_VERSION of the library. */
NMS_OPT_API int32_t nms_opt_version(void);

/* One English sentence for a status; never null, valid for the life of the process. */
NMS_OPT_API const char* nms_opt_status_string(int32_t status);

/* Device memory that a run of `batch` images needs, at any number of candidates. For SSD-ResNet34
 * (15,130 priors, 81 classes, top_k = keep_top_k = 200) about 1.4 MB an image; for RetinaNet
 * (120,087 priors, 264 classes, level_top_k = 1000, keep_top_k = 300) about 6.7 MB. */
NMS_OPT_API int32_t nms_opt_workspace_size(const nms_opt_config* config, int32_t batch,
                                           size_t* bytes);

/* Enqueue one run on `stream`.
 *
 * loc, conf        host arrays of num_levels device pointers
 * priors           device, float32 [2, P * 4]: xmin, ymin, xmax, ymax of each prior, then its four
 *                  variances; P = sum over the levels of anchors * height * width
 * detections       device, float32 [batch, keep_top_k, 7]; every element is written
 * num_detections   device, int32 [batch]
 * workspace        device, as nms_opt_workspace_size says, of one run at a time; its contents do
 *                  not matter before and mean nothing after
 */
NMS_OPT_API int32_t nms_opt_run(const nms_opt_config* config, int32_t batch, const void* const* loc,
                                const void* const* conf, const float* priors, float* detections,
                                int32_t* num_detections, void* workspace, size_t workspace_bytes,
                                nms_opt_stream stream);

#ifdef __cplusplus
}
#endif
#endif
