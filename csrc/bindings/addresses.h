// Addresses of tensors, as Python hands them over.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

using Addresses = std::vector<uintptr_t>;

// Addresses of Python's array("q"), or of any sequence of integers.
inline Addresses unpacked(const pybind11::object& addresses) {
  if (!PyObject_CheckBuffer(addresses.ptr())) return addresses.cast<Addresses>();
  const pybind11::buffer_info info = pybind11::reinterpret_borrow<pybind11::buffer>(addresses).request();
  if (info.itemsize != 8 || info.ndim != 1) throw std::invalid_argument("addresses are 64-bit integers");
  const auto* first = static_cast<const uintptr_t*>(info.ptr);
  return Addresses(first, first + info.size);
}
