// The kernels' table: one of it for each instruction set and element type that kernels.cpp is compiled for.
#pragma once
#include <cstdint>

// Sequences as they lie in a batch of N tokens without padding. A segment attends causally to itself and wholly to the
// segment that is its parent, if it has one; children follow their parent, which has no parent itself.
struct Segments {
  const int64_t* rows;       // [count, 3]: first token, tokens, parent (-1: none)
  int64_t count;
  const int64_t* positions;  // [N]: the rotary position of each token
};

struct Heads {
  int64_t queries, shared, width;  // query heads, key and value heads, elements of a head
};

// Keys and values of generation. Keys stand transposed, [width, slots], so that scores are sums of whole vectors.
struct DecodeRows {
  int64_t count;
  const int64_t* group;     // [count]: the prompt of each row, never falling
  const int64_t* slot;      // [count]: the place of the row's own keys and values
  const int64_t* position;  // [count]: the rotary position of the row's token
  int64_t used;             // own tokens before this one, the same for all rows
};

template <class T>
struct Kernels {
  // y = rms_norm(x + delta) * weight; delta and sum may be null together.
  void (*rms_norm)(const T* x, const T* delta, const T* weight, double epsilon, int64_t rows, int64_t width, T* sum, T* y,
                   T* scale, int threads);
  // dx = gradient of the norm's input, plus `through` where it is not null; dw is [width].
  void (*rms_norm_backward)(const T* x, const T* weight, const T* scale, const T* dy, const T* through, int64_t rows,
                            int64_t width, T* dx, T* dw, int threads);
  // out = silu(gate) * up of rows that hold gate and up side by side.
  void (*swiglu)(const T* gate_up, int64_t rows, int64_t width, T* out, int threads);
  void (*swiglu_backward)(const T* gate_up, const T* dout, int64_t rows, int64_t width, T* dgate_up, int threads);
  // Rotates and attends; qkv is [N, (queries + 2 shared) width], tables are [positions, width / 2], lse is [N, queries].
  void (*attention)(const T* qkv, Heads heads, Segments segments, const T* cosine, const T* sine, T* out, T* lse,
                    int threads);
  void (*attention_backward)(const T* qkv, Heads heads, Segments segments, const T* cosine, const T* sine, const T* out,
                             const T* lse, const T* dout, T* dqkv, int threads);
  // Rotated keys and values of prompts into their cache; `offsets` [groups] are in padded slots.
  void (*store_prompts)(const T* qkv, Heads heads, Segments segments, const T* cosine, const T* sine,
                        const int64_t* offsets, T* keys, T* values, int threads);
  // Appends the rows' keys and values to their own cache of `slots` slots and attends to prompt and own.
  void (*decode)(const T* qkv, Heads heads, DecodeRows rows, const T* cosine, const T* sine, const int64_t* offsets,
                 const int64_t* lengths, const T* prompt_keys, const T* prompt_values, T* own_keys, T* own_values,
                 int64_t slots, T* out, int threads);
  // One step of AdamW over flat buffers; the gradient is multiplied by `clip`, the first `decayed` weights decay.
  void (*adamw)(T* weights, const T* gradient, T* first, T* second, int64_t count, int64_t decayed, double clip,
                double beta1, double beta2, double rate, double decay, double c1, double c2, double epsilon, int threads);
  int64_t vector;  // elements to which widths and slots are padded
};

struct Table {
  const char* name;  // of the instructions that the compiler was free to use
  Kernels<float> f32;
  Kernels<double> f64;
};

extern "C" {
const Table* pipe_kernels_base();
const Table* pipe_kernels_avx2();
const Table* pipe_kernels_avx512();
}
