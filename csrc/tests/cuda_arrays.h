// Arrays of a storage type for the CUDA kernels' tests. The address sanitizer detects accesses past their ends.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/storage.h"

namespace fused_sam_test {

using Sizes = std::vector<int64_t>;

class Array {
  using bf16 = fused_sam::bf16;
  using f16 = fused_sam::f16;

 public:
  using Dtype = fused_sam::Dtype;

  // `offset` is the number of elements between a 16-byte boundary and the first element.
  Array(Dtype dtype, int64_t size, int64_t offset)
      : dtype_(dtype), size_(size), bytes_(new char[size_t((size + offset) * size_of(dtype))]), offset_(offset) {}

  char* data() const { return bytes_.get() + offset_ * size_of(dtype_); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data()); }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * size_of(dtype_); }

  float get(int64_t i) const {
    if (dtype_ == Dtype::f32) return reinterpret_cast<const float*>(data())[i];
    if (dtype_ == Dtype::bf16) return widen(reinterpret_cast<const bf16*>(data())[i]);
    return widen(reinterpret_cast<const f16*>(data())[i]);
  }
  void set(int64_t i, float x) {
    if (dtype_ == Dtype::f32)
      reinterpret_cast<float*>(data())[i] = x;
    else if (dtype_ == Dtype::bf16)
      reinterpret_cast<bf16*>(data())[i] = fused_sam::Narrow<bf16, float>::of(x);
    else
      reinterpret_cast<f16*>(data())[i] = fused_sam::Narrow<f16, float>::of(x);
  }
  void fill(std::mt19937& random, float scale) {
    for (int64_t i = 0; i < size_; ++i) set(i, scale * (float(random()) * 0x1p-31f - 1));
  }
  std::vector<char> copy() const { return std::vector<char>(data(), data() + bytes()); }
  bool equals(const std::vector<char>& other) const {
    return other.empty() || std::memcmp(other.data(), data(), other.size()) == 0;
  }

 private:
  Dtype dtype_;
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
  int64_t offset_;
};

using Arrays = std::vector<Array>;

Arrays arrays(fused_sam::Dtype dtype, const Sizes& sizes, int64_t offset);
std::vector<uintptr_t> addresses(const Arrays& arrays);
std::vector<std::vector<char>> copies(const Arrays& arrays);
bool same(const Arrays& arrays, const std::vector<std::vector<char>>& before);

// Return true if the difference is within the rounding of a few fp32 operations and one write in the storage type.
bool near(double found, double expected, fused_sam::Dtype dtype, double magnitude);
// Return x after one write in the storage type.
float rounded(float x, fused_sam::Dtype dtype);

}  // namespace fused_sam_test
