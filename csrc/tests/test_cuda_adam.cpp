// P7, Adam and AdamW, in the CUDA kernels' source on the host (cuda_shim/), against formulas in double.
#include <algorithm>
#include <cmath>

#include "cuda_runtime.h"
#include "tests/check.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

// With masters too: then the weights are read and written as such, and the models are their rounding.
void check_adam(const Case& c, const float* scale, double max_norm) {
  Rig rig(c);
  rig.use_adam();
  Groups groups = kAdamGroups;
  groups[0].max_norm = groups[1].max_norm = max_norm;
  rig.norm(true);
  rig.perturb();
  rig.norm(false, true);
  const Arrays& from = c.masters() || !c.separate ? rig.weights : rig.backups;
  std::vector<std::vector<double>> before, means, squares, largest;
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const auto read = [&](const Array& a, auto& to) {
      to.emplace_back();
      for (int64_t i = 0; i < a.size(); ++i) to.back().push_back(a.get(i));
    };
    read(from[t], before), read(rig.momenta[t], means), read(rig.squares[t], squares), read(rig.largest[t], largest);
  }
  rig.table.adam(groups, rig.update(scale));
  const double unscale = scale == nullptr ? 1 : 1 / double(*scale);
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const GroupOf<double>& h = groups[size_t(rig.groups[t])];
    const double step = c.sizes[t] == 0 ? 3 * double(t) : 3 * double(t) + 1;
    CHECK(rig.steps[t] == float(step));
    const double clip = std::min(1.0, h.max_norm / (double(rig.status.update_norm) * unscale + 1e-6));
    const double beta1 = 1 - h.keep1, c1 = 1 - std::pow(beta1, step), c2 = 1 - std::pow(h.beta2, step);
    bool good = true;
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const size_t k = size_t(i);
      double w = before[t][k], d = h.factor * unscale * clip * rig.gradients[t].get(i);
      if (!h.decoupled) d += h.weight_decay * w;
      if (h.decoupled) w *= 1 - h.lr * h.weight_decay;
      const double m = means[t][k] + h.keep1 * (d - means[t][k]), v = h.beta2 * squares[t][k] + h.keep2 * d * d;
      const double s = h.amsgrad ? std::max(v, largest[t][k]) : v;
      const double moved = w - h.lr / c1 * m / (std::sqrt(s) / std::sqrt(c2) + h.adam_eps);
      // A root near 0 magnifies the rounding of its square: by less than 1 / adam_eps.
      const double magnitude = 4 + h.lr / c1 / h.adam_eps;
      good = good && near(rig.momenta[t].get(i), m, Dtype::f32, 4) && near(rig.squares[t].get(i), v, Dtype::f32, 4);
      if (h.amsgrad) good = good && near(rig.largest[t].get(i), s, Dtype::f32, 4);
      good = good && near(rig.weights[t].get(i), moved, c.weight, magnitude);
      if (c.masters()) good = good && rig.models[t].get(i) == rounded(rig.weights[t].get(i), c.model);
    }
    CHECK(good);
  }
  // Skipped: nothing is counted, no state is touched, and the unperturbed weight comes back.
  const auto state = copies(rig.momenta), weights = copies(rig.weights), kept = copies(from);
  const std::vector<float> steps = rig.steps;
  rig.status.skip = 1;
  rig.table.adam(groups, rig.update(scale));
  CHECK(same(rig.momenta, state) && rig.steps == steps && same(rig.weights, c.masters() ? weights : kept));
}

void test_adam() {
  const float scale = 4;
  for (int64_t chunk : {int64_t(333), int64_t(0)})
    for (const Sizes& sizes : {Sizes{33333, 555}, Sizes{0, 3, 5, 8, 15, 16, 0, 17, 4095, 4096, 4097}})
      for (Dtype narrow : {Dtype::bf16, Dtype::f16}) {
        check_adam({Dtype::f32, Dtype::f32, sizes, chunk}, nullptr, kInf);
        check_adam({narrow, narrow, sizes, chunk}, &scale, 1.5);
        check_adam({narrow, Dtype::f32, sizes, chunk}, nullptr, kInf);
        check_adam({Dtype::f32, narrow, sizes, chunk, 0, true, narrow}, &scale, 0.25);
        check_adam({Dtype::f32, Dtype::f32, sizes, chunk, 0, true, narrow}, nullptr, kInf);
      }
  check_adam({Dtype::f32, Dtype::f32, {5000, 7, 4096}, 0, 1, false}, nullptr, kInf);
}

// Steps of tensors in several launches, each counted once a step, whichever block comes last.
void test_adam_counts_every_step_once() {
  for (int driver : {13000, 12000}) {
    cuda_shim::machine().driver = driver;
    const int slots = driver == 13000 ? LargeAdamTable::kTensors : SmallAdamTable::kTensors;
    for (int count : {1, slots, slots + 1, 2 * slots + 1}) {
      Rig rig({Dtype::f32, Dtype::f32, Sizes(size_t(count), 9), 4});
      rig.use_adam();
      const int before = cuda_shim::machine().launches;
      for (int step = 1; step <= 3; ++step) {
        rig.table.adam(kAdamGroups, rig.update());
        bool good = true;
        for (size_t t = 0; t < rig.steps.size(); ++t) good = good && rig.steps[t] == float(3 * t + size_t(step));
        CHECK(good);
      }
      CHECK(cuda_shim::machine().launches - before == 3 * ((count - 1) / slots + 1));
    }
  }
  cuda_shim::machine().driver = 13000;
}

}  // namespace

int main() {
  test_adam();
  test_adam_counts_every_step_once();
  return fused_sam_test::result();
}
