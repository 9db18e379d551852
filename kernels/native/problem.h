// What the CPU kernels are given: plain shapes and pointers, and a host that runs tasks and lends memory. Nothing here
// knows ONNX Runtime, so that the same kernels run under a sanitizer in a program of their own.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace optimize {

struct Half {
  uint16_t bits;  // IEEE binary16
};

struct Host {
  void* self;
  void (*parallel)(void* self, size_t tasks, void (*task)(void* data, size_t index), void* data);
  void* (*allocate)(void* self, size_t bytes);  // at least 64-byte aligned; null where there is no memory
  void (*release)(void* self, void* memory);
};

enum class BiasKind { none, added, seen };  // added: of the tensors' type; seen: bool, true where a query sees a key

// Elements from one batch, head and token to the next; the numbers of a head lie side by side
struct Strides {
  int64_t batch, head, token;
  int64_t at(int64_t b, int64_t h) const { return b * batch + h * head; }
};

// Of [batch, heads, tokens, head_dim], or of [batch, tokens, heads * head_dim]: packed
inline Strides strides_of(bool packed, int64_t heads, int64_t tokens, int64_t head_dim) {
  const int64_t batch = heads * tokens * head_dim;
  return packed ? Strides{batch, head_dim, heads * head_dim} : Strides{batch, tokens * head_dim, head_dim};
}

// out[b, h, i] = softmax over j of (q[b, h, i] . k[b, h / (heads / kv_heads), j] * scale + bias[b, h, i, j]) . v
struct AttentionProblem {
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  float scale;
  bool causal;  // query i sees the keys up to i + keys - queries
  Strides q_strides, kv_strides;  // of q and out, of k and v
  const void *q, *k, *v;
  BiasKind bias_kind;
  const void* bias;
  int64_t bias_stride[4];  // in elements; 0 where the bias broadcasts
  void* out;
};

// [channels] values for each row: of batch b and token t at data + b * batch_stride + t * token_stride (elements)
struct PerToken {
  const void* data;  // null where there is none
  int64_t batch_stride, token_stride;
};

// total = residual + gate * x, rounded (where there is a residual, else x itself); y = norm(total), modulated
struct NormProblem {
  int64_t rows, tokens, channels;  // row r is token r % tokens of batch r / tokens
  bool rms;
  float epsilon;
  const void *x, *residual, *weight, *bias;  // residual null: no sum; bias null: none
  PerToken gate, scale, shift;
  void *y, *total;  // total null: not wanted
};

// x and y [batch, channels, spatial]
struct GroupNormProblem {
  int64_t batch, channels, spatial, groups;
  bool silu;
  float epsilon;
  const void *x, *weight, *bias;
  void* y;
};

// One of q and k: x and y [batch, heads, tokens, head_dim], weight [head_dim] or null
struct RopeSide {
  int64_t heads;
  const void *x, *weight;
  void* y;
};

struct RopeProblem {
  int64_t batch, tokens, head_dim;
  RopeSide sides[2];
  const float *cos, *sin;  // [batch or 1, tokens, head_dim / 2], or null: no rotation
  int64_t angle_batch_stride;
  bool interleaved;
  float epsilon;
};

enum class Gate { gelu, gelu_tanh, silu };

struct GatedProblem {
  int64_t count;
  Gate gate_kind;
  const void *value, *gate;
  void* y;
};

// The kernels of one instruction set; [0] fp32, [1] fp16. False: there was no memory.
struct Kernels {
  const char* name;
  bool (*attention[2])(const AttentionProblem&, const Host&);
  bool (*norm[2])(const NormProblem&, const Host&);
  bool (*group_norm[2])(const GroupNormProblem&, const Host&);
  bool (*rope[2])(const RopeProblem&, const Host&);
  bool (*gated[2])(const GatedProblem&, const Host&);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best that this CPU runs; OPTIMIZE_NATIVE_ISA (base, avx2, avx512) asks for a lesser one.
const Kernels& kernels();

}  // namespace optimize
