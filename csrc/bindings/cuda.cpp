// Python's door to the CUDA kernels: tables of raw addresses, streams as integers, no torch headers.
//
// Addresses are integers from Tensor.data_ptr(). The caller keeps the tensors alive until the stream has run what was
// launched, and vouches for sizes, dtypes and layouts; fused_sam/backends/cuda.py is the one caller.
// FUSED_SAM_CUDA_MODULE: the module's name, which csrc/tests sets to run the same source without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/addresses.h"
#include "bindings/groups.h"
#include "cuda/device.h"
#include "cuda/table.h"

#ifndef FUSED_SAM_CUDA_MODULE
#define FUSED_SAM_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace fused_sam;

namespace {

// rates: None where every learning rate is a number of the host, else (address, is it a double) for each group.
std::vector<DeviceRate> rates_from(const py::object& rates) {
  std::vector<DeviceRate> out;
  if (rates.is_none()) return out;
  for (const py::handle item : rates) {
    const auto pair = item.cast<std::pair<uintptr_t, bool>>();
    out.push_back(DeviceRate{pair.first, pair.second});
  }
  return out;
}

template <class T>
void add_columns(py::class_<T>& cls) {
  cls.def_property_readonly("workspace_bytes", &T::workspace_bytes)
      .def_property_readonly("launches", &T::launches, "Launches a primitive takes.")
      .def_property_readonly("chunk", &T::chunk, "Elements a block takes.")
      .def_property_readonly("chunks", &T::chunks, "Blocks of all launches.");
}

}  // namespace

PYBIND11_MODULE(FUSED_SAM_CUDA_MODULE, m) {
  m.doc() = "fused_sam's CUDA kernels";

  // Local to the module: the test-only build of this file may be in the same process.
  py::class_<CudaTable> table(m, "Table", py::module_local(), "Tensors of equal dtypes on one GPU: addresses, sizes, group numbers.");
  add_columns(table);
  table
      .def(py::init([](int weight, int gradient, int model, int device, std::vector<int64_t> sizes,
                       std::vector<int32_t> groups, std::vector<uint32_t> streams, int64_t chunk) {
             return CudaTable(Dtype(weight), Dtype(gradient), Dtype(model), device, std::move(sizes), std::move(groups),
                              std::move(streams), chunk);
           }),
           py::arg("weight_dtype"), py::arg("gradient_dtype"), py::arg("model_dtype"), py::arg("device"), py::arg("sizes"),
           py::arg("groups"), py::arg("streams") = std::vector<uint32_t>(), py::arg("chunk") = 0)
      // The columns that stay are looked up in the driver, once; gradients come anew with every step.
      .def("set_weights", &CudaTable::set_weights)
      .def("set_backups", &CudaTable::set_backups)
      .def("set_models", &CudaTable::set_models)
      .def("set_momenta", &CudaTable::set_momenta)
      .def("set_adam", &CudaTable::set_adam, py::arg("squares"), py::arg("largest"), py::arg("steps"))
      .def("set_gradients", [](CudaTable& t, const py::object& a) { t.set_gradients(unpacked(a)); })
      .def(
          "norm",
          [](CudaTable& t, const py::sequence& groups, uintptr_t status, bool scaled, bool carry, bool begin, bool finish,
             double eps, uintptr_t workspace, uintptr_t stream) {
            t.norm(groups_from(groups, 1.0), status, NormFlags{scaled, carry, begin, finish}, eps, workspace, stream);
          },
          "P1: global sum of squares and, with finish, norm, inverse and skip flag into the status.")
      .def(
          "perturb",
          [](CudaTable& t, const py::sequence& groups, uintptr_t status, uint64_t seed, bool random_rounding,
             uintptr_t stream) { t.perturb(groups_from(groups, 1.0), status, seed, random_rounding, stream); },
          "P2: weight to backup, then weight += rho * inverse * T^2 * gradient; from a master weight into the model.")
      .def(
          "sgd",
          [](CudaTable& t, const py::sequence& groups, const py::object& rates, uintptr_t status, uintptr_t grad_scale,
             uintptr_t workspace, uint64_t seed, bool random_rounding, uintptr_t stream) {
            t.sgd(groups_from(groups, 1.0),
                  Update{rates_from(rates), status, grad_scale, workspace, seed, random_rounding, stream});
          },
          "P3: one step of SGD from the backup into the weight.")
      .def(
          "adam",
          [](CudaTable& t, const py::sequence& groups, const py::object& rates, uintptr_t status, uintptr_t grad_scale,
             uintptr_t workspace, uint64_t seed, bool random_rounding, uintptr_t stream) {
            t.adam(groups_from(groups, 1.0),
                   Update{rates_from(rates), status, grad_scale, workspace, seed, random_rounding, stream});
          },
          "P7: one step of Adam or AdamW from the backup into the weight.")
      .def("restore", &CudaTable::restore, "Backup to weight, or master weight to model.");

  py::class_<CudaLists> lists(m, "Lists", py::module_local(), "Two lists of tensors on one GPU, without groups.");
  add_columns(lists);
  lists
      .def(py::init([](int x, int y, int device, std::vector<int64_t> sizes, int64_t chunk) {
             return CudaLists(Dtype(x), Dtype(y), device, std::move(sizes), chunk);
           }),
           py::arg("x_dtype"), py::arg("y_dtype"), py::arg("device"), py::arg("sizes"), py::arg("chunk") = 0)
      .def("dots", &CudaLists::dots, "P4: adds <x, y>, ||x||^2, ||y||^2 to three floats.")
      .def(
          "combine",
          [](CudaLists& l, const Addresses& x, const Addresses& y, int out_dtype, const Addresses& out,
             uintptr_t coefficients, double a, double b, uintptr_t status, uintptr_t stream) {
            l.combine(x, y, Dtype(out_dtype), out, coefficients, a, b, status, stream);
          },
          "P5: out = a * x + b * y; with a status, unless it says skip.");

  m.def(
      "finish",
      [](uintptr_t status, bool scaled, bool carry, double eps, int device, uintptr_t stream) {
        cuda_finish(status, NormFlags{scaled, carry, false, true}, eps, device, stream);
      },
      "The end of P1 by itself: norm, inverse and skip flag from the status's sum.");

  m.def("lists_served", [](int x, int y) { return cuda_lists_served(Dtype(x), Dtype(y)); });
  m.def("problem", &cuda_problem, "Why CUDA cannot be used here; empty where it can.");
  m.def("device_problem", &cuda_device_problem, "Why these kernels cannot run on a device; empty where they can.");
  m.def("runtime_version", &cuda_runtime_version);
  m.def("driver_version", &cuda_driver_version);
#ifdef FUSED_SAM_CUDA_EXTRAS
  FUSED_SAM_CUDA_EXTRAS(m);
#endif
}
