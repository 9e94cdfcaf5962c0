// The CUDA backend's errors, and its reasons on machines where it cannot run. cuda_shim/ replaces the GPU.
#include "cuda/device.h"
#include "cuda_runtime.h"
#include "tests/check_words.h"
#include "tests/cuda_rig.h"

using namespace fused_sam;
using namespace fused_sam_test;

namespace {

void test_bad_input() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  Rig rig({Dtype::f32, Dtype::f32, {100, 0, 50}, 0});
  const auto params = copies(rig.params);
  rig.norm(true);
  auto a = addresses(rig.params);
  const auto set = [&] { rig.table.set_params(a); };
  machine.memory[a[2]] = {cudaMemoryTypeUnregistered, 0};
  CHECK_WORDS(set(), "the param of tensor 2 is not in GPU memory");
  machine.memory[a[2]] = {cudaMemoryTypeDevice, 1};
  CHECK_WORDS(set(), "is on cuda:1, the table on cuda:0");
  machine.memory[a[2]] = {cudaMemoryTypeManaged, 0};
  set();
  machine.memory.clear();
  a[0] += 2;
  CHECK_WORDS(set(), "not a multiple of its element size");
  a[0] = 0;
  CHECK_WORDS(set(), "has no address");
  a.pop_back();
  CHECK_WORDS(set(), "every tensor of the table needs an address");
  const auto perturb = [&](uintptr_t address, uintptr_t stream) {
    rig.table.perturb(kPerturbGroups, address, 0, false, stream);
  };
  const uintptr_t status = rig.status_address();
  CHECK_WORDS(rig.table.perturb({kPerturbGroups[0]}, status, 0, false, 0), "group number is out of range");
  CHECK_WORDS(rig.table.sgd({kSgdGroups[0]}, rig.arguments()), "group number is out of range");
  CHECK_WORDS(perturb(0, 0), "the status has no address");
  CHECK_WORDS(perturb(status + 1, 0), "status is not a multiple");
  const NormCall ascent{true, true, {true, false}, 0};
  CHECK_WORDS(rig.table.norm(nullptr, status, ascent, rig.scratch(), 0), "norm of the ascent needs groups");
  const auto table = [](Dtype param, Dtype grad, Dtype master, int device = 0, int32_t id = 0) {
    return CudaTable(param, grad, master, device, {1}, {id}, {}, 0);
  };
  CHECK_WORDS(table(Dtype::f64, Dtype::f64, Dtype::f64), "no CUDA kernel for these dtypes");
  CHECK_WORDS(table(Dtype::f32, Dtype::bf16, Dtype::f32), "no CUDA kernel for these dtypes");
  CHECK_WORDS(table(Dtype::bf16, Dtype::bf16, Dtype::f16), "no CUDA kernel for these dtypes");
  CHECK_WORDS(table(Dtype::f32, Dtype::f32, Dtype::f32, 7), "cudaErrorInvalidDevice");
  CHECK_WORDS(table(Dtype::f32, Dtype::f32, Dtype::f32, 0, -1), "negative");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, Dtype::f32, 0, {1, 2}, {0, 0}, {1}, 0), "needs a stream of random");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, Dtype::f32, 0, {5, int64_t(1) << 32}, {0, 0}, {}, 12288),
              "chunk size that is a power of 2");
  CudaTable(Dtype::f32, Dtype::f32, Dtype::f32, 0, {(int64_t(1) << 32) - 1}, {0}, {}, 12288);
  CHECK_WORDS(rig.table.set_masters(addresses(rig.params)), "masters are fp32, and their params bf16 or fp16");
  CHECK_WORDS(Rig({Dtype::bf16, Dtype::f32, {3}, 0, 0, true, Dtype::f32}).table.set_backups({16}), "has no backups");
  CHECK_WORDS(rig.table.set_state(3, addresses(rig.params)), "the state buffers 0, 1 and 2");
  CHECK_WORDS(rig.table.set_state(1, {4, 0, 6}), "state buffer 1 is not a multiple");
  CHECK_WORDS(rig.table.adam(kAdamGroups, rig.arguments()), "Adam's state has not been set");
  CudaTable without(Dtype::f32, Dtype::f32, Dtype::f32, 0, {3}, {0}, {}, 0);
  auto masked = kPerturbGroups;
  masked[0].mask_prob = 0.5;
  CHECK_WORDS(without.perturb(masked, status, 0, false, 0), "every tensor of the table needs a stream");
  const UpdateArguments random = rig.arguments(nullptr, kInf, true);
  CHECK_WORDS(without.sgd(kSgdGroups, random), "every tensor of the table needs a stream");
  CHECK_WORDS(without.element<Lion>(kLionGroups, rig.arguments()), "tensor 0 lacks Lion's exp_avg");
  UpdateArguments rated = rig.arguments();
  rated.rates.resize(3);
  CHECK_WORDS(rig.table.sgd(kSgdGroups, rated), "every group needs a learning rate");
  rated.rates.assign(4, {12, true});
  CHECK_WORDS(rig.table.sgd(kSgdGroups, rated), "learning rate is not a multiple");
  const auto adam_without = [](int slot) {
    Rig lacking({Dtype::f32, Dtype::f32, {3, 4}, 0});
    lacking.use_adam();
    slot < 3 ? lacking.table.set_state(slot, {lacking.state[0][0].address(), 0})
             : lacking.table.set_steps({lacking.state[0][0].address(), 0});
    lacking.table.adam(kAdamGroups, lacking.arguments());
  };
  CHECK_WORDS(adam_without(0), "tensor 1 lacks Adam's exp_avg");
  CHECK_WORDS(adam_without(1), "tensor 1 lacks Adam's exp_avg_sq");
  CHECK_WORDS(adam_without(2), "tensor 1 lacks Adam's max_exp_avg_sq");
  CHECK_WORDS(adam_without(3), "tensor 1 lacks Adam's step");
  CHECK_WORDS(CudaVectorPair(Dtype::bf16, Dtype::f16, 0, {1}, 0), "no CUDA kernel for vectors");
  machine.freed_stream = 0x1000;
  CHECK_WORDS(perturb(status, 0x1000),
              "kernel perturb (fp32 params, fp32 grads, 2 blocks) was not launched: cudaErrorInvalidResourceHandle");
  machine.freed_stream = 0;
  machine.next_launch = cudaErrorInvalidValue;
  CHECK_WORDS(rig.table.restore(0), "kernel restore");
  CHECK(same(rig.params, params));
}

void test_device_guard() {
  Rig rig({Dtype::f32, Dtype::f32, {100}, 0});
  cuda_shim::machine().contexts = {0, 1};
  cuda_shim::machine().current_device = 1;
  rig.norm(true);
  CHECK(cuda_shim::machine().current_device == 1);
  cuda_shim::machine().next_launch = cudaErrorInvalidValue;
  CHECK_WORDS(rig.norm(true), "kernel norm");
  CHECK(cuda_shim::machine().current_device == 1);
  cuda_shim::machine().current_device = 0;
}

// A process that trains on GPU 1 takes no memory on GPU 0, which is current from the start.
void test_no_context_on_another_device() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  const std::set<int> own = {1};
  const auto with_current = [&](auto&& call) {
    machine.contexts = own;
    machine.current_device = 0;
    call();
    CHECK(machine.contexts == own);
  };
  Array weight(Dtype::f32, 3, 0), grad(Dtype::f32, 3, 0);
  for (int64_t i = 0; i < 3; ++i) weight.set(i, 1), grad.set(i, 1);
  StatusOf<float> status{};
  CudaTable table(Dtype::f32, Dtype::f32, Dtype::f32, 1, {3}, {0}, {}, 0);
  std::vector<char> workspace(size_t(table.workspace_bytes()) + 16, 0);
  const uintptr_t scratch = (reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16;
  const uintptr_t at = reinterpret_cast<uintptr_t>(&status);
  with_current([&] { table.set_params({weight.address()}); });
  with_current([&] { table.set_grads({grad.address()}); });
  with_current([&] { table.norm(nullptr, at, NormCall{true, true, {false, false}, 0}, scratch, 0); });
  with_current([&] { cuda_finish_norm(at, {false, true}, 0, 1, 0); });
  with_current([&] { CHECK(device_unavailable_reason(1).empty()); });
  CHECK(status.update_norm > 1.7 && status.update_norm < 1.8);
  machine.current_device = 0;
}

void test_reasons() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  CHECK(cuda_unavailable_reason().empty() && device_unavailable_reason(0).empty());
  machine.driver = 0;
  CHECK(cuda_unavailable_reason().find("no NVIDIA driver") != std::string::npos);
  machine.driver = 12020;
  machine.device_count_error = cudaErrorInsufficientDriver;
  const char* words = "driver runs CUDA 12.2 at most, and fused_sam._cuda was built with 13.0";
  CHECK(cuda_unavailable_reason().find(words) != std::string::npos);
  machine.device_count_error = cudaErrorNoDevice;
  CHECK(cuda_unavailable_reason().find("no NVIDIA GPU is visible") != std::string::npos);
  machine.device_count_error = cudaSuccess;
  machine.driver = 13000;
  machine.kernel_image = cudaErrorNoKernelImageForDevice;
  words = "no kernels for cuda:0, whose compute capability is 9.0";
  CHECK(device_unavailable_reason(0).find(words) != std::string::npos);
  machine.kernel_image = cudaSuccess;
}

}  // namespace

int main() {
  test_bad_input();
  test_device_guard();
  test_no_context_on_another_device();
  test_reasons();
  return fused_sam_test::result();
}
