#include "cpu/lists.h"

#include "cpu/table.h"

namespace fused_sam {

Lists::Lists(std::vector<int64_t> sizes) : rows_(sizes.size()), chunks_(sizes), partial_(chunks_.count() * 3) {}

void Lists::check(const Column& column) const {
  if (column.data.size() != rows_) throw std::invalid_argument("an address is due for every row");
}

void Lists::dots(const Column& x, const Column& y, double* sums, bool begin, int threads) {
  check(x), check(y);
  const auto kernel = kernels().dots;
  chunks_.each(
      threads,
      [&](size_t i, const Chunk& c) {
        kernel(x.dtype, x.data[size_t(c.tensor)], y.dtype, y.data[size_t(c.tensor)], &partial_[i * 3], c.begin, c.length);
      },
      [] {});
  for (int k = 0; k < 3; ++k) {
    double sum = begin ? 0 : sums[k];
    for (size_t i = size_t(k); i < partial_.size(); i += 3) sum += partial_[i];
    sums[k] = sum;
  }
}

void Lists::combine(const Column& x, const Column& y, const Column& out, double a, double b, int threads) {
  check(x), check(y), check(out);
  const auto kernel = kernels().combine;
  chunks_.each(
      threads,
      [&](size_t, const Chunk& c) {
        const size_t t = size_t(c.tensor);
        kernel(x.dtype, x.data[t], y.dtype, y.data[t], out.dtype, out.data[t], a, b, c.begin, c.length);
      },
      [] {});
}

}  // namespace fused_sam
