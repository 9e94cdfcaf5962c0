// Reads a tensor's address, dtype, device and layout without a Python object per number and without torch's headers.
//
// torch exports C functions for this, with a stable interface: torch/csrc/inductor/aoti_torch/c/shim.h. Their handle is
// the address of an at::Tensor, which every Python tensor contains. An at::Tensor is a pointer to the implementation,
// and the attribute `_cdata` is the same pointer. Its place in a Python object is therefore found by comparison, once.
//
// Two more functions are C++: at::native::is_neg and torch::autograd::impl::bump_version. Both take an at::Tensor by
// reference, which is the same handle. A torch that lacks one of these names is asked through Python instead.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace fused_sam {

// The numbers of one tensor, valid while it lives and is not changed.
struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
  int32_t dtype, device_type, device_index;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data); }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
    return count;
  }

  // Returns a hash of everything but the address.
  uint64_t form() const {
    uint64_t hash = uint64_t(uint32_t(dtype)) << 32 ^ uint64_t(uint32_t(device_type)) << 16 ^ uint32_t(device_index);
    const auto mix = [&hash](int64_t x) { hash = (hash ^ uint64_t(x)) * 0x9e3779b97f4a7c15u + (hash >> 29); };
    for (int64_t i = 0; i < dim; ++i) mix(sizes[i]), mix(strides[i]);
    mix(dim);
    return hash;
  }
};

// Returns true if two tensors have one dtype, device and shape, and their elements have one order in memory.
inline bool same_form(const TensorView& a, const TensorView& b) {
  if (a.dtype != b.dtype || a.device_type != b.device_type || a.device_index != b.device_index || a.dim != b.dim)
    return false;
  for (int64_t i = 0; i < a.dim; ++i)
    if (a.sizes[i] != b.sizes[i] || (a.sizes[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

class TensorViewer {
 public:
  // Not usable before `locate`.
  TensorViewer() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (torch == nullptr) return;
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name));
      return function != nullptr;
    };
    found_ = find("aoti_torch_get_data_ptr", data_ptr_) && find("aoti_torch_get_sizes", sizes_) &&
             find("aoti_torch_get_strides", strides_) && find("aoti_torch_get_dim", dim_) &&
             find("aoti_torch_get_dtype", dtype_) && find("aoti_torch_get_device_type", device_type_) &&
             find("aoti_torch_get_device_index", device_index_);
    find("aoti_torch_get_storage_size", storage_size_), find("aoti_torch_get_storage_offset", storage_offset_);
    find("_ZN2at6native6is_negERKNS_6TensorE", is_neg_);
    find("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", bump_version_);
    // Newer than the others. Without it the address of a sparse tensor fails, which torch also prints.
    int32_t (*strided)() = nullptr;
    if (find("aoti_torch_layout_strided", strided) && find("aoti_torch_get_layout", layout_)) strided_ = strided();
    dlclose(torch);  // torch itself keeps it loaded
  }

  bool usable() const { return place_ != 0; }
  bool has_bump() const { return usable() && bump_version_ != nullptr; }

  // Finds the at::Tensor in a Python tensor. It is in the same place in all, of any class.
  void locate(pybind11::handle tensor) {
    if (!found_) return;
    const auto implementation = tensor.attr("_cdata").cast<uintptr_t>();
    const auto* words = reinterpret_cast<const uintptr_t*>(tensor.ptr());
    const size_t end = size_t(Py_TYPE(tensor.ptr())->tp_basicsize) / sizeof(uintptr_t);
    for (size_t i = sizeof(PyObject) / sizeof(uintptr_t); i < end && !usable(); ++i)
      if (words[i] == implementation) place_ = i;
  }

  // Returns false only if the tensor's memory has the sign of its value; `unknown` if torch cannot be asked.
  bool is_neg(pybind11::handle tensor, bool unknown) const {
    return is_neg_ == nullptr ? unknown : is_neg_(handle_of(tensor));
  }

  // Returns false if a tensor of so many bytes, all in one block, has no memory or reaches beyond its storage. A wrapper
  // of other tensors has the address 0, as has a tensor whose storage was freed; a storage may also be resized.
  bool in_storage(pybind11::handle tensor, const TensorView& view, int64_t bytes) const {
    if (bytes == 0) return true;
    if (view.data == nullptr) return false;
    if (storage_size_ == nullptr || storage_offset_ == nullptr) return true;
    void* handle = handle_of(tensor);
    int64_t size = 0, offset = 0;  // in bytes, and in elements
    if (storage_size_(handle, &size) != 0 || storage_offset_(handle, &offset) != 0) return false;
    return offset * (bytes / view.numel()) + bytes <= size;
  }

  // Raises the version counter, by which autograd notices that a tensor was written.
  void bump_version(pybind11::handle tensor) const { bump_version_(handle_of(tensor)); }

  // Throws std::runtime_error if the tensor is not a strided array, such as a sparse one.
  TensorView operator()(pybind11::handle tensor) const {
    void* handle = handle_of(tensor);
    TensorView out;
    int32_t layout = strided_;
    if (layout_ != nullptr && layout_(handle, &layout) != 0) layout = ~strided_;
    if (layout != strided_ || data_ptr_(handle, &out.data) != 0)
      throw std::runtime_error("the tensor has no memory of its own");
    int64_t *sizes, *strides;
    if (sizes_(handle, &sizes) | strides_(handle, &strides) | dim_(handle, &out.dim) | dtype_(handle, &out.dtype) |
        device_type_(handle, &out.device_type) | device_index_(handle, &out.device_index))
      throw std::runtime_error("torch's C interface failed on a tensor");
    out.sizes = sizes, out.strides = strides;
    return out;
  }

 private:
  void* handle_of(pybind11::handle tensor) const { return reinterpret_cast<uintptr_t*>(tensor.ptr()) + place_; }

  bool found_ = false;
  size_t place_ = 0;  // in words from the beginning of the Python object; 0: unknown
  int32_t strided_ = 0;
  int32_t (*data_ptr_)(void*, void**) = nullptr;
  int32_t (*sizes_)(void*, int64_t**) = nullptr;
  int32_t (*strides_)(void*, int64_t**) = nullptr;
  int32_t (*dim_)(void*, int64_t*) = nullptr;
  int32_t (*dtype_)(void*, int32_t*) = nullptr;
  int32_t (*device_type_)(void*, int32_t*) = nullptr;
  int32_t (*device_index_)(void*, int32_t*) = nullptr;
  int32_t (*layout_)(void*, int32_t*) = nullptr;
  int32_t (*storage_size_)(void*, int64_t*) = nullptr;
  int32_t (*storage_offset_)(void*, int64_t*) = nullptr;
  bool (*is_neg_)(const void*) = nullptr;
  void (*bump_version_)(const void*) = nullptr;
};

}  // namespace fused_sam
