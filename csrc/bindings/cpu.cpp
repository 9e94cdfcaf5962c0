// The Python bindings of the CPU kernels: tables of raw addresses, no torch headers.
//
// Addresses are integers from Tensor.data_ptr(). The caller keeps the tensors alive during a call and guarantees sizes,
// dtypes and layouts. fused_sam/backends/cpu.py is the only caller of the tables, fused_sam/engine of the reader.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/addresses.h"
#include "bindings/groups.h"
#include "bindings/reader.h"
#include "bindings/versions.h"
#include "cpu/table.h"
#include "cpu/vectors.h"

namespace py = pybind11;
using namespace fused_sam;

namespace {

template <class Set>
void set_column(Table& table, const py::object& addresses, Set&& set) {
  const Addresses column = unpacked(addresses);
  std::vector<Entry>& entries = table.entries();
  if (column.size() != entries.size()) throw std::invalid_argument("the table needs one address per tensor");
  for (size_t i = 0; i < entries.size(); ++i) set(entries[i], reinterpret_cast<void*>(column[i]));
}

void set_state(Table& table, int slot, const py::object& addresses) {
  if (slot < 0 || slot >= kStateSlots) throw std::out_of_range("the table has no such slot of state");
  set_column(table, addresses, [slot](Entry& e, void* address) { e.state[slot] = address; });
}

Vector vector(int dtype, const py::object& addresses) {
  Vector out{Dtype(dtype), {}};
  for (uintptr_t address : unpacked(addresses)) out.data.push_back(reinterpret_cast<void*>(address));
  return out;
}

Status& status_at(uintptr_t address) {
  if (address == 0) throw std::invalid_argument("the status has no address");
  return *reinterpret_cast<Status*>(address);
}

// groups: None for the norm of g itself. finish: true for the last table of a norm.
void norm(Table& table, const py::object& groups, uintptr_t address, bool reset, bool finish, bool keep_skip,
          double eps, int threads) {
  const bool ascent = !groups.is_none();
  std::vector<PerturbGroup> perturb_groups;
  if (ascent) perturb_groups = groups_from(groups, perturb_group);
  Status& status = status_at(address);
  py::gil_scoped_release release;
  table.accumulate_norm(ascent ? &perturb_groups : nullptr, status, reset, threads);
  if (finish) finish_norm(status, eps, {ascent, keep_skip});
}

// Returns the Python method of an update rule.
template <class Group>
auto update(void (Table::*run)(std::vector<Group>, const Status&, double, int),
            Group (*read)(const py::tuple&, double unscale)) {
  return [run, read](Table& table, const py::sequence& groups, uintptr_t status, double unscale, double max_norm,
                     int threads) {
    std::vector<Group> own = groups_from(groups, [&](const py::tuple& t) { return read(t, unscale); });
    Status& s = status_at(status);
    py::gil_scoped_release release;
    (table.*run)(std::move(own), s, max_norm, threads);
    s.updated_tables += 1;
  };
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fused_sam's CPU kernels; fused_sam/backends/contract.py describes the primitives";

  py::class_<Table>(m, "Table", "Tensors of equal dtypes: addresses, sizes in elements, group numbers.")
      .def(py::init([](int param, int grad, int master, std::vector<int64_t> sizes, const std::vector<int32_t>& ids) {
             return Table({Dtype(param), Dtype(grad), Dtype(master)}, std::move(sizes), ids);
           }),
           py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("master_dtype"), py::arg("sizes"),
           py::arg("group_ids"))
      .def("set_params",
           [](Table& t, const py::object& a) { set_column(t, a, [](Entry& e, void* p) { e.param = p; }); })
      .def("set_backups",
           [](Table& t, const py::object& a) { set_column(t, a, [](Entry& e, void* p) { e.backup = p; }); })
      .def("set_masters",
           [](Table& t, const py::object& a) { set_column(t, a, [](Entry& e, void* p) { e.master = p; }); })
      .def("set_grads", [](Table& t, const py::object& a) { set_column(t, a, [](Entry& e, void* p) { e.grad = p; }); })
      .def("set_state", &set_state, py::arg("slot"), py::arg("addresses"))
      .def("set_steps",
           [](Table& t, const py::object& a) {
             set_column(t, a, [](Entry& e, void* p) { e.step = static_cast<float*>(p); });
           })
      .def("set_rng", &Table::set_rng, py::arg("seed"), py::arg("rng_streams"), py::arg("stochastic_rounding"))
      .def("norm", &norm, py::arg("groups"), py::arg("status"), py::arg("reset"), py::arg("finish"),
           py::arg("keep_skip"), py::arg("eps"), py::arg("threads"))
      // unbias, factors: addresses of a number per tensor; 0: none.
      .def("squares",
           [](Table& t, const py::sequence& groups, uintptr_t unbias, uintptr_t sums, bool weights, int threads) {
             const std::vector<PerturbGroup> own = groups_from(groups, perturb_group);
             if (sums == 0) throw std::invalid_argument("the sums have no address");
             py::gil_scoped_release release;
             t.squares(own, reinterpret_cast<const double*>(unbias), reinterpret_cast<double*>(sums), weights, threads);
           },
           py::arg("groups"), py::arg("unbias"), py::arg("sums"), py::arg("weights"), py::arg("threads"))
      .def("perturb",
           [](Table& t, const py::sequence& groups, uintptr_t status, int threads, uintptr_t factors,
              uintptr_t unbias) {
             const std::vector<PerturbGroup> own = groups_from(groups, perturb_group);
             Status& s = status_at(status);
             py::gil_scoped_release release;
             t.perturb(own, s, threads, reinterpret_cast<const double*>(factors),
                       reinterpret_cast<const double*>(unbias));
             s.perturbed_tables += 1;
           },
           py::arg("groups"), py::arg("status"), py::arg("threads"), py::arg("factors") = 0, py::arg("unbias") = 0)
      .def("sgd", update(&Table::sgd, sgd_group))
      .def("adam", update(&Table::adam, adam_group))
#define FUSED_SAM_DEF(Rule) .def(Rule::kName, update(&Table::element<Rule>, element_group<Rule>))
      FUSED_SAM_ELEMENT_RULES(FUSED_SAM_DEF)
#undef FUSED_SAM_DEF
      .def("restore", [](Table& t, int threads) {
        py::gil_scoped_release release;
        t.restore(threads);
      });

  py::class_<VectorPair>(m, "VectorPair", "Two vectors over many tensors, without groups.")
      .def(py::init<std::vector<int64_t>>(), py::arg("sizes"))
      .def("dot",
           [](VectorPair& pair, int x_dtype, const py::object& x, int y_dtype, const py::object& y, uintptr_t sums,
              bool reset, int threads) {
             const Vector p = vector(x_dtype, x), q = vector(y_dtype, y);
             py::gil_scoped_release release;
             pair.dot(p, q, reinterpret_cast<double*>(sums), reset, threads);
           })
      // status: 0, or nothing is written where skip is set.
      .def("axpby", [](VectorPair& pair, int x_dtype, const py::object& x, int y_dtype, const py::object& y,
                       int out_dtype, const py::object& out, double a, double b, uintptr_t status, int threads) {
        if (status != 0 && status_at(status).skip != 0) return;
        const Vector p = vector(x_dtype, x), q = vector(y_dtype, y), o = vector(out_dtype, out);
        py::gil_scoped_release release;
        pair.axpby(p, q, o, a, b, threads);
        if (status != 0) status_at(status).updated_tables += 1;
      });

  py::class_<Reader>(m, "Reader", "Reads the gradients of all parameters at once; see fused_sam/engine/grad_reader.py.")
      .def(py::init<py::object, py::tuple, py::list>(), py::arg("tensor_base"), py::arg("plain"), py::arg("params"))
      .def("read", &Reader::read, py::arg("groups"))
      .def_static("unchanged", &Reader::unchanged);

  py::class_<VersionBumper>(m, "VersionBumper", "Raises the version counters of a list of tensors.")
      .def(py::init<py::object, py::object, py::handle>(), py::arg("tensor_base"), py::arg("increment_version"),
           py::arg("tensor"))
      .def("__call__", &VersionBumper::operator(), py::arg("tensors"));

  m.def("finish_norm", [](uintptr_t status, bool ascent, bool keep_skip, double eps) {
    finish_norm(status_at(status), eps, {ascent, keep_skip});
  });
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("instruction_sets", &usable_kernels, "Those that this processor supports, best first.");
  m.def("use_instruction_set", &use_kernels, "For tests: one of instruction_sets(), or \"auto\".");
}
