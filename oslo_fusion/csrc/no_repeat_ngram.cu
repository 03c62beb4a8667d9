// no_repeat_ngram on a GPU, cut as oslo_fusion/triton/no_repeat_ngram.py is.
//
// In place: blocks stride over (row, stretch of the text); a thread compares one window and leaves at the first difference.
// Functional: blocks stride over (row, stretch of the vocabulary); a block copies its scores, waits for its threads, then goes
// through the whole text and bans what lies in its stretch. A long text would be read once per stretch: there the copy is apart.

#include "no_repeat_ngram.h"

// c10's headers and not <ATen/cuda/CUDAContext.h>, which wants cuBLAS, cuSPARSE and cuSOLVER installed.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace oslo_fusion {
namespace {

constexpr int kThreads = 128;
constexpr int kCopyThreads = 256;
constexpr int64_t kStretchBytes = 16384;     // copied by one block of the functional form: 64 bytes a thread
constexpr int64_t kFusedCopyTokens = 2048;   // as FUSED_COPY_TOKENS in Triton's launcher
constexpr int64_t kBlocks = 4096;            // aimed at; more would only queue
constexpr int64_t kVectorBytes = 16;

template <typename bits_t, typename id_t>
__global__ void __launch_bounds__(kThreads)
    no_repeat_ngram_ban_kernel(bits_t* scores, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t vocab,
                               Texts<id_t> texts, bits_t minus_infinity) {
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row<id_t> row(texts, r);
    const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
    for (int64_t w = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; w < row.windows; w += step) {
      const int64_t token = row.token(w);
      if (token >= 0 && token < vocab && row.matches(w)) scores[r * row_stride + token * col_stride] = minus_infinity;
    }
  }
}

template <typename bits_t>
__device__ void copy_stretch(bits_t* out, const bits_t* scores, int64_t col_stride, int64_t count) {
  constexpr int64_t kPerVector = kVectorBytes / sizeof(bits_t);
  int64_t done = 0;
  const auto out_offset = reinterpret_cast<uintptr_t>(out) % kVectorBytes;
  if (col_stride == 1 && out_offset == reinterpret_cast<uintptr_t>(scores) % kVectorBytes) {
    const int64_t head = min(out_offset == 0 ? int64_t{0} : static_cast<int64_t>((kVectorBytes - out_offset) / sizeof(bits_t)), count);
    if (threadIdx.x < head) out[threadIdx.x] = scores[threadIdx.x];
    const int64_t vectors = (count - head) / kPerVector;
    const auto* from = reinterpret_cast<const uint4*>(scores + head);
    auto* to = reinterpret_cast<uint4*>(out + head);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < vectors; i += kCopyThreads) to[i] = from[i];
    done = head + vectors * kPerVector;
  }
#pragma unroll 4
  for (int64_t i = done + threadIdx.x; i < count; i += kCopyThreads) out[i] = scores[i * col_stride];
}

template <typename bits_t, typename id_t>
__global__ void __launch_bounds__(kCopyThreads)
    no_repeat_ngram_copy_kernel(bits_t* out, const bits_t* scores, int64_t row_stride, int64_t col_stride, int64_t rows,
                                int64_t vocab, Texts<id_t> texts, bits_t minus_infinity) {
  constexpr int64_t kStretch = kStretchBytes / sizeof(bits_t);
  const int64_t step = gridDim.y * kStretch;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row<id_t> row(texts, r);
    for (int64_t lowest = blockIdx.y * kStretch; lowest < vocab; lowest += step) {
      const int64_t highest = min(lowest + kStretch, vocab);
      copy_stretch(out + r * vocab + lowest, scores + r * row_stride + lowest * col_stride, col_stride, highest - lowest);
      __syncthreads();  // a ban below may be written by another thread than the copy of the same score
      for (int64_t w = threadIdx.x; w < row.windows; w += kCopyThreads) {
        const int64_t token = row.token(w);
        if (token >= lowest && token < highest && row.matches(w)) out[r * vocab + token] = minus_infinity;
      }
    }
  }
}

// Rows and stretches; what exceeds a grid is strided over.
dim3 grid_of(int64_t rows, int64_t stretches) {
  constexpr int64_t kMostRows = (int64_t{1} << 31) - 1, kMostStretches = 65535;
  return dim3(static_cast<unsigned>(std::min(rows, kMostRows)), static_cast<unsigned>(std::min(stretches, kMostStretches)));
}

template <typename bits_t, typename id_t>
void launch_ban(const at::Tensor& scores, const Texts<id_t>& texts, int64_t windows) {
  const int64_t rows = scores.size(0);
  const int64_t wanted = (windows + kThreads - 1) / kThreads;
  const int64_t chunks = std::max<int64_t>(std::min(wanted, (kBlocks + rows - 1) / rows), 1);
  no_repeat_ngram_ban_kernel<bits_t, id_t><<<grid_of(rows, chunks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<bits_t*>(scores.mutable_data_ptr()), scores.stride(0), scores.stride(1), rows, scores.size(1), texts,
      static_cast<bits_t>(minus_infinity_bits(scores.scalar_type())));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename bits_t, typename id_t>
void launch_copy(const at::Tensor& out, const at::Tensor& scores, const Texts<id_t>& texts) {
  constexpr int64_t kStretch = kStretchBytes / sizeof(bits_t);
  const int64_t rows = scores.size(0), vocab = scores.size(1), chunks = (vocab + kStretch - 1) / kStretch;
  no_repeat_ngram_copy_kernel<bits_t, id_t>
      <<<grid_of(rows, chunks), kCopyThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          static_cast<bits_t*>(out.mutable_data_ptr()), static_cast<const bits_t*>(scores.const_data_ptr()), scores.stride(0),
          scores.stride(1), rows, vocab, texts, static_cast<bits_t>(minus_infinity_bits(scores.scalar_type())));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls f with a value of the unsigned type as wide as a score and a value of the ids' type.
template <typename F>
void dispatch(const at::Tensor& scores, const at::Tensor& ids, F&& f) {
  const auto with_bits = [&](auto id) {
    switch (scores.element_size()) {
      case 2:
        return f(uint16_t{}, id);
      case 4:
        return f(uint32_t{}, id);
      default:
        return f(uint64_t{}, id);
    }
  };
  if (ids.scalar_type() == at::kInt) {
    with_bits(int32_t{});
  } else {
    with_bits(int64_t{});
  }
}

std::optional<at::Tensor> as_wide_as(const at::Tensor& ids, const std::optional<at::Tensor>& source) {
  return source && source->scalar_type() != ids.scalar_type() ? source->to(ids.scalar_type()) : source;
}

void check_device(const at::Tensor& scores) {
  TORCH_CHECK_VALUE(scores.is_cuda(), "no_repeat_ngram: scores: received a tensor on ", scores.device(),
                    ". Allowed: a CUDA device. Remedy: scores.cuda().");
}

}  // namespace

void no_repeat_ngram_cuda_(at::Tensor scores, const at::Tensor& ids, const std::optional<at::Tensor>& source, int64_t size,
                           const std::optional<at::Tensor>& sizes, int64_t length,
                           const std::optional<at::Tensor>& device_length) {
  check_no_repeat_ngram(scores, ids, source, size, sizes, length, device_length, /*in_place=*/true);
  check_device(scores);
  const int64_t windows = most_windows(ids, source, size, sizes, length, device_length);
  if (scores.numel() == 0 || windows == 0) return;
  const c10::cuda::OptionalCUDAGuard guard(scores.device());
  const auto same_width = as_wide_as(ids, source);
  dispatch(scores, ids, [&](auto bits, auto id) {
    using id_t = decltype(id);
    launch_ban<decltype(bits), id_t>(scores, texts_of<id_t>(scores, ids, same_width, size, sizes, length, device_length), windows);
  });
}

at::Tensor no_repeat_ngram_cuda(const at::Tensor& scores, const at::Tensor& ids, const std::optional<at::Tensor>& source,
                                int64_t size, const std::optional<at::Tensor>& sizes, int64_t length,
                                const std::optional<at::Tensor>& device_length) {
  check_no_repeat_ngram(scores, ids, source, size, sizes, length, device_length, /*in_place=*/false);
  check_device(scores);
  const c10::cuda::OptionalCUDAGuard guard(scores.device());
  const int64_t windows = most_windows(ids, source, size, sizes, length, device_length);
  if (scores.numel() == 0 || windows == 0 || windows > kFusedCopyTokens) {
    at::Tensor result = scores.clone(at::MemoryFormat::Contiguous);
    no_repeat_ngram_cuda_(result, ids, source, size, sizes, length, device_length);
    return result;
  }
  at::Tensor result = at::empty_like(scores, scores.options(), at::MemoryFormat::Contiguous);
  const auto same_width = as_wide_as(ids, source);
  dispatch(scores, ids, [&](auto bits, auto id) {
    using id_t = decltype(id);
    launch_copy<decltype(bits), id_t>(result, scores,
                                      texts_of<id_t>(scores, ids, same_width, size, sizes, length, device_length));
  });
  return result;
}

}  // namespace oslo_fusion
