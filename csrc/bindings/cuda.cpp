// The Python module of the CUDA kernels: tables of raw addresses, streams as integers, no torch headers.
//
// Addresses are integers from Tensor.data_ptr(). The caller, fused_sam/backends/cuda.py, keeps the tensors alive until
// the stream has run the launches, and guarantees sizes, dtypes and layouts.
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

// rates: None if every learning rate is a number in its group, else (address, whether it is a double) for each group.
std::vector<DeviceRate> rates_from(const py::object& rates) {
  std::vector<DeviceRate> out;
  if (rates.is_none()) return out;
  for (const py::handle item : rates) {
    const auto pair = item.cast<std::pair<uintptr_t, bool>>();
    out.push_back(DeviceRate{pair.first, pair.second});
  }
  return out;
}

// Counts a launched write at Status.marks, so that no exception comes between the launch and its count. marks: 0 for none.
void count(uintptr_t marks, double StatusOf<double>::*tables) {
  if (marks != 0) reinterpret_cast<StatusOf<double>*>(marks)->*tables += 1;
}

// Defines a method of an update rule: update(table, groups, arguments), the groups being read by `read_group`.
template <class Read, class Call>
void add_update(py::class_<CudaTable>& cls, const char* name, Read read_group, Call update, const char* doc) {
  cls.def(
      name,
      [read_group, update](CudaTable& table, const py::sequence& groups, const py::object& rates, uintptr_t status,
                           uintptr_t grad_scale, double max_norm, uintptr_t workspace, uint64_t seed,
                           bool stochastic_rounding, uintptr_t stream, uintptr_t marks) {
        const auto read = [&](const py::tuple& t) { return read_group(t, 1.0); };  // grad_scale is read on the device
        (table.*update)(groups_from(groups, read), UpdateArguments{rates_from(rates), status, grad_scale, max_norm,
                                                                   workspace, seed, stochastic_rounding, stream});
        count(marks, &StatusOf<double>::updated_tables);
      },
      py::arg("groups"), py::arg("rates"), py::arg("status"), py::arg("grad_scale"), py::arg("max_norm"),
      py::arg("workspace"), py::arg("seed"), py::arg("stochastic_rounding"), py::arg("stream"), py::arg("marks") = 0,
      doc);
}

template <class T>
void add_columns(py::class_<T>& cls) {
  cls.def_property_readonly("workspace_bytes", &T::workspace_bytes)
      .def_property_readonly("launches", &T::launches, "Launches per primitive.")
      .def_property_readonly("chunk", &T::chunk, "Elements per block.")
      .def_property_readonly("chunks", &T::chunks, "Blocks of all launches.");
}

}  // namespace

PYBIND11_MODULE(FUSED_SAM_CUDA_MODULE, m) {
  m.doc() = "fused_sam's CUDA kernels";

  // Local to the module: the test-only build of this file may be in the same process.
  py::class_<CudaTable> table(m, "Table", py::module_local(), "Tensors of equal dtypes on one GPU.");
  add_columns(table);
  table
      .def(py::init([](int param, int grad, int master, int device, std::vector<int64_t> sizes,
                       std::vector<int32_t> group_ids, std::vector<uint32_t> rng_streams, int64_t chunk) {
             return CudaTable(Dtype(param), Dtype(grad), Dtype(master), device, std::move(sizes), std::move(group_ids),
                              std::move(rng_streams), chunk);
           }),
           py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("master_dtype"), py::arg("device"), py::arg("sizes"),
           py::arg("group_ids"), py::arg("rng_streams") = std::vector<uint32_t>(), py::arg("chunk") = 0)
      // The driver checks the addresses of these columns once; those of the gradients change with every step.
      .def("set_params", &CudaTable::set_params)
      .def("set_backups", &CudaTable::set_backups)
      .def("set_masters", &CudaTable::set_masters)
      .def("set_state", &CudaTable::set_state, py::arg("slot"), py::arg("addresses"),
           "Set the addresses of one buffer of the update rule.")
      .def("set_steps", &CudaTable::set_steps)
      .def("set_grads", [](CudaTable& t, const py::object& a) { t.set_grads(unpacked(a)); })
      .def(
          "norm",
          [](CudaTable& t, const py::object& groups, uintptr_t status, bool reset, bool finish, bool keep_skip,
             double eps, uintptr_t workspace, uintptr_t stream) {
            const NormCall call{reset, finish, FinishNorm{!groups.is_none(), keep_skip}, float(eps)};
            if (groups.is_none()) return t.norm(nullptr, status, call, workspace, stream);
            const auto numbers = groups_from(groups.cast<py::sequence>(), perturb_group);
            t.norm(&numbers, status, call, workspace, stream);
          },
          py::arg("groups"), py::arg("status"), py::arg("reset"), py::arg("finish"), py::arg("keep_skip"),
          py::arg("eps"), py::arg("workspace"), py::arg("stream"),
          "Add the sum of squares of T_w g to the status, or of g if groups is None; with finish, also finish_norm.")
      .def(
          "squares",
          [](CudaTable& t, const py::sequence& groups, uintptr_t unbias, uintptr_t sums, bool weights,
             uintptr_t workspace, uintptr_t stream) {
            t.squares(groups_from(groups, perturb_group), unbias, sums, weights, workspace, stream);
          },
          py::arg("groups"), py::arg("unbias"), py::arg("sums"), py::arg("weights"), py::arg("workspace"),
          py::arg("stream"), "Write the sums of squares of T_w g of each tensor, and then those of the weights.")
      .def(
          "perturb",
          [](CudaTable& t, const py::sequence& groups, uintptr_t status, uint64_t seed, bool stochastic_rounding,
             uintptr_t stream, uintptr_t factors, uintptr_t unbias, uintptr_t marks) {
            t.perturb(groups_from(groups, perturb_group), status, seed, stochastic_rounding, stream, factors, unbias);
            count(marks, &StatusOf<double>::perturbed_tables);
          },
          py::arg("groups"), py::arg("status"), py::arg("seed"), py::arg("stochastic_rounding"), py::arg("stream"),
          py::arg("factors") = 0, py::arg("unbias") = 0, py::arg("marks") = 0,
          "Copy params to backups, then params += rho * inverse_norm * factor * T_w^2 g; from masters if there are any.")
      .def("restore", &CudaTable::restore, py::arg("stream"), "Copy backups to params, or round masters into them.");
  add_update(table, "sgd", sgd_group, &CudaTable::sgd, "Take one step of SGD from the backups or masters.");
  add_update(table, "adam", adam_group, &CudaTable::adam,
             "Take one step of Adam or AdamW from the backups or masters.");
#define FUSED_SAM_ADD(Rule) \
  add_update(table, Rule::kName, element_group<Rule>, &CudaTable::element<Rule>, "Take one step of the rule.");
  FUSED_SAM_ELEMENT_RULES(FUSED_SAM_ADD)
#undef FUSED_SAM_ADD

  py::class_<CudaVectorPair> vectors(m, "VectorPair", py::module_local(), "Two columns of tensors on one GPU.");
  add_columns(vectors);
  vectors
      .def(py::init([](int x, int y, int device, std::vector<int64_t> sizes, int64_t chunk) {
             return CudaVectorPair(Dtype(x), Dtype(y), device, std::move(sizes), chunk);
           }),
           py::arg("x_dtype"), py::arg("y_dtype"), py::arg("device"), py::arg("sizes"), py::arg("chunk") = 0)
      .def("dot", &CudaVectorPair::dot, py::arg("x"), py::arg("y"), py::arg("sums"), py::arg("reset"),
           py::arg("workspace"), py::arg("stream"), "Add <x, y>, ||x||^2 and ||y||^2 to three floats.")
      .def(
          "axpby",
          [](CudaVectorPair& v, const Addresses& x, const Addresses& y, int out_dtype, const Addresses& out,
             uintptr_t coefficients, double a, double b, uintptr_t status, uintptr_t stream, uintptr_t marks) {
            v.axpby(x, y, Dtype(out_dtype), out, coefficients, a, b, status, stream);
            count(marks, &StatusOf<double>::updated_tables);
          },
          py::arg("x"), py::arg("y"), py::arg("out_dtype"), py::arg("out"), py::arg("coefficients"), py::arg("a"),
          py::arg("b"), py::arg("status"), py::arg("stream"), py::arg("marks") = 0,
          "Write out = a * x + b * y; with a status, nothing where skip is set.");

  m.def(
      "finish_norm",
      [](uintptr_t status, bool ascent, bool keep_skip, double eps, int device, uintptr_t stream) {
        cuda_finish_norm(status, FinishNorm{ascent, keep_skip}, eps, device, stream);
      },
      py::arg("status"), py::arg("ascent"), py::arg("keep_skip"), py::arg("eps"), py::arg("device"), py::arg("stream"),
      "Turn the status's sum of squares into a norm and a skip flag.");

  m.def("supports_vectors", [](int x, int y) { return supports_vectors(Dtype(x), Dtype(y)); });
  m.def("unavailable_reason", &cuda_unavailable_reason, "Return why CUDA cannot be used here; '' if it can.");
  m.def("device_unavailable_reason", &device_unavailable_reason,
        "Return why these kernels cannot run on a device; '' if they can.");
  m.def("runtime_version", &cuda_runtime_version);
  m.def("driver_version", &cuda_driver_version);
#ifdef FUSED_SAM_CUDA_EXTRAS
  FUSED_SAM_CUDA_EXTRAS(m);
#endif
}
