// Attention, block by block: the scores of 8 queries with a block of keys are made, turned into probabilities and
// multiplied into the output while they lie in the first-level cache. No [queries, keys] matrix is ever written.
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao, FlashAttention-2, 2023, 3.1.
//
// Two phases. First K and V are packed, once for all queries: K transposed into panels of PANEL keys ([head_dim, PANEL]
// each), V into strips of at most STRIP vectors ([keys, strip] each), both in fp32, so that the two products read
// memory in order. Then each task takes some queries of one head. Few queries skip the packing.
#pragma once

#include "rows.h"

namespace optimize {
namespace {

// The products keep ROWS x STRIP accumulators in registers: 8 x 3 of 32 (AVX-512, AArch64), 4 x 3 of 16
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif
constexpr int STRIP = 3;
constexpr int PANEL = STRIP * WIDTH;
constexpr int KEYS = 384;                  // a block of keys: a multiple of every PANEL; ROWS x KEYS scores are 12 KB
constexpr int64_t WIDEST = 512;            // head_dim
constexpr int64_t TILE_FLOATS = 1 << 13;   // of a task's queries, and of its outputs
constexpr int64_t TILE_QUERIES = 64;
constexpr int64_t FEW_QUERIES = 4;
constexpr int64_t PACK_KEYS = KEYS;
constexpr float LEAST = -__builtin_inff();
static_assert(KEYS % PANEL == 0 && TILE_FLOATS >= ROWS * (WIDEST + WIDTH), "a tile holds ROWS queries of the widest head");

template <class T>
struct AttentionJob {
  const AttentionProblem& p;
  float *keys, *values;      // packed; [batch * kv_heads] of each
  int64_t key_floats, value_floats;  // of one head
  int64_t vectors;           // of one head_dim, rounded up
  int64_t tile;              // queries of a task
};

INLINE int64_t rounded_up(int64_t n, int64_t to) { return blocks(n, to) * to; }

// How many of `vectors` the strip that begins at `at` takes: as even as can be, STRIP at most
INLINE int64_t strip_at(int64_t at, int64_t vectors) {
  const int64_t strips = blocks(vectors, STRIP), whole = vectors / strips, wide = vectors % strips;
  return at < wide * (whole + 1) ? whole + 1 : whole;
}

// --- packing ---

// out[d * rows + r] = x[r * stride + d] * factor; zeros for the rows from n on. `rows` is a multiple of 4.
template <class T>
void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t n, int64_t width, float factor, float* out) {
  alignas(64) float four[4][WIDEST + WIDTH];
  for (int64_t first = 0; first < rows; first += 4) {
    for (int64_t r = 0; r < 4; ++r)
      for (int64_t d = 0; d < width; d += WIDTH)
        store(four[r] + d, first + r < n ? load(x + (first + r) * stride + d, width - d) * factor : Vec{});
    for (int64_t d = 0; d < width; d += 4) {
      Four part[4];
      for (int r = 0; r < 4; ++r) __builtin_memcpy(&part[r], four[r] + d, sizeof(Four));
      transpose(part);
      for (int64_t i = 0; i < least(4, width - d); ++i)
        __builtin_memcpy(out + (d + i) * rows + first, &part[i], sizeof(Four));
    }
  }
}

template <class T>
void pack_keys(const AttentionProblem& p, const T* k, int64_t from, int64_t to, float* out) {
  for (int64_t first = from; first < to; first += PANEL) {
    const int64_t n = least(PANEL, p.keys - first);
    const int64_t stride = p.kv_strides.token;
    pack_columns(k + first * stride, stride, rounded_up(n, WIDTH), n, p.head_dim, 1.0f, out + first * p.head_dim);
  }
}

template <class T>
void pack_values(const AttentionProblem& p, const T* v, int64_t vectors, int64_t from, int64_t to, float* out) {
  for (int64_t at = 0; at < vectors;) {
    const int64_t wide = strip_at(at, vectors);
    float* strip = out + p.keys * at * WIDTH;
    for (int64_t j = from; j < to; ++j)
      for (int64_t i = 0; i < wide; ++i) {
        const int64_t d = (at + i) * WIDTH;
        store(strip + (j * wide + i) * WIDTH, load(v + j * p.kv_strides.token + d, p.head_dim - d));
      }
    at += wide;
  }
}

template <class T>
void pack_task(void* data, size_t index) {
  const auto& job = *(const AttentionJob<T>*)data;
  const AttentionProblem& p = job.p;
  const int64_t pieces = blocks(p.keys, PACK_KEYS), head = (int64_t)index / pieces;
  const int64_t from = (int64_t)index % pieces * PACK_KEYS, to = least(p.keys, from + PACK_KEYS);
  const int64_t at = p.kv_strides.at(head / p.kv_heads, head % p.kv_heads);
  pack_keys(p, (const T*)p.k + at, from, to, job.keys + head * job.key_floats);
  pack_values(p, (const T*)p.v + at, job.vectors, from, to, job.values + head * job.value_floats);
}

// --- the two products ---

// scores[r][0 .. N * WIDTH) = sum over d of queries[d][r] * keys[d][...]; queries [head_dim, ROWS]
template <int N>
INLINE void multiply_keys(const float* queries, const float* keys, int64_t head_dim, float* scores) {
  Vec sums[ROWS][N] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec k[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) k[n] = load(keys + (d * N + n) * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec q = splat(queries[d * ROWS + r]);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[r][n] += q * k[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) store(scores + r * KEYS + n * WIDTH, sums[r][n]);
}

// out[r][0 .. N * WIDTH) = out * factor[r] + sum over j of weights[r][j] * values[j][...]
template <int N>
INLINE void multiply_values(const float* weights, const float* values, int64_t keys, const float* factor, float* out,
                            int64_t stride) {
  Vec sums[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) sums[r][n] = load(out + r * stride + n * WIDTH) * factor[r];
  for (int64_t j = 0; j < keys; ++j) {
    Vec v[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) v[n] = load(values + (j * N + n) * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec w = splat(weights[r * KEYS + j]);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[r][n] += w * v[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) store(out + r * stride + n * WIDTH, sums[r][n]);
}

// The scores of ROWS queries with keys [first, first + n)
void score_block(const float* queries, const float* packed, int64_t keys, int64_t head_dim, int64_t first, int64_t n,
                 float* scores) {
  for (int64_t j = 0; j < n; j += PANEL) {
    const float* panel = packed + (first + j) * head_dim;
    switch (blocks(least(PANEL, keys - first - j), WIDTH)) {
      case 3: multiply_keys<3>(queries, panel, head_dim, scores + j); break;
      case 2: multiply_keys<2>(queries, panel, head_dim, scores + j); break;
      default: multiply_keys<1>(queries, panel, head_dim, scores + j);
    }
  }
}

void add_values(const float* weights, const float* packed, int64_t keys, int64_t vectors, int64_t first, int64_t n,
                const float* factor, float* out) {
  for (int64_t at = 0; at < vectors;) {
    const int64_t wide = strip_at(at, vectors);
    const float* strip = packed + (keys * at + first * wide) * WIDTH;
    switch (wide) {
      case 3: multiply_values<3>(weights, strip, n, factor, out + at * WIDTH, vectors * WIDTH); break;
      case 2: multiply_values<2>(weights, strip, n, factor, out + at * WIDTH, vectors * WIDTH); break;
      default: multiply_values<1>(weights, strip, n, factor, out + at * WIDTH, vectors * WIDTH);
    }
    at += wide;
  }
}

// --- softmax ---

struct Where {
  int64_t batch, head, query, first;  // of a row of scores and its first key
};

// Scores are in units of log 2, and the bias becomes that too. What is finite stays finite: transformers masks with the
// least number, and a row of nothing but those is a mean, not nothing.
INLINE Vec in_log2(Vec b) {
  const Vec greatest = splat(3.402823466e38f);
  const Vec scaled = larger(-greatest, -larger(-greatest, -b * LOG2E));
  return select((Vec)(bits_of(b) & 0x7fffffff) <= greatest, scaled, b);
}

template <class T>
INLINE void add_bias(const AttentionProblem& p, const Where& w, int64_t n, float* scores) {
  const int64_t* s = p.bias_stride;
  const int64_t at = w.batch * s[0] + w.head * s[1] + w.query * s[2] + w.first * s[3];
  if (p.bias_kind == BiasKind::seen) {
    const uint8_t* seen = (const uint8_t*)p.bias + at;
    for (int64_t j = 0; j < n; ++j) scores[j] = seen[j * s[3]] ? scores[j] : LEAST;
  } else if (s[3] == 0) {
    const Vec b = in_log2(splat(one((const T*)p.bias + at)));
    for (int64_t j = 0; j < n; j += WIDTH) store(scores + j, load(scores + j) + b);
  } else {
    for (int64_t j = 0; j < n; j += WIDTH)
      store(scores + j, load(scores + j) + in_log2(load((const T*)p.bias + at + j, n - j)));
  }
}

// The scores from `from` on become -infinity, up to a whole vector after n
INLINE void hide(float* scores, int64_t from, int64_t n) {
  const int64_t whole = rounded_up(from, WIDTH);
  if (whole > from) {
    float* last = scores + whole - WIDTH;
    store(last, upto(from - whole + WIDTH, load(last), splat(LEAST)));
  }
  for (int64_t j = whole; j < n; j += WIDTH) store(scores + j, splat(LEAST));
}

// Of the n scores of a row, those that the query sees: the bias is added, the others become -infinity
template <class T>
INLINE void mask_row(const AttentionProblem& p, const Where& w, int64_t n, float* scores) {
  if (p.bias_kind != BiasKind::none) add_bias<T>(p, w, n, scores);
  hide(scores, p.causal ? most(0, least(n, w.query + p.keys - p.queries + 1 - w.first)) : n, n);
}

// What is known of a query after some blocks: the largest score, and the sum of 2^(score - largest)
struct Running {
  float largest;
  Vec sums;  // the sum is that of its lanes
};

// One row of scores -> 2^(score - reference); returns the sums of its lanes
INLINE Vec softened(float* scores, int64_t n, float reference) {
  Vec sums[2] = {};
  int64_t j = 0;
  for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) {
    const Vec e = exp2_of_negative(load(scores + j) - reference);
    const Vec f = exp2_of_negative(load(scores + j + WIDTH) - reference);
    store(scores + j, e);
    store(scores + j + WIDTH, f);
    sums[0] += e;
    sums[1] += f;
  }
  for (; j < n; j += WIDTH) {
    const Vec e = exp2_of_negative(load(scores + j) - reference);
    store(scores + j, e);
    sums[0] += e;
  }
  return sums[0] + sums[1];
}

// R rows of scores -> 2^(score - largest so far of its row); `factor` is what the row's output has to be multiplied by.
// The largest of all rows are looked for side by side: one alone waits for itself.
template <int R>
INLINE void soften(float* scores, int64_t n, Running* running, float* factor) {
  Vec highest[R];
  for (int r = 0; r < R; ++r) highest[r] = splat(LEAST);
  for (int64_t j = 0; j < n; j += WIDTH)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) highest[r] = larger(load(scores + r * KEYS + j), highest[r]);
  float reference[R];
  for (int r = 0; r < R; ++r) {
    const float before = running[r].largest, block = largest_of(highest[r]);
    const float now = block > before ? block : before;
    reference[r] = now == LEAST ? 0.0f : now;  // nothing seen yet: 2^-infinity is 0
    // where nothing was seen before, what is multiplied is 0
    factor[r] = before == now || before == LEAST ? 1.0f : exp2_of_negative(splat(before - reference[r]))[0];
    running[r].largest = now;
  }
  for (int r = 0; r < R; ++r)
    running[r].sums = running[r].sums * factor[r] + softened(scores + r * KEYS, n, reference[r]);
}

// --- many queries ---

template <class T>
INLINE void write_queries(const AttentionProblem& p, const float* out, int64_t stride, const Running* running, int64_t n,
                          T* to) {
  for (int64_t r = 0; r < n; ++r) {
    const float sum = sum_of(running[r].sums);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;  // a query that sees no key gives zeros
    for (int64_t d = 0; d < p.head_dim; d += WIDTH)
      store(to + r * p.q_strides.token + d, load(out + r * stride + d) * factor, p.head_dim - d);
  }
}

template <class T>
void tile_task(void* data, size_t index) {
  const auto& job = *(const AttentionJob<T>*)data;
  const AttentionProblem& p = job.p;
  const int64_t tiles = blocks(p.queries, job.tile), head = (int64_t)index / tiles;  // head: of all batches
  const int64_t start = (int64_t)index % tiles * job.tile, n = least(job.tile, p.queries - start);
  const int64_t kv = head / p.heads * p.kv_heads + head % p.heads / (p.heads / p.kv_heads);
  const float *keys = job.keys + kv * job.key_floats, *values = job.values + kv * job.value_floats;
  const int64_t stride = job.vectors * WIDTH;
  alignas(64) float queries[TILE_FLOATS], out[TILE_FLOATS] = {}, scores[ROWS * KEYS];
  Running running[TILE_QUERIES];
  for (auto& r : running) r = {LEAST, Vec{}};
  const int64_t step = p.q_strides.token, at = p.q_strides.at(head / p.heads, head % p.heads) + start * step;
  for (int64_t r = 0; r < n; r += ROWS)
    pack_columns((const T*)p.q + at + r * step, step, ROWS, n - r, p.head_dim, p.scale * LOG2E, queries + r * p.head_dim);
  const int64_t last = p.causal ? least(p.keys, start + n + p.keys - p.queries) : p.keys;
  for (int64_t first = 0; first < last; first += KEYS) {
    const int64_t block = least(KEYS, p.keys - first);
    for (int64_t group = 0; group < n; group += ROWS) {
      float factor[ROWS];
      score_block(queries + group * p.head_dim, keys, p.keys, p.head_dim, first, block, scores);
      for (int64_t r = 0; r < ROWS; ++r)
        mask_row<T>(p, {head / p.heads, head % p.heads, least(start + group + r, p.queries - 1), first}, block,
                    scores + r * KEYS);
      soften<ROWS>(scores, block, running + group, factor);
      add_values(scores, values, p.keys, job.vectors, first, block, factor, out + group * stride);
    }
  }
  write_queries(p, out, stride, running, n, (T*)p.out + at);
}

// --- few queries: a key or a value at a time, straight from the tensors ---

template <class T>
INLINE float product(const float* query, const T* key, int64_t n) {
  Vec sums{};
  for (int64_t d = 0; d < n; d += WIDTH) sums += load(query + d) * load(key + d, n - d);
  return sum_of(sums);
}

template <class T>
void query_task(void* data, size_t index) {
  const auto& job = *(const AttentionJob<T>*)data;
  const AttentionProblem& p = job.p;
  const int64_t head = (int64_t)index / p.queries, query = (int64_t)index % p.queries, n = p.head_dim;
  const int64_t kv = p.kv_strides.at(head / p.heads, head % p.heads / (p.heads / p.kv_heads)), step = p.kv_strides.token;
  const int64_t at = p.q_strides.at(head / p.heads, head % p.heads) + query * p.q_strides.token;
  const T *k = (const T*)p.k + kv, *v = (const T*)p.v + kv;
  alignas(64) float q[WIDEST + WIDTH], out[WIDEST + WIDTH] = {}, scores[KEYS];
  Running running{LEAST, Vec{}};
  for (int64_t d = 0; d < n; d += WIDTH) store(q + d, load((const T*)p.q + at + d, n - d) * (p.scale * LOG2E));
  const int64_t last = p.causal ? query + p.keys - p.queries + 1 : p.keys;
  for (int64_t first = 0; first < last; first += KEYS) {
    const int64_t block = least(KEYS, p.keys - first);
    for (int64_t j = 0; j < block; ++j) scores[j] = product(q, k + (first + j) * step, n);
    mask_row<T>(p, {head / p.heads, head % p.heads, query, first}, block, scores);
    float factor;
    soften<1>(scores, block, &running, &factor);
    for (int64_t d = 0; d < n; d += WIDTH) {
      Vec sum = load(out + d) * factor;
      for (int64_t j = 0; j < block; ++j) sum += scores[j] * load(v + (first + j) * step + d, n - d);
      store(out + d, sum);
    }
  }
  write_queries(p, out, 0, &running, 1, (T*)p.out + at);
}

template <class T>
bool attention(const AttentionProblem& p, const Host& host) {
  if (p.batch * p.heads * p.queries * p.head_dim == 0) return true;
  AttentionJob<T> job{p, nullptr, nullptr, p.head_dim * rounded_up(p.keys, WIDTH), 0, blocks(p.head_dim, WIDTH), 0};
  if (p.queries < FEW_QUERIES) {
    host.parallel(host.self, (size_t)(p.batch * p.heads * p.queries), query_task<T>, &job);
    return true;
  }
  job.value_floats = p.keys * job.vectors * WIDTH;
  job.tile = least(TILE_QUERIES, TILE_FLOATS / (job.vectors * WIDTH) / ROWS * ROWS);
  const int64_t heads = p.batch * p.kv_heads;
  const size_t bytes = (size_t)(heads * (job.key_floats + job.value_floats)) * sizeof(float);
  if (bytes > 0) {
    job.keys = (float*)host.allocate(host.self, bytes);
    if (!job.keys) return false;
    job.values = job.keys + heads * job.key_floats;
    host.parallel(host.self, (size_t)(heads * blocks(p.keys, PACK_KEYS)), pack_task<T>, &job);
  }
  host.parallel(host.self, (size_t)(p.batch * p.heads * blocks(p.queries, job.tile)), tile_task<T>, &job);
  if (bytes > 0) host.release(host.self, job.keys);
  return true;
}

}  // namespace
}  // namespace optimize
