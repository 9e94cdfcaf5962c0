// The host side of the CUDA backend: packs tables into launches and checks the arguments.
#include "cuda/table.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/tuning.h"

namespace fused_sam {
namespace {

bool takes_large_tables() { return FUSED_SAM_LARGE_TABLES && cuda_driver_version() >= 12010; }

void check_aligned(uintptr_t address, int64_t element_size, const char* what) {
  if (address % uintptr_t(element_size) != 0)
    throw std::invalid_argument(std::string("the address of the ") + what +
                                " is not a multiple of its element size of " + std::to_string(element_size) +
                                " bytes: copy it into memory of its own");
}

template <class T>
T* at(uintptr_t address, const char* what) {
  if (address == 0) throw std::invalid_argument(std::string("the ") + what + " has no address");
  check_aligned(address, int64_t(alignof(T)), what);
  return reinterpret_cast<T*>(address);
}

template <class T>
using TableOf = std::remove_cv_t<std::remove_reference_t<T>>;

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Fills in each launch's groups from those of the optimizer: set(table, slot, group id).
template <class L, class Set>
void set_groups(L& launches, Set&& set) {
  launches.each([&](auto& table, const LaunchPlan& plan) {
    for (size_t slot = 0; slot < plan.group_ids.size(); ++slot) set(table, slot, size_t(plan.group_ids[slot]));
  });
}

void set_perturb_groups(TableLaunches& launches, const std::vector<PerturbGroupOf<double>>& groups) {
  set_groups(launches, [&](auto& table, size_t slot, size_t id) { table.group[slot].perturb = in_fp32(groups[id]); });
}

// The ticket counter, padded so that the slots begin on a cache line of their own.
constexpr int64_t kTicketBytes = 128;

}  // namespace

// ---- columns ----------------------------------------------------------------------------------------------

Columns::Columns(int device, std::vector<int64_t> sizes, const std::vector<int32_t>& group_ids, int64_t chunk)
    : device_(device), sizes_(std::move(sizes)), chunk_(chunk) {
  if (chunk_ == 0) {
    const int64_t elements = std::accumulate(sizes_.begin(), sizes_.end(), int64_t(0));
    chunk_ = chunk_for(elements, device_attribute(cudaDevAttrMultiProcessorCount, device),
                       tuning_of(device_attribute(cudaDevAttrComputeCapabilityMajor, device)));
  }
  if ((chunk_ & (chunk_ - 1)) != 0)
    for (int64_t size : sizes_)
      if (size >> 32 != 0)  // the random streams rely on it: tuning.h
        throw std::invalid_argument("a tensor of 2^32 elements or more needs a chunk size that is a power of 2");
  cut(launches_, group_ids);
}

template <class L>
void Columns::cut(L& launches, const std::vector<int32_t>& group_ids) const {
  using Small = typename L::Small;
  using Middle = typename L::Middle;
  using Large = typename L::Large;
  // The smallest table that suffices: its argument is copied and read faster.
  const auto plan = [&](int tensors, int groups) {
    launches.plans = plan_launches(sizes_, group_ids, chunk_, tensors, groups);
  };
  plan(Small::kTensors, Small::kGroups);
  if (launches.plans.size() <= 1 || !takes_large_tables()) {
    launches.small.resize(launches.plans.size());
  } else {
    plan(Middle::kTensors, Middle::kGroups);
    if (launches.plans.size() <= 1) {
      launches.middle.resize(launches.plans.size());
    } else {
      plan(Large::kTensors, Large::kGroups);
      launches.large.resize(launches.plans.size());
    }
  }
  launches.each([this](auto& table, const LaunchPlan& plan) {
    table.count = int32_t(plan.tensors.size());
    table.chunk = int32_t(chunk_);
    std::copy(plan.prefix.begin(), plan.prefix.end(), table.prefix);
    std::copy(plan.group_of.begin(), plan.group_of.end(), table.group_of);
    for (size_t i = 0; i < plan.tensors.size(); ++i) table.size[i] = sizes_[size_t(plan.tensors[i])];
  });
}

int64_t Columns::chunks() const {
  return launches_.plans.empty() ? 0 : launches_.plans.back().first_chunk + launches_.plans.back().chunks();
}

void Columns::check(const char* what, const Addresses& addresses, int64_t element_size, bool check_memory,
                    bool may_miss) const {
  if (addresses.size() != sizes_.size()) throw std::invalid_argument("every tensor of the table needs an address");
  std::optional<OnDevice> guard;
  if (check_memory) guard.emplace(device_);  // asking for an address makes a context on the current device
  for (size_t i = 0; i < addresses.size(); ++i) {
    if (sizes_[i] == 0) continue;
    if (addresses[i] == 0 && !may_miss)
      throw std::invalid_argument(std::string("the ") + what + " of tensor " + std::to_string(i) + " has no address");
    check_aligned(addresses[i], element_size, what);
    if (check_memory && addresses[i] != 0) check_memory_of(device_, addresses[i], what, i);
  }
}

template <class L>
void Columns::fill(L& launches, Column column, const Addresses& addresses) const {
  launches.each([&](auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i)
      table.data[column][i] = reinterpret_cast<void*>(addresses[size_t(plan.tensors[i])]);
  });
}

template <class L, class F>
void Columns::run(L& launches, bool from_the_end, F&& launch) {
  const OnDevice guard(device_);
  const size_t count = launches.plans.size();
  for (size_t n = 0; n < count; ++n) {
    launches.at(from_the_end ? count - 1 - n : n, launch);
  }
}

void Columns::set_fitting(int on_an_sm) {
  fitting_ = int64_t(std::max(on_an_sm, 1)) * device_attribute(cudaDevAttrMultiProcessorCount, device_);
}

int32_t Columns::reduction_blocks(const LaunchPlan& plan) const {
  return int32_t(fused_sam::reduction_blocks(plan.chunks(), fitting_));
}

int64_t Columns::reduction_blocks() const {
  int64_t blocks = 0;
  for (const LaunchPlan& plan : launches_.plans) blocks += reduction_blocks(plan);
  return blocks;
}

Slots Columns::slots(uintptr_t workspace, const LaunchPlan& plan) const {
  float* sums = at<float>(workspace + kTicketBytes, "workspace");
  int32_t first = 0;
  for (const LaunchPlan* before = launches_.plans.data(); before != &plan; ++before) first += reduction_blocks(*before);
  return Slots{sums, at<unsigned int>(workspace, "workspace"), first, int32_t(reduction_blocks()),
               &plan == &launches_.plans.back()};
}

// ---- a table's columns ------------------------------------------------------------------------------------

CudaTable::CudaTable(Dtype param, Dtype grad, Dtype master, int device, std::vector<int64_t> sizes,
                     std::vector<int32_t> group_ids, std::vector<uint32_t> rng_streams, int64_t chunk)
    : Columns(device, std::move(sizes), group_ids, chunk),
      dtypes_{param, grad, master},
      group_ids_(std::move(group_ids)),
      rng_streams_(std::move(rng_streams)) {
  if (!has_cuda_instance(dtypes_))
    throw std::invalid_argument("no CUDA kernel for these dtypes of params, grads and masters");
  for (int32_t id : group_ids_) {
    if (id < 0) throw std::invalid_argument("a tensor's group number is negative");
    group_count_ = std::max(group_count_, id + 1);
  }
  if (!rng_streams_.empty() && rng_streams_.size() != sizes_.size())
    throw std::invalid_argument("every tensor of the table needs a stream of random numbers");
  set_rng_streams(launches_);
  const OnDevice guard(device_);
  if (!launches_.plans.empty()) launches_.at(0, [this](const auto& table, const LaunchPlan&) {
    using Launched = TableOf<decltype(table)>;
    NormKernels<Launched>::load(dtypes_);
    PerturbKernels<Launched>::load(dtypes_);
    SgdKernels<Launched>::load(dtypes_);
#define FUSED_SAM_LOAD(Rule) ElementKernels<Rule, Launched>::load(dtypes_);
    FUSED_SAM_ELEMENT_RULES(FUSED_SAM_LOAD)
#undef FUSED_SAM_LOAD
    set_fitting(NormKernels<Launched>::fitting(dtypes_));
  });
}

template <class L>
void CudaTable::set_rng_streams(L& launches) const {
  if (rng_streams_.empty()) return;
  launches.each([this](auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i) table.rng_stream[i] = rng_streams_[size_t(plan.tensors[i])];
  });
}

void CudaTable::set(Column column, const char* what, const Addresses& addresses, int64_t element_size,
                    bool check_memory, bool may_miss) {
  check(what, addresses, element_size, check_memory, may_miss);
  fill(launches_, column, addresses);
  fill(adam_launches_, column, addresses);
}

void CudaTable::set_params(const Addresses& a) { set(kParam, "param", a, size_of(dtypes_.param), true); }

void CudaTable::set_backups(const Addresses& a) {
  if (dtypes_.has_masters()) throw std::invalid_argument("a table with masters has no backups");
  set(kBackup, "backup", a, size_of(dtypes_.param), true);
}

void CudaTable::set_masters(const Addresses& a) {
  if (!dtypes_.has_masters()) throw std::invalid_argument("masters are fp32, and their params bf16 or fp16");
  set(kMaster, "master", a, size_of(dtypes_.master), true);
}

void CudaTable::set_grads(const Addresses& a) { set(kGrad, "grad", a, size_of(dtypes_.grad), false); }

void CudaTable::set_state(int slot, const Addresses& a) {
  if (slot < 0 || slot > 2) throw std::invalid_argument("a table has the state buffers 0, 1 and 2");
  const std::string what = "state buffer " + std::to_string(slot);
  if (slot == 0) return set(kState0, what.c_str(), a, 4, true, true);
  check(what.c_str(), a, 4, true, true);
  make_adam_launches();
  fill(adam_launches_, Column(kState0 + slot), a);
}

void CudaTable::set_steps(const Addresses& a) {
  check("step", a, 4, true, true);
  make_adam_launches();
  fill(adam_launches_, kStep, a);
}

void CudaTable::make_adam_launches() {
  if (!adam_launches_.plans.empty()) return;
  cut(adam_launches_, group_ids_);
  set_rng_streams(adam_launches_);
  const OnDevice guard(device_);
  if (!adam_launches_.plans.empty()) adam_launches_.at(0, [this](const auto& table, const LaunchPlan&) {
    AdamKernels<TableOf<decltype(table)>>::load(dtypes_);
  });
  // The columns that were set before are in the other launches.
  for (Column column : {kParam, kBackup, kGrad, kState0}) {
    Addresses present(sizes_.size(), 0);
    launches_.each([&](const auto& table, const LaunchPlan& plan) {
      for (size_t i = 0; i < plan.tensors.size(); ++i)
        present[size_t(plan.tensors[i])] = reinterpret_cast<uintptr_t>(table.data[column][i]);
    });
    fill(adam_launches_, column, present);
  }
}

int64_t CudaTable::workspace_bytes() const {
  int64_t most = reduction_blocks();  // of squares: two sums per chunk of one launch
  for (const LaunchPlan& plan : launches_.plans) most = std::max(most, 2 * int64_t(plan.chunks()));
  return kTicketBytes + most * int64_t(sizeof(float));
}

// ---- a table's primitives ---------------------------------------------------------------------------------

void CudaTable::check_groups(size_t groups) const {
  if (groups < size_t(group_count_)) throw std::out_of_range("a tensor's group number is out of range");
}

void CudaTable::check_rng_streams(bool random) const {
  if (random && rng_streams_.empty())
    throw std::invalid_argument("random numbers are drawn: every tensor of the table needs a stream of them");
}

void CudaTable::norm(const std::vector<PerturbGroupOf<double>>* groups, uintptr_t status, const NormCall& call,
                     uintptr_t workspace, uintptr_t stream) {
  if (groups != nullptr) {
    check_groups(groups->size());
    set_perturb_groups(launches_, *groups);
  } else if (call.how.ascent) {
    throw std::invalid_argument("the norm of the ascent needs groups");
  }
  auto* numbers = at<StatusOf<float>>(status, "status");
  run(launches_, false, [&](const auto& table, const LaunchPlan& plan) {
    NormKernels<TableOf<decltype(table)>>::norm(dtypes_, table, reduction_blocks(plan), slots(workspace, plan),
                                                numbers, call, stream_of(stream));
  });
}

void CudaTable::check_numbers(uintptr_t numbers, const char* what) const {
  check_aligned(numbers, 4, what);
  if (numbers == 0) return;
  for (int64_t size : sizes_)
    if (size == 0) throw std::invalid_argument(std::string("a table with a number per tensor (") + what +
                                               ") has no empty tensors");
}

void CudaTable::check_second_moments(uintptr_t unbias) {
  check_numbers(unbias, "unbias");
  if (unbias == 0) return;
  launches_.each([](const auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i)
      if (table.data[kState0][i] == nullptr)
        throw std::invalid_argument("tensor " + std::to_string(plan.tensors[i]) + " lacks Adam's second moment");
  });
}

void CudaTable::squares(const std::vector<PerturbGroupOf<double>>& groups, uintptr_t unbias, uintptr_t sums,
                        bool weights, uintptr_t workspace, uintptr_t stream) {
  check_groups(groups.size());
  float* to = at<float>(sums, "sums");
  check_numbers(sums, "sums");
  check_second_moments(unbias);
  set_perturb_groups(launches_, groups);
  const auto column = uint8_t(dtypes_.has_masters() ? kMaster : kParam);
  run(launches_, false, [&](const auto& table, const LaunchPlan& plan) {
    const float* of_launch = unbias == 0 ? nullptr : reinterpret_cast<const float*>(unbias) + plan.tensors.front();
    const SquaresCall call{of_launch, to + plan.tensors.front(), int32_t(sizes_.size()), column, weights};
    // Each launch adds up its own slots, so that the next one can use them again.
    const Slots own{at<float>(workspace + kTicketBytes, "workspace"), at<unsigned int>(workspace, "workspace"), 0,
                    plan.chunks(), true};
    NormKernels<TableOf<decltype(table)>>::squares(dtypes_, table, plan.chunks(), own, call, stream_of(stream));
  });
}

void CudaTable::perturb(const std::vector<PerturbGroupOf<double>>& groups, uintptr_t status, uint64_t seed,
                        bool stochastic_rounding, uintptr_t stream, uintptr_t factors, uintptr_t unbias) {
  check_groups(groups.size());
  check_numbers(factors, "factors");
  check_second_moments(unbias);
  bool masked = false;
  for (const LaunchPlan& plan : launches_.plans)
    for (int32_t id : plan.group_ids) masked = masked || groups[size_t(id)].mask_prob < 1;
  if (masked && unbias != 0) throw std::invalid_argument("a table with second moments has no mask");
  check_rng_streams(masked || stochastic_rounding);
  set_perturb_groups(launches_, groups);
  const auto* numbers = at<const StatusOf<float>>(status, "status");
  const bool random = masked || stochastic_rounding || unbias != 0;
  run(launches_, true, [&](const auto& table, const LaunchPlan& plan) {
    const auto of_launch = [&](uintptr_t all) {
      return all == 0 ? nullptr : reinterpret_cast<const float*>(all) + plan.tensors.front();
    };
    const PerturbCall call{numbers, seed, of_launch(factors), of_launch(unbias), stochastic_rounding};
    PerturbKernels<TableOf<decltype(table)>>::perturb(dtypes_, table, plan.chunks(), call, random, stream_of(stream));
  });
}

template <class L, class Group, class Set, class Launch>
void CudaTable::update(L& launches, const std::vector<Group>& groups, const UpdateArguments& a, Set&& set,
                       Launch&& launch) {
  check_groups(groups.size());
  if (!a.rates.empty() && a.rates.size() != groups.size())
    throw std::out_of_range("every group needs a learning rate, on the device or in the group");
  for (const DeviceRate& rate : a.rates) check_aligned(rate.address, rate.is_double ? 8 : 4, "learning rate");
  check_rng_streams(a.stochastic_rounding);
  check_aligned(a.grad_scale, 4, "gradient scale");
  set_groups(launches, [&](auto& table, size_t slot, size_t id) {
    const DeviceRate rate = a.rates.empty() ? DeviceRate{} : a.rates[id];
    table.rate[slot] = reinterpret_cast<const void*>(rate.address);
    table.rate_is_double[slot] = rate.is_double;
    set(table.group[slot], groups[id]);
  });
  const UpdateCall call{at<const StatusOf<float>>(a.status, "status"), reinterpret_cast<const float*>(a.grad_scale),
                        a.seed, float(a.max_norm), a.stochastic_rounding};
  run(launches, true, [&](const auto& table, const LaunchPlan& plan) { launch(table, plan.chunks(), call); });
}

void CudaTable::sgd(const std::vector<SgdGroupOf<double>>& groups, const UpdateArguments& a) {
  update(
      launches_, groups, a, [](AnyGroup& to, const SgdGroupOf<double>& from) { to.sgd = group_as<float>(from); },
      [&](const auto& table, int32_t blocks, const UpdateCall& call) {
        SgdKernels<TableOf<decltype(table)>>::sgd(dtypes_, table, blocks, call, stream_of(a.stream));
      });
}

void CudaTable::adam(const std::vector<AdamGroupOf<double>>& groups, const UpdateArguments& a) {
  if (adam_launches_.plans.empty() && !launches_.plans.empty())
    throw std::invalid_argument("Adam's state has not been set");
  check_groups(groups.size());
  adam_launches_.each([&](const auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i) {
      const bool amsgrad = groups[size_t(plan.group_ids[table.group_of[i]])].amsgrad;
      const char* missing = table.data[kState0][i] == nullptr              ? "exp_avg"
                            : table.data[kState1][i] == nullptr            ? "exp_avg_sq"
                            : amsgrad && table.data[kState2][i] == nullptr ? "max_exp_avg_sq"
                            : table.data[kStep][i] == nullptr              ? "step"
                                                                           : nullptr;
      if (missing != nullptr)
        throw std::invalid_argument("tensor " + std::to_string(plan.tensors[i]) + " lacks Adam's " + missing);
    }
  });
  auto* ticket = at<unsigned int>(a.workspace, "workspace");
  update(
      adam_launches_, groups, a, [](AdamGroup& to, const AdamGroupOf<double>& from) { to = group_as<float>(from); },
      [&](const auto& table, int32_t blocks, const UpdateCall& call) {
        AdamKernels<TableOf<decltype(table)>>::adam(dtypes_, table, blocks, call, ticket, stream_of(a.stream));
      });
}

template <class Rule>
void CudaTable::element(const std::vector<typename Rule::template GroupOf<double>>& groups, const UpdateArguments& a) {
  launches_.each([](const auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i)
      if (table.data[kState0][i] == nullptr)
        throw std::invalid_argument("tensor " + std::to_string(plan.tensors[i]) + " lacks " + Rule::kTitle + "'s " +
                                    Rule::kState[0]);
  });
  update(
      launches_, groups, a,
      [](AnyGroup& to, const auto& from) { numbers_of(to, Rule{}) = group_as<float>(from); },
      [&](const auto& table, int32_t blocks, const UpdateCall& call) {
        ElementKernels<Rule, TableOf<decltype(table)>>::update(dtypes_, table, blocks, call, stream_of(a.stream));
      });
}
#define FUSED_SAM_TABLE_ELEMENT(Rule) \
  template void CudaTable::element<Rule>(const std::vector<Rule::GroupOf<double>>&, const UpdateArguments&);
FUSED_SAM_ELEMENT_RULES(FUSED_SAM_TABLE_ELEMENT)
#undef FUSED_SAM_TABLE_ELEMENT

void CudaTable::restore(uintptr_t stream) {
  run(launches_, true, [&](const auto& table, const LaunchPlan& plan) {
    PerturbKernels<TableOf<decltype(table)>>::restore(dtypes_, table, plan.chunks(), stream_of(stream));
  });
}

void cuda_finish_norm(uintptr_t status, FinishNorm how, double eps, int device, uintptr_t stream) {
  const OnDevice guard(device);
  launch_finish_norm(at<StatusOf<float>>(status, "status"), float(eps), how, stream_of(stream));
}

// ---- a pair of vectors ------------------------------------------------------------------------------------

CudaVectorPair::CudaVectorPair(Dtype x, Dtype y, int device, std::vector<int64_t> sizes, int64_t chunk)
    : Columns(device, sizes, std::vector<int32_t>(sizes.size(), 0), chunk), x_(x), y_(y) {
  if (!supports_vectors(x, y)) throw std::invalid_argument("no CUDA kernel for vectors of these dtypes");
  const OnDevice guard(device_);
  if (!launches_.plans.empty()) launches_.at(0, [this](const auto& table, const LaunchPlan&) {
    using Launched = TableOf<decltype(table)>;
    VectorKernels<Launched>::load({x_, y_, x_});
    set_fitting(VectorKernels<Launched>::fitting({x_, y_, x_}));
  });
}

bool supports_vectors(Dtype x, Dtype y) { return has_cuda_instance(VectorDtypes{x, y, x}); }

int64_t CudaVectorPair::workspace_bytes() const {
  return kTicketBytes + 3 * reduction_blocks() * int64_t(sizeof(float));
}

void CudaVectorPair::set(Column column, const char* what, const Addresses& addresses, Dtype dtype) {
  check(what, addresses, size_of(dtype), false, false);
  fill(launches_, column, addresses);
}

void CudaVectorPair::dot(const Addresses& x, const Addresses& y, uintptr_t sums, bool reset, uintptr_t workspace,
                         uintptr_t stream) {
  set(kX, "x", x, x_);
  set(kY, "y", y, y_);
  auto* numbers = at<float>(sums, "sums");
  run(launches_, false, [&](const auto& table, const LaunchPlan& plan) {
    VectorKernels<TableOf<decltype(table)>>::dot(VectorDtypes{x_, y_, x_}, table, reduction_blocks(plan),
                                                 slots(workspace, plan), numbers, reset, stream_of(stream));
  });
}

void CudaVectorPair::axpby(const Addresses& x, const Addresses& y, Dtype out_dtype, const Addresses& out,
                           uintptr_t coefficients, double a, double b, uintptr_t status, uintptr_t stream) {
  const VectorDtypes dtypes{x_, y_, out_dtype};
  if (!has_cuda_instance(dtypes)) throw std::invalid_argument("the result must have the dtype of x or of y");
  set(kX, "x", x, x_);
  set(kY, "y", y, y_);
  set(kOut, "result", out, out_dtype);
  check_aligned(coefficients, 4, "coefficients");
  check_aligned(status, 4, "status");
  const Coefficients numbers{reinterpret_cast<const float*>(coefficients), float(a), float(b)};
  run(launches_, true, [&](const auto& table, const LaunchPlan& plan) {
    VectorKernels<TableOf<decltype(table)>>::axpby(dtypes, table, plan.chunks(), numbers,
                                                   reinterpret_cast<const StatusOf<float>*>(status), stream_of(stream));
  });
}

}  // namespace fused_sam
