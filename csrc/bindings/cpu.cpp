// Python's door to the CPU kernels: tables of raw addresses, no torch headers.
//
// Addresses are integers from Tensor.data_ptr(). The caller keeps the tensors alive during a call and
// vouches for sizes, dtypes and layouts; fused_sam/engine/plan.py is the one caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/addresses.h"
#include "bindings/groups.h"
#include "bindings/reader.h"
#include "cpu/lists.h"
#include "cpu/table.h"

namespace py = pybind11;
using fused_sam::Column;
using fused_sam::Dtype;
using fused_sam::Entry;
using fused_sam::Group;
using fused_sam::Lists;
using fused_sam::Status;
using fused_sam::Table;

namespace {

template <class Field>
void set_column(Table& table, const Addresses& addresses, Field Entry::*field) {
  std::vector<Entry>& entries = table.entries();
  if (addresses.size() != entries.size()) throw std::invalid_argument("an address is due for every tensor of the table");
  for (size_t i = 0; i < entries.size(); ++i) entries[i].*field = reinterpret_cast<Field>(addresses[i]);
}

Column column(int dtype, const Addresses& addresses) {
  Column c{Dtype(dtype), {}};
  c.data.reserve(addresses.size());
  for (uintptr_t a : addresses) c.data.push_back(reinterpret_cast<void*>(a));
  return c;
}

Status& status_at(uintptr_t address) {
  if (address == 0) throw std::invalid_argument("the status has no address");
  return *reinterpret_cast<Status*>(address);
}

// The Python method of an update.
auto update(void (Table::*run)(const std::vector<Group>&, const Status&, int)) {
  return [run](Table& t, const py::sequence& groups, uintptr_t status, double unscale, int threads) {
    const std::vector<Group> g = groups_from(groups, unscale);
    const Status& s = status_at(status);
    py::gil_scoped_release release;
    (t.*run)(g, s, threads);
  };
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fused_sam's CPU kernels";

  py::class_<Table>(m, "Table", "Tensors of equal dtypes: addresses, sizes in elements, group numbers.")
      .def(py::init([](int weight, int gradient, int network, std::vector<int64_t> sizes, std::vector<int32_t> groups) {
             return Table({Dtype(weight), Dtype(gradient), Dtype(network)}, std::move(sizes), std::move(groups));
           }),
           py::arg("weight_dtype"), py::arg("gradient_dtype"), py::arg("network_dtype"), py::arg("sizes"),
           py::arg("groups"))
      .def("set_weights", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::weight); })
      .def("set_backups", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::backup); })
      .def("set_gradients", [](Table& t, const py::object& a) { set_column(t, unpacked(a), &Entry::gradient); })
      .def("set_models", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::model); })
      .def("set_momenta", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::momentum); })
      .def("set_squares", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::square); })
      .def("set_largest", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::largest); })
      .def("set_steps", [](Table& t, const Addresses& a) { set_column(t, a, &Entry::step); })
      .def("set_draws", &Table::set_draws, py::arg("seed"), py::arg("streams"), py::arg("rounding"))
      .def(
          "norm",
          [](Table& t, const py::sequence& groups, uintptr_t status, bool scaled, bool carry, bool begin, bool finish,
             double eps, int threads) {
            const std::vector<Group> g = groups_from(groups, 1.0);
            Status& s = status_at(status);
            py::gil_scoped_release release;
            t.norm(g, s, {scaled, carry, begin, finish}, eps, threads);
          },
          "P1: global sum of squares and, with finish, norm, inverse and skip flag into the status.")
      .def(
          "perturb",
          [](Table& t, const py::sequence& groups, uintptr_t status, int threads) {
            const std::vector<Group> g = groups_from(groups, 1.0);
            const Status& s = status_at(status);
            py::gil_scoped_release release;
            t.perturb(g, s, threads);
          },
          "P2: weight to backup, then weight += rho * inverse * T^2 * gradient.")
      .def("sgd", update(&Table::sgd), "P3: one step of SGD from the backup into the weight.")
      .def("adam", update(&Table::adam), "P7: one step of Adam or AdamW from the backup into the weight.")
      .def("restore", [](Table& t, int threads) {
        py::gil_scoped_release release;
        t.restore(threads);
      });

  py::class_<Lists>(m, "Lists", "Columns of tensors, without groups.")
      .def(py::init<std::vector<int64_t>>(), py::arg("sizes"))
      .def(
          "dots",
          [](Lists& l, int x_dtype, const Addresses& x, int y_dtype, const Addresses& y, uintptr_t sums, bool begin,
             int threads) {
            const Column p = column(x_dtype, x), q = column(y_dtype, y);
            py::gil_scoped_release release;
            l.dots(p, q, reinterpret_cast<double*>(sums), begin, threads);
          },
          "P4: adds <x, y>, ||x||^2, ||y||^2 to three doubles.")
      .def(
          "combine",
          [](Lists& l, int x_dtype, const Addresses& x, int y_dtype, const Addresses& y, int out_dtype,
             const Addresses& out, double a, double b, uintptr_t status, int threads) {
            if (status != 0 && status_at(status).skip != 0) return;
            const Column p = column(x_dtype, x), q = column(y_dtype, y), o = column(out_dtype, out);
            py::gil_scoped_release release;
            l.combine(p, q, o, a, b, threads);
          },
          "P5: out = a * x + b * y, unless there is a status and it says to skip.");

  py::class_<fused_sam::Reader>(m, "Reader", "Reads all parameters' gradients at once; see fused_sam/engine/grad_reader.py.")
      .def(py::init<py::object, py::tuple, py::list>(), py::arg("tensor_base"), py::arg("plain"), py::arg("params"))
      .def("read", &fused_sam::Reader::read, py::arg("groups"))
      .def_static("unchanged", &fused_sam::Reader::unchanged);

  m.def(
      "finish",
      [](uintptr_t status, bool scaled, bool carry, double eps) {
        fused_sam::add_norm(status_at(status), 0.0, eps, {scaled, carry, false, true});
      },
      "The end of P1, for a sum that is in the status.");
  m.def("instruction_set", [] { return std::string(fused_sam::kernels().name); });
  m.def("instruction_sets", &fused_sam::usable_kernels, "Those this processor can run, best first.");
  m.def("use_instruction_set", &fused_sam::use_kernels, "For tests: one of instruction_sets(), or \"auto\".");
}
