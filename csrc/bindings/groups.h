// Hyper-parameters of the parameter groups, from the Python tuples of fused_sam/backends/contract.py.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/formulas.h"

// unscale: factor of every gradient in the update, the reciprocal of a loss scale.
inline std::vector<fused_sam::GroupOf<double>> groups_from(const pybind11::sequence& groups, double unscale) {
  std::vector<fused_sam::GroupOf<double>> out;
  out.reserve(groups.size());
  for (const pybind11::handle item : groups) {
    const pybind11::tuple t = pybind11::reinterpret_borrow<pybind11::tuple>(item);
    fused_sam::GroupOf<double> g;
    g.rho = t[0].cast<double>();
    g.adaptive = t[1].cast<bool>();
    g.eta = t[2].cast<double>();
    g.lr = t[3].cast<double>();
    g.momentum = t[4].cast<double>();
    g.keep = 1 - t[5].cast<double>();
    g.weight_decay = t[6].cast<double>();
    g.nesterov = t[7].cast<bool>();
    g.factor = t[8].cast<bool>() ? -unscale : unscale;
    out.push_back(g);
  }
  return out;
}
