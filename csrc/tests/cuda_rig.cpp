// Arrays and Rig of the CUDA kernels' tests. All tests share this object file.
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

static AdamGroupOf<double> adam_group(double lr, double beta1, double beta2, double eps, double weight_decay,
                                      double factor, bool decoupled, bool amsgrad) {
  return {lr,  1 - beta1,    1 - beta2, beta2,     std::log(beta1), std::log(beta2),
          eps, weight_decay, factor,    decoupled, amsgrad};
}

// rho, eta, mask_prob, adaptive
const std::vector<PerturbGroupOf<double>> kPerturbGroups = {
    {0.5, 0, 1, false}, {0.25, 0.125, 1, true}, {1, 0, 1, true}, {0.5, 0, 1, false}};
// lr, momentum, one_minus_dampening, weight_decay, factor, nesterov
const std::vector<SgdGroupOf<double>> kSgdGroups = {
    {0.1, 0.9, 1, 0.01, 1, false},
    {0.2, 0.8, 0.75, 0, -1, false},
    {0.1, 0.9, 1, 0.001, 1, true},
    {0.3, 0, 1, 0.01, 1, false},
};
const std::vector<AdamGroupOf<double>> kAdamGroups = {
    adam_group(0.1, 0.8, 0.95, 1e-3, 0.05, 1, false, false),
    adam_group(0.2, 0.9, 0.99, 1e-2, 0.1, -1, true, true),
    adam_group(0.05, 0.7, 0.9, 1e-3, 0, 1, false, true),
    adam_group(0.3, 0.9, 0.999, 1e-1, 0.1, 1, true, false),
};
// lr, one_minus_beta1, one_minus_beta2, weight_decay, factor. The betas are 0, and below and above 0.5.
const std::vector<LionGroupOf<double>> kLionGroups = {
    {0.1, 0.1, 0.01, 0.05, 1}, {0.2, 0.75, 0.25, 0, -1}, {0.05, 1, 0.5, 0.1, 1}, {0.3, 0.2, 1, 0.01, 1}};

// ---- rig --------------------------------------------------------------------------------------------------

std::vector<int32_t> Rig::ids(size_t count) {
  std::vector<int32_t> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = int32_t(i % kPerturbGroups.size());
  return out;
}

std::vector<uint32_t> Rig::rng_streams(size_t count) {
  std::vector<uint32_t> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = 0x7fffffffu - 12345u * uint32_t(i);
  return out;
}

Rig::Rig(const Case& c)
    : c(c),
      group_ids(ids(c.sizes.size())),
      params(arrays(c.param, c.sizes, c.offset)),
      backups(arrays(c.param, c.sizes, c.other_offset)),
      masters(arrays(c.master, c.sizes, c.other_offset)),
      grads(arrays(c.grad, c.sizes, c.grad_offset)),
      state{arrays(Dtype::f32, c.sizes, c.other_offset), arrays(Dtype::f32, c.sizes, c.other_offset),
            arrays(Dtype::f32, c.sizes, c.other_offset)},
      table(c.param, c.grad, c.master, 0, c.sizes, group_ids, rng_streams(c.sizes.size()), c.chunk),
      workspace(size_t(table.workspace_bytes()) + 64) {
  std::mt19937 random(1);
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    params[t].fill(random, c.has_masters() ? 100 : 2);  // with masters, no kernel reads the params
    backups[t].fill(random, 100);                       // arbitrary values until perturb writes them
    masters[t].fill(random, 2);
    grads[t].fill(random, 0.5);
    for (Arrays& buffer : state) buffer[t].fill(random, 1);
    for (int64_t i = 0; i < c.sizes[t]; ++i)
      for (int slot : {1, 2}) state[slot][t].set(i, std::fabs(state[slot][t].get(i)));
    steps.push_back(float(3 * t));
  }
  table.set_params(addresses(params));
  if (c.has_masters())
    table.set_masters(addresses(masters));
  else
    table.set_backups(addresses(c.separate ? backups : params));
  std::vector<uintptr_t> momentum_buffers = addresses(state[0]);
  for (size_t t = 0; t < group_ids.size(); ++t)
    if (kSgdGroups[size_t(group_ids[t])].momentum == 0) momentum_buffers[t] = 0;
  table.set_state(0, momentum_buffers);
  table.set_grads(addresses(grads));
}

void Rig::use_adam() {
  std::vector<uintptr_t> of_steps;
  for (float& t : steps) of_steps.push_back(reinterpret_cast<uintptr_t>(&t));
  for (int slot = 0; slot < 3; ++slot) table.set_state(slot, addresses(state[slot]));
  table.set_steps(of_steps);
}

void Rig::use_lion() { table.set_state(0, addresses(state[0])); }

UpdateArguments Rig::arguments(const float* scale, double max_norm, bool stochastic_rounding) {
  UpdateArguments a;
  a.status = status_address(), a.grad_scale = reinterpret_cast<uintptr_t>(scale), a.max_norm = max_norm;
  a.workspace = scratch(), a.seed = 0xf123456789abcdefu, a.stochastic_rounding = stochastic_rounding;
  return a;
}

uintptr_t Rig::scratch() { return (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64; }

void Rig::norm(bool ascent, bool keep_skip, bool reset, bool finish) {
  table.norm(ascent ? &kPerturbGroups : nullptr, status_address(), {reset, finish, {ascent, keep_skip}, 1e-12f},
             scratch(), 0);
}

double Rig::expected_norm(bool ascent) const {
  const Arrays& weights = c.has_masters() ? masters : params;
  double sum = 0;
  for (size_t t = 0; t < c.sizes.size(); ++t) {
    const PerturbGroupOf<double>& h = kPerturbGroups[size_t(group_ids[t])];
    for (int64_t i = 0; i < c.sizes[t]; ++i) {
      const double scale = ascent && h.adaptive ? std::fabs(double(weights[t].get(i))) + h.eta : 1;
      sum += std::pow(scale * grads[t].get(i), 2);
    }
  }
  return std::sqrt(sum);
}

bool Rig::is_perturbed(size_t tensor, const Array& moved, const Array& clean, Dtype dtype) const {
  const PerturbGroupOf<double>& h = kPerturbGroups[size_t(group_ids[tensor])];
  for (int64_t i = 0; i < clean.size(); ++i) {
    const double w = clean.get(i), scale = h.adaptive ? std::fabs(w) + h.eta : 1;
    const double e = h.rho * double(status.inverse_norm) * scale * scale * grads[tensor].get(i);
    if (!near(moved.get(i), w + e, dtype, 4)) return false;
  }
  return true;
}

bool Rig::params_are_rounded() const {
  for (size_t t = 0; t < params.size(); ++t)
    for (int64_t i = 0; i < params[t].size(); ++i)
      if (params[t].get(i) != rounded(masters[t].get(i), c.param)) return false;
  return true;
}

}  // namespace fused_sam_test
