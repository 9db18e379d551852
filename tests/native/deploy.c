/* Runs a model that needs the operator library through ONNX Runtime's C ABI: no Python, no headers but ours.
 *
 *   deploy LIBONNXRUNTIME OPERATOR_LIBRARY MODEL OUTPUT THREADS TYPE:SHAPE:FILE...
 *
 * Inputs are named i0, i1, ... and lie as raw bytes in files (float:1,8,77,40:q.bin); the first output, o0, is written to
 * OUTPUT. Prints what it ran. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ort_abi.h"

enum { MOST_INPUTS = 8, MOST_DIMS = 8 };

static const OrtApi *api;

static void stop(const char *what, const char *why) {
  fprintf(stderr, "deploy: %s: %s\n", what, why);
  exit(1);
}

static void check(OrtStatus *status, const char *what) {
  if (status) stop(what, ORT_CALL(api, GetErrorMessage)(status));
}

static void *file_bytes(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) stop(path, "cannot be read");
  *bytes = (size_t)ftell(file);
  rewind(file);
  void *data = malloc(*bytes);
  if (fread(data, 1, *bytes, file) != *bytes) stop(path, "cannot be read");
  fclose(file);
  return data;
}

/* float:1,8,77,40:q.bin */
static OrtValue *input(char *text, const OrtMemoryInfo *memory) {
  char *type = strtok(text, ":"), *shape = strtok(NULL, ":"), *path = strtok(NULL, ":");
  if (!path) stop(text, "expected TYPE:SHAPE:FILE");
  int64_t dims[MOST_DIMS];
  size_t count = 0, bytes = 0;
  for (char *n = strtok(shape, ","); n && count < MOST_DIMS; n = strtok(NULL, ",")) dims[count++] = atoll(n);
  void *data = file_bytes(path, &bytes);
  OrtValue *value = NULL;
  const int element = strcmp(type, "float") == 0 ? ORT_FLOAT : strcmp(type, "half") == 0 ? ORT_FLOAT16 : ORT_BOOL;
  check(ORT_CALL(api, CreateTensorWithDataAsOrtValue)(memory, data, bytes, dims, count, element, &value), path);
  return value;
}

static void write_output(OrtValue *value, const char *path) {
  OrtTensorTypeAndShapeInfo *info = NULL;
  void *data = NULL;
  size_t elements = 0, dims = 0;
  int type = 0;
  int64_t shape[MOST_DIMS];
  check(ORT_CALL(api, GetTensorTypeAndShape)(value, &info), "output");
  check(ORT_CALL(api, GetTensorShapeElementCount)(info, &elements), "output");
  check(ORT_CALL(api, GetTensorElementType)(info, &type), "output");
  check(ORT_CALL(api, GetDimensionsCount)(info, &dims), "output");
  check(ORT_CALL(api, GetDimensions)(info, shape, dims), "output");
  ORT_CALL(api, ReleaseTensorTypeAndShapeInfo)(info);
  check(ORT_CALL(api, GetTensorMutableData)(value, &data), "output");
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(data, type == ORT_FLOAT ? 4 : 2, elements, file) != elements) stop(path, "cannot be written");
  fclose(file);
  printf("o0: %zu elements, [", elements);
  for (size_t i = 0; i < dims; ++i) printf("%s%lld", i ? ", " : "", (long long)shape[i]);
  printf("]\n");
}

int main(int count, char **words) {
  if (count < 7) stop("usage", "LIBONNXRUNTIME OPERATOR_LIBRARY MODEL OUTPUT THREADS TYPE:SHAPE:FILE...");
  void *runtime = dlopen(words[1], RTLD_NOW);
  if (!runtime) stop(words[1], dlerror());
  const OrtApiBase *(*base)(void) = (const OrtApiBase *(*)(void))dlsym(runtime, "OrtGetApiBase");
  if (!base) stop(words[1], "has no OrtGetApiBase");
  api = base()->GetApi(ORT_ABI_VERSION);
  if (!api) stop(base()->GetVersionString(), "is older than what ort_abi.h describes");
  printf("ONNX Runtime %s\n", base()->GetVersionString());

  OrtEnv *env = NULL;
  OrtSessionOptions *options = NULL;
  OrtSession *session = NULL;
  OrtMemoryInfo *memory = NULL;
  check(ORT_CALL(api, CreateEnv)(ORT_LOGGING_WARNING, "deploy", &env), "environment");
  check(ORT_CALL(api, CreateSessionOptions)(&options), "options");
  check(ORT_CALL(api, SetIntraOpNumThreads)(options, atoi(words[5])), "threads");
  check(ORT_CALL(api, RegisterCustomOpsLibrary_V2)(options, words[2]), "operator library");
  check(ORT_CALL(api, CreateSession)(env, words[3], options, &session), "session");
  check(ORT_CALL(api, CreateCpuMemoryInfo)(ORT_ARENA_ALLOCATOR, ORT_MEM_DEFAULT, &memory), "memory");

  size_t inputs = 0, outputs = 0;
  check(ORT_CALL(api, SessionGetInputCount)(session, &inputs), "session");
  check(ORT_CALL(api, SessionGetOutputCount)(session, &outputs), "session");
  printf("%zu inputs, %zu outputs\n", inputs, outputs);
  if (inputs != (size_t)(count - 6) || inputs > MOST_INPUTS) stop("inputs", "not as many as the model takes");
  const char *const names[MOST_INPUTS] = {"i0", "i1", "i2", "i3", "i4", "i5", "i6", "i7"}, *const result[] = {"o0"};
  const OrtValue *values[MOST_INPUTS];
  OrtValue *output = NULL;
  for (size_t i = 0; i < inputs; ++i) values[i] = input(words[6 + i], memory);
  check(ORT_CALL(api, Run)(session, NULL, names, values, inputs, result, 1, &output), "run");
  write_output(output, words[4]);

  ORT_CALL(api, ReleaseValue)(output);
  for (size_t i = 0; i < inputs; ++i) ORT_CALL(api, ReleaseValue)((OrtValue *)values[i]);
  ORT_CALL(api, ReleaseMemoryInfo)(memory);
  ORT_CALL(api, ReleaseSession)(session);
  ORT_CALL(api, ReleaseSessionOptions)(options);
  ORT_CALL(api, ReleaseEnv)(env);
  return 0;
}
