// The CUDA bindings compiled against the shim: the Python module _cuda_shim, which can also set the machine's state.
#include "cuda_runtime.h"

#define FUSED_SAM_CUDA_MODULE _cuda_shim
#define FUSED_SAM_CUDA_EXTRAS(m) add_pretences(m)

#include <pybind11/pybind11.h>

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // the module's first byte, from the linker

static void add_pretences(pybind11::module_& m) {
  m.def("launches", [] { return cuda_shim::machine().launches; }, "Kernels launched so far.");
  m.def("unloaded_launches", [] { return cuda_shim::machine().unloaded_launches; },
        "Launches so far of kernels that were not loaded before.");
  m.def(
      "pretend",
      [](int driver, int devices, const std::string& device_count_error, bool kernel_image, bool launch_fails,
         uintptr_t freed_stream) {
        cuda_shim::Machine& machine = cuda_shim::machine();
        machine.driver = driver;
        machine.devices = devices;
        machine.device_count_error = device_count_error == "insufficient driver" ? cudaErrorInsufficientDriver
                                     : device_count_error == "no device"         ? cudaErrorNoDevice
                                                                                 : cudaSuccess;
        machine.kernel_image = kernel_image ? cudaSuccess : cudaErrorNoKernelImageForDevice;
        machine.next_launch = launch_fails ? cudaErrorInvalidValue : cudaSuccess;
        machine.freed_stream = freed_stream;
        machine.memory.clear();
      },
      pybind11::kw_only(), pybind11::arg("driver") = 13000, pybind11::arg("devices") = 2,
      pybind11::arg("device_count_error") = "", pybind11::arg("kernel_image") = true,
      pybind11::arg("launch_fails") = false, pybind11::arg("freed_stream") = 0,
      "Set the machine's state; the defaults are those of a healthy machine.");
  m.def(
      "on_launch",
      [](const pybind11::object& run) {
        if (run.is_none()) {
          cuda_shim::machine().on_launch = nullptr;
          return;
        }
        cuda_shim::machine().on_launch = [run](const void* kernel, unsigned blocks, unsigned threads,
                                               const std::vector<std::string>& arguments) {
          pybind11::list bytes;
          for (const std::string& argument : arguments) bytes.append(pybind11::bytes(argument));
          run(static_cast<const char*>(kernel) - &__ehdr_start, blocks, threads, bytes);
        };
      },
      "Let run(kernel, blocks, threads, arguments) run the launches; None: the host runs them. `kernel` is the place of "
      "the kernel's symbol in this module, and `arguments` the bytes of each.");
  m.def(
      "pretend_memory",
      [](uintptr_t address, int device) {
        cuda_shim::machine().memory[address] =
            device < 0 ? cudaPointerAttributes{cudaMemoryTypeUnregistered, 0}
                       : cudaPointerAttributes{cudaMemoryTypeDevice, device};
      },
      "Let an address be memory of that device; -1: of the host.");
}

#include "bindings/cuda.cpp"
