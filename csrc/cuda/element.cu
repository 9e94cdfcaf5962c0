// The rules of core/rules.h: undo the perturbation and one step, in one launch over all tensors of a table.
#include "cuda/launch.cuh"
#include "cuda/write.cuh"

namespace fused_sam {
namespace {

template <class Rule, class P, class G, class M, bool kRandom>
struct Element : UpdateArrays<P, G, M> {
  using Arrays = UpdateArrays<P, G, M>;
  using Group = typename Rule::template GroupOf<float>;
  static constexpr int kPack = 16 / int(sizeof(P));
  // Half as many if an element has many bytes: else the compiler waits for the first loads before it issues the last.
  static constexpr bool kFewer = kRandom || Arrays::kMasters || sizeof(G) == 4;
  static constexpr int kElements = kFewer ? kElementsInFlight / 2 : kElementsInFlight;

  float* buffer;
  Group h;
  Rounding<P, kRandom> round;

  FUSED_SAM_METHOD Element(const Arrays& arrays, float* buffer, const Group& h, const Rounding<P, kRandom>& round)
      : Arrays(arrays), buffer(buffer), h(h), round(round) {}

  template <int N>
  struct Registers {
    Pack<M, N> w;
    Pack<G, N> g;
    Pack<float, N> state;
  };
  FUSED_SAM_METHOD uintptr_t addresses(int32_t at) const { return Arrays::addresses(at) | uintptr_t(buffer + at); }
  template <int N, bool kSplit>
  FUSED_SAM_METHOD Registers<N> load(int32_t at) const {
    Registers<N> values;
    values.w = fused_sam::load<N, Use::once>(this->clean + at);
    values.g = load_other<N, Use::once, kSplit>(this->grad + at);
    values.state = fused_sam::load<N, Use::once>(buffer + at);
    return values;
  }
  template <int N>
  FUSED_SAM_METHOD void finish(Registers<N>& values, int32_t at, int) const {
    Pack<float, N> param = widened(values.w);
    const Pack<float, N> g = widened(values.g);
#pragma unroll
    for (int k = 0; k < N; ++k) param.at[k] = Rule::template step<float>(param.at[k], g.at[k], h, values.state.at[k]);
    store<N, Use::once>(buffer + at, values.state);
    if constexpr (Arrays::kMasters) store<N, Use::once>(this->clean + at, param);
    store<N, Use::again>(this->param + at, round(param, at));
  }
};

template <class Rule, class P, class G, class M, bool kRandom, class Table>
__global__ void __launch_bounds__(kThreads, blocks_of(3)) element_kernel(const Table __grid_constant__ table, UpdateCall call) {
  const Span span = span_of(table, chunk_from_the_end());
  if (call.status->skip != 0) return restore<P, M>(table, span);
  const int32_t group = table.group_of[span.tensor];
  typename Rule::template GroupOf<float> h = numbers_of(table.group[group], Rule{});
  h.lr = rate_of(table, group, h.lr);
  h.factor = grad_factor(h.factor, call);
  const auto round = rounding<P, kRandom>(table, span, call.seed, call.status->rng_offset);
  Element<Rule, P, G, M, kRandom> operation({table, span}, state_of(table, kState0, span), h, round);
  run(operation, span.length);
}

}  // namespace

template <class Rule, class Table>
void ElementKernels<Rule, Table>::load(Dtypes d) {
  with_types(d, [](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    load_kernel(element_kernel<Rule, P, G, M, false, Table>);
    if constexpr (sizeof(M) == 2) load_kernel(element_kernel<Rule, P, G, M, true, Table>);
  });
}

template <class Rule, class Table>
void ElementKernels<Rule, Table>::update(Dtypes d, const Table& table, int32_t blocks, const UpdateCall& call,
                                         cudaStream_t stream) {
  static_assert(kBuffersOf<Rule> == 1, "a rule with other state needs a kernel of its own, as in adam.cu");
  with_types(d, [&](auto p, auto g, auto m) {
    using P = of<decltype(p)>;
    using G = of<decltype(g)>;
    using M = of<decltype(m)>;
    if constexpr (sizeof(M) == 2)
      if (call.stochastic_rounding)
        return launch(Rule::kName, d, blocks, stream, element_kernel<Rule, P, G, M, true, Table>, table, call);
    launch(Rule::kName, d, blocks, stream, element_kernel<Rule, P, G, M, false, Table>, table, call);
  });
}
#define FUSED_SAM_SMALL_LAUNCHERS(Rule) template struct ElementKernels<Rule, SmallTable>;
#define FUSED_SAM_LARGE_LAUNCHERS(Rule)             \
  template struct ElementKernels<Rule, MiddleTable>; \
  template struct ElementKernels<Rule, LargeTable>;
FUSED_SAM_ELEMENT_RULES(FUSED_SAM_SMALL_LAUNCHERS)
#if FUSED_SAM_LARGE_TABLES
FUSED_SAM_ELEMENT_RULES(FUSED_SAM_LARGE_LAUNCHERS)
#endif

}  // namespace fused_sam
