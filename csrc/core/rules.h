// The update rules of one formula per element: the kernels of both backends, their tables' methods and the bindings are
// made from the list at the end. SGD and Adam have kernels of their own, because not every group uses all their state.
//
// A rule is a struct with
//   GroupOf<R>  hyper-parameters of a group, with `lr` and `factor`; group_as converts it (core/formulas.h)
//   kName       of the Python method and in errors
//   kTitle      the optimizer's name, in errors
//   kState      the buffers' names in their order; every group uses all of them
//   read        the group from the named tuple of fused_sam/backends/contract.py, whose numbers are t(0), t(1) ...
//   step        returns the new param from the unperturbed w and the gradient g, and writes a reference per buffer.
//               A local copy of the state would keep the CPU's compiler from vector instructions
#pragma once

#include "core/formulas.h"

namespace fused_sam {

struct Lion {
  template <class R>
  using GroupOf = LionGroupOf<R>;
  static constexpr const char* kName = "lion";
  static constexpr const char* kTitle = "Lion";
  static constexpr const char* kState[] = {"exp_avg"};

  // lr, beta1, beta2, weight_decay, maximize. factor: of the gradients, with the sign.
  template <class Tuple>
  static LionGroupOf<double> read(const Tuple& t, double factor) {
    return {t(0), 1 - t(1), 1 - t(2), t(3), factor};
  }
  template <class R>
  FUSED_SAM_FN R step(R w, R g, const LionGroupOf<R>& h, R& exp_avg) {
    const R d = h.factor * g;
    const R updated = lion_weight<R>(w, exp_avg, d, h);
    exp_avg = lion_exp_avg<R>(exp_avg, d, h);
    return updated;
  }
};

#define FUSED_SAM_ELEMENT_RULES(X) X(Lion)

// The number of a rule's state buffers.
template <class Rule>
constexpr int kBuffersOf = int(sizeof(Rule::kState) / sizeof(Rule::kState[0]));

}  // namespace fused_sam
