// Kernels that walk rows: norms with what comes before and after them, rotation, gated activations.
#pragma once

#include "simd.h"

namespace optimize {
namespace {

constexpr int64_t TASK_ELEMENTS = 1 << 14;  // what a task handles at least: tens of microseconds, a thousand times its dispatch
constexpr int64_t STACK_FLOATS = 1 << 13;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A row of floats: on the stack where it fits, else lent by the host
struct Row {
  const Host& host;
  alignas(64) float here[STACK_FLOATS];
  float* data;
  Row(const Host& h, int64_t floats) : host(h) {
    data = floats <= STACK_FLOATS ? here : (float*)host.allocate(host.self, (size_t)floats * sizeof(float));
  }
  ~Row() {
    if (data && data != here) host.release(host.self, data);
  }
};

template <class P>
struct Job {
  const P& problem;
  const Host& host;
  int64_t per_task;
  bool failed;  // only ever set; read after all tasks
};

template <class P>
bool run(const P& problem, const Host& host, int64_t items, int64_t item_elements, void (*task)(void*, size_t)) {
  if (items == 0) return true;
  Job<P> job{problem, host, most(1, TASK_ELEMENTS / most(1, item_elements)), false};
  host.parallel(host.self, (size_t)blocks(items, job.per_task), task, &job);
  return !__atomic_load_n(&job.failed, __ATOMIC_RELAXED);
}

INLINE const char* offset(const void* p, int64_t elements, size_t size) { return (const char*)p + elements * (int64_t)size; }

template <class T>
INLINE const T* row_of(const PerToken& p, int64_t batch, int64_t token) {
  return (const T*)p.data + batch * p.batch_stride + token * p.token_stride;
}

// --- norms ---

// total -> row, in fp32 as it is after rounding; returns the sum of its elements (or of their squares)
template <class T>
INLINE float total_row(const NormProblem& p, int64_t r, float* row) {
  const int64_t batch = r / p.tokens, token = r % p.tokens, n = p.channels;
  const T* x = (const T*)p.x + r * n;
  const T* residual = p.residual ? (const T*)p.residual + r * n : nullptr;
  const T* gate = p.gate.data ? row_of<T>(p.gate, batch, token) : nullptr;
  T* total = p.total ? (T*)p.total + r * n : nullptr;
  return summed(n, [&](int64_t i, int64_t left) {
    Vec v = load(x + i, left);
    if (residual) {
      if (gate) v *= load(gate + i, left);
      v = rounded<T>(v + load(residual + i, left));
      if (total) store(total + i, v, left);
    }
    store(row + i, v);
    return p.rms ? v * v : v;
  });
}

INLINE float squared_deviations(const float* row, int64_t n, float mean) {
  return summed(n, [&](int64_t i, int64_t left) {
    const Vec d = upto(left, load(row + i) - mean, Vec{});
    return d * d;
  });
}

template <class T>
void norm_row(const NormProblem& p, int64_t r, float* row) {
  const int64_t batch = r / p.tokens, token = r % p.tokens, n = p.channels;
  const float sum = total_row<T>(p, r, row);
  const float mean = p.rms ? 0.0f : sum / (float)n;
  const float variance = (p.rms ? sum : squared_deviations(row, n, mean)) / (float)n;
  const float factor = 1.0f / __builtin_sqrtf(variance + p.epsilon);
  const T *weight = (const T*)p.weight, *bias = (const T*)p.bias;
  const T* scale = p.scale.data ? row_of<T>(p.scale, batch, token) : nullptr;
  const T* shift = p.shift.data ? row_of<T>(p.shift, batch, token) : nullptr;
  T* y = (T*)p.y + r * n;
  for (int64_t i = 0; i < n; i += WIDTH) {
    Vec v = (load(row + i) - mean) * factor * load(weight + i, n - i);
    if (bias) v += load(bias + i, n - i);
    if (scale) v = v * (1.0f + load(scale + i, n - i)) + load(shift + i, n - i);
    store(y + i, v, n - i);
  }
}

template <class T>
void norm_task(void* data, size_t index) {
  auto& job = *(Job<NormProblem>*)data;
  const NormProblem& p = job.problem;
  Row row(job.host, p.channels + WIDTH);
  if (!row.data) return __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
  const int64_t first = (int64_t)index * job.per_task;
  for (int64_t r = first; r < least(p.rows, first + job.per_task); ++r) norm_row<T>(p, r, row.data);
}

template <class T>
bool norm(const NormProblem& p, const Host& host) {
  return run(p, host, p.rows, p.channels, norm_task<T>);
}

// --- rotation ---

template <class T>
INLINE void rotate_halves(const float* row, const float* cos, const float* sin, int64_t half, T* y) {
  for (int64_t i = 0; i < half; i += WIDTH) {
    const Vec a = load(row + i, half - i), b = load(row + half + i, half - i);
    const Vec c = load(cos + i, half - i), s = load(sin + i, half - i);
    store(y + i, a * c - b * s, half - i);
    store(y + half + i, b * c + a * s, half - i);
  }
}

template <class T>
INLINE void rotate_pairs(const float* row, const float* cos, const float* sin, int64_t half, T* y) {
  for (int64_t i = 0; i < half; i += WIDTH) {
    const int64_t n = least(WIDTH, half - i);
    float c[WIDTH], s[WIDTH], turned[2 * WIDTH] = {};
    store(c, load(cos + i, n));
    store(s, load(sin + i, n));
    for (int64_t j = 0; j < n; ++j) {
      const float a = row[2 * (i + j)], b = row[2 * (i + j) + 1];
      turned[2 * j] = a * c[j] - b * s[j];
      turned[2 * j + 1] = b * c[j] + a * s[j];
    }
    for (int64_t j = 0; j < 2 * n; j += WIDTH) store(y + 2 * i + j, load(turned + j), 2 * n - j);
  }
}

template <class T>
void rope_row(const RopeProblem& p, const RopeSide& side, int64_t r, float* row) {
  const int64_t n = p.head_dim, half = n / 2, token = r % p.tokens, batch = r / p.tokens / side.heads;
  const T *x = (const T*)side.x + r * n, *weight = (const T*)side.weight;
  T* y = (T*)side.y + r * n;
  Vec squares{};
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Vec v = load(x + i, n - i);
    store(row + i, v);
    squares += v * v;
  }
  if (weight) {
    const float factor = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)n + p.epsilon);
    for (int64_t i = 0; i < n; i += WIDTH) store(row + i, load(row + i) * factor * load(weight + i, n - i));
  }
  if (!p.cos) {
    for (int64_t i = 0; i < n; i += WIDTH) store(y + i, load(row + i), n - i);
    return;
  }
  const int64_t at = batch * p.angle_batch_stride + token * half;
  const float *cos = p.cos + at, *sin = p.sin + at;
  p.interleaved ? rotate_pairs(row, cos, sin, half, y) : rotate_halves(row, cos, sin, half, y);
}

template <class T>
void rope_task(void* data, size_t index) {
  auto& job = *(Job<RopeProblem>*)data;
  const RopeProblem& p = job.problem;
  Row row(job.host, p.head_dim + WIDTH);
  if (!row.data) return __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
  const int64_t q_rows = p.batch * p.sides[0].heads * p.tokens;
  const int64_t rows = q_rows + p.batch * p.sides[1].heads * p.tokens, first = (int64_t)index * job.per_task;
  for (int64_t r = first; r < least(rows, first + job.per_task); ++r)
    r < q_rows ? rope_row<T>(p, p.sides[0], r, row.data) : rope_row<T>(p, p.sides[1], r - q_rows, row.data);
}

template <class T>
bool rope(const RopeProblem& p, const Host& host) {
  return run(p, host, p.batch * (p.sides[0].heads + p.sides[1].heads) * p.tokens, p.head_dim, rope_task<T>);
}

// --- gated activations ---

template <class T, Vec (*ACTIVATION)(Vec)>
void gated_task(void* data, size_t index) {
  auto& job = *(Job<GatedProblem>*)data;
  const GatedProblem& p = job.problem;
  const T *value = (const T*)p.value, *gate = (const T*)p.gate;
  const int64_t first = (int64_t)index * job.per_task, end = least(p.count, first + job.per_task);
  for (int64_t i = first; i < end; i += WIDTH)
    store((T*)p.y + i, load(value + i, end - i) * ACTIVATION(load(gate + i, end - i)), end - i);
}

template <class T>
bool gated(const GatedProblem& p, const Host& host) {
  switch (p.gate_kind) {
    case Gate::gelu: return run(p, host, p.count, 1, gated_task<T, gelu>);
    case Gate::gelu_tanh: return run(p, host, p.count, 1, gated_task<T, gelu_tanh>);
    default: return run(p, host, p.count, 1, gated_task<T, silu>);
  }
}

}  // namespace
}  // namespace optimize
