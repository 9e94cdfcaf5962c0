// The numbers that one primitive leaves for the next. fused_sam/backends/contract.py has the same order.
#pragma once

#include <cmath>

#include "core/formulas.h"

namespace fused_sam {

template <class R>
struct StatusOf {
  R sum_of_squares;  // of all tables so far
  R ascent_norm;     // of the gradient that perturbs, scaled by T_w
  R inverse_norm;    // see inverse_norm() in formulas.h
  R skip;            // not 0: a gradient was not finite, and no parameter and no state may change
  R update_norm;     // of the gradient of the update
  R rng_offset;      // how many primitives have drawn random numbers
  // Used in the host's memory only: how many tables the perturbation and the update of this step have written.
  R perturbed_tables;
  R updated_tables;
  R skipped_steps;  // in a row, up to the step before this one
};

// Adds the sum of squares of one table. reset: true for the first table.
template <class R>
FUSED_SAM_FN void accumulate_norm(StatusOf<R>& status, R sum, bool reset) {
  status.sum_of_squares = reset ? sum : status.sum_of_squares + sum;
}

struct FinishNorm {
  bool ascent;     // true: writes ascent_norm and inverse_norm; false: update_norm
  bool keep_skip;  // true: keeps a skip flag that is already set
};

// Turns the sum of squares into a norm and a skip flag. Without keep_skip a step begins, and the flag is the last one's.
template <class R>
FUSED_SAM_FN void finish_norm(StatusOf<R>& status, R eps, FinishNorm how) {
  const R total = status.sum_of_squares;
  if (!how.keep_skip) status.skipped_steps = status.skip != R(0) ? status.skipped_steps + R(1) : R(0);  // of the last step
  const bool finite = total - total == R(0);
  const R norm = sqrt(total);
  if (how.ascent) {
    status.ascent_norm = norm;
    status.inverse_norm = finite ? inverse_norm<R>(norm, eps) : R(0);
  } else {
    status.update_norm = norm;
  }
  status.skip = R(!finite || (how.keep_skip && status.skip != R(0)));
}

}  // namespace fused_sam
