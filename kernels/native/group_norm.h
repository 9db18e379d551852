// GroupNorm of [batch, channels, spatial]: a group is one contiguous stretch. Groups that a core's cache holds are read
// from memory once, by one task each; larger ones are cut: a pass over the pieces for mean and variance, a pass to write.
#pragma once

#include "rows.h"

namespace optimize {
namespace {

constexpr int64_t CACHED_ELEMENTS = 1 << 16;  // 256 KB in fp32: half of the smallest second-level cache that is common
constexpr int64_t SUM_ELEMENTS = 1 << 12;     // summed in fp32 lanes, then added in double

struct Moments {
  double count, mean, squares;  // squares: the sum of squared deviations from the mean
};

// Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979
INLINE Moments joined(Moments a, Moments b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, delta = b.mean - a.mean;
  return {count, a.mean + delta * b.count / count, a.squares + b.squares + delta * delta * a.count * b.count / count};
}

// Two passes over what lies in the first-level cache. Deviations are from a mean in fp32; their own sum, which would be
// 0 for the exact mean, mends it.
template <class T>
INLINE Moments moments_of_block(const T* x, int64_t n) {
  const float mean = summed(n, [&](int64_t i, int64_t left) { return load(x + i, left); }) / (float)n;
  Vec squares{};
  const double count = (double)n, off = summed(n, [&](int64_t i, int64_t left) {
    const Vec d = upto(left, load(x + i, left) - mean, Vec{});
    squares += d * d;
    return d;
  });
  return {count, mean + off / count, sum_of(squares) - off * off / count};
}

template <class T>
Moments moments_of(const T* x, int64_t n) {
  Moments all{0, 0, 0};
  for (int64_t i = 0; i < n; i += SUM_ELEMENTS) all = joined(all, moments_of_block(x + i, least(SUM_ELEMENTS, n - i)));
  return all;
}

template <class T, bool SILU>
INLINE void write_stretch(const T* x, T* y, int64_t n, float mean, float factor, float bias) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Vec v = (load(x + i, n - i) - mean) * factor + bias;
    store(y + i, SILU ? silu(v) : v, n - i);
  }
}

// Elements [from, to) of one group
template <class T>
void write_group(const GroupNormProblem& p, int64_t group, Moments m, int64_t from, int64_t to) {
  const int64_t channels = p.channels / p.groups, size = channels * p.spatial;
  const T* x = (const T*)p.x + group * size;
  T* y = (T*)p.y + group * size;
  const float mean = (float)m.mean, rest = (float)(m.mean - mean);
  const float factor = (float)(1.0 / __builtin_sqrt(m.squares / m.count + (double)p.epsilon));
  for (int64_t i = from; i < to;) {
    const int64_t end = least(to, (i / p.spatial + 1) * p.spatial);
    const int64_t channel = group % p.groups * channels + i / p.spatial;
    const float w = one((const T*)p.weight + channel) * factor, b = one((const T*)p.bias + channel) - rest * w;
    p.silu ? write_stretch<T, true>(x + i, y + i, end - i, mean, w, b)
           : write_stretch<T, false>(x + i, y + i, end - i, mean, w, b);
    i = end;
  }
}

template <class T>
void cached_group_task(void* data, size_t index) {
  auto& job = *(Job<GroupNormProblem>*)data;
  const GroupNormProblem& p = job.problem;
  const int64_t size = p.channels / p.groups * p.spatial, first = (int64_t)index * job.per_task;
  for (int64_t g = first; g < least(p.batch * p.groups, first + job.per_task); ++g)
    write_group<T>(p, g, moments_of((const T*)p.x + g * size, size), 0, size);
}

struct CutGroups {
  const GroupNormProblem& problem;
  int64_t size, pieces;
  Moments* moments;  // [groups of all batches, pieces]
};

template <class T>
void moments_task(void* data, size_t index) {
  auto& cut = *(CutGroups*)data;
  const int64_t group = (int64_t)index / cut.pieces, from = (int64_t)index % cut.pieces * CACHED_ELEMENTS;
  const T* x = (const T*)cut.problem.x + group * cut.size + from;
  cut.moments[index] = moments_of(x, least(CACHED_ELEMENTS, cut.size - from));
}

template <class T>
void write_task(void* data, size_t index) {
  auto& cut = *(CutGroups*)data;
  const int64_t group = (int64_t)index / cut.pieces, from = (int64_t)index % cut.pieces * CACHED_ELEMENTS;
  Moments all{0, 0, 0};
  for (int64_t i = 0; i < cut.pieces; ++i) all = joined(all, cut.moments[group * cut.pieces + i]);
  write_group<T>(cut.problem, group, all, from, least(from + CACHED_ELEMENTS, cut.size));
}

template <class T>
bool group_norm(const GroupNormProblem& p, const Host& host) {
  const int64_t groups = p.batch * p.groups, size = p.channels / p.groups * p.spatial;
  if (groups == 0 || size == 0) return true;
  if (size <= CACHED_ELEMENTS) return run(p, host, groups, size, cached_group_task<T>);
  CutGroups cut{p, size, blocks(size, CACHED_ELEMENTS), nullptr};
  const size_t tasks = (size_t)(groups * cut.pieces);
  cut.moments = (Moments*)host.allocate(host.self, tasks * sizeof(Moments));
  if (!cut.moments) return false;
  host.parallel(host.self, tasks, moments_task<T>, &cut);
  host.parallel(host.self, tasks, write_task<T>, &cut);
  host.release(host.self, cut.moments);
  return true;
}

}  // namespace
}  // namespace optimize
