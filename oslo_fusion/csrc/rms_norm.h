// rms_norm: what the CPU and the CUDA launcher share. What the operation means stands in oslo_fusion/ops/rms_norm.py.

#pragma once

#include "text.h"

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace oslo_fusion {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// y and the reciprocal root mean square of each row.
Two rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double weight_offset,
                 std::optional<at::ScalarType> out_dtype);
// y, the sum, and the reciprocal root mean square of each of its rows.
Three add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight, double eps,
                       double weight_offset, std::optional<at::ScalarType> out_dtype);
// The gradients of s and of the weight; the latter has no elements unless wanted.
Two rms_norm_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                          const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double weight_offset,
                          bool weight_gradient);

// The same on a GPU, on the current stream.
Two rms_norm_cuda(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double weight_offset,
                  std::optional<at::ScalarType> out_dtype);
Three add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight, double eps,
                        double weight_offset, std::optional<at::ScalarType> out_dtype);
Two rms_norm_backward_cuda(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                           const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double weight_offset,
                           bool weight_gradient);

inline bool is_norm_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

// What a norm of this dtype is computed in.
inline at::ScalarType wide_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_norm_weight(const at::Tensor& x, const std::optional<at::Tensor>& weight) {
  if (!weight) return;
  TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == x.size(-1), "rms_norm: weight: received shape ",
                    text(weight->sizes()), ", must be [", text(x.size(-1)), "], the last dimension of x ", text(x.sizes()));
  TORCH_CHECK_VALUE(is_norm_dtype(weight->scalar_type()), "rms_norm: weight: received dtype ", weight->scalar_type(),
                    ", must be floating point. Remedy: weight.float()");
  TORCH_CHECK_VALUE(weight->device() == x.device(), "rms_norm: weight: is on ", weight->device(), ", x on ", x.device(),
                    ". Remedy: weight.to(x.device)");
}

// The same conditions as _check in oslo_fusion/ops/rms_norm.py.
inline void check_rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& residual, double eps, std::optional<at::ScalarType> out_dtype) {
  TORCH_CHECK_VALUE(is_norm_dtype(x.scalar_type()), "rms_norm: x: received dtype ", x.scalar_type(),
                    ", allowed are half, bfloat16, float and double. Remedy: x.float()");
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0, "rms_norm: x: received shape ", text(x.sizes()),
                    ", needs a last dimension of at least one number to norm");
  check_norm_weight(x, weight);
  if (residual) {
    TORCH_CHECK_VALUE(residual->sizes() == x.sizes(), "rms_norm: residual: received shape ", text(residual->sizes()),
                      ", must be that of x, ", text(x.sizes()), ". Remedy: residual.expand_as(x)");
    TORCH_CHECK_VALUE(is_norm_dtype(residual->scalar_type()), "rms_norm: residual: received dtype ", residual->scalar_type(),
                      ", must be floating point");
    TORCH_CHECK_VALUE(residual->device() == x.device(), "rms_norm: residual: is on ", residual->device(), ", x on ", x.device(),
                      ". Remedy: residual.to(x.device)");
  }
  TORCH_CHECK_VALUE(eps >= 0.0, "rms_norm: eps: received ", text(eps), ", must be zero or positive");
  TORCH_CHECK_VALUE(!out_dtype || is_norm_dtype(*out_dtype), "rms_norm: out_dtype: received ", *out_dtype,
                    ", must be floating point or None");
}

// A gradient of another shape would be read out of bounds.
inline void check_rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                                    const std::optional<at::Tensor>& weight, const at::Tensor& rstd) {
  check_rms_norm(s, weight, std::nullopt, 0.0, std::nullopt);
  const auto check_gradient = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.sizes() == s.sizes() && is_norm_dtype(tensor.scalar_type()) && tensor.device() == s.device(),
                      "rms_norm_backward: ", name, ": received ", tensor.scalar_type(), " ", text(tensor.sizes()), " on ",
                      tensor.device(), ", must be floating point, of the shape of s, ", text(s.sizes()), ", on ", s.device());
  };
  check_gradient("dy", dy);
  if (ds) check_gradient("ds", *ds);
  TORCH_CHECK_VALUE(rstd.sizes() == s.sizes().slice(0, s.dim() - 1) && rstd.scalar_type() == wide_dtype(s.scalar_type()) &&
                        rstd.device() == s.device(),
                    "rms_norm_backward: rstd: received ", rstd.scalar_type(), " ", text(rstd.sizes()), " on ", rstd.device(),
                    ", must be what the forward returned");
}

// The dtypes of s and y.
inline std::tuple<at::ScalarType, at::ScalarType> rms_norm_dtypes(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                                  const std::optional<at::Tensor>& residual,
                                                                  std::optional<at::ScalarType> out_dtype) {
  const auto summed = residual ? at::promote_types(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  if (out_dtype) return {summed, *out_dtype};
  return {summed, weight ? at::promote_types(summed, weight->scalar_type()) : summed};
}

// A tensor whose rows lie one stride apart and whose numbers lie side by side. It is a copy only where it must be.
struct Rows {
  at::Tensor tensor;
  int64_t stride;  // in numbers
};

inline Rows as_rows(const at::Tensor& given) {
  const at::Tensor x = given.resolve_neg();  // a view of a complex tensor may mean its numbers negated
  const int64_t dim = x.size(-1);
  if (x.is_contiguous()) return {x, dim};
  bool collapses = x.stride(-1) == 1 || dim == 1;
  int64_t stride = 0, next = 0;  // of the innermost leading dimension, and what the next one must have
  bool first = true;
  for (int64_t d = x.dim() - 2; d >= 0 && collapses; --d) {
    if (x.size(d) == 1) continue;
    if (first) stride = x.stride(d);
    collapses = first || x.stride(d) == next;
    next = x.stride(d) * x.size(d);
    first = false;
  }
  if (collapses) return {x, stride};
  return {x.contiguous(), dim};
}

}  // namespace oslo_fusion
