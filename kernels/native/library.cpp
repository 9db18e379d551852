// The library's one entry, RegisterCustomOps, and the glue between ONNX Runtime and the kernels.
//
// Threads are those of the session's own pool (KernelContext_ParallelFor, since 1.17): a pool of ours beside it would
// fight it for the cores, and would not know intra_op_num_threads. Memory comes from the session's arena.
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <string.h>

#include "cuda.h"
#include "node.h"

namespace optimize {
namespace {

const char* const DOMAIN_NAME = "ai.optimize";
const char* const OLDER =
    "ai.optimize: this ONNX Runtime is older than 1.17; the operator library needs the C API of 1.17 or later";

const char* const NO_CUBINS =
    "ai.optimize: this library was built without CUDA kernels; build it with OPTIMIZE_CUBINS (see "
    "kernels/native_cubins.py), or run the model without the library: its nodes carry their bodies";

// One operator for one type of tensors. Those with a bias exist twice for each: with an added and with a boolean one.
struct Registered : OrtCustomOp {
  const OrtApi* api;  // of the runtime it is registered with
  const Operator* op;
  int type, bias_type;
  bool cuda;
};

struct Kernel {
  const OrtApi* api;
  const Registered* registered;
  Attributes attributes;
};

bool has_bias(const Operator& op) { return strstr(op.name, "AttentionBias") != nullptr; }
const Registered& of(const OrtCustomOp* op) { return *static_cast<const Registered*>(op); }

OrtStatus* status_of(const OrtApi* api, int code, const char* message) { return ORT_CALL(api, CreateStatus)(code, message); }

// Runs what may throw; its message becomes the status
template <class F>
OrtStatus* guarded(const OrtApi* api, F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& e) {
    return status_of(api, ORT_INVALID_ARGUMENT, e.what());
  } catch (const std::exception& e) {
    return status_of(api, ORT_FAIL, e.what());
  }
}

// --- attributes ---

void read_text(const OrtApi* api, const OrtKernelInfo* info, const char* op, Attributes& a) {
  char text[16] = "";
  size_t bytes = sizeof text;
  check(api, ORT_CALL(api, KernelInfoGetAttribute_string)(info, "approximate", text, &bytes));
  a.tanh = strcmp(text, "tanh") == 0;
  if (!a.tanh && strcmp(text, "none") != 0)
    throw std::invalid_argument(std::string("ai.optimize ") + op + ": approximate: got \"" + text + "\", expected \"none\" or \"tanh\"");
}

Attributes read_attributes(const OrtApi* api, const OrtKernelInfo* info, const Operator& op) {
  Attributes a;
  const struct { const char* name; int64_t* to; } integers[] = {
      {"causal", &a.causal}, {"groups", &a.groups}, {"interleaved", &a.interleaved},
      {"heads", &a.heads},   {"kv_heads", &a.kv_heads}};
  const struct { const char* name; float* to; } floats[] = {{"scale", &a.scale}, {"epsilon", &a.epsilon}};
  for (const auto& i : integers)
    if (strstr(op.attributes, i.name)) check(api, ORT_CALL(api, KernelInfoGetAttribute_int64)(info, i.name, i.to));
  for (const auto& f : floats)
    if (strstr(op.attributes, f.name)) check(api, ORT_CALL(api, KernelInfoGetAttribute_float)(info, f.name, f.to));
  if (strstr(op.attributes, "approximate")) read_text(api, info, op.name, a);
  return a;
}

// --- one run ---

Tensor input(const OrtApi* api, const OrtKernelContext* context, int index) {
  const OrtValue* value = nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Tensor out{};
  size_t dims = 0;
  check(api, ORT_CALL(api, KernelContext_GetInput)(context, (size_t)index, &value));
  check(api, ORT_CALL(api, GetTensorMutableData)(const_cast<OrtValue*>(value), &out.data));
  check(api, ORT_CALL(api, GetTensorTypeAndShape)(value, &info));
  OrtStatus* bad = ORT_CALL(api, GetDimensionsCount)(info, &dims);
  if (!bad && dims <= MAX_DIMS) bad = ORT_CALL(api, GetDimensions)(info, out.shape.dims, dims);
  if (!bad) bad = ORT_CALL(api, GetTensorElementType)(info, &out.type);
  ORT_CALL(api, ReleaseTensorTypeAndShapeInfo)(info);
  check(api, bad);
  if (dims > MAX_DIMS) throw std::invalid_argument("ai.optimize: a tensor of more than 8 dimensions");
  out.shape.count = (int)dims;
  return out;
}

// The session's threads and memory, for one run
struct Session {
  const OrtApi* api;
  OrtKernelContext* context;
  OrtMemoryInfo* place = nullptr;
  OrtAllocator* arena = nullptr;
  ~Session() {
    if (arena) ORT_CALL(api, ReleaseAllocator)(arena);
    if (place) ORT_CALL(api, ReleaseMemoryInfo)(place);
  }
};

void parallel(void* self, size_t tasks, void (*task)(void*, size_t), void* data) {
  auto& s = *(Session*)self;
  if (tasks == 1) return task(data, 0);
  check(s.api, ORT_CALL(s.api, KernelContext_ParallelFor)(s.context, task, tasks, 0, data));
}

// Called by tasks too, on the pool's threads: nothing may be thrown
void* allocate(void* self, size_t bytes) {
  auto& s = *(Session*)self;
  void* memory = nullptr;
  OrtStatus* bad = ORT_CALL(s.api, AllocatorAlloc)(s.arena, bytes, &memory);
  if (!bad) return memory;
  ORT_CALL(s.api, ReleaseStatus)(bad);
  return nullptr;
}

void release(void* self, void* memory) {
  auto& s = *(Session*)self;
  if (OrtStatus* bad = ORT_CALL(s.api, AllocatorFree)(s.arena, memory)) ORT_CALL(s.api, ReleaseStatus)(bad);
}

void compute(const Kernel& kernel, OrtKernelContext* context) {
  const OrtApi* api = kernel.api;
  const Operator& op = *kernel.registered->op;
  Call call{api, context, kernel.attributes, op.name, kernel.registered->type, op.inputs, {}};
  for (int i = 0; i < op.inputs; ++i) call.inputs[i] = input(api, context, i);
  if (kernel.registered->cuda) {
    void* stream = nullptr;
    check(api, ORT_CALL(api, KernelContext_GetGPUComputeStream)(context, &stream));
    return op.cuda(call, stream);
  }
  Session session{api, context};
  check(api, ORT_CALL(api, CreateCpuMemoryInfo)(ORT_ARENA_ALLOCATOR, ORT_MEM_DEFAULT, &session.place));
  check(api, ORT_CALL(api, KernelContext_GetAllocator)(context, session.place, &session.arena));
  op.cpu(call, {&session, parallel, allocate, release});
}

// --- what ONNX Runtime asks of an operator ---

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  return guarded(api, [&] {
    if (of(op).cuda && CUBIN_COUNT == 0) throw std::runtime_error(NO_CUBINS);
    *kernel = new Kernel{api, &of(op), read_attributes(api, info, *of(op).op)};
  });
}
OrtStatus* run(void* kernel, OrtKernelContext* context) {
  const auto& k = *(const Kernel*)kernel;
  return guarded(k.api, [&] { compute(k, context); });
}
void destroy(void* kernel) { delete (Kernel*)kernel; }

// Whether each size is a number or has a name. ONNX Runtime's own layout pass makes sizes that are neither, and would
// read one that is passed on as -1 for a number.
OrtStatus* is_known(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info, bool* known) {
  size_t count = 0;
  int64_t dims[MAX_DIMS];
  const char* names[MAX_DIMS] = {};
  if (OrtStatus* bad = ORT_CALL(api, GetDimensionsCount)(info, &count)) return bad;
  *known = count <= MAX_DIMS;
  if (!*known) return nullptr;
  if (OrtStatus* bad = ORT_CALL(api, GetDimensions)(info, dims, count)) return bad;
  if (OrtStatus* bad = ORT_CALL(api, GetSymbolicDimensions)(info, names, count)) return bad;
  for (size_t i = 0; i < count; ++i) *known = *known && (dims[i] >= 0 || (names[i] && *names[i]));
  return nullptr;
}

// Outputs are shaped like inputs
OrtStatus* infer(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = of(op).api;
  for (int i = 0; i < of(op).op->outputs; ++i) {
    OrtTensorTypeAndShapeInfo* like = nullptr;  // the context owns it
    if (OrtStatus* bad = ORT_CALL(api, ShapeInferContext_GetInputTypeShape)(context, (size_t)of(op).op->output_like[i], &like))
      return bad;
    bool known = false;
    if (OrtStatus* bad = is_known(api, like, &known)) return bad;
    if (!known) continue;
    if (OrtStatus* bad = ORT_CALL(api, ShapeInferContext_SetOutputTypeShape)(context, (size_t)i, like)) return bad;
  }
  return nullptr;
}

Registered registered(const OrtApi* api, const Operator& op, int type, int bias_type, bool cuda) {
  Registered r{};
  r.api = api;
  r.op = &op;
  r.type = type;
  r.bias_type = bias_type;
  r.cuda = cuda;
  r.version = ORT_ABI_VERSION;
  r.GetName = [](const OrtCustomOp* o) { return of(o).op->name; };
  r.GetExecutionProviderType = [](const OrtCustomOp* o) -> const char* {
    return of(o).cuda ? "CUDAExecutionProvider" : nullptr;
  };
  r.GetInputType = [](const OrtCustomOp* o, size_t i) {
    if ((int)i >= of(o).op->angles) return (int)ORT_FLOAT;
    return i == 3 && has_bias(*of(o).op) ? of(o).bias_type : of(o).type;
  };
  r.GetInputTypeCount = [](const OrtCustomOp* o) { return (size_t)of(o).op->inputs; };
  r.GetOutputType = [](const OrtCustomOp* o, size_t) { return of(o).type; };
  r.GetOutputTypeCount = [](const OrtCustomOp* o) { return (size_t)of(o).op->outputs; };
  r.KernelDestroy = destroy;
  r.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return (int)ORT_REQUIRED; };
  r.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return (int)ORT_REQUIRED; };
  r.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return (int)ORT_MEM_DEFAULT; };
  r.GetVariadicInputMinArity = r.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  r.GetVariadicOutputMinArity = r.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  r.CreateKernelV2 = create;
  r.KernelComputeV2 = run;
  r.InferOutputShapeFn = infer;
  r.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  r.GetEndVersion = [](const OrtCustomOp*) { return 2147483647; };
  return r;
}

// Every operator in every combination of types, for one runtime
struct Domain {
  std::deque<Registered> operators;
  OrtCustomOpDomain* made = nullptr;

  explicit Domain(const OrtApi* api) {
    for (bool cuda : {false, true})
      for (int i = 0; i < OPERATOR_COUNT; ++i)
        for (int type : {ORT_FLOAT, ORT_FLOAT16}) {
          operators.push_back(registered(api, OPERATORS[i], type, type, cuda));
          if (has_bias(OPERATORS[i]))
            operators.push_back(registered(api, OPERATORS[i], type, ORT_BOOL, cuda));
        }
    check(api, ORT_CALL(api, CreateCustomOpDomain)(DOMAIN_NAME, &made));
    for (const Registered& r : operators) check(api, ORT_CALL(api, CustomOpDomain_Add)(made, &r));
  }
};

// One for each ONNX Runtime in the process; kept as long as the library, as sessions point into it
OrtCustomOpDomain* domain_of(const OrtApi* api) {
  static std::map<const OrtApi*, Domain> domains;
  static std::mutex guard;
  const std::lock_guard<std::mutex> hold(guard);
  return domains.try_emplace(api, api).first->second.made;
}

}  // namespace
}  // namespace optimize

#if defined(_WIN32)
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif

EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_ABI_VERSION);
  if (!api) {  // entries of version 1 are in every version's table
    return optimize::status_of(base->GetApi(1), ORT_NOT_IMPLEMENTED, optimize::OLDER);
  }
  return optimize::guarded(api, [&] {
    optimize::check(api, ORT_CALL(api, AddCustomOpDomain)(options, optimize::domain_of(api)));
  });
}

// What runs here: "avx512", "avx2" or "base"
EXPORTED const char* optimize_kernels_isa(void) { return optimize::kernels().name; }

// How many CUDA kernels the library carries, for all GPUs together
EXPORTED int optimize_kernels_cubins(void) { return optimize::CUBIN_COUNT; }
