// A tensor's address, dtype and layout in one C call, where torch offers DLPack's exchange table (2.10 and newer).
//
// Only the part of DLPack's stable C interface that is needed here: https://dmlc.github.io/dlpack, version 1.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fused_sam {

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dimensions;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }
};

// Whether two tensors have one dtype, one device and one shape, and their elements lie in one order.
inline bool alike(const DlTensor& a, const DlTensor& b) {
  if (a.dtype_code != b.dtype_code || a.dtype_bits != b.dtype_bits || a.device_type != b.device_type ||
      a.device_id != b.device_id || a.dimensions != b.dimensions)
    return false;
  for (int32_t i = 0; i < a.dimensions; ++i)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

// One number for a tensor's dtype, shape and strides.
inline uint64_t form_of(const DlTensor& t) {
  uint64_t form = uint64_t(t.dtype_code) << 8 | t.dtype_bits;
  const auto mix = [&form](int64_t x) { form = (form ^ uint64_t(x)) * 0x9e3779b97f4a7c15u + (form >> 29); };
  for (int32_t i = 0; i < t.dimensions; ++i) mix(t.shape[i]), mix(t.strides[i]);
  mix(t.dimensions);
  return form;
}

class DlpackView {
 public:
  // cls: a tensor class. Without an exchange table of major version 1 on it, the view is not usable.
  explicit DlpackView(pybind11::handle cls) {
    if (!pybind11::hasattr(cls, "__dlpack_c_exchange_api__")) return;
    const pybind11::object capsule = cls.attr("__dlpack_c_exchange_api__");
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    const auto* table = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (table->major == 1) view_ = table->view;
  }

  bool usable() const { return view_ != nullptr; }

  // The tensor's fields, borrowed: valid while the tensor lives and is not changed.
  DlTensor operator()(pybind11::handle tensor) const {
    DlTensor out;
    if (view_(tensor.ptr(), &out) != 0) throw pybind11::error_already_set();
    return out;
  }

 private:
  struct Table {
    uint32_t major;
    uint32_t minor;
    void* previous;
    void* allocate;
    void* export_managed;
    void* import_managed;
    int (*view)(void* tensor, DlTensor* out);
    void* current_stream;
  };

  int (*view_)(void*, DlTensor*) = nullptr;
};

}  // namespace fused_sam
