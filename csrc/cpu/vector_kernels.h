// The kernels of dot, axpby and ema, on arrays whose dtypes are known at run time. Part of kernels.cpp, with internal
// linkage.
#pragma once

#include "cpu/tiles.h"

namespace fused_sam {
namespace {

inline const float* widened_any(Dtype dtype, const void* from, int64_t at, float* tile, int64_t n) {
  if (dtype == Dtype::bf16) return widened<bf16, float>(static_cast<const bf16*>(from) + at, tile, n);
  if (dtype == Dtype::f16) return widened<f16, float>(static_cast<const f16*>(from) + at, tile, n);
  return static_cast<const float*>(from) + at;
}
inline const double* widened_any(Dtype, const void* from, int64_t at, double*, int64_t) {
  return static_cast<const double*>(from) + at;
}
inline void narrowed_any(Dtype dtype, const float* from, void* to, int64_t at, int64_t n) {
  if (dtype == Dtype::bf16)
    narrowed<bf16, float>(from, static_cast<bf16*>(to) + at, n);
  else if (dtype == Dtype::f16)
    narrowed<f16, float>(from, static_cast<f16*>(to) + at, n);
  else
    memcpy(static_cast<float*>(to) + at, from, size_t(n) * sizeof(float));
}
inline void narrowed_any(Dtype, const double* from, void* to, int64_t at, int64_t n) {
  memcpy(static_cast<double*>(to) + at, from, size_t(n) * sizeof(double));
}

// Writes <x, y>, <x, x>, <y, y> into sums, added up in double as in sum_squares.
template <class R>
void dot(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, double sums[3], int64_t begin, int64_t n) {
  constexpr int kLanes = 16;
  double xy[kLanes] = {}, xx[kLanes] = {}, yy[kLanes] = {};
  R x_tile[kTile], y_tile[kTile];
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t m = n - at < kTile ? n - at : kTile;
    const R* p = widened_any(x_dtype, x, begin + at, x_tile, m);
    const R* q = widened_any(y_dtype, y, begin + at, y_tile, m);
    int64_t i = 0;
    for (; i + kLanes <= m; i += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) {
        const double u = double(p[i + k]), v = double(q[i + k]);
        xy[k] += u * v, xx[k] += u * u, yy[k] += v * v;
      }
    }
    for (int k = 0; i < m; ++i, ++k) {
      const double u = double(p[i]), v = double(q[i]);
      xy[k] += u * v, xx[k] += u * u, yy[k] += v * v;
    }
  }
  sums[0] = sums[1] = sums[2] = 0;
  for (int k = 0; k < kLanes; ++k) sums[0] += xy[k], sums[1] += xx[k], sums[2] += yy[k];
}

// ema is this with a = decay, b = 1 - decay and out = x.
template <class R>
void axpby_tiles(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, Dtype out_dtype, void* out, double a,
                 double b, int64_t begin, int64_t n) {
  const R p = R(a), q = R(b);
  R x_tile[kTile], y_tile[kTile], out_tile[kTile];
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t m = n - at < kTile ? n - at : kTile;
    const R* u = widened_any(x_dtype, x, begin + at, x_tile, m);
    const R* v = widened_any(y_dtype, y, begin + at, y_tile, m);
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) out_tile[i] = axpby<R>(p, u[i], q, v[i]);
    narrowed_any(out_dtype, out_tile, out, begin + at, m);
  }
}

void dot_of(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, double sums[3], int64_t begin, int64_t n) {
  x_dtype == Dtype::f64 ? dot<double>(x_dtype, x, y_dtype, y, sums, begin, n)
                        : dot<float>(x_dtype, x, y_dtype, y, sums, begin, n);
}

void axpby_of(Dtype x_dtype, const void* x, Dtype y_dtype, const void* y, Dtype out_dtype, void* out, double a,
              double b, int64_t begin, int64_t n) {
  x_dtype == Dtype::f64 ? axpby_tiles<double>(x_dtype, x, y_dtype, y, out_dtype, out, a, b, begin, n)
                        : axpby_tiles<float>(x_dtype, x, y_dtype, y, out_dtype, out, a, b, begin, n);
}

}  // namespace
}  // namespace fused_sam
