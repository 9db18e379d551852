/* The part of ONNX Runtime's C ABI that this project uses, written for it from the documentation.
 *
 * OrtApi is a table of function pointers that only ever grows at its end: an entry is known by its index, which never
 * changes once a version has shipped. Each index below is the entry's place in the documented order of struct OrtApi
 * (onnxruntime_c_api.h), counted from 0; the documentation fixes some of them by name: ReleaseCustomOpDomain is 101 (the
 * end of version 1), SynchronizeBoundOutputs 203 (version 10), GetBuildInfoString 254 (version 15),
 * KernelContext_GetResource 265 (version 16), SessionOptionsAppendExecutionProvider_OpenVINO_V2 275 (version 17).
 * tests/native calls each of them.
 *
 * Plain C, so that the C program of the tests uses it too.
 */
#ifndef OPTIMIZE_ORT_ABI_H
#define OPTIMIZE_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version that first has every entry and every field used here (ONNX Runtime 1.17, January 2024). */
enum { ORT_ABI_VERSION = 17 };

typedef struct OrtApi OrtApi;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtEnv OrtEnv;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtValue OrtValue;

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version); /* NULL where the runtime is older than that */
  const char *(*GetVersionString)(void);
} OrtApiBase;

/* ONNXTensorElementDataType, OrtErrorCode, OrtMemType, OrtAllocatorType, OrtLoggingLevel: the values used here */
enum { ORT_FLOAT = 1, ORT_BOOL = 9, ORT_FLOAT16 = 10 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum { ORT_MEM_DEFAULT = 0 };
enum { ORT_ARENA_ALLOCATOR = 1 };
enum { ORT_LOGGING_WARNING = 2 };
enum { ORT_REQUIRED = 0 }; /* OrtCustomOpInputOutputCharacteristic */

/* X(index, name, result, parameters) */
#define ORT_ABI_ENTRIES(X)                                                                                             \
  X(0, CreateStatus, OrtStatus *, (int code, const char *message))                                                     \
  X(2, GetErrorMessage, const char *, (const OrtStatus *))                                                             \
  X(3, CreateEnv, OrtStatus *, (int level, const char *name, OrtEnv **))                                               \
  X(7, CreateSession, OrtStatus *, (const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **))       \
  X(9, Run, OrtStatus *,                                                                                               \
    (OrtSession *, const OrtRunOptions *, const char *const *input_names, const OrtValue *const *inputs,               \
     size_t input_count, const char *const *output_names, size_t output_count, OrtValue **outputs))                    \
  X(10, CreateSessionOptions, OrtStatus *, (OrtSessionOptions **))                                                     \
  X(24, SetIntraOpNumThreads, OrtStatus *, (OrtSessionOptions *, int))                                                 \
  X(26, CreateCustomOpDomain, OrtStatus *, (const char *name, OrtCustomOpDomain **))                                   \
  X(27, CustomOpDomain_Add, OrtStatus *, (OrtCustomOpDomain *, const struct OrtCustomOp *))                            \
  X(28, AddCustomOpDomain, OrtStatus *, (OrtSessionOptions *, OrtCustomOpDomain *))                                    \
  X(30, SessionGetInputCount, OrtStatus *, (const OrtSession *, size_t *))                                             \
  X(31, SessionGetOutputCount, OrtStatus *, (const OrtSession *, size_t *))                                            \
  X(49, CreateTensorWithDataAsOrtValue, OrtStatus *,                                                                   \
    (const OrtMemoryInfo *, void *data, size_t bytes, const int64_t *shape, size_t dims, int type, OrtValue **))       \
  X(51, GetTensorMutableData, OrtStatus *, (OrtValue *, void **))                                                      \
  X(60, GetTensorElementType, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, int *))                                 \
  X(61, GetDimensionsCount, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, size_t *))                                \
  X(62, GetDimensions, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, int64_t *, size_t dims))                       \
  X(63, GetSymbolicDimensions, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, const char *names[], size_t dims))     \
  X(64, GetTensorShapeElementCount, OrtStatus *, (const OrtTensorTypeAndShapeInfo *, size_t *))                        \
  X(65, GetTensorTypeAndShape, OrtStatus *, (const OrtValue *, OrtTensorTypeAndShapeInfo **))                          \
  X(69, CreateCpuMemoryInfo, OrtStatus *, (int allocator_type, int mem_type, OrtMemoryInfo **))                        \
  X(75, AllocatorAlloc, OrtStatus *, (OrtAllocator *, size_t bytes, void **))                                          \
  X(76, AllocatorFree, OrtStatus *, (OrtAllocator *, void *))                                                          \
  X(85, KernelInfoGetAttribute_float, OrtStatus *, (const OrtKernelInfo *, const char *name, float *))                 \
  X(86, KernelInfoGetAttribute_int64, OrtStatus *, (const OrtKernelInfo *, const char *name, int64_t *))               \
  X(87, KernelInfoGetAttribute_string, OrtStatus *, (const OrtKernelInfo *, const char *name, char *, size_t *bytes))  \
  X(90, KernelContext_GetInput, OrtStatus *, (const OrtKernelContext *, size_t index, const OrtValue **))              \
  X(91, KernelContext_GetOutput, OrtStatus *,                                                                          \
    (OrtKernelContext *, size_t index, const int64_t *shape, size_t dims, OrtValue **))                                \
  X(92, ReleaseEnv, void, (OrtEnv *))                                                                                  \
  X(93, ReleaseStatus, void, (OrtStatus *))                                                                            \
  X(94, ReleaseMemoryInfo, void, (OrtMemoryInfo *))                                                                    \
  X(95, ReleaseSession, void, (OrtSession *))                                                                          \
  X(96, ReleaseValue, void, (OrtValue *))                                                                              \
  X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo *))                                            \
  X(100, ReleaseSessionOptions, void, (OrtSessionOptions *))                                                           \
  X(132, ReleaseAllocator, void, (OrtAllocator *))                                                                     \
  X(193, KernelContext_GetGPUComputeStream, OrtStatus *, (const OrtKernelContext *, void **stream))                    \
  X(228, RegisterCustomOpsLibrary_V2, OrtStatus *, (OrtSessionOptions *, const char *path))                            \
  X(253, KernelContext_GetAllocator, OrtStatus *, (const OrtKernelContext *, const OrtMemoryInfo *, OrtAllocator **))  \
  X(268, ShapeInferContext_GetInputTypeShape, OrtStatus *,                                                             \
    (const OrtShapeInferContext *, size_t index, OrtTensorTypeAndShapeInfo **))                                        \
  X(270, ShapeInferContext_SetOutputTypeShape, OrtStatus *,                                                            \
    (const OrtShapeInferContext *, size_t index, const OrtTensorTypeAndShapeInfo *))                                   \
  X(274, KernelContext_ParallelFor, OrtStatus *,                                                                       \
    (const OrtKernelContext *, void (*task)(void *, size_t), size_t tasks, size_t batches, void *data))

struct OrtCustomOp;
#define ORT_ABI_DECLARE(index, name, result, parameters)                                                               \
  enum { ORT_INDEX_##name = index };                                                                                   \
  typedef result(*OrtEntry_##name) parameters;
ORT_ABI_ENTRIES(ORT_ABI_DECLARE)
#undef ORT_ABI_DECLARE

/* ORT_CALL(api, CreateStatus)(code, message) */
#define ORT_CALL(api, name) ((OrtEntry_##name)((void *const *)(const void *)(api))[ORT_INDEX_##name])

/* One operator of a custom domain. A runtime reads no field that is younger than `version`. */
typedef struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const struct OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const struct OrtCustomOp *); /* NULL: the CPU provider */
  int (*GetInputType)(const struct OrtCustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const struct OrtCustomOp *);
  int (*GetOutputType)(const struct OrtCustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const struct OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const struct OrtCustomOp *, size_t index);
  int (*GetOutputCharacteristic)(const struct OrtCustomOp *, size_t index);
  /* since 13 */
  int (*GetInputMemoryType)(const struct OrtCustomOp *, size_t index);
  /* since 14 */
  int (*GetVariadicInputMinArity)(const struct OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const struct OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const struct OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const struct OrtCustomOp *);
  /* since 16: with an error to return */
  OrtStatus *(*CreateKernelV2)(const struct OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  /* since 17 */
  OrtStatus *(*InferOutputShapeFn)(const struct OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const struct OrtCustomOp *);
  int (*GetEndVersion)(const struct OrtCustomOp *);
  /* since 18: unused */
  size_t (*GetMayInplace)(int **, int **);
  void (*ReleaseMayInplace)(int *, int *);
  size_t (*GetAliasMap)(int **, int **);
  void (*ReleaseAliasMap)(int *, int *);
} OrtCustomOp;

#ifdef __cplusplus
}
#endif
#endif
