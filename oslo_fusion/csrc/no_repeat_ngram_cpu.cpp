// no_repeat_ngram on the CPU: parallel over rows, one pass over the text, a store per ban.

#include "no_repeat_ngram.h"

#include <ATen/Parallel.h>

namespace oslo_fusion {
namespace {

constexpr int64_t kWindowsPerTask = 16384;

template <typename bits_t, typename id_t>
void ban(const at::Tensor& scores, const Texts<id_t>& texts, int64_t windows) {
  auto* data = static_cast<bits_t*>(scores.mutable_data_ptr());
  const int64_t vocab = scores.size(1), row_stride = scores.stride(0), col_stride = scores.stride(1);
  const auto minus_infinity = static_cast<bits_t>(minus_infinity_bits(scores.scalar_type()));
  const int64_t grain = std::max<int64_t>(kWindowsPerTask / std::max<int64_t>(windows, 1), 1);
  at::parallel_for(0, scores.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<id_t> row(texts, r);
      for (int64_t w = 0; w < row.windows; ++w) {
        if (!row.matches(w)) continue;
        const int64_t token = row.token(w);
        if (token >= 0 && token < vocab) data[r * row_stride + token * col_stride] = minus_infinity;
      }
    }
  });
}

template <typename id_t>
void ban_any_width(const at::Tensor& scores, const Texts<id_t>& texts, int64_t windows) {
  switch (scores.element_size()) {
    case 2:
      return ban<uint16_t, id_t>(scores, texts, windows);
    case 4:
      return ban<uint32_t, id_t>(scores, texts, windows);
    default:
      return ban<uint64_t, id_t>(scores, texts, windows);
  }
}

}  // namespace

void no_repeat_ngram_cpu_(at::Tensor scores, const at::Tensor& ids, const std::optional<at::Tensor>& source, int64_t size,
                          const std::optional<at::Tensor>& sizes, int64_t length,
                          const std::optional<at::Tensor>& device_length) {
  check_no_repeat_ngram(scores, ids, source, size, sizes, length, device_length, /*in_place=*/true);
  const int64_t windows = most_windows(ids, source, size, sizes, length, device_length);
  if (scores.numel() == 0 || windows == 0) return;
  std::optional<at::Tensor> same_width = source;
  if (source && source->scalar_type() != ids.scalar_type()) same_width = source->to(ids.scalar_type());
  if (ids.scalar_type() == at::kInt) {
    ban_any_width(scores, texts_of<int32_t>(scores, ids, same_width, size, sizes, length, device_length), windows);
  } else {
    ban_any_width(scores, texts_of<int64_t>(scores, ids, same_width, size, sizes, length, device_length), windows);
  }
}

at::Tensor no_repeat_ngram_cpu(const at::Tensor& scores, const at::Tensor& ids, const std::optional<at::Tensor>& source,
                               int64_t size, const std::optional<at::Tensor>& sizes, int64_t length,
                               const std::optional<at::Tensor>& device_length) {
  check_no_repeat_ngram(scores, ids, source, size, sizes, length, device_length, /*in_place=*/false);
  at::Tensor result = scores.clone(at::MemoryFormat::Contiguous);
  no_repeat_ngram_cpu_(result, ids, source, size, sizes, length, device_length);
  return result;
}

}  // namespace oslo_fusion
