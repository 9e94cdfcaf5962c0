// Host side of the CUDA backend: packs tables into launches and checks what comes from outside.
#include "cuda/table.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/tuning.h"

namespace fused_sam {
namespace {

bool takes_large_tables() { return FUSED_SAM_LARGE_TABLES && cuda_driver_version() >= 12010; }

void check_aligned(uintptr_t address, int64_t element_size, const char* what) {
  if (address % uintptr_t(element_size) != 0)
    throw std::invalid_argument(std::string("the address of the ") + what + " is not a multiple of its element size of " +
                                std::to_string(element_size) + " bytes: copy it into memory of its own");
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

// The ticket counter, padded so that the slots begin on a cache line of their own.
constexpr int64_t kTicketBytes = 128;

}  // namespace

// ---- columns ----------------------------------------------------------------------------------------------

Columns::Columns(int device, std::vector<int64_t> sizes, std::vector<int32_t> groups, int64_t chunk)
    : device_(device), sizes_(std::move(sizes)), chunk_(chunk) {
  if (chunk_ == 0) {
    const int64_t elements = std::accumulate(sizes_.begin(), sizes_.end(), int64_t(0));
    chunk_ = chunk_for(elements, device_attribute(cudaDevAttrMultiProcessorCount, device),
                       tuning_of(device_attribute(cudaDevAttrComputeCapabilityMajor, device)));
  }
  cut(pass_, groups);
}

template <class L>
void Columns::cut(L& launches, const std::vector<int32_t>& groups) const {
  using Small = typename L::Small;
  using Large = typename L::Large;
  // The small table where it suffices: its argument is copied and read faster.
  launches.plans = plan_launches(sizes_, groups, chunk_, Small::kTensors, Small::kGroups);
  const bool large = launches.plans.size() > 1 && takes_large_tables();
  if (large) launches.plans = plan_launches(sizes_, groups, chunk_, Large::kTensors, Large::kGroups);
  launches.small.resize(large ? 0 : launches.plans.size());
  launches.large.resize(large ? launches.plans.size() : 0);
  launches.each([this](auto& table, const LaunchPlan& plan) {
    table.count = int32_t(plan.tensors.size());
    table.chunk = int32_t(chunk_);
    std::copy(plan.prefix.begin(), plan.prefix.end(), table.prefix);
    std::copy(plan.group_of.begin(), plan.group_of.end(), table.group_of);
    for (size_t i = 0; i < plan.tensors.size(); ++i) table.size[i] = sizes_[size_t(plan.tensors[i])];
  });
}

int64_t Columns::chunks() const {
  return pass_.plans.empty() ? 0 : pass_.plans.back().first_chunk + pass_.plans.back().chunks();
}

void Columns::check(const char* what, const Addresses& addresses, int64_t element_size, bool check_memory,
                    bool may_miss) const {
  if (addresses.size() != sizes_.size()) throw std::invalid_argument("an address is due for every tensor of the table");
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
    const size_t k = from_the_end ? count - 1 - n : n;
    if (launches.large.empty())
      launch(launches.small[k], launches.plans[k]);
    else if constexpr (FUSED_SAM_LARGE_TABLES)
      launch(launches.large[k], launches.plans[k]);
  }
}

Slots Columns::slots(uintptr_t workspace, const LaunchPlan& plan) const {
  float* sums = at<float>(workspace + kTicketBytes, "workspace");
  return Slots{sums, at<unsigned int>(workspace, "workspace"), plan.first_chunk, chunks(), &plan == &pass_.plans.back()};
}

// ---- P1 to P3, P7 -----------------------------------------------------------------------------------------

CudaTable::CudaTable(Dtype weight, Dtype gradient, Dtype model, int device, std::vector<int64_t> sizes,
                     std::vector<int32_t> groups, std::vector<uint32_t> streams, int64_t chunk)
    : Columns(device, std::move(sizes), groups, chunk),
      dtypes_{weight, gradient, model},
      groups_(std::move(groups)),
      streams_(std::move(streams)) {
  if (!has_cuda_instance(dtypes_))
    throw std::invalid_argument("no CUDA kernel for these dtypes of weight, gradient and model");
  for (int32_t group : groups_) {
    if (group < 0) throw std::invalid_argument("a tensor's group number is negative");
    group_count_ = std::max(group_count_, group + 1);
  }
  if (!streams_.empty() && streams_.size() != sizes_.size())
    throw std::invalid_argument("a stream of random numbers is due for every tensor of the table");
  set_streams(pass_);
}

template <class L>
void CudaTable::set_streams(L& launches) const {
  if (streams_.empty()) return;
  launches.each([this](auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i) table.stream[i] = streams_[size_t(plan.tensors[i])];
  });
}

void CudaTable::set(Column column, const char* what, const Addresses& addresses, int64_t element_size, bool check_memory,
                    bool may_miss) {
  check(what, addresses, element_size, check_memory, may_miss);
  fill(pass_, column, addresses);
  fill(adam_, column, addresses);
}

void CudaTable::set_weights(const Addresses& a) { set(kWeight, "weight", a, size_of(dtypes_.weight), true); }

void CudaTable::set_backups(const Addresses& a) {
  if (dtypes_.has_models()) throw std::invalid_argument("beside master weights there are no backups");
  set(kBackup, "backup", a, size_of(dtypes_.weight), true);
}

void CudaTable::set_models(const Addresses& a) {
  if (!dtypes_.has_models()) throw std::invalid_argument("models stand beside fp32 master weights, and are bf16 or fp16");
  set(kModel, "model", a, size_of(dtypes_.model), true);
}

void CudaTable::set_gradients(const Addresses& a) { set(kGradient, "gradient", a, size_of(dtypes_.gradient), false); }
void CudaTable::set_momenta(const Addresses& a) { set(kMomentum, "momentum", a, 4, true, true); }

void CudaTable::set_adam(const Addresses& squares, const Addresses& largest, const Addresses& steps) {
  check("exp_avg_sq", squares, 4, true, false);
  check("max_exp_avg_sq", largest, 4, true, true);
  check("step", steps, 4, true, false);
  if (adam_.plans.empty()) {
    cut(adam_, groups_);
    set_streams(adam_);
    // What was set before lies in the tables of the other passes.
    for (Column column : {kWeight, kBackup, kGradient, kMomentum}) {
      Addresses present(sizes_.size(), 0);
      pass_.each([&](const auto& table, const LaunchPlan& plan) {
        for (size_t i = 0; i < plan.tensors.size(); ++i)
          present[size_t(plan.tensors[i])] = reinterpret_cast<uintptr_t>(table.data[column][i]);
      });
      fill(adam_, column, present);
    }
  }
  fill(adam_, kSquare, squares);
  fill(adam_, kLargest, largest);
  fill(adam_, kStep, steps);
}

int64_t CudaTable::workspace_bytes() const { return kTicketBytes + chunks() * int64_t(sizeof(float)); }

void CudaTable::check_call(const Groups& groups, const std::vector<DeviceRate>& rates, bool drawn) const {
  if (groups.size() < size_t(group_count_) || (!rates.empty() && rates.size() != groups.size()))
    throw std::out_of_range("a tensor's group number is out of range");
  for (const DeviceRate& rate : rates) check_aligned(rate.address, rate.is_double ? 8 : 4, "learning rate");
  if (drawn && streams_.empty())
    throw std::invalid_argument("random numbers are drawn here: a stream is due for every tensor of the table");
}

// Each launch's groups, from those of the optimizer: set(table, slot, group).
template <class L, class F>
static void set_groups(L& launches, const CudaTable::Groups& groups, const std::vector<DeviceRate>& rates, F&& set) {
  launches.each([&](auto& table, const LaunchPlan& plan) {
    for (size_t slot = 0; slot < plan.groups.size(); ++slot) {
      const size_t group = size_t(plan.groups[slot]);
      const DeviceRate rate = rates.empty() ? DeviceRate{} : rates[group];
      table.rate[slot] = reinterpret_cast<const void*>(rate.address);
      set(table.group[slot], groups[group], rate.is_double);
    }
  });
}

static void set_move(PassGroup& to, const GroupOf<double>& from, bool) { to.move = move_group(from); }

void CudaTable::norm(const Groups& groups, uintptr_t status, NormFlags flags, double eps, uintptr_t workspace,
                     uintptr_t stream) {
  check_call(groups, {}, false);
  set_groups(pass_, groups, {}, set_move);
  auto* numbers = at<StatusOf<float>>(status, "status");
  run(pass_, false, [&](const auto& table, const LaunchPlan& plan) {
    NormKernels<TableOf<decltype(table)>>::norm(dtypes_, table, plan.chunks(), slots(workspace, plan), numbers,
                                                float(eps), flags, stream_of(stream));
  });
}

void CudaTable::perturb(const Groups& groups, uintptr_t status, uint64_t seed, bool random_rounding, uintptr_t stream) {
  bool drawn = random_rounding;
  for (const LaunchPlan& plan : pass_.plans)
    for (int32_t group : plan.groups) drawn = drawn || (size_t(group) < groups.size() && groups[size_t(group)].share < 1);
  check_call(groups, {}, drawn);
  set_groups(pass_, groups, {}, set_move);
  const auto* numbers = at<const StatusOf<float>>(status, "status");
  const Draws draws{seed, random_rounding};
  run(pass_, true, [&](const auto& table, const LaunchPlan& plan) {
    MoveKernels<TableOf<decltype(table)>>::perturb(dtypes_, table, plan.chunks(), numbers, drawn ? &draws : nullptr,
                                                   stream_of(stream));
  });
}

void CudaTable::sgd(const Groups& groups, const Update& u) {
  check_call(groups, u.rates, u.random_rounding);
  set_groups(pass_, groups, u.rates, [](PassGroup& to, const GroupOf<double>& from, bool rate_is_double) {
    to.sgd = sgd_group(from);
    to.sgd.rate_is_double = rate_is_double;
  });
  const auto* numbers = at<const StatusOf<float>>(u.status, "status");
  check_aligned(u.grad_scale, 4, "gradient scale");
  run(pass_, true, [&](const auto& table, const LaunchPlan& plan) {
    SgdKernels<TableOf<decltype(table)>>::sgd(dtypes_, table, plan.chunks(), numbers,
                                              reinterpret_cast<const float*>(u.grad_scale),
                                              Draws{u.seed, u.random_rounding}, stream_of(u.stream));
  });
}

void CudaTable::adam(const Groups& groups, const Update& u) {
  check_call(groups, u.rates, u.random_rounding);
  if (adam_.plans.empty() && !pass_.plans.empty()) throw std::invalid_argument("Adam's state has not been set");
  set_groups(adam_, groups, u.rates, [](AdamGroup& to, const GroupOf<double>& from, bool rate_is_double) {
    to = adam_group(from);
    to.rate_is_double = rate_is_double;
  });
  adam_.each([](const auto& table, const LaunchPlan& plan) {
    for (size_t i = 0; i < plan.tensors.size(); ++i)
      if (table.data[kMomentum][i] == nullptr ||
          (table.group[table.group_of[i]].amsgrad && table.data[kLargest][i] == nullptr))
        throw std::invalid_argument("tensor " + std::to_string(plan.tensors[i]) + " lacks Adam's " +
                                    (table.data[kMomentum][i] == nullptr ? "exp_avg" : "max_exp_avg_sq"));
  });
  const auto* numbers = at<const StatusOf<float>>(u.status, "status");
  auto* ticket = at<unsigned int>(u.workspace, "workspace");
  check_aligned(u.grad_scale, 4, "gradient scale");
  run(adam_, true, [&](const auto& table, const LaunchPlan& plan) {
    AdamKernels<TableOf<decltype(table)>>::adam(dtypes_, table, plan.chunks(), numbers,
                                                reinterpret_cast<const float*>(u.grad_scale), ticket,
                                                Draws{u.seed, u.random_rounding}, stream_of(u.stream));
  });
}

void CudaTable::restore(uintptr_t stream) {
  run(pass_, true, [&](const auto& table, const LaunchPlan& plan) {
    MoveKernels<TableOf<decltype(table)>>::restore(dtypes_, table, plan.chunks(), stream_of(stream));
  });
}

void cuda_finish(uintptr_t status, NormFlags flags, double eps, int device, uintptr_t stream) {
  const OnDevice guard(device);
  launch_finish(at<StatusOf<float>>(status, "status"), float(eps), flags, stream_of(stream));
}

// ---- P4 to P6 ---------------------------------------------------------------------------------------------

CudaLists::CudaLists(Dtype x, Dtype y, int device, std::vector<int64_t> sizes, int64_t chunk)
    : Columns(device, sizes, std::vector<int32_t>(sizes.size(), 0), chunk), x_(x), y_(y) {
  if (!cuda_lists_served(x, y)) throw std::invalid_argument("no CUDA kernel for lists of these dtypes");
}

bool cuda_lists_served(Dtype x, Dtype y) { return has_cuda_instance(ListDtypes{x, y, x}); }

int64_t CudaLists::workspace_bytes() const { return kTicketBytes + 3 * chunks() * int64_t(sizeof(float)); }

void CudaLists::set(Column column, const char* what, const Addresses& addresses, Dtype dtype) {
  check(what, addresses, size_of(dtype), false, false);
  fill(pass_, column, addresses);
}

void CudaLists::dots(const Addresses& x, const Addresses& y, uintptr_t sums, bool begin, uintptr_t workspace,
                     uintptr_t stream) {
  set(kX, "x", x, x_);
  set(kY, "y", y, y_);
  auto* numbers = at<float>(sums, "sums");
  run(pass_, false, [&](const auto& table, const LaunchPlan& plan) {
    ListKernels<TableOf<decltype(table)>>::dots(ListDtypes{x_, y_, x_}, table, plan.chunks(), slots(workspace, plan),
                                                numbers, begin, stream_of(stream));
  });
}

void CudaLists::combine(const Addresses& x, const Addresses& y, Dtype out_dtype, const Addresses& out,
                        uintptr_t coefficients, double a, double b, uintptr_t status, uintptr_t stream) {
  const ListDtypes dtypes{x_, y_, out_dtype};
  if (!has_cuda_instance(dtypes)) throw std::invalid_argument("the result must have the dtype of x or of y");
  set(kX, "x", x, x_);
  set(kY, "y", y, y_);
  set(kOut, "result", out, out_dtype);
  check_aligned(coefficients, 4, "coefficients");
  check_aligned(status, 4, "status");
  const Coefficients by{reinterpret_cast<const float*>(coefficients), float(a), float(b)};
  run(pass_, true, [&](const auto& table, const LaunchPlan& plan) {
    ListKernels<TableOf<decltype(table)>>::combine(dtypes, table, plan.chunks(), by,
                                                   reinterpret_cast<const StatusOf<float>*>(status), stream_of(stream));
  });
}

}  // namespace fused_sam
