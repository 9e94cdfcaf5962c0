// Reads the gradients of a list of parameters in one call from Python.
//
// An optimizer asks every parameter for its gradient, and every gradient for its address, dtype and layout, twice per
// step. In Python, one attribute at a time, that costs more than the kernels of a small model.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "bindings/tensor_view.h"

namespace fused_sam {

namespace py = pybind11;

class Reader {
 public:
  // tensor_base: torch._C.TensorBase. plain: classes that do not override its attributes.
  Reader(const py::object& tensor_base, const py::tuple& plain, const py::list& params)
      : params_(params),
        grad_(tensor_base, "grad"),
        dtype_(tensor_base, "dtype"),
        data_ptr_(tensor_base, "data_ptr"),
        is_contiguous_(tensor_base, "is_contiguous"),
        is_neg_(tensor_base, "is_neg"),
        numel_(tensor_base, "numel"),
        plain_(plain),
        addresses_(params.size()) {
    for (const py::handle p : params)
      if (is_plain(p) && !view_.usable()) view_.locate(p);
    for (const py::handle p : params) {
      places_.push_back(place(p, is_plain(p)));
      bytes_.push_back(p.attr("numel")().cast<int64_t>() * p.attr("element_size")().cast<int64_t>());
      add_span(param_spans_, places_.back().address, bytes_.back());
    }
    std::sort(param_spans_.begin(), param_spans_.end());
  }

  // Returns (gradients, their addresses as packed int64 for Table.set_grads, true if some have none), or None unless the
  // usual case holds: the parameters of `groups` are those given, in order, where they were and as they were. Gradients
  // have the dtype and layout of their parameters, and memory that no other gradient and no parameter shares. Where there
  // is none, it is None and its address 0. The packed addresses are the same object while no address changes.
  py::object read(const py::list& groups) {
    if (!has_params_of(groups)) return py::none();
    const py::ssize_t count = PyList_GET_SIZE(params_.ptr());
    py::list grads(count);
    bool some_absent = false;
    for (py::ssize_t i = 0; i < count; ++i) {
      const py::handle p = PyList_GET_ITEM(params_.ptr(), i);
      const bool plain = is_plain(p);
      py::object g = grad_.get(p, plain);
      if (g.is_none()) {
        if (!in_place(i, p, plain)) return py::none();
        addresses_[size_t(i)] = 0;
        some_absent = true;
      } else {
        const uintptr_t address = plain && view_.usable() ? viewed(i, p, g) : asked(i, p, g, plain);
        if (address == kNotUsual) return py::none();
        addresses_[size_t(i)] = address;
      }
      PyList_SET_ITEM(grads.ptr(), i, g.release().ptr());
    }
    if (!packed()) return py::none();
    return py::make_tuple(grads, packed_, some_absent);
  }

  // Returns true if the state has exactly these entries, in order, and entries[i][keys[k]] is values[k][i]. None as a
  // value: the entry has no such key.
  static bool unchanged(const py::dict& state, const py::list& all_entries, const py::list& entries,
                        const py::tuple& keys, const py::list& values) {
    if (PyDict_Size(state.ptr()) != PyList_GET_SIZE(all_entries.ptr())) return false;
    PyObject *tensor, *entry;
    Py_ssize_t at = 0;
    for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &at, &tensor, &entry); ++i)
      if (entry != PyList_GET_ITEM(all_entries.ptr(), i)) return false;
    const Py_ssize_t count = PyList_GET_SIZE(entries.ptr());
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(keys.ptr()); ++k) {
      PyObject* const key = PyTuple_GET_ITEM(keys.ptr(), k);
      const py::list column = values[size_t(k)];
      if (PyList_GET_SIZE(column.ptr()) != count) return false;
      for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* const wanted = PyList_GET_ITEM(column.ptr(), i);
        PyObject* const value = PyDict_GetItemWithError(PyList_GET_ITEM(entries.ptr(), i), key);
        if (value == wanted) continue;
        if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (value != nullptr || wanted != Py_None) return false;
      }
    }
    return true;
  }

 private:
  // What tables assume of a parameter. The address alone would not do: memory that one parameter freed may be the same
  // parameter's again, in another dtype or size.
  struct Place {
    uintptr_t address;
    uint64_t form;  // of the view, else of dtype and size

    bool operator==(const Place& other) const { return address == other.address && form == other.form; }
  };

  static constexpr uintptr_t kNotUsual = ~uintptr_t(0);  // instead of an address

  bool has_params_of(const py::list& groups) const {
    const Py_ssize_t count = PyList_GET_SIZE(params_.ptr());
    Py_ssize_t i = 0;
    for (const py::handle group : groups) {
      const py::list members = py::reinterpret_borrow<py::list>(group);
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(members.ptr()); ++k, ++i)
        if (i >= count || PyList_GET_ITEM(members.ptr(), k) != PyList_GET_ITEM(params_.ptr(), i)) return false;
    }
    return i == count;
  }

  // Returns true if parameter i, which has no gradient, is where it was and as it was.
  bool in_place(py::ssize_t i, py::handle p, bool plain) const {
    if (!(place(p, plain) == places_[size_t(i)])) return false;
    const bool viewable = plain && view_.usable();
    if (viewable && !view_.in_storage(p, view_(p), bytes_[size_t(i)])) return false;
    return !(viewable ? view_.is_neg(p, true) && is_true(is_neg_.call(p, true)) : is_true(is_neg_.call(p, plain)));
  }

  // Return the gradient's address; kNotUsual unless it has the dtype and layout of parameter i, which is in its place.
  uintptr_t viewed(py::ssize_t i, py::handle p, const py::object& g) const {
    const TensorView param = view_(p), grad = view_(g);
    if (!(place(param) == places_[size_t(i)]) || !same_form(param, grad)) return kNotUsual;
    const int64_t bytes = bytes_[size_t(i)];
    if (!view_.in_storage(p, param, bytes) || !view_.in_storage(g, grad, bytes)) return kNotUsual;
    // Complex arithmetic may leave a gradient whose memory has the opposite sign.
    if (view_.is_neg(g, true) && is_true(is_neg_.call(g, is_plain(g)))) return kNotUsual;
    if (view_.is_neg(p, true) && is_true(is_neg_.call(p, true))) return kNotUsual;
    return grad.address();
  }

  // As `viewed`, through torch's attributes, which recognise only contiguous layouts.
  uintptr_t asked(py::ssize_t i, py::handle p, const py::object& g, bool plain) const {
    const bool plain_grad = is_plain(g);
    if (!is_true(is_contiguous_.call(g, plain_grad)) || !is_true(is_contiguous_.call(p, plain))) return kNotUsual;
    if (dtype_.get(g, plain_grad).ptr() != dtype_.get(p, plain).ptr()) return kNotUsual;
    if (numel_.call(g, plain_grad).cast<int64_t>() != numel_.call(p, plain).cast<int64_t>()) return kNotUsual;
    if (!(place(p, plain) == places_[size_t(i)]) || is_true(is_neg_.call(g, plain_grad))) return kNotUsual;
    const uintptr_t found = address(g);
    return found == 0 && bytes_[size_t(i)] > 0 ? kNotUsual : found;
  }

  static Place place(const TensorView& tensor) { return {tensor.address(), tensor.form()}; }

  Place place(py::handle p, bool plain) const {
    if (plain && view_.usable()) {
      try {
        return place(view_(p));
      } catch (const std::runtime_error&) {  // no strided array, and so never the usual case
        return {0, 0};
      }
    }
    const auto dtype = reinterpret_cast<uintptr_t>(dtype_.get(p, plain).ptr());  // dtypes are never freed
    return {address(p), uint64_t(numel_.call(p, plain).cast<int64_t>()) * 31 + dtype};
  }

  uintptr_t address(py::handle tensor) const {
    return data_ptr_.call(tensor, is_plain(tensor)).cast<uintptr_t>();
  }

  // Puts the gradients' addresses into packed_; returns false if their memory is shared.
  bool packed() {
    const auto size = Py_ssize_t(addresses_.size() * sizeof(uintptr_t));
    const char* bytes = reinterpret_cast<const char*>(addresses_.data());
    if (packed_ && std::memcmp(PyBytes_AS_STRING(packed_.ptr()), bytes, size_t(size)) == 0) return true;
    if (any_shared()) return false;
    packed_ = owned(PyBytes_FromStringAndSize(bytes, size));
    return true;
  }

  using Spans = std::vector<std::pair<uintptr_t, uintptr_t>>;  // [begin, end)

  static void add_span(Spans& spans, uintptr_t begin, int64_t bytes) {
    if (begin != 0 && bytes > 0) spans.emplace_back(begin, begin + uintptr_t(bytes));
  }

  // Returns true if a gradient shares memory with another one or with a parameter.
  bool any_shared() {
    spans_.clear();
    for (size_t i = 0; i < addresses_.size(); ++i) add_span(spans_, addresses_[i], bytes_[i]);
    std::sort(spans_.begin(), spans_.end());
    for (size_t i = 1; i < spans_.size(); ++i)
      if (spans_[i].first < spans_[i - 1].second) return true;
    for (size_t i = 0, k = 0; i < spans_.size() && k < param_spans_.size();) {
      const auto &grad = spans_[i], &param = param_spans_[k];
      if (grad.first < param.second && param.first < grad.second) return true;
      grad.second < param.second ? ++i : ++k;
    }
    return false;
  }

  static bool is_true(const py::object& result) { return result.ptr() == Py_True; }

  static py::object owned(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  // An attribute of tensors. For plain classes its C function is called directly.
  struct Attribute {
    Attribute(const py::object& cls, const char* name) : name(name), descriptor(cls.attr("__dict__")[name]) {
      if (Py_TYPE(descriptor.ptr()) == &PyGetSetDescr_Type)
        getset = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    }
    py::object get(py::handle self, bool plain) const {
      return owned(plain && getset != nullptr ? getset->get(self.ptr(), getset->closure)
                                              : PyObject_GetAttr(self.ptr(), name.ptr()));
    }
    py::str name;
    py::object descriptor;
    PyGetSetDef* getset = nullptr;
  };

  // A method of tensors without arguments, likewise.
  struct Method {
    Method(const py::object& cls, const char* name) : name(name), descriptor(cls.attr("__dict__")[name]) {
      if (Py_TYPE(descriptor.ptr()) == &PyMethodDescr_Type)
        method = reinterpret_cast<PyMethodDescrObject*>(descriptor.ptr())->d_method;
    }
    py::object call(py::handle self, bool plain) const {
      if (plain && method != nullptr) {
        if (method->ml_flags == METH_NOARGS) return owned(method->ml_meth(self.ptr(), nullptr));
        if (method->ml_flags == (METH_VARARGS | METH_KEYWORDS))
          return owned(reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void (*)()>(method->ml_meth))(
              self.ptr(), empty.ptr(), nullptr));
      }
      return owned(PyObject_CallMethodNoArgs(self.ptr(), name.ptr()));
    }
    py::str name;
    py::object descriptor;
    py::tuple empty;
    PyMethodDef* method = nullptr;
  };

  bool is_plain(py::handle tensor) const {
    for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(plain_.ptr()); ++i)
      if (reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == PyTuple_GET_ITEM(plain_.ptr(), i)) return true;
    return false;
  }

  py::list params_;
  Attribute grad_, dtype_;
  Method data_ptr_, is_contiguous_, is_neg_, numel_;
  py::tuple plain_;
  TensorViewer view_;
  std::vector<Place> places_;
  std::vector<int64_t> bytes_;  // of each parameter, and so of its gradient
  Spans param_spans_, spans_;   // sorted; the latter is working memory
  std::vector<uintptr_t> addresses_;  // of the latest gradients ...
  py::object packed_;                 // ... and the bytes of an earlier read
};

}  // namespace fused_sam
