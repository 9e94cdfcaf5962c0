// The CPU kernels, compiled once for each instruction set (FUSED_SAM_ISA: generic, avx2, avx512).
//
// Elements pass through in tiles that stay in the first-level cache. Kernels compute on fp32 and fp64 arrays directly;
// they widen bf16 and fp16 into a tile of floats and round the results. Only the table at the end has external linkage
// (see core/formulas.h for why).

#include "cpu/kernels.h"

#include "cpu/tiles.h"
#include "cpu/vector_kernels.h"

#define FUSED_SAM_PASTE2(a, b) a##b
#define FUSED_SAM_PASTE(a, b) FUSED_SAM_PASTE2(a, b)
#define FUSED_SAM_STRING2(a) #a
#define FUSED_SAM_STRING(a) FUSED_SAM_STRING2(a)

namespace fused_sam {
namespace {

// A slice whose dtypes are types. P: of params. G: of grads. T: of masters, or of params where there are no masters.
template <class T, class G, class P>
struct Span {
  using R = typename Arithmetic<T>::type;
  static constexpr bool kMaster = !std::is_same_v<T, P>;

  explicit Span(const Slice& s)
      : primary(at<T>(kMaster ? s.entry.master : s.entry.param, s.begin)),
        unperturbed(kMaster ? primary : at<T>(s.entry.backup, s.begin)),
        param(at<P>(s.entry.param, s.begin)),
        grad(at<const G>(s.entry.grad, s.begin)),
        begin(s.begin),
        n(s.length) {
    for (int slot = 0; slot < kStateSlots; ++slot) state[slot] = at<R>(s.entry.state[slot], begin);
  }

  template <class X, class Void>
  static X* at(Void* array, int64_t begin) {
    return array == nullptr ? nullptr : static_cast<X*>(array) + begin;
  }

  T* primary;      // the master, or the param where there is none
  T* unperturbed;  // the master, or the backup
  P* param;
  const G* grad;
  R* state[kStateSlots];
  int64_t begin, n;
};

template <class P, class F>
inline void with_low_precision(const Slice& s, F&& call) {
  const bool wider_grad = s.dtypes.grad != s.dtypes.param;
  if (s.dtypes.has_masters())
    return wider_grad ? call(Span<float, float, P>(s)) : call(Span<float, P, P>(s));
  return wider_grad ? call(Span<P, float, P>(s)) : call(Span<P, P, P>(s));
}

template <class F>
inline void with_types(const Slice& s, F&& call) {
  switch (s.dtypes.param) {
    case Dtype::f32: return call(Span<float, float, float>(s));
    case Dtype::f64: return call(Span<double, double, double>(s));
    case Dtype::bf16: return with_low_precision<bf16>(s, call);
    case Dtype::f16: return with_low_precision<f16>(s, call);
  }
}

// Writes a tile of results into params of a narrower type. stream: around the cache.
template <class P, class R>
inline void store_rounded(const R* from, P* to, const Rng& rng, int64_t first, bool stream, int64_t n) {
  P tile[kTile];
  P* out = stream ? tile : to;
  if (rng.stochastic_rounding)
    narrowed_at_random<P, R>(from, out, rng.rounding, first, n);
  else
    narrowed<P, R>(from, out, n);
  if (stream) stream_copy(to, tile, n * int64_t(sizeof(P)));
}

// ---- norm -------------------------------------------------------------------------------------------------

// What T_w is made of: 1, the weight (ASAM), or Adam's second moment (Precond-SAM).
enum class Scale { none, weight, second_moment };

// (T_w g)^2. v: the second moment. eta: ASAM's offset, or Adam's eps.
template <Scale kScale, class R>
FUSED_SAM_FN double scaled_square(R w, R g, R v, R eta, R unbias) {
  if constexpr (kScale == Scale::second_moment) return double(g) * double(g) * double(preconditioner<R>(v, unbias, eta));
  const double x = double(scaled_gradient<kScale == Scale::weight, R>(w, g, eta));
  return x * x;
}

// Sums in double, in lanes that do not depend on the instruction set. Squares of floats are exact in double, so neither
// overflow nor the vector width changes the result.
template <Scale kScale, class T, class G, class R>
double sum_squares(const T* weight, const G* grad, const R* second_moment, R eta, R unbias, int64_t n) {
  constexpr bool kAdaptive = kScale == Scale::weight, kMoment = kScale == Scale::second_moment;
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  R weight_tile[kTile], grad_tile[kTile];
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t m = n - at < kTile ? n - at : kTile;
    const R* w = kAdaptive ? widened<T, R>(weight + at, weight_tile, m) : nullptr;
    const R* g = widened<G, R>(grad + at, grad_tile, m);
    const R* v = kMoment ? second_moment + at : nullptr;
    int64_t i = 0;
    for (; i + kLanes <= m; i += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k)
        lanes[k] += scaled_square<kScale, R>(kAdaptive ? w[i + k] : R(0), g[i + k], kMoment ? v[i + k] : R(0), eta, unbias);
    }
    for (int k = 0; i < m; ++i, ++k)
      lanes[k] += scaled_square<kScale, R>(kAdaptive ? w[i] : R(0), g[i], kMoment ? v[i] : R(0), eta, unbias);
  }
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// ---- perturb: in place, with a backup; with masters, from the master into the param -----------------------

// Perturbs the elements in the mask and copies the others.
template <bool kAdaptive, class R>
inline void perturb_masked(const R* w, const R* g, R* out, R s, R eta, StreamKey mask, float mask_prob, int64_t first,
                           int64_t n) {
  uint32_t words[kTile];
  draw(mask, first, words, n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const R moved = perturbed<kAdaptive, R>(w[i], g[i], s, eta);
    out[i] = in_mask(words[i], mask_prob) ? moved : w[i];
  }
}

template <Scale kScale, class T, class G, class P>
void perturb(const Span<T, G, P>& span, const PerturbGroup& group, double length, double row_unbias, const Rng& rng,
             bool stream) {
  using R = typename Arithmetic<T>::type;
  constexpr bool kMaster = Span<T, G, P>::kMaster, kAdaptive = kScale == Scale::weight;
  const R s = R(length), eta = R(group.eta), unbias = R(row_unbias);
  R weight_tile[kTile], grad_tile[kTile];
  for (int64_t at = 0; at < span.n; at += kTile) {
    const int64_t m = span.n - at < kTile ? span.n - at : kTile;
    if (!kMaster) copy(span.unperturbed + at, span.primary + at, m * int64_t(sizeof(T)), stream);
    const R* w = widened<T, R>(span.primary + at, weight_tile, m);
    const R* g = widened<G, R>(span.grad + at, grad_tile, m);
    R* out = std::is_same_v<P, R> ? reinterpret_cast<R*>(span.param + at) : weight_tile;
    if constexpr (kScale == Scale::second_moment) {
      const R* v = span.state[0] + at;
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) out[i] = w[i] + s * (preconditioner<R>(v[i], unbias, eta) * g[i]);
    } else if (group.mask_prob < 1) {
      perturb_masked<kAdaptive, R>(w, g, out, s, eta, rng.mask, float(group.mask_prob), span.begin + at, m);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) out[i] = perturbed<kAdaptive, R>(w[i], g[i], s, eta);
    }
    // A param that was read just now is in the cache, and streaming would only evict it.
    if constexpr (!std::is_same_v<P, R>)
      store_rounded<P, R>(out, span.param + at, rng, span.begin + at, stream && kMaster, m);
  }
}

// ---- updates: undo the perturbation and take one step, in one pass ----------------------------------------

// Passes tiles of unperturbed params and of grads to `update(w, g, out, at, m)`, which writes m new params into `out`
// and its own state, from element `at` on. Inlined, so that hyper-parameters stay in registers.
template <class T, class G, class P, class F>
FUSED_SAM_FN void update_tiles(const Span<T, G, P>& span, const Rng& rng, bool stream, F&& update) {
  using R = typename Arithmetic<T>::type;
  constexpr bool kMaster = Span<T, G, P>::kMaster;
  R weight_tile[kTile], grad_tile[kTile];
  // A param that is only written goes around the cache, by way of a tile that stays in it.
  const bool by_tile = !kMaster && (stream || !std::is_same_v<T, R>);
  for (int64_t at = 0; at < span.n; at += kTile) {
    const int64_t m = span.n - at < kTile ? span.n - at : kTile;
    const R* w = widened<T, R>(span.unperturbed + at, weight_tile, m);
    const R* g = widened<G, R>(span.grad + at, grad_tile, m);
    R* out = by_tile ? weight_tile : reinterpret_cast<R*>(span.primary + at);
    update(w, g, out, at, m);
    if constexpr (!std::is_same_v<P, R>)
      store_rounded<P, R>(out, span.param + at, rng, span.begin + at, stream, m);
    else if (stream)
      stream_copy(span.param + at, out, m * int64_t(sizeof(T)));
  }
}

enum class Momentum { none, heavy_ball, nesterov };

template <Momentum kMode, bool kDampened, class T, class G, class P>
void sgd(const Span<T, G, P>& span, const SgdGroup& group, const Rng& rng, bool stream) {
  using R = typename Arithmetic<T>::type;
  constexpr bool kNesterov = kMode == Momentum::nesterov;
  const SgdGroupOf<R> h = group_as<R>(group);
  update_tiles(span, rng, stream, [&](const R* w, const R* g, R* out, int64_t at, int64_t m) {
    if constexpr (kMode == Momentum::none) {
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) {
        const R d = sgd_gradient<R>(w[i], g[i], h);
        out[i] = sgd_weight<false, R>(w[i], d, d, h);
      }
    } else {
      R* momentum_buffer = span.state[0] + at;
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) {
        const R d = sgd_gradient<R>(w[i], g[i], h);
        const R b = sgd_momentum<kDampened, R>(momentum_buffer[i], d, h);
        momentum_buffer[i] = b;
        out[i] = sgd_weight<kNesterov, R>(w[i], b, d, h);
      }
    }
  });
}

template <bool kDecoupled, bool kAmsgrad, class T, class G, class P>
void adam(const Span<T, G, P>& span, const AdamGroup& group, const AdamStep<double>& of_tensor, const Rng& rng,
          bool stream) {
  using R = typename Arithmetic<T>::type;
  AdamGroupOf<R> h = group_as<R>(group);
  h.decoupled = kDecoupled;
  const AdamStep<R> step = {R(of_tensor.shrink), R(of_tensor.rate), R(of_tensor.unbias)};
  update_tiles(span, rng, stream, [&](const R* w, const R* g, R* out, int64_t at, int64_t m) {
    R *exp_avg = span.state[0] + at, *exp_avg_sq = span.state[1] + at;
    R* max_exp_avg_sq = kAmsgrad ? span.state[2] + at : nullptr;
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) {
      const R d = adam_gradient<R>(w[i], g[i], h);
      const R first = adam_exp_avg<R>(exp_avg[i], d, h);
      R second = adam_exp_avg_sq<R>(exp_avg_sq[i], d, h);
      exp_avg[i] = first;
      exp_avg_sq[i] = second;
      if constexpr (kAmsgrad) {
        second = max_exp_avg_sq[i] > second ? max_exp_avg_sq[i] : second;
        max_exp_avg_sq[i] = second;
      }
      out[i] = adam_weight<R>(w[i], first, second, step, h.eps);
    }
  });
}

// A rule of core/rules.h.
template <class Rule, class T, class G, class P>
void element(const Span<T, G, P>& span, const typename Rule::template GroupOf<double>& group, const Rng& rng,
             bool stream) {
  using R = typename Arithmetic<T>::type;
  constexpr int kBuffers = kBuffersOf<Rule>;
  static_assert(1 <= kBuffers && kBuffers <= kStateSlots, "a table has 3 slots of state");
  const auto h = group_as<R>(group);
  update_tiles(span, rng, stream, [&](const R* w, const R* g, R* out, int64_t at, int64_t m) {
    R* first = span.state[0] + at;
    R* second = kBuffers > 1 ? span.state[1] + at : nullptr;
    R* third = kBuffers > 2 ? span.state[2] + at : nullptr;
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) {
      if constexpr (kBuffers == 1)
        out[i] = Rule::template step<R>(w[i], g[i], h, first[i]);
      else if constexpr (kBuffers == 2)
        out[i] = Rule::template step<R>(w[i], g[i], h, first[i], second[i]);
      else
        out[i] = Rule::template step<R>(w[i], g[i], h, first[i], second[i], third[i]);
    }
  });
}

// ---- from options as numbers to options as types ----------------------------------------------------------

double norm_of(const Slice& s, const PerturbGroup* group, const double* unbias) {
  double sum = 0;
  with_types(s, [&](const auto& p) {
    using R = std::remove_pointer_t<std::decay_t<decltype(p.state[0])>>;
    const R eta = group != nullptr ? R(group->eta) : R(0);
    sum = unbias != nullptr
              ? sum_squares<Scale::second_moment>(p.primary, p.grad, p.state[0], eta, R(*unbias), p.n)
          : group != nullptr && group->adaptive
              ? sum_squares<Scale::weight>(p.primary, p.grad, p.state[0], eta, R(0), p.n)
              : sum_squares<Scale::none>(p.primary, p.grad, p.state[0], R(0), R(0), p.n);
  });
  return sum;
}

void perturb_of(const Slice& s, const PerturbGroup& group, double length, const double* unbias, const Rng& rng,
                bool stream) {
  with_types(s, [&](const auto& p) {
    unbias != nullptr ? perturb<Scale::second_moment>(p, group, length, *unbias, rng, stream)
    : group.adaptive  ? perturb<Scale::weight>(p, group, length, 0, rng, stream)
                      : perturb<Scale::none>(p, group, length, 0, rng, stream);
  });
}

void sgd_of(const Slice& s, const SgdGroup& group, const Rng& rng, bool stream) {
  with_types(s, [&](const auto& p) {
    if (group.momentum == 0 || p.state[0] == nullptr)
      sgd<Momentum::none, false>(p, group, rng, stream);
    else if (group.nesterov)  // torch allows no dampening with it
      sgd<Momentum::nesterov, false>(p, group, rng, stream);
    else if (group.one_minus_dampening == 1)
      sgd<Momentum::heavy_ball, false>(p, group, rng, stream);
    else
      sgd<Momentum::heavy_ball, true>(p, group, rng, stream);
  });
}

void adam_of(const Slice& s, const AdamGroup& group, const AdamStep<double>& step, const Rng& rng, bool stream) {
  with_types(s, [&](const auto& p) {
    if (group.decoupled)
      group.amsgrad ? adam<true, true>(p, group, step, rng, stream) : adam<true, false>(p, group, step, rng, stream);
    else
      group.amsgrad ? adam<false, true>(p, group, step, rng, stream) : adam<false, false>(p, group, step, rng, stream);
  });
}

template <class Rule>
void element_of(const Slice& s, const typename Rule::template GroupOf<double>& group, const Rng& rng, bool stream) {
  with_types(s, [&](const auto& p) { element<Rule>(p, group, rng, stream); });
}

void save_of(const Slice& s, bool stream) {
  const int64_t size = size_of(s.dtypes.param);
  copy(static_cast<char*>(s.entry.backup) + s.begin * size, static_cast<const char*>(s.entry.param) + s.begin * size,
       s.length * size, stream);
}

void restore_of(const Slice& s, bool stream) {
  with_types(s, [&](const auto& p) {
    using S = std::decay_t<decltype(p)>;
    if constexpr (S::kMaster) {
      for (int64_t at = 0; at < p.n; at += kTile)
        store_rounded(p.primary + at, p.param + at, Rng{}, p.begin + at, stream, p.n - at < kTile ? p.n - at : kTile);
    } else {
      copy(p.param, p.unperturbed, p.n * int64_t(sizeof(*p.param)), stream);
    }
  });
}

void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace

extern const Kernels FUSED_SAM_PASTE(kernels_, FUSED_SAM_ISA);
const Kernels FUSED_SAM_PASTE(kernels_, FUSED_SAM_ISA) = {
    norm_of,    perturb_of, sgd_of,   adam_of, save_of,
    restore_of, dot_of,     axpby_of, fence,   FUSED_SAM_STRING(FUSED_SAM_ISA),
#define FUSED_SAM_ELEMENT_OF(Rule) element_of<Rule>,
    FUSED_SAM_ELEMENT_RULES(FUSED_SAM_ELEMENT_OF)
#undef FUSED_SAM_ELEMENT_OF
};

}  // namespace fused_sam
