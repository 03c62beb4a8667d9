// no_repeat_ngram: what the CPU and the CUDA launcher share. What the operation means stands in oslo_fusion/ops/no_repeat_ngram.py.

#pragma once

#include "text.h"

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace oslo_fusion {

// In place on the CPU, and into a new contiguous tensor.
void no_repeat_ngram_cpu_(at::Tensor scores, const at::Tensor& ids, const std::optional<at::Tensor>& source, int64_t size,
                          const std::optional<at::Tensor>& sizes, int64_t length,
                          const std::optional<at::Tensor>& device_length);
at::Tensor no_repeat_ngram_cpu(const at::Tensor& scores, const at::Tensor& ids, const std::optional<at::Tensor>& source,
                               int64_t size, const std::optional<at::Tensor>& sizes, int64_t length,
                               const std::optional<at::Tensor>& device_length);

// The same on a GPU, on the current stream. The length is read by the kernel, so a CUDA graph can hold the launch.
void no_repeat_ngram_cuda_(at::Tensor scores, const at::Tensor& ids, const std::optional<at::Tensor>& source, int64_t size,
                           const std::optional<at::Tensor>& sizes, int64_t length,
                           const std::optional<at::Tensor>& device_length);
at::Tensor no_repeat_ngram_cuda(const at::Tensor& scores, const at::Tensor& ids, const std::optional<at::Tensor>& source,
                                int64_t size, const std::optional<at::Tensor>& sizes, int64_t length,
                                const std::optional<at::Tensor>& device_length);

// An integer tensor of either width, read as int64.
struct Integers {
  const void* data = nullptr;
  int64_t stride = 0;
  bool wide = true;

  explicit operator bool() const { return data != nullptr; }
  C10_HOST_DEVICE int64_t at(int64_t index) const {
    return wide ? static_cast<const int64_t*>(data)[index * stride] : static_cast<const int32_t*>(data)[index * stride];
  }
};

// Everything but the scores, as a kernel sees it. Strides in elements.
template <typename id_t>
struct Texts {
  const id_t* ids;
  int64_t ids_row_stride, ids_col_stride, capacity;
  const id_t* source;  // nullptr: the windows are the ids' own
  int64_t source_row_stride, source_col_stride, source_length, rows_per_source;
  Integers sizes;  // no data: size holds for all rows
  int64_t size;
  Integers device_length;  // no data: length holds
  int64_t length;
};

// One row's windows and ending.
template <typename id_t>
struct Row {
  const id_t* text;
  const id_t* ending;  // not to be read where there are no windows
  int64_t text_stride, ending_stride, windows, n;

  C10_HOST_DEVICE Row(const Texts<id_t>& texts, int64_t row) {
    int64_t length = texts.length;
    if (texts.device_length.data != nullptr) {
      length = texts.device_length.at(0);
      length = length < 0 ? 0 : length > texts.capacity ? texts.capacity : length;
    }
    n = texts.sizes.data != nullptr ? texts.sizes.at(row) : texts.size;
    const id_t* ids = texts.ids + row * texts.ids_row_stride;
    const bool own = texts.source == nullptr;
    text = own ? ids : texts.source + row / texts.rows_per_source * texts.source_row_stride;
    text_stride = own ? texts.ids_col_stride : texts.source_col_stride;
    ending_stride = texts.ids_col_stride;
    const bool possible = n >= 1 && length >= n - 1;
    windows = possible ? (own ? length : texts.source_length) - n + 1 : 0;
    ending = ids + (possible ? length - n + 1 : 0) * ending_stride;
  }

  // The last token of a window.
  C10_HOST_DEVICE int64_t token(int64_t window) const { return static_cast<int64_t>(text[(window + n - 1) * text_stride]); }

  // Whether a window begins with the ending. Compared from the back: the nearest tokens differ most often.
  C10_HOST_DEVICE bool matches(int64_t window) const {
    for (int64_t k = n - 2; k >= 0; --k) {
      if (text[(window + k) * text_stride] != ending[k * ending_stride]) return false;
    }
    return true;
  }
};

// The same conditions as _check in oslo_fusion/ops/no_repeat_ngram.py. Reads no device memory.
inline void check_no_repeat_ngram(const at::Tensor& scores, const at::Tensor& ids, const std::optional<at::Tensor>& source,
                                  int64_t size, const std::optional<at::Tensor>& sizes, int64_t length,
                                  const std::optional<at::Tensor>& device_length, bool in_place) {
  TORCH_CHECK_VALUE(scores.dim() == 2, "no_repeat_ngram: scores: received ", text(scores.sizes()),
                    ". Allowed: [rows, vocab]. Remedy: scores.view(-1, vocab).");
  const auto dtype = scores.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
                   "no_repeat_ngram: scores: received ", dtype,
                   ". Allowed: float16, bfloat16, float32 or float64. Remedy: scores.float().");
  for (int64_t dim = 0; in_place && dim < 2; ++dim) {
    TORCH_CHECK_VALUE(scores.stride(dim) != 0 || scores.size(dim) <= 1,
                      "no_repeat_ngram: scores: received an expanded tensor. Allowed: memory of its own for every score. "
                      "Remedy: scores.contiguous().");
  }
  const int64_t rows = scores.size(0);
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == rows, "no_repeat_ngram: ids: received ", text(ids.sizes()),
                    ". Allowed: [", text(rows), ", capacity], as scores is ", text(scores.sizes()), ". Remedy: a row per score row.");
  if (source) {
    const bool fits = source->dim() == 2 && (source->size(0) == 0 ? rows == 0 : rows % source->size(0) == 0);
    TORCH_CHECK_VALUE(fits, "no_repeat_ngram: source: received ", text(source->sizes()),
                      ". Allowed: [sources, length] where sources divides ", text(rows), ". Remedy: a row per beam group.");
  }
  TORCH_CHECK_VALUE(!sizes || (sizes->dim() == 1 && sizes->size(0) == rows), "no_repeat_ngram: sizes: received ",
                    text(sizes ? sizes->sizes() : at::IntArrayRef()), ". Allowed: [", text(rows),
                    "]. Remedy: a size per row, or one int.");
  TORCH_CHECK_VALUE(sizes || size >= 1, "no_repeat_ngram: size: received ", text(size),
                    ". Allowed: 1 or more. Remedy: leave the call out to ban nothing.");
  TORCH_CHECK_VALUE(0 <= length && length <= ids.size(1), "no_repeat_ngram: length: received ", text(length), ". Allowed: 0 to ",
                    text(ids.size(1)), ", the capacity of ids. Remedy: at most ids.shape[1].");
  TORCH_CHECK_VALUE(!device_length || device_length->dim() == 0, "no_repeat_ngram: length: received ",
                    text(device_length ? device_length->sizes() : at::IntArrayRef()),
                    ". Allowed: a tensor of shape []. Remedy: length.reshape(()).");
  const auto check_integers = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, "no_repeat_ngram: ", name,
                     ": received ", tensor.scalar_type(), ". Allowed: int32 or int64. Remedy: ", name, ".long().");
    TORCH_CHECK_VALUE(tensor.device() == scores.device(), "no_repeat_ngram: ", name, ": received a tensor on ", tensor.device(),
                      ". Allowed: ", scores.device(), ", where scores is. Remedy: ", name, ".to(scores.device).");
  };
  check_integers("ids", ids);
  if (source) check_integers("source", *source);
  if (sizes) check_integers("sizes", *sizes);
  if (device_length) check_integers("length", *device_length);
}

inline Integers integers(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), tensor->dim() == 0 ? 0 : tensor->stride(0), tensor->scalar_type() == at::kLong};
}

// `source` must have the dtype of `ids`.
template <typename id_t>
Texts<id_t> texts_of(const at::Tensor& scores, const at::Tensor& ids, const std::optional<at::Tensor>& source, int64_t size,
                     const std::optional<at::Tensor>& sizes, int64_t length, const std::optional<at::Tensor>& device_length) {
  Texts<id_t> texts{};
  texts.ids = ids.const_data_ptr<id_t>();
  texts.ids_row_stride = ids.stride(0);
  texts.ids_col_stride = ids.stride(1);
  texts.capacity = ids.size(1);
  texts.rows_per_source = 1;
  if (source) {
    texts.source = source->const_data_ptr<id_t>();
    texts.source_row_stride = source->stride(0);
    texts.source_col_stride = source->stride(1);
    texts.source_length = source->size(1);
    texts.rows_per_source = std::max<int64_t>(scores.size(0) / std::max<int64_t>(source->size(0), 1), 1);
  }
  texts.sizes = integers(sizes);
  texts.size = size;
  texts.device_length = integers(device_length);
  texts.length = length;
  return texts;
}

// The most windows that a row can have, whatever the sizes and the length on the device are.
inline int64_t most_windows(const at::Tensor& ids, const std::optional<at::Tensor>& source, int64_t size,
                            const std::optional<at::Tensor>& sizes, int64_t length,
                            const std::optional<at::Tensor>& device_length) {
  const int64_t searched = source ? source->size(1) : device_length ? ids.size(1) : length;
  return std::max<int64_t>(searched - (sizes ? 1 : size) + 1, 0);
}

// -inf as it lies in memory, so that a kernel is compiled per width of a score and not per dtype.
inline uint64_t minus_infinity_bits(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 0xFC00u;
    case at::kBFloat16:
      return 0xFF80u;
    case at::kFloat:
      return 0xFF800000u;
    default:
      return 0xFFF0000000000000u;
  }
}

}  // namespace oslo_fusion
