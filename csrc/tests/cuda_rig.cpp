// Memory and rig of the CUDA kernels' tests, compiled once for all of them.
#include "tests/cuda_rig.h"

#include <cmath>

namespace fused_sam_test {

using namespace fused_sam;

// ---- arrays -----------------------------------------------------------------------------------------------

Arrays arrays(Dtype dtype, const Sizes& sizes, int64_t offset) {
  Arrays out;
  for (int64_t n : sizes) out.emplace_back(dtype, n, offset);
  return out;
}
std::vector<uintptr_t> addresses(const Arrays& arrays) {
  std::vector<uintptr_t> out;
  for (const Array& a : arrays) out.push_back(a.address());
  return out;
}
std::vector<std::vector<char>> copies(const Arrays& arrays) {
  std::vector<std::vector<char>> out;
  for (const Array& a : arrays) out.push_back(a.copy());
  return out;
}
bool same(const Arrays& arrays, const std::vector<std::vector<char>>& before) {
  for (size_t t = 0; t < arrays.size(); ++t)
    if (!arrays[t].equals(before[t])) return false;
  return true;
}

bool near(double found, double expected, Dtype dtype, double magnitude) {
  const double storage = dtype == Dtype::bf16 ? 0x1p-8 : dtype == Dtype::f16 ? 0x1p-11 : 0;
  return std::fabs(found - expected) <= magnitude * 0x1p-20 + std::fabs(expected) * storage + 0x1p-24;
}

float rounded(float x, Dtype dtype) {
  Array one(dtype, 1, 0);
  one.set(0, x);
  return one.get(0);
}

// ---- groups -----------------------------------------------------------------------------------------------

static GroupOf<double> group(double rho, double eta, bool adaptive, double lr, double weight_decay, double factor) {
  GroupOf<double> g{};
  g.rho = rho, g.eta = eta, g.adaptive = adaptive, g.lr = lr, g.weight_decay = weight_decay, g.factor = factor;
  g.keep = g.share = 1, g.max_norm = kInf;
  return g;
}
static GroupOf<double> sgd_with(GroupOf<double> g, double momentum, double keep, bool nesterov) {
  g.momentum = momentum, g.keep = keep, g.nesterov = nesterov;
  return g;
}
static GroupOf<double> adam_with(GroupOf<double> g, double beta1, double beta2, double eps, bool decoupled,
                                 bool amsgrad) {
  g.keep1 = 1 - beta1, g.keep2 = 1 - beta2, g.beta2 = beta2;
  g.log_beta1 = std::log(beta1), g.log_beta2 = std::log(beta2);
  g.adam_eps = eps, g.decoupled = decoupled, g.amsgrad = amsgrad;
  return g;
}

const Groups kGroups = {
    sgd_with(group(0.5, 0, false, 0.1, 0.01, 1), 0.9, 1, false),
    sgd_with(group(0.25, 0.125, true, 0.2, 0, -1), 0.8, 0.75, false),
    sgd_with(group(1, 0, true, 0.1, 0.001, 1), 0.9, 1, true),
    sgd_with(group(0.5, 0, false, 0.3, 0.01, 1), 0, 1, false),
};
const Groups kAdamGroups = {
    adam_with(group(0.5, 0, false, 0.1, 0.05, 1), 0.8, 0.95, 1e-3, false, false),
    adam_with(group(0.5, 0, false, 0.2, 0.1, -1), 0.9, 0.99, 1e-2, true, true),
    adam_with(group(0.5, 0, false, 0.05, 0, 1), 0.7, 0.9, 1e-3, false, true),
    adam_with(group(0.5, 0, false, 0.3, 0.1, 1), 0.9, 0.999, 1e-1, true, false),
};

// ---- rig --------------------------------------------------------------------------------------------------

std::vector<int32_t> Rig::numbers(size_t count) {
  std::vector<int32_t> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = int32_t(i % kGroups.size());
  return out;
}

std::vector<uint32_t> Rig::streams(size_t count) {
  std::vector<uint32_t> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = 0x7fffffffu - 12345u * uint32_t(i);
  return out;
}

Rig::Rig(const Case& c)
    : c(c),
      groups(numbers(c.sizes.size())),
      weights(arrays(c.weight, c.sizes, c.offset)),
      backups(arrays(c.weight, c.sizes, 0)),
      models(arrays(c.model, c.sizes, 0)),
      gradients(arrays(c.gradient, c.sizes, 0)),
      momenta(arrays(Dtype::f32, c.sizes, 0)),
      squares(arrays(Dtype::f32, c.sizes, 0)),
      largest(arrays(Dtype::f32, c.sizes, 0)),
      table(c.weight, c.gradient, c.model, 0, c.sizes, groups, streams(c.sizes.size()), c.chunk),
      workspace(size_t(table.workspace_bytes()) + 64) {
  std::mt19937 random(1);
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    weights[t].fill(random, 2);
    backups[t].fill(random, 100);  // rubbish
    gradients[t].fill(random, 0.5);
    models[t].fill(random, 100);
    momenta[t].fill(random, 1);
    squares[t].fill(random, 1), largest[t].fill(random, 1);
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      squares[t].set(i, std::fabs(squares[t].get(i)));
      largest[t].set(i, std::fabs(largest[t].get(i)));
    }
    steps.push_back(float(3 * t));
  }
  table.set_weights(addresses(weights));
  if (c.masters())
    table.set_models(addresses(models));
  else
    table.set_backups(addresses(c.separate ? backups : weights));
  std::vector<uintptr_t> momentum = addresses(momenta);
  for (size_t t = 0; t < groups.size(); ++t)
    if (kGroups[size_t(groups[t])].momentum == 0) momentum[t] = 0;
  table.set_momenta(momentum);
  table.set_gradients(addresses(gradients));
}

void Rig::use_adam() {
  std::vector<uintptr_t> of_steps;
  for (float& t : steps) of_steps.push_back(reinterpret_cast<uintptr_t>(&t));
  table.set_momenta(addresses(momenta));
  table.set_adam(addresses(squares), addresses(largest), of_steps);
}

Update Rig::update(const float* scale, bool random_rounding) {
  Update u;
  u.status = status_address(), u.grad_scale = reinterpret_cast<uintptr_t>(scale), u.workspace = scratch();
  u.seed = 0xf123456789abcdefu, u.random_rounding = random_rounding;
  return u;
}

uintptr_t Rig::scratch() { return (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64; }

void Rig::norm(bool scaled, bool carry, bool begin, bool finish) {
  table.norm(kGroups, status_address(), NormFlags{scaled, carry, begin, finish}, 1e-12, scratch(), 0);
}

double Rig::expected_norm(bool scaled) const {
  double sum = 0;
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const GroupOf<double>& h = kGroups[size_t(groups[t])];
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double scale = scaled && h.adaptive ? std::fabs(double(weights[t].get(i))) + h.eta : 1;
      sum += std::pow(scale * gradients[t].get(i), 2);
    }
  }
  return std::sqrt(sum);
}

bool Rig::is_perturbed(size_t tensor, const Array& moved, const Array& clean, Dtype dtype) const {
  const GroupOf<double>& h = kGroups[size_t(groups[tensor])];
  for (int64_t i = 0; i < clean.size(); ++i) {
    const double w = clean.get(i), scale = h.adaptive ? std::fabs(w) + h.eta : 1;
    const double e = h.rho * double(status.inverse) * scale * scale * gradients[tensor].get(i);
    if (!near(moved.get(i), w + e, dtype, 4)) return false;
  }
  return true;
}

}  // namespace fused_sam_test
