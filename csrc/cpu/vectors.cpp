#include "cpu/vectors.h"

#include "cpu/table.h"

namespace fused_sam {

VectorPair::VectorPair(std::vector<int64_t> sizes)
    : rows_(sizes.size()), chunks_(sizes), partial_(chunks_.count() * 3) {}

void VectorPair::check(const Vector& vector) const {
  if (vector.data.size() != rows_) throw std::invalid_argument("a vector needs one address per row");
}

void VectorPair::dot(const Vector& x, const Vector& y, double* sums, bool reset, int threads) {
  check(x), check(y);
  const auto kernel = kernels().dot;
  chunks_.each(
      threads,
      [&](size_t i, const Chunk& c) {
        const size_t t = size_t(c.tensor);
        kernel(x.dtype, x.data[t], y.dtype, y.data[t], &partial_[i * 3], c.begin, c.length);
      },
      [] {});
  for (int k = 0; k < 3; ++k) {
    double sum = reset ? 0 : sums[k];
    for (size_t i = size_t(k); i < partial_.size(); i += 3) sum += partial_[i];
    sums[k] = sum;
  }
}

void VectorPair::axpby(const Vector& x, const Vector& y, const Vector& out, double a, double b, int threads) {
  check(x), check(y), check(out);
  const auto kernel = kernels().axpby;
  chunks_.each(
      threads,
      [&](size_t, const Chunk& c) {
        const size_t t = size_t(c.tensor);
        kernel(x.dtype, x.data[t], y.dtype, y.data[t], out.dtype, out.data[t], a, b, c.begin, c.length);
      },
      [] {});
}

}  // namespace fused_sam
