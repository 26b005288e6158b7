// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "simt/simt_memory.h"

namespace singlepass::pybind {

namespace py = pybind11;

// NumPy has no bfloat16: arrays of uint16 hold its bits.
inline DType dtype_of(const py::dtype& dtype) {
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return DType::kFloat32;
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return DType::kFloat16;
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) return DType::kBFloat16;
  throw py::type_error("singlepass_core: expected arrays of float32, float16 or uint16 (the bits of bfloat16); got " +
                       py::str(static_cast<py::handle>(dtype)).cast<std::string>() + ". Convert with astype or view.");
}

inline DType dtype_of(const py::array& array) {
  return dtype_of(array.dtype());
}

// A copy of an array in guarded memory, `misalignment` elements past an aligned address, that kernels work on.
class DeviceArray {
 public:
  DeviceArray(const py::array& array, int misalignment)
      : shape_(array.shape(), array.shape() + array.ndim()),
        numpy_dtype_(array.dtype()),
        numel_(array.size()),
        memory_(static_cast<std::size_t>(array.nbytes()), static_cast<std::size_t>(misalignment * array.itemsize())) {
    assign(array);
  }

  void assign(const py::array& array) {
    if (array.size() != numel_ || !array.dtype().equal(numpy_dtype_))
      throw py::value_error(
          "singlepass_core: expected an array of the size and dtype that it replaces. Make a new Stepper.");
    const py::array contiguous = py::array::ensure(array, py::array::c_style);
    if (numel_ > 0) std::memcpy(memory_.data(), contiguous.data(), memory_.bytes());
  }

  py::array to_numpy() const { return py::array(numpy_dtype_, shape_, memory_.data()); }

  // Null for an empty array, as PyTorch has it.
  void* data() const { return numel_ == 0 ? nullptr : memory_.data(); }
  DType dtype() const { return dtype_of(numpy_dtype_); }
  int64_t numel() const { return numel_; }
  const std::vector<py::ssize_t>& shape() const { return shape_; }
  bool intact() const { return memory_.intact(); }

 private:
  std::vector<py::ssize_t> shape_;
  py::dtype numpy_dtype_;
  int64_t numel_;
  simt::GuardedMemory memory_;
};

// One float in device memory.
class DeviceFloat {
 public:
  explicit DeviceFloat(float value = 0.0f) : memory_(sizeof(float)) { *get() = value; }
  float* get() const { return reinterpret_cast<float*>(memory_.data()); }
  bool intact() const { return memory_.intact(); }

 private:
  simt::GuardedMemory memory_;
};

}  // namespace singlepass::pybind
