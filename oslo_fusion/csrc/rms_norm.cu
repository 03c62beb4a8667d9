// rms_norm on a GPU.
//
// A group of threads takes a row: one warp, of which several share a block, or a whole block. Where rows are aligned to 16 bytes
// and fit, each thread keeps up to kHeld 16-byte vectors of its row in registers and memory is read once; any other row is read
// again for the second pass. Groups stride over the rows.
//
// The weight's gradient: each group adds up its own rows (in registers, or in its own row of partial sums), a block adds up its
// groups, and a second kernel adds up the blocks, always in the same order. No atomics: the same input gives the same bits.

#include "rms_norm.h"

// c10's headers and not <ATen/cuda/CUDAContext.h>, which wants cuBLAS, cuSPARSE and cuSOLVER installed.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <type_traits>

namespace oslo_fusion {
namespace {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
constexpr int kHeld = 4;              // vectors of each tensor in a thread's registers: 64 bytes under way per thread and tensor
constexpr int kForwardThreads = 1024;
constexpr int kBackwardThreads = 512;  // the sums need another 32 registers a thread
constexpr int kForwardWarps = 4;       // rows of a block whose rows take a warp each
constexpr int kBackwardWarps = 8;      // their sums meet in at most 32 KiB of shared memory
constexpr int kSumRows = 16;
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T v[N];
};

// Makes the compiler take what lies in registers for something new. Otherwise it keeps what bfloat16 was widened to in the first
// pass for the second one, in twice the registers, and spills up to 100 bytes a thread.
template <typename T, int N>
__device__ __forceinline__ void renew(Vector<T, N>& vector) {
  auto* words = reinterpret_cast<uint32_t*>(&vector);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(vector) / sizeof(uint32_t)); ++i) asm volatile("" : "+r"(words[i]));
}

__device__ __forceinline__ float reciprocal_root(float value) { return ::rsqrtf(value); }
__device__ __forceinline__ double reciprocal_root(double value) { return ::rsqrt(value); }

// The sum over the threads of a row, for all of them. A block of more than one warp per row has one row: `shared` has a place
// per warp, and must be another one for the next row.
template <typename A>
__device__ __forceinline__ A group_sum(A value, A* shared) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  if (blockDim.x == kWarp) return value;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  A total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) total += shared[warp];
  return total;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename S, typename W, typename O>
struct Forward {
  const S* x;
  int64_t x_stride;
  const S* residual;  // nullptr: s is x
  int64_t residual_stride;
  const W* weight;  // nullptr: no scale
  S* s;
  O* y;
  wide_t<S>* rstd;
  int64_t rows, dim;
  wide_t<S> eps, offset;
};

template <typename S, int VEC>
__device__ __forceinline__ Vector<S, VEC> add(const Vector<S, VEC>& a, const Vector<S, VEC>& b) {
  Vector<S, VEC> sum;
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum.v[j] = static_cast<S>(static_cast<wide_t<S>>(a.v[j]) + static_cast<wide_t<S>>(b.v[j]));
  return sum;
}

template <typename S, int VEC>
__device__ __forceinline__ void add_squares(wide_t<S>& sum, const Vector<S, VEC>& s) {
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum += static_cast<wide_t<S>>(s.v[j]) * static_cast<wide_t<S>>(s.v[j]);
}

template <typename W, typename A, int VEC>
__device__ __forceinline__ void read_scale(A (&scale)[VEC], const W* weight, A offset, int64_t i) {
  if (weight == nullptr) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) scale[j] = A(1);
    return;
  }
  const auto read = reinterpret_cast<const Vector<W, VEC>*>(weight)[i];
#pragma unroll
  for (int j = 0; j < VEC; ++j) scale[j] = static_cast<A>(read.v[j]) + offset;
}

template <int VEC, typename S, typename W, typename O>
__device__ __forceinline__ void write_norm(const Forward<S, W, O>& work, O* y, int64_t i, const Vector<S, VEC>& s,
                                           wide_t<S> rstd) {
  using A = wide_t<S>;
  A scale[VEC];
  read_scale(scale, work.weight, work.offset, i);
  Vector<O, VEC> out;
#pragma unroll
  for (int j = 0; j < VEC; ++j) out.v[j] = static_cast<O>(static_cast<A>(s.v[j]) * rstd * scale[j]);
  reinterpret_cast<Vector<O, VEC>*>(y)[i] = out;
}

template <int VEC, bool KEPT, typename S, typename W, typename O>
__global__ void __launch_bounds__(kForwardThreads) rms_norm_forward_kernel(const Forward<S, W, O> work) {
  using A = wide_t<S>;
  using V = Vector<S, VEC>;
  __shared__ A shared[2][kForwardThreads / kWarp];
  const int64_t vectors = work.dim / VEC, step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int turn = 0;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; r < work.rows; r += step, turn ^= 1) {
    const V* x = reinterpret_cast<const V*>(work.x + r * work.x_stride);
    const V* residual = work.residual == nullptr ? nullptr : reinterpret_cast<const V*>(work.residual + r * work.residual_stride);
    V* s = reinterpret_cast<V*>(work.s + r * work.dim);
    O* y = work.y + r * work.dim;
    A sum = 0;
    if constexpr (KEPT) {
      V held[kHeld];
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i < vectors) held[k] = x[i];
      }
      if (residual != nullptr) {
        V other[kHeld];
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          const int i = threadIdx.x + k * blockDim.x;
          if (i < vectors) other[k] = residual[i];
        }
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          const int i = threadIdx.x + k * blockDim.x;
          renew(held[k]);
          renew(other[k]);
          if (i < vectors) s[i] = held[k] = add<S, VEC>(held[k], other[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (threadIdx.x + k * blockDim.x < vectors) add_squares<S, VEC>(sum, held[k]);
      }
      const A rstd = reciprocal_root(group_sum(sum, shared[turn]) / static_cast<A>(work.dim) + work.eps);
      if (threadIdx.x == 0) work.rstd[r] = rstd;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        renew(held[k]);
        if (i < vectors) write_norm<VEC>(work, y, i, held[k], rstd);
      }
    } else {
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        V read = x[i];
        if (residual != nullptr) s[i] = read = add<S, VEC>(read, residual[i]);
        add_squares<S, VEC>(sum, read);
      }
      const A rstd = reciprocal_root(group_sum(sum, shared[turn]) / static_cast<A>(work.dim) + work.eps);
      if (threadIdx.x == 0) work.rstd[r] = rstd;
      const V* again = residual == nullptr ? x : s;  // what a thread reads of s it wrote itself
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) write_norm<VEC>(work, y, i, again[i], rstd);
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

template <typename S, typename W, typename D>
struct Backward {
  const D* dy;
  int64_t dy_stride;
  const S* ds;  // nullptr: nothing reached s by another way
  int64_t ds_stride;
  const S* s;
  int64_t s_stride;
  const W* weight;
  const wide_t<S>* rstd;
  S* dx;
  wide_t<S>* partials;  // nullptr: the weight's gradient is not wanted
  int64_t rows, dim;
  wide_t<S> offset;
};

// The row's sum of g · x̂, of which the mean is taken away.
template <int VEC, typename S, typename W, typename D>
__device__ __forceinline__ void add_products(wide_t<S>& sum, const Backward<S, W, D>& work, int64_t i, const Vector<S, VEC>& s,
                                             const Vector<D, VEC>& dy, wide_t<S> rstd) {
  using A = wide_t<S>;
  A scale[VEC];
  read_scale(scale, work.weight, work.offset, i);
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum += static_cast<A>(dy.v[j]) * scale[j] * (static_cast<A>(s.v[j]) * rstd);
}

template <int VEC, typename S, typename W, typename D>
__device__ __forceinline__ void write_gradient(const Backward<S, W, D>& work, int64_t r, int64_t i, const Vector<S, VEC>& s,
                                               const Vector<D, VEC>& dy, wide_t<S> rstd, wide_t<S> mean,
                                               wide_t<S> (&products)[VEC]) {
  using A = wide_t<S>;
  A scale[VEC], other[VEC] = {};
  read_scale(scale, work.weight, work.offset, i);
  if (work.ds != nullptr) {
    const auto read = reinterpret_cast<const Vector<S, VEC>*>(work.ds + r * work.ds_stride)[i];
#pragma unroll
    for (int j = 0; j < VEC; ++j) other[j] = static_cast<A>(read.v[j]);
  }
  Vector<S, VEC> dx;
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const A g = static_cast<A>(dy.v[j]), normed = static_cast<A>(s.v[j]) * rstd;
    dx.v[j] = static_cast<S>((g * scale[j] - normed * mean) * rstd + other[j]);
    products[j] = g * normed;
  }
  reinterpret_cast<Vector<S, VEC>*>(work.dx + r * work.dim)[i] = dx;
}

template <int VEC, bool KEPT, typename S, typename W, typename D>
__global__ void __launch_bounds__(kBackwardThreads) rms_norm_backward_kernel(const Backward<S, W, D> work) {
  using A = wide_t<S>;
  using VS = Vector<S, VEC>;
  using VD = Vector<D, VEC>;
  __shared__ A shared[2][kBackwardThreads / kWarp];
  const int64_t vectors = work.dim / VEC, step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const A dim = static_cast<A>(work.dim);
  int turn = 0;
  if constexpr (KEPT) {
    A sums[kHeld][VEC] = {};
    for (int64_t r = first; r < work.rows; r += step, turn ^= 1) {
      const VS* s = reinterpret_cast<const VS*>(work.s + r * work.s_stride);
      const VD* dy = reinterpret_cast<const VD*>(work.dy + r * work.dy_stride);
      const A rstd = work.rstd[r];
      VS held_s[kHeld];
      VD held_dy[kHeld];
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i < vectors) {
          held_s[k] = s[i];
          held_dy[k] = dy[i];
        }
      }
      A sum = 0;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i < vectors) add_products<VEC>(sum, work, i, held_s[k], held_dy[k], rstd);
      }
      const A mean = group_sum(sum, shared[turn]) / dim;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        renew(held_s[k]);
        renew(held_dy[k]);
        if (i < vectors) {
          A products[VEC];
          write_gradient<VEC>(work, r, i, held_s[k], held_dy[k], rstd, mean, products);
#pragma unroll
          for (int j = 0; j < VEC; ++j) sums[k][j] += products[j];
        }
      }
    }
    if (work.partials == nullptr) return;
    // One row of partial sums per block; the groups of a block meet in shared memory.
    extern __shared__ char meeting_place[];
    A* met = reinterpret_cast<A*>(meeting_place);
    A* mine = blockDim.y == 1 ? work.partials + blockIdx.x * work.dim : met + threadIdx.y * work.dim;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = threadIdx.x + k * blockDim.x;
      if (i < vectors) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) mine[static_cast<int64_t>(i) * VEC + j] = sums[k][j];
      }
    }
    if (blockDim.y == 1) return;
    __syncthreads();
    for (int64_t col = threadIdx.y * blockDim.x + threadIdx.x; col < work.dim; col += blockDim.x * blockDim.y) {
      A sum = 0;
      for (int group = 0; group < static_cast<int>(blockDim.y); ++group) sum += met[group * work.dim + col];
      work.partials[blockIdx.x * work.dim + col] = sum;
    }
  } else {
    A* partials = work.partials == nullptr ? nullptr : work.partials + first * work.dim;  // of this group alone
    for (int64_t i = threadIdx.x; partials != nullptr && i < work.dim; i += blockDim.x) partials[i] = 0;
    // The sums are added to by other threads than those that cleared them.
    if (blockDim.x == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    for (int64_t r = first; r < work.rows; r += step, turn ^= 1) {
      const VS* s = reinterpret_cast<const VS*>(work.s + r * work.s_stride);
      const VD* dy = reinterpret_cast<const VD*>(work.dy + r * work.dy_stride);
      const A rstd = work.rstd[r];
      A sum = 0;
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) add_products<VEC>(sum, work, i, s[i], dy[i], rstd);
      const A mean = group_sum(sum, shared[turn]) / dim;
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        A products[VEC];
        write_gradient<VEC>(work, r, i, s[i], dy[i], rstd, mean, products);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          if (partials != nullptr) partials[i * VEC + j] += products[j];
        }
      }
    }
  }
}

template <typename A, typename W>
__global__ void __launch_bounds__(kWarp* kSumRows) column_sums_kernel(W* out, const A* partials, int64_t count, int64_t dim) {
  __shared__ A shared[kSumRows][kWarp];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  A sum = 0;
  if (col < dim) {
    for (int64_t p = threadIdx.y; p < count; p += kSumRows) sum += partials[p * dim + col];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= dim) return;
  for (int row = 1; row < kSumRows; ++row) sum += shared[row][threadIdx.x];
  out[col] = static_cast<W>(sum);
}

// --- launchers -------------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows are cut: the block, and whether a row stays in registers.
struct Cut {
  dim3 block;
  bool kept;
};

Cut cut_rows(int64_t vectors, bool aligned, bool few, int most_threads, int warps) {
  Cut cut;
  cut.kept = aligned && vectors <= static_cast<int64_t>(most_threads) * kHeld;
  // Few rows leave the device empty: then a row is spread over as many threads as it feeds, for the shortest time.
  const int64_t wanted = few ? vectors : divide_up(vectors, kHeld);
  const int64_t threads = std::min<int64_t>(divide_up(wanted, kWarp) * kWarp, most_threads);
  cut.block = dim3(static_cast<unsigned>(threads), threads == kWarp ? warps : 1);
  return cut;
}

int processors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename T>
bool is_aligned(const T* data, int64_t stride, int vector) {
  const auto bytes = std::min<int64_t>(sizeof(T) * vector, kVectorBytes);
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * static_cast<int64_t>(sizeof(T)) % bytes == 0;
}

// The combinations that are compiled. Others go through the wide type, in which the norm is computed anyway.
bool is_compiled(at::ScalarType s, at::ScalarType w, at::ScalarType o) {
  if (s == at::kDouble) return w == s && o == s;
  if (w == at::kDouble || o == at::kDouble) return false;
  if (s == at::kFloat) return w == s || o == s || o == w;
  return (w == s || w == at::kFloat) && (o == s || o == at::kFloat);
}

template <typename F>
void dispatch(at::ScalarType s, at::ScalarType w, at::ScalarType o, F&& f) {
  const auto half_and_float = [&](auto* narrow, auto* weight) {
    using S = std::remove_pointer_t<decltype(narrow)>;
    if (o == at::kFloat) {
      f(narrow, weight, static_cast<float*>(nullptr));
    } else {
      f(narrow, weight, static_cast<S*>(nullptr));
    }
  };
  const auto narrow = [&](auto* type) {
    if (w == at::kFloat) {
      half_and_float(type, static_cast<float*>(nullptr));
    } else {
      half_and_float(type, type);
    }
  };
  const auto single = static_cast<float*>(nullptr);
  const auto half = static_cast<at::Half*>(nullptr);
  const auto brain = static_cast<at::BFloat16*>(nullptr);
  if (s == at::kDouble) {
    const auto wide = static_cast<double*>(nullptr);
    f(wide, wide, wide);
  } else if (s == at::kHalf) {
    narrow(half);
  } else if (s == at::kBFloat16) {
    narrow(brain);
  } else if (w == at::kHalf) {
    o == at::kFloat ? f(single, half, single) : f(single, half, half);
  } else if (w == at::kBFloat16) {
    o == at::kFloat ? f(single, brain, single) : f(single, brain, brain);
  } else if (o == at::kHalf) {
    f(single, single, half);
  } else if (o == at::kBFloat16) {
    f(single, single, brain);
  } else {
    f(single, single, single);
  }
}

// The dtypes of weight and result (or gradient) that a kernel for s is launched with.
std::tuple<at::ScalarType, at::ScalarType> launched_dtypes(at::ScalarType s, const std::optional<at::Tensor>& weight,
                                                           at::ScalarType o) {
  auto w = weight ? weight->scalar_type() : s;
  if (!is_compiled(s, w, o)) w = wide_dtype(s);
  if (!is_compiled(s, w, o)) o = wide_dtype(s);
  return {w, o};
}

template <typename T>
const T* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

void check_device(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_cuda(), "rms_norm: x: received a tensor on ", x.device(), ". Allowed: a CUDA device. Remedy: x.cuda()");
}

Three forward(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& residual, double eps,
              double weight_offset, std::optional<at::ScalarType> out_dtype) {
  check_rms_norm(x, weight, residual, eps, out_dtype);
  check_device(x);
  const c10::cuda::OptionalCUDAGuard guard(x.device());
  const auto [s_dtype, y_dtype] = rms_norm_dtypes(x, weight, residual, out_dtype);
  const auto [w_dtype, o_dtype] = launched_dtypes(s_dtype, weight, y_dtype);
  const int64_t dim = x.size(-1), rows = x.numel() / dim;
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(o_dtype));
  at::Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(wide_dtype(s_dtype)));
  at::Tensor s = residual ? at::empty(x.sizes(), x.options().dtype(s_dtype)) : x;
  if (rows == 0) return {y.to(y_dtype), s, rstd};
  const Rows x_rows = as_rows(x.to(s_dtype));  // exact: s has the wider type of the two
  const Rows residual_rows = residual ? as_rows(residual->to(s_dtype)) : Rows{at::Tensor(), dim};
  const at::Tensor scale = weight ? weight->to(w_dtype).resolve_neg().contiguous() : at::Tensor();
  dispatch(s_dtype, w_dtype, o_dtype, [&](auto* s_type, auto* w_type, auto* o_type) {
    using S = std::remove_pointer_t<decltype(s_type)>;
    using W = std::remove_pointer_t<decltype(w_type)>;
    using O = std::remove_pointer_t<decltype(o_type)>;
    constexpr int kVector = kVectorBytes / sizeof(S);
    Forward<S, W, O> work;
    work.x = data_of<S>(x_rows.tensor);
    work.x_stride = x_rows.stride;
    work.residual = data_of<S>(residual_rows.tensor);
    work.residual_stride = residual_rows.stride;
    work.weight = data_of<W>(scale);
    work.s = residual ? static_cast<S*>(s.mutable_data_ptr()) : nullptr;
    work.y = static_cast<O*>(y.mutable_data_ptr());
    work.rstd = static_cast<wide_t<S>*>(rstd.mutable_data_ptr());
    work.rows = rows;
    work.dim = dim;
    work.eps = static_cast<wide_t<S>>(eps);
    work.offset = static_cast<wide_t<S>>(weight_offset);
    const bool aligned = dim % kVector == 0 && is_aligned(work.x, work.x_stride, kVector) &&
                         is_aligned(work.residual, work.residual_stride, kVector) && is_aligned(work.weight, 0, kVector);
    const bool few = rows <= 2 * processors();
    const Cut cut = cut_rows(aligned ? dim / kVector : dim, aligned, few, kForwardThreads, kForwardWarps);
    const auto blocks = static_cast<unsigned>(std::min(divide_up(rows, cut.block.y), kMostBlocks));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (cut.kept) {
      rms_norm_forward_kernel<kVector, true><<<blocks, cut.block, 0, stream>>>(work);
    } else if (aligned) {
      rms_norm_forward_kernel<kVector, false><<<blocks, cut.block, 0, stream>>>(work);
    } else {
      rms_norm_forward_kernel<1, false><<<blocks, cut.block, 0, stream>>>(work);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y.to(y_dtype), s, rstd};
}

template <typename A>
void sum_columns(const at::Tensor& dweight, const at::Tensor& partials) {
  const int64_t dim = dweight.size(0);
  const auto blocks = static_cast<unsigned>(divide_up(dim, kWarp));
  const auto launch = [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    column_sums_kernel<<<blocks, dim3(kWarp, kSumRows), 0, c10::cuda::getCurrentCUDAStream()>>>(
        static_cast<W*>(dweight.mutable_data_ptr()), static_cast<const A*>(partials.const_data_ptr()), partials.size(0), dim);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  switch (dweight.scalar_type()) {
    case at::kHalf:
      return launch(static_cast<at::Half*>(nullptr));
    case at::kBFloat16:
      return launch(static_cast<at::BFloat16*>(nullptr));
    case at::kFloat:
      return launch(static_cast<float*>(nullptr));
    default:
      return launch(static_cast<double*>(nullptr));
  }
}

}  // namespace

Two rms_norm_cuda(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double weight_offset,
                  std::optional<at::ScalarType> out_dtype) {
  auto [y, s, rstd] = forward(x, weight, std::nullopt, eps, weight_offset, out_dtype);
  return {y, rstd};
}

Three add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight, double eps,
                        double weight_offset, std::optional<at::ScalarType> out_dtype) {
  return forward(x, weight, residual, eps, weight_offset, out_dtype);
}

Two rms_norm_backward_cuda(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                           const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double weight_offset,
                           bool weight_gradient) {
  check_rms_norm_backward(dy, ds, s, weight, rstd);
  check_device(s);
  const c10::cuda::OptionalCUDAGuard guard(s.device());
  const auto s_dtype = s.scalar_type(), wide = wide_dtype(s_dtype);
  if (ds && ds->scalar_type() != s_dtype) {  // autograd gives a gradient of the same dtype; others are rare
    auto [dx, dweight] = rms_norm_backward_cuda(dy, ds->to(wide), s.to(wide), weight, rstd, weight_offset, weight_gradient);
    return {dx.to(s_dtype), dweight.numel() == 0 ? dweight.to(s_dtype) : dweight};
  }
  weight_gradient = weight_gradient && weight;
  const int64_t dim = s.size(-1), rows = s.numel() / dim;
  at::Tensor dx = at::empty(s.sizes(), s.options());
  if (rows == 0) return {dx, weight_gradient ? at::zeros({dim}, weight->options()) : at::empty({0}, s.options())};
  const auto [w_dtype, d_dtype] = launched_dtypes(s_dtype, weight, dy.scalar_type());
  const Rows dy_rows = as_rows(dy.to(d_dtype)), s_rows = as_rows(s), ds_rows = ds ? as_rows(*ds) : Rows{at::Tensor(), dim};
  const at::Tensor scale = weight ? weight->to(w_dtype).resolve_neg().contiguous() : at::Tensor();
  const at::Tensor kept_rstd = rstd.contiguous();
  at::Tensor dweight = weight_gradient ? at::empty({dim}, weight->options()) : at::empty({0}, s.options());
  dispatch(s_dtype, w_dtype, d_dtype, [&](auto* s_type, auto* w_type, auto* d_type) {
    using S = std::remove_pointer_t<decltype(s_type)>;
    using W = std::remove_pointer_t<decltype(w_type)>;
    using D = std::remove_pointer_t<decltype(d_type)>;
    using A = wide_t<S>;
    constexpr int kVector = kVectorBytes / sizeof(S);
    Backward<S, W, D> work;
    work.dy = data_of<D>(dy_rows.tensor);
    work.dy_stride = dy_rows.stride;
    work.ds = data_of<S>(ds_rows.tensor);
    work.ds_stride = ds_rows.stride;
    work.s = data_of<S>(s_rows.tensor);
    work.s_stride = s_rows.stride;
    work.weight = data_of<W>(scale);
    work.rstd = data_of<A>(kept_rstd);
    work.dx = static_cast<S*>(dx.mutable_data_ptr());
    work.rows = rows;
    work.dim = dim;
    work.offset = static_cast<A>(weight_offset);
    const bool aligned = dim % kVector == 0 && is_aligned(work.dy, work.dy_stride, kVector) &&
                         is_aligned(work.ds, work.ds_stride, kVector) && is_aligned(work.s, work.s_stride, kVector) &&
                         is_aligned(work.weight, 0, kVector);
    const int multiprocessors = processors();
    const bool few = rows <= 2 * multiprocessors;
    const Cut cut = cut_rows(aligned ? dim / kVector : dim, aligned, few, kBackwardThreads, kBackwardWarps);
    int64_t blocks = std::min(divide_up(rows, cut.block.y), kMostBlocks);
    // Each block costs a row of partial sums, written and read again: as many as give a multiprocessor 512 threads.
    const int64_t threads = cut.block.x * cut.block.y;
    if (weight_gradient) blocks = std::min(blocks, multiprocessors * std::max<int64_t>(kBackwardThreads / threads, 1));
    at::Tensor partials;
    if (weight_gradient) {
      partials = at::empty({cut.kept ? blocks : blocks * cut.block.y, dim}, s.options().dtype(wide));
    }
    work.partials = weight_gradient ? static_cast<A*>(partials.mutable_data_ptr()) : nullptr;
    const bool meet = cut.kept && weight_gradient && cut.block.y > 1;
    const size_t met_bytes = meet ? cut.block.y * dim * sizeof(A) : 0;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const auto grid = static_cast<unsigned>(blocks);
    if (cut.kept) {
      rms_norm_backward_kernel<kVector, true><<<grid, cut.block, met_bytes, stream>>>(work);
    } else if (aligned) {
      rms_norm_backward_kernel<kVector, false><<<grid, cut.block, 0, stream>>>(work);
    } else {
      rms_norm_backward_kernel<1, false><<<grid, cut.block, 0, stream>>>(work);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (weight_gradient) sum_columns<A>(dweight, partials);
  });
  return {dx, dweight};
}

}  // namespace oslo_fusion
