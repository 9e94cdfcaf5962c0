// dot and axpby in the CUDA kernels' source on the host (cuda_shim/) equal formulas in double.
#include <array>
#include <cmath>
#include <utility>

#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

void test_vectors() {
  const Sizes sizes = {33333, 0, 555, 1, 4096};
  // Elements by which x and y are misaligned, and the chunk.
  const std::vector<std::array<int64_t, 3>> cases = {{0, 0, 333}, {0, 0, 0}, {0, 3, 0}, {1, 1, 0}, {4, 1, 333}};
  for (const auto& [x_offset, y_offset, chunk] : cases)
    for (const auto& [dx, dy] : std::vector<std::pair<Dtype, Dtype>>{{Dtype::f32, Dtype::f32},
                                                                    {Dtype::bf16, Dtype::bf16},
                                                                    {Dtype::f16, Dtype::f16},
                                                                    {Dtype::bf16, Dtype::f32},
                                                                    {Dtype::f32, Dtype::bf16},
                                                                    {Dtype::f16, Dtype::f32},
                                                                    {Dtype::f32, Dtype::f16}}) {
      Arrays x = arrays(dx, sizes, x_offset), y = arrays(dy, sizes, y_offset);
      std::mt19937 random(2);
      double xy = 0, xx = 0, yy = 0;
      for (size_t t = 0; t < sizes.size(); ++t) {
        x[t].fill(random, 1), y[t].fill(random, 3);
        for (int64_t i = 0; i < sizes[t]; ++i) {
          const double a = x[t].get(i), b = y[t].get(i);
          xy += a * b, xx += a * a, yy += b * b;
        }
      }
      CudaVectorPair pair(dx, dy, 0, sizes, chunk);
      std::vector<char> workspace(size_t(pair.workspace_bytes()) + 64);
      const uintptr_t scratch = (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64;
      float sums[3] = {1, 2, 3};
      pair.dot(addresses(x), addresses(y), reinterpret_cast<uintptr_t>(sums), true, scratch, 0);
      pair.dot(addresses(x), addresses(y), reinterpret_cast<uintptr_t>(sums), false, scratch, 0);
      const double loose = 1e-5 * std::sqrt(xx * yy);
      CHECK(std::fabs(sums[0] - 2 * xy) <= 2 * loose && std::fabs(sums[1] - 2 * xx) <= 1e-5 * 2 * xx &&
            std::fabs(sums[2] - 2 * yy) <= 1e-5 * 2 * yy);

      for (Dtype out_dtype : {dx, dy})
        for (int in_place = 0; in_place < 2; ++in_place) {
          Arrays third = arrays(out_dtype, sizes, 0);
          const auto before_x = copies(x), before_y = copies(y);
          Arrays& out = in_place ? (out_dtype == dx ? x : y) : third;
          std::vector<std::vector<double>> expected;
          for (size_t t = 0; t < sizes.size(); ++t) {
            expected.emplace_back();
            for (int64_t i = 0; i < sizes[t]; ++i) expected.back().push_back(0.75 * x[t].get(i) - 2.5 * y[t].get(i));
          }
          const float coefficients[2] = {0.75f, -2.5f};
          pair.axpby(addresses(x), addresses(y), out_dtype, addresses(out),
                     in_place ? 0 : reinterpret_cast<uintptr_t>(coefficients), 0.75, -2.5, 0, 0);
          bool good = true;
          for (size_t t = 0; t < sizes.size(); ++t)
            for (int64_t i = 0; i < sizes[t]; ++i)
              good = good && near(out[t].get(i), expected[t][size_t(i)], out_dtype, 12);
          CHECK(good);
          for (size_t t = 0; in_place && t < sizes.size(); ++t) {
            if (sizes[t] == 0) continue;
            std::memcpy(x[t].data(), before_x[t].data(), before_x[t].size());
            std::memcpy(y[t].data(), before_y[t].data(), before_y[t].size());
          }
        }
    }
  // A column with coefficient 0 has no effect, even if it is not finite.
  Arrays x = arrays(Dtype::f32, {3}, 0), y = arrays(Dtype::f32, {3}, 0);
  for (int64_t i = 0; i < 3; ++i) x[0].set(i, float(i)), y[0].set(i, i == 1 ? kNan : kInf);
  CudaVectorPair pair(Dtype::f32, Dtype::f32, 0, {3}, 0);
  StatusOf<float> status{};
  status.skip = 1;
  const uintptr_t skipping = reinterpret_cast<uintptr_t>(&status);
  pair.axpby(addresses(x), addresses(y), Dtype::f32, addresses(y), 0, 2, 0, skipping, 0);
  CHECK(y[0].get(0) == kInf);
  pair.axpby(addresses(x), addresses(y), Dtype::f32, addresses(y), 0, 2, 0, 0, 0);
  for (int64_t i = 0; i < 3; ++i) CHECK(y[0].get(i) == 2 * float(i));
}

}  // namespace

int main() {
  test_vectors();
  CHECK(cuda_shim::machine().unloaded_launches == 0);
  return fused_sam_test::result();
}
