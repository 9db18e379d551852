// From nodes to problems: shapes are checked here, once for every kernel.
#include "node.h"

#include <string.h>

#include "cuda.h"

namespace optimize {

int64_t Shape::elements(int from, int to) const {
  int64_t n = 1;
  for (int i = from; i < to; ++i) n *= dims[i];
  return n;
}

bool Shape::operator==(const Shape& other) const {
  return count == other.count && memcmp(dims, other.dims, sizeof(int64_t) * (size_t)count) == 0;
}

std::string Shape::text() const {
  std::string out = "[";
  for (int i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

void check(const OrtApi* api, OrtStatus* status) {
  if (!status) return;
  const std::string message = ORT_CALL(api, GetErrorMessage)(status);
  ORT_CALL(api, ReleaseStatus)(status);
  throw std::runtime_error(message);
}

void Call::fail(const char* argument, const std::string& got, const std::string& expected) const {
  throw std::invalid_argument(std::string("ai.optimize ") + name + ": " + argument + ": got " + got + ", expected " +
                              expected);
}

Tensor Call::output(int index, const Shape& shape) const {
  OrtValue* value = nullptr;
  Tensor out{nullptr, shape, type};
  check(api, ORT_CALL(api, KernelContext_GetOutput)(context, (size_t)index, shape.dims, (size_t)shape.count, &value));
  check(api, ORT_CALL(api, GetTensorMutableData)(value, &out.data));
  return out;
}

namespace {

bool starts(const Call& call, const char* text) { return strncmp(call.name, text, strlen(text)) == 0; }
bool contains(const Call& call, const char* text) { return strstr(call.name, text) != nullptr; }

std::string number(int64_t n) { return std::to_string(n); }

const Tensor& expect_dims(const Call& call, int index, const char* argument, int dims, const char* layout) {
  const Tensor& t = call.inputs[index];
  if (t.shape.count != dims) call.fail(argument, t.shape.text(), layout);
  return t;
}

const void* expect_vector(const Call& call, int index, const char* argument, int64_t n) {
  const Tensor& t = call.inputs[index];
  if (t.shape.count != 1 || t.shape.dims[0] != n) call.fail(argument, t.shape.text(), "[" + number(n) + "]");
  return t.data;
}

const char* const HEADS = "[batch, heads, tokens, head_dim]";

struct Sizes {
  int64_t batch, heads, tokens, head_dim;
};

Sizes sizes(const Call& call, int index, const char* argument) {
  const int64_t* d = expect_dims(call, index, argument, 4, HEADS).shape.dims;
  return {d[0], d[1], d[2], d[3]};
}

Sizes split_sizes(const Call& call, int index, const char* argument, int64_t heads) {
  const int64_t* d = expect_dims(call, index, argument, 3, "[batch, tokens, heads * head_dim]").shape.dims;
  if (heads < 1 || d[2] % heads != 0)
    call.fail(argument, number(d[2]) + " channels for " + number(heads) + " heads", "a number that its heads divide");
  return {d[0], heads, d[1], d[2] / heads};
}

// gate, scale and shift: [batch or 1, tokens or 1, channels]
PerToken per_token(const Call& call, int index, const char* argument, const Shape& x) {
  const Tensor& t = call.inputs[index];
  const int64_t* d = t.shape.dims;
  const bool fits = x.count == 3 && t.shape.count == 3 && (d[0] == 1 || d[0] == x.dims[0]) &&
                    (d[1] == 1 || d[1] == x.dims[1]) && d[2] == x.dims[2];
  if (!fits)
    call.fail(argument, t.shape.text() + " for x " + x.text(), "[batch or 1, tokens or 1, channels], x of three dims");
  return {t.data, d[0] == 1 ? 0 : d[1] * d[2], d[1] == 1 ? 0 : d[2]};
}

void set_bias(const Call& call, AttentionProblem& p) {
  const Tensor& bias = expect_dims(call, 3, "bias", 4, "4 dimensions that broadcast to [batch, heads, queries, keys]");
  const int64_t whole[4] = {p.batch, p.heads, p.queries, p.keys};
  for (int i = 0; i < 4; ++i) {
    const int64_t n = bias.shape.dims[i];
    if (n != 1 && n != whole[i])
      call.fail("bias", bias.shape.text(), "what broadcasts to " + Shape{{whole[0], whole[1], whole[2], whole[3]}, 4}.text());
    p.bias_stride[i] = n == 1 ? 0 : bias.shape.elements(i + 1, 4);
  }
  p.bias_kind = bias.type == ORT_BOOL ? BiasKind::seen : BiasKind::added;
  p.bias = bias.data;
}

}  // namespace

AttentionProblem attention_problem(const Call& call) {
  const bool packed = starts(call, "Packed");
  const Sizes a = packed ? split_sizes(call, 0, "q", call.attributes.heads) : sizes(call, 0, "q");
  const Sizes b = packed ? split_sizes(call, 1, "k", call.attributes.kv_heads) : sizes(call, 1, "k");
  const Tensor &q = call.inputs[0], &k = call.inputs[1], &v = call.inputs[2];
  if (a.head_dim > 512) call.fail("q", "a head_dim of " + number(a.head_dim), "at most 512");
  if (b.batch != a.batch || b.head_dim != a.head_dim)
    call.fail("k", k.shape.text(), "batch " + number(a.batch) + " and head_dim " + number(a.head_dim) + ", as q");
  if (!(v.shape == k.shape)) call.fail("v", v.shape.text(), k.shape.text() + ", as k");
  if (b.heads < 1 || a.heads % b.heads != 0)
    call.fail("k", number(b.heads) + " heads", "a number that divides the " + number(a.heads) + " heads of q");
  AttentionProblem p{};
  p.batch = a.batch, p.heads = a.heads, p.queries = a.tokens, p.head_dim = a.head_dim, p.kv_heads = b.heads, p.keys = b.tokens;
  p.q_strides = strides_of(packed, a.heads, a.tokens, a.head_dim);
  p.kv_strides = strides_of(packed, b.heads, b.tokens, b.head_dim);
  p.scale = call.attributes.scale;
  p.causal = call.attributes.causal != 0;
  p.q = q.data, p.k = k.data, p.v = v.data;
  if (call.input_count == 4) set_bias(call, p);
  p.out = call.output(0, q.shape).data;
  return p;
}

// x, [residual], [gate], weight, [bias], [scale, shift] -> y, [total]
NormProblem norm_problem(const Call& call) {
  const Shape& x = call.inputs[0].shape;
  if (x.count < 1) call.fail("x", x.text(), "[..., channels]");
  NormProblem p{};
  p.channels = x.last();
  p.rows = x.elements(0, x.count - 1);
  p.tokens = x.count == 3 ? x.dims[1] : p.rows;
  p.rms = contains(call, "RMSNorm");
  p.epsilon = call.attributes.epsilon;
  int at = 0;
  p.x = call.inputs[at++].data;
  if (contains(call, "Add")) {
    const Tensor& residual = call.inputs[at++];
    if (!(residual.shape == x)) call.fail("residual", residual.shape.text(), x.text() + ", as x");
    p.residual = residual.data;
    if (starts(call, "Gated")) p.gate = per_token(call, at++, "gate", x);
  }
  p.weight = expect_vector(call, at++, "weight", p.channels);
  if (!p.rms) p.bias = expect_vector(call, at++, "bias", p.channels);
  if (contains(call, "Modulated")) {
    p.scale = per_token(call, at++, "scale", x);
    p.shift = per_token(call, at++, "shift", x);
  }
  p.y = call.output(0, x).data;
  if (p.residual) p.total = call.output(1, x).data;
  return p;
}

GroupNormProblem group_norm_problem(const Call& call) {
  const Shape& x = call.inputs[0].shape;
  if (x.count < 2) call.fail("x", x.text(), "[batch, channels, ...]");
  GroupNormProblem p{};
  p.batch = x.dims[0], p.channels = x.dims[1], p.spatial = x.elements(2, x.count);
  p.groups = call.attributes.groups;
  if (p.groups < 1 || p.channels % p.groups != 0)
    call.fail("groups", number(p.groups), "a number that divides the " + number(p.channels) + " channels of x");
  p.silu = contains(call, "SiLU");
  p.epsilon = call.attributes.epsilon;
  p.x = call.inputs[0].data;
  p.weight = expect_vector(call, 1, "weight", p.channels);
  p.bias = expect_vector(call, 2, "bias", p.channels);
  p.y = call.output(0, x).data;
  return p;
}

// q, k, [q_weight, k_weight], [cos, sin]
RopeProblem rope_problem(const Call& call) {
  const Tensor& q = expect_dims(call, 0, "q", 4, HEADS);
  const Tensor& k = expect_dims(call, 1, "k", 4, HEADS);
  const int64_t *a = q.shape.dims, *b = k.shape.dims;
  if (b[0] != a[0] || b[2] != a[2] || b[3] != a[3])
    call.fail("k", k.shape.text(), "batch, tokens and head_dim of q, " + q.shape.text());
  RopeProblem p{};
  p.batch = a[0], p.tokens = a[2], p.head_dim = a[3];
  p.epsilon = call.attributes.epsilon;
  p.interleaved = call.attributes.interleaved != 0;
  int at = 2;
  p.sides[0] = {a[1], q.data, nullptr, nullptr};
  p.sides[1] = {b[1], k.data, nullptr, nullptr};
  if (starts(call, "QKNorm")) {
    p.sides[0].weight = expect_vector(call, at++, "q_weight", p.head_dim);
    p.sides[1].weight = expect_vector(call, at++, "k_weight", p.head_dim);
  }
  if (contains(call, "Rot") || contains(call, "Rope")) {
    if (p.head_dim % 2) call.fail("q", "a head_dim of " + number(p.head_dim), "an even one to rotate");
    const Tensor& cos = expect_dims(call, at, "cos", 3, "[batch or 1, tokens, head_dim / 2]");
    const Tensor& sin = expect_dims(call, at + 1, "sin", 3, "[batch or 1, tokens, head_dim / 2]");
    const int64_t* c = cos.shape.dims;
    if ((c[0] != 1 && c[0] != p.batch) || c[1] != p.tokens || c[2] != p.head_dim / 2)
      call.fail("cos", cos.shape.text(), "[1 or " + number(p.batch) + ", " + number(p.tokens) + ", " + number(p.head_dim / 2) + "]");
    if (!(sin.shape == cos.shape)) call.fail("sin", sin.shape.text(), cos.shape.text() + ", as cos");
    p.cos = (const float*)cos.data, p.sin = (const float*)sin.data;
    p.angle_batch_stride = c[0] == 1 ? 0 : c[1] * c[2];
  }
  p.sides[0].y = call.output(0, q.shape).data;
  p.sides[1].y = call.output(1, k.shape).data;
  return p;
}

GatedProblem gated_problem(const Call& call) {
  const Tensor &value = call.inputs[0], &gate = call.inputs[1];
  if (!(gate.shape == value.shape)) call.fail("gate", gate.shape.text(), value.shape.text() + ", as value");
  const Gate kind = starts(call, "SwiGLU") ? Gate::silu : call.attributes.tanh ? Gate::gelu_tanh : Gate::gelu;
  return {value.shape.elements(0, value.shape.count), kind, value.data, gate.data, call.output(0, value.shape).data};
}

namespace {

void served(bool enough) {
  if (!enough) throw std::runtime_error("ai.optimize: no memory for the kernel's workspace");
}
int at(const Call& call) { return call.type == ORT_FLOAT ? 0 : 1; }

void attention_cpu(const Call& c, const Host& h) { served(kernels().attention[at(c)](attention_problem(c), h)); }
void norm_cpu(const Call& c, const Host& h) { served(kernels().norm[at(c)](norm_problem(c), h)); }
void group_norm_cpu(const Call& c, const Host& h) { served(kernels().group_norm[at(c)](group_norm_problem(c), h)); }
void rope_cpu(const Call& c, const Host& h) { served(kernels().rope[at(c)](rope_problem(c), h)); }
void gated_cpu(const Call& c, const Host& h) { served(kernels().gated[at(c)](gated_problem(c), h)); }

bool half(const Call& call) { return call.type == ORT_FLOAT16; }
void attention_cuda(const Call& c, void* stream) { attention_on_cuda(attention_problem(c), half(c), stream); }
void norm_cuda(const Call& c, void* stream) { norm_on_cuda(norm_problem(c), half(c), stream); }
void group_norm_cuda(const Call& c, void* stream) { group_norm_on_cuda(group_norm_problem(c), half(c), stream); }
void rope_cuda(const Call& c, void* stream) { rope_on_cuda(rope_problem(c), half(c), stream); }
void gated_cuda(const Call& c, void* stream) { gated_on_cuda(gated_problem(c), half(c), stream); }

}  // namespace

const Operator OPERATORS[] = {
    {"Attention", 3, 1, {0, 0}, "causal scale", attention_cpu, attention_cuda},
    {"AttentionBias", 4, 1, {0, 0}, "scale", attention_cpu, attention_cuda},
    {"PackedAttention", 3, 1, {0, 0}, "causal scale heads kv_heads", attention_cpu, attention_cuda},
    {"PackedAttentionBias", 4, 1, {0, 0}, "scale heads kv_heads", attention_cpu, attention_cuda},
    {"GroupNorm", 3, 1, {0, 0}, "groups epsilon", group_norm_cpu, group_norm_cuda},
    {"GroupNormSiLU", 3, 1, {0, 0}, "groups epsilon", group_norm_cpu, group_norm_cuda},
    {"LayerNorm", 3, 1, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"LayerNormModulated", 5, 1, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"RMSNorm", 2, 1, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"RMSNormModulated", 4, 1, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"AddLayerNorm", 4, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"AddLayerNormModulated", 6, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"AddRMSNorm", 3, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"AddRMSNormModulated", 5, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"GatedAddLayerNorm", 5, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"GatedAddLayerNormModulated", 7, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"GatedAddRMSNorm", 4, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"GatedAddRMSNormModulated", 6, 2, {0, 0}, "epsilon", norm_cpu, norm_cuda},
    {"QKNormRope", 6, 2, {0, 1}, "epsilon interleaved", rope_cpu, rope_cuda, 4},
    {"QKNorm", 4, 2, {0, 1}, "epsilon", rope_cpu, rope_cuda},
    {"RotaryQK", 4, 2, {0, 1}, "interleaved", rope_cpu, rope_cuda, 2},
    {"GeGLU", 2, 1, {0, 0}, "approximate", gated_cpu, gated_cuda},
    {"SwiGLU", 2, 1, {0, 0}, "", gated_cpu, gated_cuda},
};
const int OPERATOR_COUNT = sizeof OPERATORS / sizeof *OPERATORS;

}  // namespace optimize
