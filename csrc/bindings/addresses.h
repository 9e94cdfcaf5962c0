// Addresses of tensors, as Python passes them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

using Addresses = std::vector<uintptr_t>;

// Returns the addresses in Python's array("q"), in bytes that hold the same, or in a sequence of integers.
inline Addresses unpacked(const pybind11::object& addresses) {
  if (!PyObject_CheckBuffer(addresses.ptr())) return addresses.cast<Addresses>();
  Py_buffer view;
  if (PyObject_GetBuffer(addresses.ptr(), &view, PyBUF_ND) != 0) throw pybind11::error_already_set();
  const bool packed = view.ndim == 1 && (view.itemsize == 8 || view.itemsize == 1) && view.len % 8 == 0;
  Addresses out;
  if (packed && view.len > 0) {
    out.resize(size_t(view.len) / 8);
    std::memcpy(out.data(), view.buf, size_t(view.len));
  }
  PyBuffer_Release(&view);
  if (!packed) throw std::invalid_argument("addresses are 64-bit integers");
  return out;
}
