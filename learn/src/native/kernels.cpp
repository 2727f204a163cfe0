// The CPU kernels, compiled once for each instruction set (PIPE_ISA names it).
//
// What an output is made of, and in which order, never depends on the number of threads: a thread computes whole outputs,
// and sums over rows go through partial sums of fixed runs of rows. Gathered heads are padded with zeros to runs of W elements.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {
// Templates of the standard library over types of this file alone: one that several instruction sets share would be linked once,
// and with instructions that the processor may not have.
template <class T>
struct Local : std::allocator<T> {
  template <class U>
  struct rebind {
    typedef Local<U> other;
  };
};
template <class T>
using Vector = std::vector<T, Local<T>>;
struct Range {
  int64_t first, second;
};


constexpr int64_t BYTES = 64;
constexpr int64_t QUERIES = 16;   // queries of one tile of scores
constexpr int64_t PARTIAL = 64;   // rows of one partial sum

// Rows and padding go by runs of W elements, whatever a register holds: what stands behind the last run is alike on all sets, and so
// is the order of a sum over a row (not that of a product).
template <class T> constexpr int64_t W = BYTES / (int64_t)sizeof(T);

// What one register of this instruction set holds: a compiler takes vectors larger than that apart, element by element.
#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64;
#elif defined(__AVX2__)
constexpr int64_t REGISTER = 32;
#else
constexpr int64_t REGISTER = 16;
#endif
template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(REGISTER)));
  typedef float U __attribute__((vector_size(REGISTER), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(REGISTER)));
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(REGISTER)));
  typedef double U __attribute__((vector_size(REGISTER), aligned(8), may_alias));
};
template <class T> using V = typename Lanes<T>::V;
template <class T> constexpr int64_t R = REGISTER / (int64_t)sizeof(T);
constexpr int64_t PARTS = BYTES / REGISTER;

template <class T> inline V<T> load(const T* p) { return *(const typename Lanes<T>::U*)p; }
template <class T> inline void store(T* p, V<T> v) { *(typename Lanes<T>::U*)p = v; }
template <class T> inline V<T> splat(T x) { return V<T>{} + x; }
template <class T> inline int64_t padded(int64_t n) { return (n + W<T> - 1) / W<T> * W<T>; }
// The sum of a run of W elements, one after the other.
template <class T> inline T sum(const V<T> (&v)[PARTS]) {
  T s = 0;
  for (int64_t i = 0; i < PARTS; i++)
    for (int64_t j = 0; j < R<T>; j++) s += v[i][j];
  return s;
}

// exp: reduced to |r| <= ln 2 / 2, a polynomial of degree 6 (error below 2 units in the last place), 0 below -87.
inline V<float> exponential(V<float> x) {
  typedef Lanes<float>::I I;
  const V<float> low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);
  V<float> in = x < low ? low : x;
  in = in > high ? high : in;
  V<float> t = in * 1.44269504088896341f + magic;
  V<float> n = t - magic;
  V<float> r = in - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I bits = (I)t - (I)magic;
  V<float> scale = (V<float>)((bits + 127) << 23);
  V<float> made = p * scale;
  made = x < low ? V<float>{} : made;
  return x != x ? x : made;
}
inline V<double> exponential(V<double> x) {
  V<double> made;
  for (int64_t i = 0; i < R<double>; i++) made[i] = std::exp(x[i]);
  return made;
}

// c [m, n] (+)= a [m, k] b [k, n], one tile of M rows and N registers; element (i, j) of a lies at i * ai + j * aj.
template <class T, int M, int N>
inline void tile(int64_t k, const T* a, int64_t ai, int64_t aj, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  V<T> s[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) s[i][j] = add ? load(c + i * ldc + j * R<T>) : V<T>{};
  for (int64_t l = 0; l < k; l++) {
    V<T> row[N];
    for (int j = 0; j < N; j++) row[j] = load(b + l * ldb + j * R<T>);
    for (int i = 0; i < M; i++) {
      V<T> x = splat(a[i * ai + l * aj]);
      for (int j = 0; j < N; j++) s[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) store(c + i * ldc + j * R<T>, s[i][j]);
}

// The same of a single row: four runs of sums, because one would wait for itself.
template <class T, int N>
inline void line(int64_t k, const T* a, int64_t aj, const T* b, int64_t ldb, T* c, bool add) {
  V<T> s[4][N];
  for (int r = 0; r < 4; r++)
    for (int j = 0; j < N; j++) s[r][j] = add && r == 0 ? load(c + j * R<T>) : V<T>{};
  int64_t l = 0;
  for (; l + 4 <= k; l += 4)
    for (int r = 0; r < 4; r++)
      for (int j = 0; j < N; j++) s[r][j] += splat(a[(l + r) * aj]) * load(b + (l + r) * ldb + j * R<T>);
  for (; l < k; l++)
    for (int j = 0; j < N; j++) s[0][j] += splat(a[l * aj]) * load(b + l * ldb + j * R<T>);
  for (int j = 0; j < N; j++) store(c + j * R<T>, (s[0][j] + s[1][j]) + (s[2][j] + s[3][j]));
}

template <class T, int M, int N>
inline void rows_of(int64_t m, int64_t k, const T* a, int64_t ai, int64_t aj, const T* b, int64_t ldb, T* c, int64_t ldc,
                    bool add) {
  int64_t i = 0;
  for (; i + M <= m; i += M) tile<T, M, N>(k, a + i * ai, ai, aj, b, ldb, c + i * ldc, ldc, add);
  if constexpr (M > 4) {
    for (; i + 4 <= m; i += 4) tile<T, 4, N>(k, a + i * ai, ai, aj, b, ldb, c + i * ldc, ldc, add);
  }
  for (; i < m; i++) line<T, N>(k, a + i * ai, aj, b, ldb, c + i * ldc, add);
}

// c [m, n] (+)= a [m, k] b [k, n]; n is a multiple of W.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t ai, int64_t aj, const T* b, int64_t ldb, T* c,
              int64_t ldc, bool add) {
  int64_t j = 0;
#ifdef __AVX512F__
  for (; j + 4 * R<T> <= n; j += 4 * R<T>) rows_of<T, 4, 4>(m, k, a, ai, aj, b + j, ldb, c + j, ldc, add);
  for (; j + 2 * R<T> <= n; j += 2 * R<T>) rows_of<T, 8, 2>(m, k, a, ai, aj, b + j, ldb, c + j, ldc, add);
  for (; j < n; j += R<T>) rows_of<T, 8, 1>(m, k, a, ai, aj, b + j, ldb, c + j, ldc, add);
#else
  for (; j < n; j += 2 * R<T>) rows_of<T, 6, 2>(m, k, a, ai, aj, b + j, ldb, c + j, ldc, add);
#endif
}

template <class T> inline T dot(const T* x, const T* y, int64_t n) {
  V<T> s[PARTS]{};
  int64_t i = 0;
  for (; i + W<T> <= n; i += W<T>)
    for (int64_t p = 0; p < PARTS; p++) s[p] += load(x + i + p * R<T>) * load(y + i + p * R<T>);
  T rest = 0;
  for (; i < n; i++) rest += x[i] * y[i];
  return sum<T>(s) + rest;
}

// ---- norm and activation ----

template <class T>
void rms_norm(const T* x, const T* delta, const T* weight, double epsilon, int64_t rows, int64_t width, T* total, T* y,
              T* scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const T* from = x + r * width;
    T* to = y + r * width;
    if (delta) {
      T* kept = total + r * width;
      for (int64_t i = 0; i < width; i++) kept[i] = from[i] + delta[r * width + i];
      from = kept;
    }
    T by = 1 / std::sqrt(dot(from, from, width) / (T)width + (T)epsilon);
    scale[r] = by;
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * by * weight[i];
  }
}

template <class T>
void rms_norm_backward(const T* x, const T* weight, const T* scale, const T* dy, const T* through, int64_t rows,
                       int64_t width, T* dx, T* dw, int threads) {
  int64_t runs = (rows + PARTIAL - 1) / PARTIAL;
  Vector<T> partial((size_t)(runs * width), 0);
#pragma omp parallel num_threads(threads)
  {
    Vector<T> weighted((size_t)width);
    T* g = weighted.data();
#pragma omp for schedule(static)
    for (int64_t run = 0; run < runs; run++) {
      T* own = partial.data() + run * width;
      for (int64_t r = run * PARTIAL; r < std::min(rows, (run + 1) * PARTIAL); r++) {
        const T *from = x + r * width, *d = dy + r * width;
        T by = scale[r];
        for (int64_t i = 0; i < width; i++) {
          own[i] += d[i] * from[i] * by;
          g[i] = d[i] * weight[i];
        }
        T along = dot(g, from, width) * by * by * by / (T)width;
        T* to = dx + r * width;
        if (through) {
          const T* t = through + r * width;
          for (int64_t i = 0; i < width; i++) to[i] = g[i] * by - from[i] * along + t[i];
        } else {
          for (int64_t i = 0; i < width; i++) to[i] = g[i] * by - from[i] * along;
        }
      }
    }
  }
  std::fill(dw, dw + width, (T)0);
  for (int64_t run = 0; run < runs; run++)
    for (int64_t i = 0; i < width; i++) dw[i] += partial[(size_t)(run * width + i)];
}

template <class T> inline T sigmoid(T x) { return 1 / (1 + std::exp(-x)); }

template <class T> void swiglu(const T* gate_up, int64_t rows, int64_t width, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const T *gate = gate_up + 2 * r * width, *up = gate + width;
    T* to = out + r * width;
    int64_t i = 0;
    for (; i + W<T> <= width; i += W<T>)
      for (int64_t j = i; j < i + W<T>; j += R<T>) {
        V<T> g = load(gate + j);
        store(to + j, g / (exponential(-g) + (T)1) * load(up + j));
      }
    for (; i < width; i++) to[i] = gate[i] * sigmoid(gate[i]) * up[i];
  }
}

template <class T>
void swiglu_backward(const T* gate_up, const T* dout, int64_t rows, int64_t width, T* dgate_up, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const T *gate = gate_up + 2 * r * width, *up = gate + width, *d = dout + r * width;
    T *dg = dgate_up + 2 * r * width, *du = dg + width;
    int64_t i = 0;
    for (; i + W<T> <= width; i += W<T>)
      for (int64_t j = i; j < i + W<T>; j += R<T>) {
        V<T> g = load(gate + j), s = (T)1 / (exponential(-g) + (T)1), o = load(d + j), gs = g * s;
        store(du + j, o * gs);
        store(dg + j, o * load(up + j) * (s + gs * ((T)1 - s)));
      }
    for (; i < width; i++) {
      T s = sigmoid(gate[i]), gs = gate[i] * s;
      du[i] = d[i] * gs;
      dg[i] = d[i] * up[i] * (s + gs * (1 - s));
    }
  }
}

// ---- attention ----

// Turns a head by its position: element i with element i + width / 2, as Hugging Face lays them out.
template <class T>
inline void turn(const T* from, const T* cosine, const T* sine, int64_t half, T scale, T* to) {
  for (int64_t i = 0; i < half; i++) {
    T one = from[i], two = from[i + half];
    to[i] = (one * cosine[i] - two * sine[i]) * scale;
    to[i + half] = (two * cosine[i] + one * sine[i]) * scale;
  }
}
template <class T>
inline void turn_back(const T* from, const T* cosine, const T* sine, int64_t half, T scale, T* to) {
  for (int64_t i = 0; i < half; i++) {
    T one = from[i], two = from[i + half];
    to[i] = (one * cosine[i] + two * sine[i]) * scale;
    to[i + half] = (two * cosine[i] - one * sine[i]) * scale;
  }
}

// [rows, width] to [width, columns], columns beyond the rows being 0.
template <class T> void transpose(const T* from, int64_t rows, int64_t width, int64_t ld, T* to, int64_t columns) {
  for (int64_t i = 0; i < width; i++) {
    T* line = to + i * columns;
    for (int64_t r = 0; r < rows; r++) line[r] = from[r * ld + i];
    for (int64_t r = rows; r < columns; r++) line[r] = 0;
  }
}

// One head of one segment, gathered.
template <class T> struct Gathered {
  Vector<T> k, kt, v, vt, dk, dv;  // [L, D], [D, L], padded
  int64_t length = 0, columns = 0;
};

template <class T> struct Scratch {
  Gathered<T> root, child;
  Vector<T> q, dout, dq, scores, dscores, o, delta;
};

template <class T> struct Problem {
  const T *qkv, *cosine, *sine;
  Heads heads;
  Segments segments;
  int64_t stride() const { return (heads.queries + 2 * heads.shared) * heads.width; }
  int64_t first(int64_t s) const { return segments.rows[3 * s]; }
  int64_t length(int64_t s) const { return segments.rows[3 * s + 1]; }
  int64_t parent(int64_t s) const { return segments.rows[3 * s + 2]; }
};

template <class T>
void gather(const Problem<T>& p, int64_t segment, int64_t head, Gathered<T>& to, bool backward) {
  int64_t d = p.heads.width, dp = padded<T>(d), length = p.length(segment), columns = padded<T>(length);
  to.length = length;
  to.columns = columns;
  to.k.assign((size_t)(length * dp), 0);
  to.v.assign((size_t)(length * dp), 0);
  to.kt.resize((size_t)(d * columns));
  for (int64_t i = 0; i < length; i++) {
    int64_t token = p.first(segment) + i, position = p.segments.positions[token];
    const T* row = p.qkv + token * p.stride();
    const T* key = row + (p.heads.queries + head) * d;
    turn(key, p.cosine + position * (d / 2), p.sine + position * (d / 2), d / 2, (T)1, to.k.data() + i * dp);
    std::memcpy(to.v.data() + i * dp, key + p.heads.shared * d, sizeof(T) * (size_t)d);
  }
  transpose(to.k.data(), length, d, dp, to.kt.data(), columns);
  if (backward) {
    to.vt.resize((size_t)(d * columns));
    transpose(to.v.data(), length, d, dp, to.vt.data(), columns);
    to.dk.assign((size_t)(length * dp), 0);
    to.dv.assign((size_t)(length * dp), 0);
  }
}

// Scores of `count` queries from `begin` on, over the parent's columns and then the segment's own; gives the width.
template <class T>
int64_t score(const T* q, int64_t d, int64_t dp, int64_t begin, int64_t count, const Gathered<T>* parent,
              const Gathered<T>& own, Vector<T>& scores, int64_t* before) {
  int64_t base = parent ? parent->columns : 0, seen = padded<T>(begin + count), width = base + seen;
  *before = base;
  scores.resize((size_t)(QUERIES * width));
  const T none = -std::numeric_limits<T>::infinity();
  if (parent) {
    multiply(count, base, d, q + begin * dp, dp, (int64_t)1, parent->kt.data(), parent->columns, scores.data(), width,
             false);
    for (int64_t i = 0; i < count; i++)
      std::fill(scores.data() + i * width + parent->length, scores.data() + i * width + base, none);
  }
  multiply(count, seen, d, q + begin * dp, dp, (int64_t)1, own.kt.data(), own.columns, scores.data() + base, width, false);
  for (int64_t i = 0; i < count; i++)
    std::fill(scores.data() + i * width + base + begin + i + 1, scores.data() + (i + 1) * width, none);
  return width;
}

template <class T> inline T softmax(T* row, int64_t width, T* lse) {
  V<T> most = load(row);
  for (int64_t j = R<T>; j < width; j += R<T>) {
    V<T> x = load(row + j);
    most = x > most ? x : most;
  }
  T top = most[0];
  for (int64_t j = 1; j < R<T>; j++) top = std::max(top, most[j]);
  V<T> total[PARTS]{};
  for (int64_t j = 0; j < width; j += W<T>) {
    for (int64_t p = 0; p < PARTS; p++) {
      V<T> e = exponential(load(row + j + p * R<T>) - top);
      total[p] += e;
      store(row + j + p * R<T>, e);
    }
  }
  T all = sum<T>(total);
  *lse = top + std::log(all);
  return 1 / all;
}

template <class T>
void gather_queries(const Problem<T>& p, int64_t segment, int64_t head, Vector<T>& q) {
  int64_t d = p.heads.width, dp = padded<T>(d), length = p.length(segment);
  q.assign((size_t)(length * dp), 0);
  T scale = (T)(1 / std::sqrt((double)d));
  for (int64_t i = 0; i < length; i++) {
    int64_t token = p.first(segment) + i, position = p.segments.positions[token];
    turn(p.qkv + token * p.stride() + head * d, p.cosine + position * (d / 2), p.sine + position * (d / 2), d / 2, scale,
         q.data() + i * dp);
  }
}

template <class T>
void attend(const Problem<T>& p, int64_t segment, int64_t head, const Gathered<T>* parent, const Gathered<T>& own,
            Scratch<T>& s, T* out, T* lse) {
  int64_t d = p.heads.width, dp = padded<T>(d), length = own.length;
  gather_queries(p, segment, head, s.q);
  s.o.resize((size_t)(QUERIES * dp));
  for (int64_t begin = 0; begin < length; begin += QUERIES) {
    int64_t count = std::min(QUERIES, length - begin), base;
    int64_t width = score(s.q.data(), d, dp, begin, count, parent, own, s.scores, &base);
    T by[QUERIES];
    for (int64_t i = 0; i < count; i++) {
      int64_t token = p.first(segment) + begin + i;
      by[i] = softmax(s.scores.data() + i * width, width, lse + token * p.heads.queries + head);
    }
    if (parent) multiply(count, dp, parent->length, s.scores.data(), width, (int64_t)1, parent->v.data(), dp, s.o.data(), dp, false);
    multiply(count, dp, begin + count, s.scores.data() + base, width, (int64_t)1, own.v.data(), dp, s.o.data(), dp,
             parent != nullptr);
    for (int64_t i = 0; i < count; i++) {
      T* to = out + ((p.first(segment) + begin + i) * p.heads.queries + head) * d;
      for (int64_t j = 0; j < d; j++) to[j] = s.o[(size_t)(i * dp + j)] * by[i];
    }
  }
}

template <class T>
void attend_backward(const Problem<T>& p, int64_t segment, int64_t head, Gathered<T>* parent, Gathered<T>& own,
                     Scratch<T>& s, const T* out, const T* lse, const T* dout, T* dqkv) {
  int64_t d = p.heads.width, dp = padded<T>(d), length = own.length;
  gather_queries(p, segment, head, s.q);
  s.dout.assign((size_t)(length * dp), 0);
  s.delta.resize((size_t)length);
  for (int64_t i = 0; i < length; i++) {
    int64_t at = ((p.first(segment) + i) * p.heads.queries + head) * d;
    std::memcpy(s.dout.data() + i * dp, dout + at, sizeof(T) * (size_t)d);
    s.delta[(size_t)i] = dot(dout + at, out + at, d);
  }
  s.dq.resize((size_t)(QUERIES * dp));
  T scale = (T)(1 / std::sqrt((double)d));
  for (int64_t begin = 0; begin < length; begin += QUERIES) {
    int64_t count = std::min(QUERIES, length - begin), base;
    int64_t width = score(s.q.data(), d, dp, begin, count, parent, own, s.scores, &base);
    s.dscores.resize((size_t)(QUERIES * width));
    const T* upper = s.dout.data() + begin * dp;
    if (parent) multiply(count, base, d, upper, dp, (int64_t)1, parent->vt.data(), parent->columns, s.dscores.data(), width, false);
    multiply(count, width - base, d, upper, dp, (int64_t)1, own.vt.data(), own.columns, s.dscores.data() + base, width, false);
    for (int64_t i = 0; i < count; i++) {
      int64_t token = p.first(segment) + begin + i;
      T norm = lse[token * p.heads.queries + head], away = s.delta[(size_t)(begin + i)];
      T *prob = s.scores.data() + i * width, *grad = s.dscores.data() + i * width;
      for (int64_t j = 0; j < width; j += R<T>) {
        V<T> e = exponential(load(prob + j) - norm);
        store(prob + j, e);
        store(grad + j, e * (load(grad + j) - away));
      }
    }
    const T *q = s.q.data() + begin * dp, *prob = s.scores.data(), *grad = s.dscores.data();
    if (parent) {
      multiply(count, dp, parent->length, grad, width, (int64_t)1, parent->k.data(), dp, s.dq.data(), dp, false);
      multiply(parent->length, dp, count, grad, (int64_t)1, width, q, dp, parent->dk.data(), dp, true);
      multiply(parent->length, dp, count, prob, (int64_t)1, width, upper, dp, parent->dv.data(), dp, true);
    }
    multiply(count, dp, begin + count, grad + base, width, (int64_t)1, own.k.data(), dp, s.dq.data(), dp, parent != nullptr);
    multiply(begin + count, dp, count, grad + base, (int64_t)1, width, q, dp, own.dk.data(), dp, true);
    multiply(begin + count, dp, count, prob + base, (int64_t)1, width, upper, dp, own.dv.data(), dp, true);
    for (int64_t i = 0; i < count; i++) {
      int64_t token = p.first(segment) + begin + i, position = p.segments.positions[token];
      turn_back(s.dq.data() + i * dp, p.cosine + position * (d / 2), p.sine + position * (d / 2), d / 2, scale,
                dqkv + token * p.stride() + head * d);
    }
  }
}

template <class T> void scatter(const Problem<T>& p, int64_t segment, int64_t head, const Gathered<T>& from, T* dqkv) {
  int64_t d = p.heads.width, dp = padded<T>(d);
  for (int64_t i = 0; i < from.length; i++) {
    int64_t token = p.first(segment) + i, position = p.segments.positions[token];
    T* key = dqkv + token * p.stride() + (p.heads.queries + head) * d;
    turn_back(from.dk.data() + i * dp, p.cosine + position * (d / 2), p.sine + position * (d / 2), d / 2, (T)1, key);
    std::memcpy(key + p.heads.shared * d, from.dv.data() + i * dp, sizeof(T) * (size_t)d);
  }
}

// A root with its children is one task a key head, so that no two threads add to one gradient.
Vector<Range> trees(const Segments& segments) {
  Vector<Range> made;
  for (int64_t s = 0; s < segments.count; s++) {
    if (segments.rows[3 * s + 2] < 0) made.push_back({s, s + 1});
    else made.back().second = s + 1;
  }
  return made;
}

template <class T>
void attention(const T* qkv, Heads heads, Segments segments, const T* cosine, const T* sine, T* out, T* lse, int threads) {
  Problem<T> p{qkv, cosine, sine, heads, segments};
  auto all = trees(segments);
  int64_t tasks = (int64_t)all.size() * heads.shared, each = heads.queries / heads.shared;
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> s;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      auto [root, last] = all[(size_t)(task / heads.shared)];
      int64_t head = task % heads.shared;
      gather(p, root, head, s.root, false);
      for (int64_t q = head * each; q < (head + 1) * each; q++) attend<T>(p, root, q, nullptr, s.root, s, out, lse);
      for (int64_t child = root + 1; child < last; child++) {
        gather(p, child, head, s.child, false);
        for (int64_t q = head * each; q < (head + 1) * each; q++) attend<T>(p, child, q, &s.root, s.child, s, out, lse);
      }
    }
  }
}

template <class T>
void attention_backward(const T* qkv, Heads heads, Segments segments, const T* cosine, const T* sine, const T* out,
                        const T* lse, const T* dout, T* dqkv, int threads) {
  Problem<T> p{qkv, cosine, sine, heads, segments};
  auto all = trees(segments);
  int64_t tasks = (int64_t)all.size() * heads.shared, each = heads.queries / heads.shared;
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> s;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      auto [root, last] = all[(size_t)(task / heads.shared)];
      int64_t head = task % heads.shared;
      gather(p, root, head, s.root, true);
      for (int64_t q = head * each; q < (head + 1) * each; q++)
        attend_backward<T>(p, root, q, nullptr, s.root, s, out, lse, dout, dqkv);
      for (int64_t child = root + 1; child < last; child++) {
        gather(p, child, head, s.child, true);
        for (int64_t q = head * each; q < (head + 1) * each; q++)
          attend_backward<T>(p, child, q, &s.root, s.child, s, out, lse, dout, dqkv);
        scatter(p, child, head, s.child, dqkv);
      }
      scatter(p, root, head, s.root, dqkv);
    }
  }
}

// ---- generation ----

template <class T>
void store_prompts(const T* qkv, Heads heads, Segments segments, const T* cosine, const T* sine, const int64_t* offsets,
                   T* keys, T* values, int threads) {
  Problem<T> p{qkv, cosine, sine, heads, segments};
  int64_t d = heads.width, dp = padded<T>(d), tasks = segments.count * heads.shared;
#pragma omp parallel num_threads(threads)
  {
    Gathered<T> own;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      int64_t group = task / heads.shared, head = task % heads.shared;
      gather(p, group, head, own, false);
      T* kt = keys + offsets[group] * heads.shared * d + head * d * own.columns;
      T* v = values + (offsets[group] * heads.shared + head * own.columns) * dp;
      std::copy(own.kt.begin(), own.kt.begin() + d * own.columns, kt);
      std::copy(own.v.begin(), own.v.begin() + own.length * dp, v);
    }
  }
}

template <class T>
void decode(const T* qkv, Heads heads, DecodeRows rows, const T* cosine, const T* sine, const int64_t* offsets,
            const int64_t* lengths, const T* prompt_keys, const T* prompt_values, T* own_keys, T* own_values, int64_t slots,
            T* out, int threads) {
  int64_t d = heads.width, dp = padded<T>(d), half = d / 2, each = heads.queries / heads.shared;
  int64_t stride = (heads.queries + 2 * heads.shared) * d, used = rows.used, seen = padded<T>(used + 1);
  // Rows of one prompt stand together and read its keys once.
  Vector<Range> runs;
  for (int64_t r = 0; r < rows.count; r++) {
    if (!runs.empty() && rows.group[runs.back().first] == rows.group[r]) runs.back().second = r + 1;
    else runs.push_back({r, r + 1});
  }
  T scale = (T)(1 / std::sqrt((double)d));
  const T none = -std::numeric_limits<T>::infinity();
  int64_t tasks = (int64_t)runs.size() * heads.shared;
#pragma omp parallel num_threads(threads)
  {
    Vector<T> q, scores, o;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      auto [from, to] = runs[(size_t)(task / heads.shared)];
      int64_t head = task % heads.shared, group = rows.group[from], length = lengths[group], base = padded<T>(length);
      int64_t count = (to - from) * each, width = base + seen;
      q.assign((size_t)(count * dp), 0);
      scores.resize((size_t)(count * width));
      o.resize((size_t)(count * dp));
      const T* kt = prompt_keys + offsets[group] * heads.shared * d + head * d * base;
      const T* v = prompt_values + (offsets[group] * heads.shared + head * base) * dp;
      for (int64_t r = from; r < to; r++) {
        const T *row = qkv + r * stride, *c = cosine + rows.position[r] * half, *s = sine + rows.position[r] * half;
        for (int64_t e = 0; e < each; e++)
          turn(row + (head * each + e) * d, c, s, half, scale, q.data() + ((r - from) * each + e) * dp);
        T* own_kt = own_keys + (rows.slot[r] * heads.shared + head) * d * slots;
        T* own_v = own_values + ((rows.slot[r] * heads.shared + head) * slots + used) * dp;
        const T* key = row + (heads.queries + head) * d;
        for (int64_t i = 0; i < half; i++) {
          T one = key[i], two = key[i + half];
          own_kt[i * slots + used] = one * c[i] - two * s[i];
          own_kt[(i + half) * slots + used] = two * c[i] + one * s[i];
        }
        std::memcpy(own_v, key + heads.shared * d, sizeof(T) * (size_t)d);
        std::fill(own_v + d, own_v + dp, (T)0);
      }
      multiply(count, base, d, q.data(), dp, (int64_t)1, kt, base, scores.data(), width, false);
      for (int64_t r = from; r < to; r++) {
        const T* own_kt = own_keys + (rows.slot[r] * heads.shared + head) * d * slots;
        int64_t first = (r - from) * each;
        multiply(each, seen, d, q.data() + first * dp, dp, (int64_t)1, own_kt, slots, scores.data() + first * width + base, width, false);
      }
      for (int64_t i = 0; i < count; i++) {
        T* row = scores.data() + i * width;
        std::fill(row + length, row + base, none);
        std::fill(row + base + used + 1, row + width, none);
        T lse, by = softmax(row, width, &lse);
        for (int64_t j = 0; j < width; j += R<T>) store(row + j, load(row + j) * by);
      }
      multiply(count, dp, length, scores.data(), width, (int64_t)1, v, dp, o.data(), dp, false);
      for (int64_t r = from; r < to; r++) {
        const T* own_v = own_values + (rows.slot[r] * heads.shared + head) * slots * dp;
        int64_t first = (r - from) * each;
        multiply(each, dp, used + 1, scores.data() + first * width + base, width, (int64_t)1, own_v, dp, o.data() + first * dp, dp, true);
        for (int64_t e = 0; e < each; e++)
          std::memcpy(out + (r * heads.queries + head * each + e) * d, o.data() + (first + e) * dp, sizeof(T) * (size_t)d);
      }
    }
  }
}

// ---- the optimizer ----

template <class T>
void adamw(T* weights, const T* gradient, T* first, T* second, int64_t count, int64_t decayed, double clip, double beta1,
           double beta2, double rate, double decay, double c1, double c2, double epsilon, int threads) {
  T keep = (T)beta1, take = (T)(1 - beta1), keep2 = (T)beta2, take2 = (T)(1 - beta2), by = (T)clip;
  T step = (T)(rate / c1), root = (T)(1 / std::sqrt(c2)), eps = (T)epsilon, shrink = (T)(1 - rate * decay);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    T g = gradient[i] * by;
    T m = first[i] * keep + g * take, v = second[i] * keep2 + g * g * take2;
    first[i] = m;
    second[i] = v;
    if (rate != 0) {
      T w = i < decayed ? weights[i] * shrink : weights[i];
      weights[i] = w - step * m / (std::sqrt(v) * root + eps);
    }
  }
}

template <class T> constexpr Kernels<T> kernels() {
  return {rms_norm<T>, rms_norm_backward<T>, swiglu<T>,  swiglu_backward<T>, attention<T>, attention_backward<T>,
          store_prompts<T>, decode<T>, adamw<T>, W<T>};
}

#if defined(__AVX512F__)
const char* const name = "avx512";
#elif defined(__AVX2__)
const char* const name = "avx2";
#else
const char* const name = "base";
#endif

const Table table = {name, kernels<float>(), kernels<double>()};

}  // namespace

#define PIPE_JOIN(a, b) a##b
#define PIPE_NAME(isa) PIPE_JOIN(pipe_kernels_, isa)
extern "C" const Table* PIPE_NAME(PIPE_ISA)() { return &table; }
