// Every per-element formula of fused_sam, written once, for host and device.
//
// R is the type of the arithmetic: float for fp32, bf16 and fp16 params, double for fp64 params.
// The functions have internal linkage and are always inlined. The CPU kernels are compiled once per instruction set,
// and a shared out-of-line copy could contain instructions that the processor lacks.
#pragma once

#include <math.h>  // <cmath> does not promise sqrt(float) without std::

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSED_SAM_FN static __host__ __device__ __forceinline__
#else
#define FUSED_SAM_FN static inline __attribute__((always_inline))
#endif

namespace fused_sam {

// Hyper-parameters of one parameter group, in the arithmetic's type R. fused_sam/backends/contract.py has the same
// groups; bindings/groups.h reads them.
template <class R>
struct PerturbGroupOf {
  R rho;        // length of the perturbation
  R eta;        // ASAM's offset, used if adaptive; Adam's eps for Precond-SAM
  R mask_prob;  // share of the elements that perturb moves; 1: all
  bool adaptive;
};

// `factor` multiplies every gradient of an update: 1, or -1 to maximize, over the loss scale, times the clipping.
template <class R>
struct SgdGroupOf {
  R lr;
  R momentum;             // 0: no momentum buffer is read or written
  R one_minus_dampening;  // subtracted in double on the host, as torch does
  R weight_decay;
  R factor;
  bool nesterov;
};

template <class R>
struct AdamGroupOf {
  R lr;
  R one_minus_beta1, one_minus_beta2;  // subtracted in double on the host, as torch does
  R beta2;
  R log_beta1, log_beta2;
  R eps;
  R weight_decay;
  R factor;
  bool decoupled;  // weight decay as in AdamW
  bool amsgrad;
};

template <class R>
struct LionGroupOf {
  R lr;
  R one_minus_beta1, one_minus_beta2;
  R weight_decay;
  R factor;
};

// Returns the same numbers in another type.
template <class To, class From>
static inline SgdGroupOf<To> group_as(const SgdGroupOf<From>& g) {
  return {To(g.lr), To(g.momentum), To(g.one_minus_dampening), To(g.weight_decay), To(g.factor), g.nesterov};
}
template <class To, class From>
static inline AdamGroupOf<To> group_as(const AdamGroupOf<From>& g) {
  return {To(g.lr),        To(g.one_minus_beta1), To(g.one_minus_beta2), To(g.beta2),   To(g.log_beta1),
          To(g.log_beta2), To(g.eps),             To(g.weight_decay),    To(g.factor), g.decoupled,
          g.amsgrad};
}
template <class To, class From>
static inline LionGroupOf<To> group_as(const LionGroupOf<From>& g) {
  return {To(g.lr), To(g.one_minus_beta1), To(g.one_minus_beta2), To(g.weight_decay), To(g.factor)};
}

// 1 / (||g|| + eps); 0 if the norm is below 1e-30. A gradient of zero gives no direction, and with eps = 0 the product
// 0 * inf would make the params NaN.
template <class R>
FUSED_SAM_FN R inverse_norm(R norm, R eps) {
  const R inverse = R(1) / (norm + eps);
  return inverse <= R(1e30) ? inverse : R(0);
}

FUSED_SAM_FN bool is_negative_zero(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits == 0x80000000u;
}
FUSED_SAM_FN bool is_negative_zero(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits == 0x8000000000000000u;
}

FUSED_SAM_FN float magnitude(float x) { return fabsf(x); }
FUSED_SAM_FN double magnitude(double x) { return fabs(x); }

// T_w of ASAM (arXiv 2102.11600): |w| + eta. Plain SAM has T_w = 1.
template <bool kAdaptive, class R>
FUSED_SAM_FN R weight_scale(R w, R eta) {
  return kAdaptive ? magnitude(w) + eta : R(1);
}

// T_w g, the vector whose global norm divides the perturbation.
template <bool kAdaptive, class R>
FUSED_SAM_FN R scaled_gradient(R w, R g, R eta) {
  return kAdaptive ? weight_scale<true>(w, eta) * g : g;
}

// w + e with e = s T_w^2 g and s = rho / (||T_w g|| + eps): SAM's equation 2 (arXiv 2010.01412) for p = 2; if adaptive,
// ASAM's (arXiv 2102.11600).
template <bool kAdaptive, class R>
FUSED_SAM_FN R perturbed(R w, R g, R s, R eta) {
  if (kAdaptive) {
    const R t = weight_scale<true>(w, eta);
    return w + s * (t * (t * g));
  }
  return w + s * g;
}

// T_w^2 of Precond-SAM (arXiv 2502.02407): 1 / (sqrt(v_hat) + eps). v is Adam's second moment, and `unbias` is
// 1 / sqrt(1 - beta2^t).
template <class R>
FUSED_SAM_FN R preconditioner(R v, R unbias, R eps) {
  return R(1) / (R(sqrt(v)) * unbias + eps);
}

// torch.optim.SGD's direction before momentum: factor * g + weight_decay * w, where w is the unperturbed param.
template <class R>
FUSED_SAM_FN R sgd_gradient(R w, R g, const SgdGroupOf<R>& h) {
  return h.factor * g + h.weight_decay * w;
}

// The momentum buffer: m <- momentum * m + (1 - dampening) * d, and the first time m <- d, as in torch.optim.SGD.
// A buffer begins as -0.0, and with dampening no result is ever -0.0, because x + 0 turns -0 into +0. The first time is
// therefore visible in the buffer itself, also after a step that was skipped or replayed.
template <bool kDampened, class R>
FUSED_SAM_FN R sgd_momentum(R m, R d, const SgdGroupOf<R>& h) {
  if (!kDampened) return h.momentum * m + d;
  const R next = h.momentum * m + h.one_minus_dampening * d;
  return (is_negative_zero(m) ? d : next) + R(0);
}

// The new param: w - lr * m; with Nesterov's momentum, w - lr * (d + momentum * m).
template <bool kNesterov, class R>
FUSED_SAM_FN R sgd_weight(R w, R m, R d, const SgdGroupOf<R>& h) {
  return w - h.lr * (kNesterov ? d + h.momentum * m : m);
}

// The factor that clips the gradients' global norm to max_norm, as in torch.nn.utils.clip_grad_norm_. The norm still
// has the loss scale; `unscale` is its reciprocal.
template <class R>
FUSED_SAM_FN R clip_factor(R norm, R unscale, R max_norm) {
  if (max_norm > R(3e38)) return R(1);
  const R factor = max_norm / (norm * unscale + R(1e-6));
  return factor < R(1) ? factor : R(1);
}

// ---- Adam (arXiv 1412.6980, algorithm 1) and AdamW (arXiv 1711.05101, algorithm 2), as in torch.optim ----

// 1 - beta^t, exact to the last rounding even if beta^t is near 1.
FUSED_SAM_FN float bias_correction(float log_beta, float t) { return -expm1f(log_beta * t); }
FUSED_SAM_FN double bias_correction(double log_beta, double t) { return -expm1(log_beta * t); }

// Numbers of one step that all elements of a tensor share.
template <class R>
struct AdamStep {
  R shrink;     // factor of the param: 1 - lr * weight_decay if decoupled, else 1
  R rate;       // lr / (1 - beta1^t)
  R unbias;     // 1 / sqrt(1 - beta2^t)
};

template <class R>
FUSED_SAM_FN AdamStep<R> adam_step(const AdamGroupOf<R>& h, R t) {
  return AdamStep<R>{h.decoupled ? R(1) - h.lr * h.weight_decay : R(1), h.lr / bias_correction(h.log_beta1, t),
                     R(1) / R(sqrt(bias_correction(h.log_beta2, t)))};
}

// The gradient, with Adam's L2 term, which AdamW lacks.
template <class R>
FUSED_SAM_FN R adam_gradient(R w, R g, const AdamGroupOf<R>& h) {
  return h.decoupled ? h.factor * g : h.factor * g + h.weight_decay * w;
}
// The moving average m of gradients d, computed from the nearer end as in torch's lerp. With beta = 0 it is exactly d.
template <class R>
FUSED_SAM_FN R moving_average(R m, R d, R one_minus_beta) {
  return one_minus_beta < R(0.5) ? m + one_minus_beta * (d - m) : d - (R(1) - one_minus_beta) * (d - m);
}
template <class R>
FUSED_SAM_FN R adam_exp_avg(R m, R d, const AdamGroupOf<R>& h) {
  return moving_average<R>(m, d, h.one_minus_beta1);
}
template <class R>
FUSED_SAM_FN R adam_exp_avg_sq(R v, R d, const AdamGroupOf<R>& h) {
  return h.beta2 * v + h.one_minus_beta2 * d * d;
}
// s: the second moment; with amsgrad, the largest so far.
template <class R>
FUSED_SAM_FN R adam_weight(R w, R m, R s, const AdamStep<R>& step, R eps) {
  return step.shrink * w - step.rate * (m / (sqrt(s) * step.unbias + eps));
}

// ---- Lion (arXiv 2302.06675, algorithm 2) ----

// The new param: w - lr * (sign(beta1 * m + (1 - beta1) * d) + weight_decay * w), where m is still the old average.
template <class R>
FUSED_SAM_FN R lion_weight(R w, R m, R d, const LionGroupOf<R>& h) {
  const R c = moving_average<R>(m, d, h.one_minus_beta1);
  const R sign = c > R(0) ? R(1) : c < R(0) ? R(-1) : c;  // 0 stays 0, and NaN stays NaN
  return w * (R(1) - h.lr * h.weight_decay) - h.lr * sign;
}
template <class R>
FUSED_SAM_FN R lion_exp_avg(R m, R d, const LionGroupOf<R>& h) {
  return moving_average<R>(m, d, h.one_minus_beta2);
}

// a * x + b * y. A column with coefficient 0 counts for nothing, even where it is not finite.
template <class R>
FUSED_SAM_FN R axpby(R a, R x, R b, R y) {
  return (a != R(0) ? a * x : R(0)) + (b != R(0) ? b * y : R(0));
}

}  // namespace fused_sam
