// sgd: undo the perturbation and one step of SGD with momentum, in one launch over all tensors of a table.
#include "cuda/launch.cuh"
#include "cuda/write.cuh"

namespace fused_sam {
namespace {

// `any` reads dampening and Nesterov's flag from the group. The other modes save its few operations where the traffic
// is least.
enum class Momentum { none, heavy_ball, dampened, nesterov, any };
template <Momentum kMode>
using Mode = std::integral_constant<Momentum, kMode>;

template <class P, class G, class M, Momentum kMode, bool kRandom>
struct Sgd : UpdateArrays<P, G, M> {
  using Arrays = UpdateArrays<P, G, M>;
  static constexpr int kPack = 16 / int(sizeof(P));
  static constexpr int kElements = kRandom || Arrays::kMasters ? kElementsInFlight / 2 : kElementsInFlight;
  static constexpr bool kHasMomentum = kMode != Momentum::none;

  float* momentum_buffer;
  SgdGroupOf<float> h;
  Rounding<P, kRandom> round;

  FUSED_SAM_METHOD Sgd(const Arrays& arrays, float* momentum_buffer, const SgdGroupOf<float>& h,
                       const Rounding<P, kRandom>& round)
      : Arrays(arrays), momentum_buffer(momentum_buffer), h(h), round(round) {}

  template <int N>
  struct Registers {
    Pack<M, N> w;
    Pack<G, N> g;
    Pack<float, kHasMomentum ? N : 1> m;
  };
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const {
    return Arrays::addresses(at) | (kHasMomentum ? uintptr_t(momentum_buffer + at) : uintptr_t(0));
  }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    Registers<N> values;
    values.w = fused_sam::load<N, Use::once>(this->clean + at);
    values.g = load_other<N, Use::once, kSplit>(this->grad + at);
    if constexpr (kHasMomentum) values.m = fused_sam::load<N, Use::once>(momentum_buffer + at);
    return values;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(Registers<N>& values, int32_t at, int) const {
    Pack<float, N> param = widened(values.w);
    const Pack<float, N> g = widened(values.g);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = param.at[k];
      const float d = sgd_gradient<float>(w, g.at[k], h);
      float m = d;
      if constexpr (kHasMomentum)
        values.m.at[k] = m =
            sgd_momentum<kMode == Momentum::dampened || kMode == Momentum::any, float>(values.m.at[k], d, h);
      param.at[k] = sgd_weight<kMode == Momentum::nesterov, float>(w, m, d, h);
      if (kMode == Momentum::any && h.nesterov) param.at[k] = sgd_weight<true, float>(w, m, d, h);
    }
    if constexpr (kHasMomentum) store<N, Use::once>(momentum_buffer + at, values.m);
    if constexpr (Arrays::kMasters) store<N, Use::once>(this->clean + at, param);
    store<N, Use::again>(this->param + at, round(param, at));
  }
};

template <class P, class G, class M, bool kRandom, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(3)) sgd_kernel(const Table __grid_constant__ table, UpdateCall call) {
  const Span span = span_of(table, chunk_from_the_end());
  if (call.status->skip != 0) return restore<P, M>(table, span);
  const int32_t group = table.group_of[span.tensor];
  SgdGroupOf<float> h = table.group[group].sgd;
  h.lr = rate_of(table, group, h.lr);
  h.factor = grad_factor(h.factor, call);
  const UpdateArrays<P, G, M> arrays(table, span);
  float* momentum_buffer = static_cast<float*>(table.data[kState0][span.tensor]);
  const auto round = rounding<P, kRandom>(table, span, call.seed, call.status->rng_offset);
  const auto step = [&](auto mode, float* momentum_buffer) {
    Sgd<P, G, M, decltype(mode)::value, kRandom> operation(arrays, momentum_buffer, h, round);
    run(operation, span.length);
  };
  if (h.momentum == 0 || momentum_buffer == nullptr) return step(Mode<Momentum::none>{}, nullptr);
  momentum_buffer += span.begin;
  if constexpr (UpdateArrays<P, G, M>::kMasters || kRandom) {
    step(Mode<Momentum::any>{}, momentum_buffer);
  } else {
    if (h.nesterov) return step(Mode<Momentum::nesterov>{}, momentum_buffer);  // torch allows no dampening with it
    if (h.one_minus_dampening == 1) return step(Mode<Momentum::heavy_ball>{}, momentum_buffer);
    step(Mode<Momentum::dampened>{}, momentum_buffer);
  }
}

}  // namespace

template <class Table>
void SgdKernels<Table>::load(Dtypes d) {
  with_types(d, [](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    load_kernel(sgd_kernel<P, G, M, false, Table>);
    if constexpr (sizeof(M) == 2) load_kernel(sgd_kernel<P, G, M, true, Table>);
  });
}

template <class Table>
void SgdKernels<Table>::sgd(Dtypes d, const Table& table, int32_t blocks, const UpdateCall& call, cudaStream_t stream) {
  with_types(d, [&](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    if constexpr (sizeof(M) == 2)
      if (call.stochastic_rounding)
        return launch("sgd", d, blocks, stream, sgd_kernel<P, G, M, true, Table>, table, call);
    launch("sgd", d, blocks, stream, sgd_kernel<P, G, M, false, Table>, table, call);
  });
}
FUSED_SAM_LAUNCHERS(SgdKernels, SmallTable, MiddleTable, LargeTable);

}  // namespace fused_sam
