// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"

#ifdef __GLIBCXX__
// Of GCC 11, and so younger than manylinux_2_28: made part of the libraries, for compilers that do not inline it.
template std::string std::basic_stringbuf<char>::str() const&;
#endif

// What registrations share: checks of what memory safety needs, with messages of one shape,
// `<op>: expected <contract>; got <value>. <remedy>`.
namespace singlepass::registration {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const std::string& op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": expected ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t k = 0; k < t.dim(); ++k) text << (k == 0 ? "" : ", ") << t.size(k);
  text << ")";
  return text.str();
}

inline DType dtype_of(const std::string& op, const char* role, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, role, " of float32, bfloat16 or float16; got ", torch::headeronly::toString(t.scalar_type()),
           ". Use backend=\"eager\" for other dtypes.");
  }
}

// Tensor::layout() is younger than torch 2.10, whose headers the libraries are also built with.
inline bool is_strided(const Tensor& t) {
  int32_t layout = -1;
  aoti_torch_get_layout(t.get(), &layout);
  return layout == aoti_torch_layout_strided();
}

// Memory where another tensor is. torch::stable::new_empty and empty_like would look ops up by their names at each
// call.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                         ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made));
  return Tensor(made);
}

// A contiguous tensor.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0; stride *= std::max<int64_t>(sizes[k], 1)) strides[k] = stride;
  return new_tensor(like, sizes, strides, dtype);
}

// Whether the strides order the elements of a tensor without gaps and overlaps.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  std::vector<int64_t> order;
  for (size_t k = 0; k < sizes.size(); ++k) {
    if (sizes[k] != 1) order.push_back(static_cast<int64_t>(k));
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t k : order) {
    if (strides[k] != expected) return false;
    expected *= sizes[k];
  }
  return true;
}

// A tensor of the shape and dtype of another, in its order if that is dense.
inline Tensor new_like(const Tensor& t) {
  if (!is_dense(t)) return torch::stable::empty_like(t);
  const auto sizes = t.sizes(), strides = t.strides();
  return new_tensor(t, {sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, t.scalar_type());
}

// Whether two tensors of one shape order their elements alike; strides of dimensions of size 1 don't matter.
inline bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes();
  const auto strides_a = a.strides();
  const auto strides_b = b.strides();
  for (size_t k = 0; k < sizes.size(); ++k) {
    if (sizes[k] != 1 && strides_a[k] != strides_b[k]) return false;
  }
  return true;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  const auto sizes_a = a.sizes();
  const auto sizes_b = b.sizes();
  for (size_t k = 0; k < sizes_a.size(); ++k) {
    if (sizes_a[k] != sizes_b[k]) return false;
  }
  return true;
}

inline void check_device(const std::string& op, const char* role, const Tensor& t, const Tensor& like) {
  if (t.is_cpu() != like.is_cpu() || t.get_device_index() != like.get_device_index()) {
    fail(op, role, " on the same device as the rest; got another one. Move it there.");
  }
}

// Refuses a tensor whose memory was freed, as sharding frees what it has gathered.
inline void check_memory(const std::string& op, const char* role, const Tensor& t) {
  if (t.const_data_ptr() != nullptr || t.numel() == 0) return;
  fail(op, role, " with memory; got ", shape_of(t), " whose memory was freed. Call the op before that.");
}

// One float of a caller's tensor, on the device of `like`, or null.
inline const float* scalar_pointer(const std::string& op, const char* role, const std::optional<Tensor>& t,
                                   const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check_device(op, role, *t, like);
  if (t->numel() != 1 || t->scalar_type() != ScalarType::Float) {
    fail(op, role, " as one float32; got ", t->numel(), " of ", torch::headeronly::toString(t->scalar_type()),
         ". Convert it.");
  }
  check_memory(op, role, *t);
  return static_cast<const float*>(t->const_data_ptr());
}

// A tensor of a given dtype and shape, contiguous from dimension `dense` on; -1 is any size.
inline void check_layout(const char* op, const char* role, const Tensor& t, ScalarType dtype,
                         const std::vector<int64_t>& shape, int64_t dense) {
  bool fits = t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t k = 0; fits && k < t.dim(); ++k) {
    const size_t at = static_cast<size_t>(k);
    fits = shape[at] == -1 || t.size(k) == shape[at];
  }
  int64_t expected = 1;
  for (int64_t k = t.dim() - 1; fits && t.numel() > 0 && k >= dense; --k) {
    fits = t.size(k) == 1 || t.stride(k) == expected;
    expected *= t.size(k);
  }
  if (fits) return check_memory(op, role, t);
  std::ostringstream wanted;
  for (size_t k = 0; k < shape.size(); ++k) {
    wanted << (k == 0 ? "" : ", ");
    if (shape[k] == -1) {
      wanted << "any";
    } else {
      wanted << shape[k];
    }
  }
  fail(op, role, " (", wanted.str(), ") of ", torch::headeronly::toString(dtype), ", dense from dimension ", dense,
       " on; got ", shape_of(t), " of ", torch::headeronly::toString(t.scalar_type()), ". Make it so.");
}

}  // namespace singlepass::registration
