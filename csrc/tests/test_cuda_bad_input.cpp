// What the CUDA backend refuses, and a machine on which it cannot run, in words; on the stand-in for CUDA (cuda_shim/).
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
  const auto weights = copies(rig.weights);
  rig.norm(true);
  auto a = addresses(rig.weights);
  const auto set = [&] { rig.table.set_weights(a); };
  machine.memory[a[2]] = {cudaMemoryTypeUnregistered, 0};
  CHECK_WORDS(set(), "the weight of tensor 2 is not in GPU memory");
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
  CHECK_WORDS(set(), "an address is due for every tensor");
  CHECK_WORDS(rig.table.perturb({kGroups[0]}, rig.status_address(), 0, false, 0), "group number is out of range");
  CHECK_WORDS(rig.table.perturb(kGroups, 0, 0, false, 0), "the status has no address");
  CHECK_WORDS(rig.table.perturb(kGroups, rig.status_address() + 1, 0, false, 0), "status is not a multiple");
  CHECK_WORDS(CudaTable(Dtype::f64, Dtype::f64, Dtype::f64, 0, {1}, {0}, {}, 0), "no CUDA kernel for these dtypes");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::bf16, Dtype::f32, 0, {1}, {0}, {}, 0), "no CUDA kernel for these dtypes");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, Dtype::f32, 7, {1}, {0}, {}, 0), "cudaErrorInvalidDevice");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, Dtype::f32, 0, {1}, {-1}, {}, 0), "negative");
  CHECK_WORDS(CudaTable(Dtype::bf16, Dtype::bf16, Dtype::f16, 0, {1}, {0}, {}, 0), "no CUDA kernel for these dtypes");
  CHECK_WORDS(CudaTable(Dtype::f32, Dtype::f32, Dtype::f32, 0, {1, 2}, {0, 0}, {1}, 0), "a stream of random numbers is due");
  CHECK_WORDS(rig.table.set_models(addresses(rig.weights)), "models stand beside fp32 master weights");
  CHECK_WORDS(Rig({Dtype::f32, Dtype::f32, {3}, 0, 0, true, Dtype::bf16}).table.set_backups({16}), "there are no backups");
  CHECK_WORDS(rig.table.adam(kAdamGroups, rig.update()), "Adam's state has not been set");
  CudaTable without(Dtype::f32, Dtype::f32, Dtype::f32, 0, {3}, {0}, {}, 0);
  Groups masked = kGroups;
  masked[0].share = 0.5;
  CHECK_WORDS(without.perturb(masked, rig.status_address(), 0, false, 0), "a stream is due for every tensor");
  CHECK_WORDS(without.sgd(kGroups, rig.update(nullptr, true)), "a stream is due for every tensor");
  Rig lacking({Dtype::f32, Dtype::f32, {3, 4}, 0});
  lacking.use_adam();
  lacking.table.set_adam(addresses(lacking.squares), {0, 0}, addresses(lacking.momenta));
  CHECK_WORDS(lacking.table.adam(kAdamGroups, lacking.update()), "tensor 1 lacks Adam's max_exp_avg_sq");
  CHECK_WORDS(CudaLists(Dtype::bf16, Dtype::f16, 0, {1}, 0), "no CUDA kernel for lists");
  machine.freed_stream = 0x1000;
  CHECK_WORDS(rig.table.perturb(kGroups, rig.status_address(), 0, false, 0x1000),
               "kernel perturb (fp32 weights, fp32 gradients, 2 blocks) was not launched: cudaErrorInvalidResourceHandle");
  machine.freed_stream = 0;
  machine.next_launch = cudaErrorInvalidValue;
  CHECK_WORDS(rig.table.restore(0), "kernel restore");
  CHECK(same(rig.weights, weights));
}

void test_device_guard() {
  Rig rig({Dtype::f32, Dtype::f32, {100}, 0});
  cuda_shim::machine().current_device = 1;
  rig.norm(true);
  CHECK(cuda_shim::machine().current_device == 1);
  cuda_shim::machine().next_launch = cudaErrorInvalidValue;
  CHECK_WORDS(rig.norm(true), "kernel norm");
  CHECK(cuda_shim::machine().current_device == 1);
  cuda_shim::machine().current_device = 0;
}

void test_problems_in_words() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  CHECK(cuda_problem().empty() && cuda_device_problem(0).empty());
  machine.driver = 0;
  CHECK(cuda_problem().find("no NVIDIA driver") != std::string::npos);
  machine.driver = 12020;
  machine.device_count_error = cudaErrorInsufficientDriver;
  CHECK(cuda_problem().find("driver knows CUDA 12.2 and fused_sam._cuda was built with 13.0") != std::string::npos);
  machine.device_count_error = cudaErrorNoDevice;
  CHECK(cuda_problem().find("no NVIDIA GPU is visible") != std::string::npos);
  machine.device_count_error = cudaSuccess;
  machine.driver = 13000;
  machine.kernel_image = cudaErrorNoKernelImageForDevice;
  CHECK(cuda_device_problem(0).find("no kernels for cuda:0, whose compute capability is 9.0") != std::string::npos);
  machine.kernel_image = cudaSuccess;
}

}  // namespace

int main() {
  test_bad_input();
  test_device_guard();
  test_problems_in_words();
  return fused_sam_test::result();
}
