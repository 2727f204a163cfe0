// The kernels as operations of libtorch: shapes, types, the gradient graph, and a C interface for the Rust half.
//
// Every function gives null or false on an error, whose text pipe_native_error then has.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <vector>

#include "guarded.h"
#include "kernels.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The kernels' sets that this processor can run, the best first.
const std::vector<const Table*>& tables() {
  static const std::vector<const Table*> found = [] {
    std::vector<const Table*> made;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      made.push_back(pipe_kernels_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) made.push_back(pipe_kernels_avx2());
#endif
    made.push_back(pipe_kernels_base());
    return made;
  }();
  return found;
}

// What a thread has chosen. The backward pass of a processor's tensors runs on the thread that asks for it.
thread_local const Table* chosen = nullptr;

const Table& table() { return chosen ? *chosen : *tables().front(); }

template <class T> const Kernels<T>& kernels();
template <> const Kernels<float>& kernels<float>() { return table().f32; }
template <> const Kernels<double>& kernels<double>() { return table().f64; }

#define DISPATCH(tensor, ...)                                                                     \
  do {                                                                                            \
    if ((tensor).scalar_type() == at::kFloat) { using T = float; __VA_ARGS__ }                    \
    else { TORCH_CHECK((tensor).scalar_type() == at::kDouble, "a kernel wants f32 or f64");       \
           using T = double; __VA_ARGS__ }                                                        \
  } while (false)

// Threads for a step over so many elements: waking them costs more than a small step. No result depends on it.
int threads(int64_t elements) { return elements < (1 << 16) ? 1 : at::get_num_threads(); }

template <class T> const T* in(const Tensor& tensor) { return tensor.const_data_ptr<T>(); }
template <class T> T* to(Tensor& tensor) { return tensor.mutable_data_ptr<T>(); }

// The norm of x, or of x + delta where delta is defined; what was normed goes to `sum`.
Tensor norm(AutogradContext* context, const Tensor& x, const Tensor& delta, const Tensor& weight, double epsilon,
            Tensor& sum) {
  Tensor from = x.contiguous(), w = weight.contiguous(), more;
  int64_t width = from.size(-1), rows = from.numel() / std::max<int64_t>(width, 1);
  TORCH_CHECK(w.numel() == width && w.scalar_type() == from.scalar_type(), "a norm's weight does not fit");
  Tensor y = at::empty_like(from), scale = at::empty({rows}, from.options());
  sum = from;
  if (delta.defined()) {
    more = delta.contiguous();
    TORCH_CHECK(more.sizes() == from.sizes() && more.scalar_type() == from.scalar_type(), "what is added does not fit");
    sum = at::empty_like(from);
  }
  DISPATCH(from, {
    const T* added = more.defined() ? in<T>(more) : nullptr;
    T* kept = more.defined() ? to<T>(sum) : nullptr;
    kernels<T>().rms_norm(in<T>(from), added, in<T>(w), epsilon, rows, width, kept, to<T>(y), to<T>(scale), threads(from.numel()));
  });
  context->save_for_backward({sum, w, scale});
  return y;
}

// The gradients of what was normed and of the weight; `through` is what reaches the sum by another way.
std::pair<Tensor, Tensor> norm_backward(AutogradContext* context, Tensor dy, Tensor through) {
  auto saved = context->get_saved_variables();
  Tensor sum = saved[0], w = saved[1], scale = saved[2];
  if (!dy.defined()) return {through, Tensor()};
  dy = dy.contiguous();
  if (through.defined()) through = through.contiguous();
  int64_t width = sum.size(-1), rows = sum.numel() / std::max<int64_t>(width, 1);
  Tensor dx = at::empty_like(sum), dw = at::empty_like(w);
  DISPATCH(sum, {
    const T* beside = through.defined() ? in<T>(through) : nullptr;
    kernels<T>().rms_norm_backward(in<T>(sum), in<T>(w), in<T>(scale), in<T>(dy), beside, rows, width, to<T>(dx), to<T>(dw),
                                   threads(sum.numel()));
  });
  return {dx, dw};
}

struct Norm : torch::autograd::Function<Norm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double epsilon) {
    Tensor sum;
    return norm(context, x, Tensor(), weight, epsilon, sum);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto [dx, dw] = norm_backward(context, gradients[0], Tensor());
    return {dx, dw, Tensor()};
  }
};

struct AddNorm : torch::autograd::Function<AddNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& delta, const Tensor& weight,
                               double epsilon) {
    Tensor sum, y = norm(context, x, delta, weight, epsilon, sum);
    return {sum, y};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto [dx, dw] = norm_backward(context, gradients[1], gradients[0]);
    return {dx, dx, dw, Tensor()};
  }
};

struct Swiglu : torch::autograd::Function<Swiglu> {
  static Tensor forward(AutogradContext* context, const Tensor& gate_up) {
    Tensor from = gate_up.contiguous();
    int64_t width = from.size(-1) / 2, rows = from.numel() / std::max<int64_t>(2 * width, 1);
    auto size = from.sizes().vec();
    size.back() = width;
    Tensor out = at::empty(size, from.options());
    DISPATCH(from, { kernels<T>().swiglu(in<T>(from), rows, width, to<T>(out), threads(from.numel())); });
    context->save_for_backward({from});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    Tensor from = context->get_saved_variables()[0], dout = gradients[0].contiguous(), made = at::empty_like(from);
    int64_t width = from.size(-1) / 2, rows = from.numel() / std::max<int64_t>(2 * width, 1);
    DISPATCH(from, { kernels<T>().swiglu_backward(in<T>(from), in<T>(dout), rows, width, to<T>(made), threads(from.numel())); });
    return {made};
  }
};

Segments segments_of(const Tensor& segments, const Tensor& positions) {
  return {segments.const_data_ptr<int64_t>(), segments.size(0), positions.const_data_ptr<int64_t>()};
}

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* context, const Tensor& qkv, const Tensor& segments, const Tensor& positions,
                        const Tensor& cosine, const Tensor& sine, int64_t queries, int64_t shared, int64_t width) {
    Tensor from = qkv.contiguous();
    int64_t tokens = from.size(0);
    TORCH_CHECK(from.size(1) == (queries + 2 * shared) * width, "projections do not fit the heads");
    TORCH_CHECK(positions.numel() == tokens && cosine.scalar_type() == from.scalar_type(), "positions do not fit");
    Tensor out = at::empty({tokens, queries * width}, from.options()), lse = at::empty({tokens, queries}, from.options());
    Heads heads{queries, shared, width};
    DISPATCH(from, {
      kernels<T>().attention(in<T>(from), heads, segments_of(segments, positions), in<T>(cosine), in<T>(sine), to<T>(out),
                             to<T>(lse), threads(32 * from.numel()));
    });
    context->save_for_backward({from, out, lse, segments, positions, cosine, sine});
    context->saved_data["queries"] = queries;
    context->saved_data["shared"] = shared;
    context->saved_data["width"] = width;
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto saved = context->get_saved_variables();
    Tensor from = saved[0], dout = gradients[0].contiguous(), made = at::empty_like(from);
    Heads heads{context->saved_data["queries"].toInt(), context->saved_data["shared"].toInt(),
                context->saved_data["width"].toInt()};
    DISPATCH(from, {
      kernels<T>().attention_backward(in<T>(from), heads, segments_of(saved[3], saved[4]), in<T>(saved[5]),
                                      in<T>(saved[6]), in<T>(saved[1]), in<T>(saved[2]), in<T>(dout), to<T>(made),
                                      threads(32 * from.numel()));
    });
    variable_list all(8);
    all[0] = made;
    return all;
  }
};

}  // namespace

extern "C" {

const char* pipe_native_error() { return pipe_error.c_str(); }

int64_t pipe_native_sets() { return (int64_t)tables().size(); }

// The name of the set that this thread uses.
const char* pipe_native_set() { return table().name; }

// Has this thread use one of the sets, or the best one (-1).
bool pipe_native_choose(int64_t set) {
  if (set >= pipe_native_sets()) return false;
  chosen = set < 0 ? nullptr : tables()[(size_t)set];
  return true;
}

int64_t pipe_native_vector(bool wide) { return wide ? table().f64.vector : table().f32.vector; }

Tensor* pipe_native_rms_norm(const Tensor* x, const Tensor* weight, double epsilon) {
  return guarded([&] { return new Tensor(Norm::apply(*x, *weight, epsilon)); });
}

bool pipe_native_add_rms_norm(const Tensor* x, const Tensor* delta, const Tensor* weight, double epsilon, Tensor** out) {
  return guarded([&] {
    auto made = AddNorm::apply(*x, *delta, *weight, epsilon);
    out[0] = new Tensor(made[0]);
    out[1] = new Tensor(made[1]);
    return true;
  });
}

Tensor* pipe_native_swiglu(const Tensor* gate_up) {
  return guarded([&] { return new Tensor(Swiglu::apply(*gate_up)); });
}

Tensor* pipe_native_attention(const Tensor* qkv, const Tensor* segments, const Tensor* positions, const Tensor* cosine,
                              const Tensor* sine, int64_t queries, int64_t shared, int64_t width) {
  return guarded([&] {
    return new Tensor(Attention::apply(*qkv, *segments, *positions, *cosine, *sine, queries, shared, width));
  });
}

bool pipe_native_store_prompts(const Tensor* qkv, const Tensor* segments, const Tensor* positions, const Tensor* cosine,
                               const Tensor* sine, const int64_t* offsets, Tensor* keys, Tensor* values, int64_t queries,
                               int64_t shared, int64_t width) {
  return guarded([&] {
    Tensor from = qkv->contiguous();
    DISPATCH(from, {
      kernels<T>().store_prompts(in<T>(from), {queries, shared, width}, segments_of(*segments, *positions), in<T>(*cosine),
                                 in<T>(*sine), offsets, to<T>(*keys), to<T>(*values), threads(from.numel()));
    });
    return true;
  });
}

Tensor* pipe_native_decode(const Tensor* qkv, const int64_t* group, const int64_t* slot, const int64_t* position,
                           int64_t used, const Tensor* cosine, const Tensor* sine, const int64_t* offsets,
                           const int64_t* lengths, const Tensor* prompt_keys, const Tensor* prompt_values, Tensor* own_keys,
                           Tensor* own_values, int64_t slots, int64_t queries, int64_t shared, int64_t width) {
  return guarded([&] {
    Tensor from = qkv->contiguous();
    Tensor out = at::empty({from.size(0), queries * width}, from.options());
    DecodeRows rows{from.size(0), group, slot, position, used};
    DISPATCH(from, {
      kernels<T>().decode(in<T>(from), {queries, shared, width}, rows, in<T>(*cosine), in<T>(*sine), offsets, lengths,
                          in<T>(*prompt_keys), in<T>(*prompt_values), to<T>(*own_keys), to<T>(*own_values), slots,
                          to<T>(out), threads(16 * from.numel()));
    });
    return new Tensor(out);
  });
}

bool pipe_native_adamw(Tensor* weights, const Tensor* gradient, Tensor* first, Tensor* second, int64_t decayed, double clip,
                       double beta1, double beta2, double rate, double decay, double c1, double c2, double epsilon) {
  return guarded([&] {
    DISPATCH(*weights, {
      kernels<T>().adamw(to<T>(*weights), in<T>(*gradient), to<T>(*first), to<T>(*second), weights->numel(), decayed, clip,
                         beta1, beta2, rate, decay, c1, c2, epsilon, threads(weights->numel()));
    });
    return true;
  });
}

}  // extern "C"
