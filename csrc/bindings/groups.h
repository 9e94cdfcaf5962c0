// Hyper-parameters of the parameter groups, from the named tuples of fused_sam/backends/contract.py, by position.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "core/rules.h"

namespace fused_sam {

// Fields of a named tuple.
inline double number(const pybind11::tuple& t, size_t i) { return t[i].cast<double>(); }
inline bool flag(const pybind11::tuple& t, size_t i) { return t[i].cast<bool>(); }

// PerturbGroup: rho, adaptive, eta, mask_prob.
inline PerturbGroupOf<double> perturb_group(const pybind11::tuple& t) {
  return {number(t, 0), number(t, 2), number(t, 3), flag(t, 1)};
}

// SGDGroup: lr, momentum, dampening, weight_decay, nesterov, maximize. unscale: the reciprocal of the loss scale.
inline SgdGroupOf<double> sgd_group(const pybind11::tuple& t, double unscale) {
  return {number(t, 0), number(t, 1), 1 - number(t, 2), number(t, 3), flag(t, 5) ? -unscale : unscale, flag(t, 4)};
}

// AdamGroup: lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize.
inline AdamGroupOf<double> adam_group(const pybind11::tuple& t, double unscale) {
  const double beta1 = number(t, 1), beta2 = number(t, 2);
  return {number(t, 0),    1 - beta1,    1 - beta2,    beta2,     std::log(beta1),
          std::log(beta2), number(t, 3), number(t, 4), flag(t, 7) ? -unscale : unscale,
          flag(t, 5),      flag(t, 6)};
}

// The group of a rule of core/rules.h. `maximize` is the last field of every update's group.
template <class Rule>
typename Rule::template GroupOf<double> element_group(const pybind11::tuple& t, double unscale) {
  return Rule::read([&](size_t i) { return number(t, i); }, flag(t, t.size() - 1) ? -unscale : unscale);
}

// Returns read(tuple) for each group of a call.
template <class F>
auto groups_from(const pybind11::sequence& groups, F&& read) {
  std::vector<decltype(read(std::declval<const pybind11::tuple&>()))> out;
  out.reserve(groups.size());
  for (const pybind11::handle item : groups) out.push_back(read(pybind11::reinterpret_borrow<pybind11::tuple>(item)));
  return out;
}

}  // namespace fused_sam
