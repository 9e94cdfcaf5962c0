// Raises the version counters of tensors, as torch.autograd.graph.increment_version does, at a tenth of its time.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/tensor_view.h"

namespace fused_sam {

class VersionBumper {
 public:
  // tensor_base: torch._C.TensorBase, of which every tensor is an instance. increment_version: torch's own function
  // over a sequence of tensors, which serves where this torch offers no other way.
  VersionBumper(const pybind11::object& tensor_base, const pybind11::object& increment_version, pybind11::handle tensor)
      : tensor_base_(tensor_base), increment_version_(increment_version) {
    if (!PyType_Check(tensor_base.ptr())) throw pybind11::type_error("tensor_base must be a class");
    view_.locate(tensor);
  }

  void operator()(const pybind11::list& tensors) const {
    if (!view_.has_bump()) {
      increment_version_(tensors);
      return;
    }
    auto* base = reinterpret_cast<PyTypeObject*>(tensor_base_.ptr());
    for (const pybind11::handle t : tensors) {
      if (!PyObject_TypeCheck(t.ptr(), base)) throw pybind11::type_error("increment_version takes tensors");
      view_.bump_version(t);
    }
  }

 private:
  pybind11::object tensor_base_, increment_version_;
  TensorViewer view_;
};

}  // namespace fused_sam
