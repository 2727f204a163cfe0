// Operations of libtorch for GPUs that its C interface for Rust does not have. No header of CUDA is needed.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <dlfcn.h>

#include <optional>

#include "guarded.h"

using at::Tensor;

namespace {

// Has operations take whatever form is fastest until it ends.
struct Unordered {
  at::Context& context = at::globalContext();
  bool deterministic = context.deterministicAlgorithms(), warns = context.deterministicAlgorithmsWarnOnly();
  Unordered() { context.setDeterministicAlgorithms(false, warns); }
  ~Unordered() { context.setDeterministicAlgorithms(deterministic, warns); }
};

}  // namespace

extern "C" {

// The compute capability of a GPU, 10 * major + minor; 0 where nothing tells. CUDA's runtime is there if libtorch has a CUDA
// half, which has loaded it: neither its headers nor a link to it are needed.
int64_t pipe_native_capability(int32_t device) {
  using Attribute = int (*)(int* value, int attribute, int device);
  static auto of = reinterpret_cast<Attribute>(dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"));
  // cudaDevAttrComputeCapabilityMajor and cudaDevAttrComputeCapabilityMinor.
  int major = 0, minor = 0;
  if (!of || of(&major, 75, device) != 0 || of(&minor, 76, device) != 0) return 0;
  return 10 * major + minor;
}

// Attention of queries [Tq, heads, D] over keys and values [Tk, shared, D], sequence by sequence: `begins_q` and `begins_k`
// [B + 1] i32 say where each begins, `longest_*` how long one is at most. Of sequence b only the first `used[b]` (i32) keys
// count where `used` is given. Causal means that the last query sees the last key. Half precision on CUDA alone.
Tensor* pipe_native_varlen(const Tensor* query, const Tensor* key, const Tensor* value, const Tensor* begins_q,
                           const Tensor* begins_k, int64_t longest_q, int64_t longest_k, bool causal, const Tensor* used) {
  return guarded([&] {
    std::optional<Tensor> live;
    if (used) live = *used;
    auto made = at::_flash_attention_forward(*query, *key, *value, *begins_q, *begins_k, longest_q, longest_k,
                                             /*dropout_p=*/0.0, causal, /*return_debug_mask=*/false,
                                             std::optional<double>(), std::optional<int64_t>(), std::optional<int64_t>(),
                                             live, std::optional<Tensor>());
    return new Tensor(std::get<0>(made));
  });
}

// into[index[i]] = rows[i] for indices that are all different. libtorch's deterministic form would sort them first, a dozen
// launches on a GPU that change nothing where none stands twice.
bool pipe_native_place(Tensor* into, const Tensor* index, const Tensor* rows) {
  return guarded([&] {
    std::optional<Unordered> unordered;
    // Another thread of a processor's never sees the switches move.
    if (into->is_cuda()) unordered.emplace();
    into->index_copy_(0, *index, *rows);
    return true;
  });
}

}  // extern "C"
