/* Passes over the rows of a weight, in one stream through memory: W' = RN(W + D) and what an undo record needs of W,
   and the way back. W and W' are bf16, fp16 or fp32 (`row.h` is included for each), D = left right^T.

   A pass is a filter. It computes each number with a bound, and decides it only if all numbers within the bound round
   to one. What is left is handed back, for `numerics.decide` and `undo.candidates`. So any compiler, vector width, FMA
   and order of sums give the same bytes: only a bound that is too small could not. The bounds are in `blocks.py`, which
   derives them, and reach this file as numbers in `struct block`. They need sums rounded to nearest in the types that
   are written here, and no flushed subnormals; each pass sets the processor's modes, and puts them back. */
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__)
#error "-ffast-math: the bounds do not hold for sums that the compiler has rearranged by algebra"
#endif
#if FLT_EVAL_METHOD != 0
#error "sums in a wider type than the one that is written, as on x87"
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "not a little-endian machine"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_PASSES 1
#include <cpuid.h>
#include <immintrin.h>
/* for these functions only: the module is also loaded where the processor lacks them, and says so */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect((x) != 0, 0)

enum { BF16, FP16, FP32 };
enum { GROUP = 6 };            /* rows that are multiplied together: their sums fill the registers */
enum { CHUNK = 16 };           /* products that are summed at a time, which makes the bound nearly that of so few */
enum { SEGMENT = 4096 };       /* numbers of a row whose squares are summed in the row's own type */
enum { TOGETHER = 256 };       /* runs that are computed at a time */
enum { PAGE = 4096 };          /* bytes */
enum { EVERY = -1, UNKNOWN = 0 }; /* counts of a run: all numbers of the type, and one that is handed back */

/* What a pass reads and writes; `blocks._Block` has the same fields. Positions are in the block, row by row. */
struct block {
  int64_t kind, back, record;      /* the type; whether W' is read and W written; whether runs are asked for */
  int64_t matrices, rows, columns, rank; /* matrices of one shape, one after the other in all arrays */
  int64_t strip;                   /* rows between two looks at what is left */
  const void *source;              /* (rows, columns), W; on the way back W' */
  void *result;                    /* (rows, columns), W'; on the way back W */
  const double *left, *right;      /* (rows, rank), (columns, rank) */
  const void *panels;              /* right as `fill_panels` packed it */
  const double *errors;            /* (rows,) bounds of D as the pass computes it; below 0: the row of D is 0 */
  const double *row_norms, *column_norms; /* of left and right, for the bound of a dot product in double */
  double spread;                   /* times |W + D|: its rounding, that of its ends, and of their casts */
  double dot_unit, dot_least;      /* the bound of a dot product is dot_unit * norm * norm + dot_least */
  double dot_spread;               /* times a sum with a dot product: its rounding and that of an interval's ends */
  double margin;                   /* times the larger end of a run: its rounding */
  double pair_unit;                /* times both norms: the bound of a dot product in pairs */
  int64_t is_exact;                /* whether left and right are the factors, times powers of two */
  void *scratch;                   /* scratch_size bytes */
  double *squares;                 /* (rows,) out: <D, D> where W and W' are finite */
  int32_t *index, *count, *at;     /* (rows * columns) out, in the order of positions */
  int64_t entries, undecided;      /* out: how many of index and count; of `at`, on the way there */
  struct sums *sums;               /* out: of each matrix */
};

/* Of a matrix; `blocks._SUMS` has the same fields. */
struct sums {
  int64_t changed, not_finite, entries; /* W' that differ; W that are inf or nan; the block's entries up to its end */
  double base, kept;               /* <W, W> and <W' - W, D>, where both are finite */
  double squares;                  /* <D, D> of the row that is at work */
};

INLINE float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE double double_of(int64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
INLINE int64_t bits_of_double(double x) { int64_t bits; memcpy(&bits, &x, 8); return bits; }

INLINE float value_bf16(uint32_t pattern) { return float_of(pattern << 16); }
INLINE float value_fp16(uint32_t pattern) { return _cvtsh_ss((unsigned short)pattern); }
INLINE float value_fp32(uint32_t pattern) { return float_of(pattern); }

/* Rounded to nearest, a tie away from 0: no tie is ever decided, as it is strictly within its bound. */
INLINE uint32_t nearest_bf16(float x) { return ((bits_of_float(x) + 0x8000u) >> 16) & 0xffffu; }
INLINE uint32_t nearest_fp16(double x) { return _cvtss_sh((float)x, _MM_FROUND_TO_NEAREST_INT); }
INLINE uint32_t nearest_fp32(double x) { return bits_of_float((float)x); }

static int32_t LANES[256][8] __attribute__((aligned(32))); /* the places of the bits that are set in a byte */

/* the same of 4 bits, each as the two places of a double's halves */
static int32_t HALVES[16][8] __attribute__((aligned(32)));

static void fill_lanes(void) {
  for (int mask = 0; mask < 256; mask++)
    for (int bit = 0, count = 0; bit < 8; bit++)
      if (mask >> bit & 1) LANES[mask][count++] = bit;
  for (int mask = 0; mask < 16; mask++)
    for (int bit = 0, count = 0; bit < 4; bit++)
      if (mask >> bit & 1) {
        HALVES[mask][count++] = 2 * bit;
        HALVES[mask][count++] = 2 * bit + 1;
      }
}

INLINE double sum_of_floats(__m256 x) {
  float each[8];
  double sum = 0;
  _mm256_storeu_ps(each, x);
  for (int i = 0; i < 8; i++) sum += each[i];
  return sum;
}

INLINE double sum_of_doubles(__m256d x) {
  double each[4];
  _mm256_storeu_pd(each, x);
  return (each[0] + each[1]) + (each[2] + each[3]);
}

INLINE __m256 size_ps(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE __m256d size_pd(__m256d x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
INLINE __m256d low_pd(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
INLINE __m256d high_pd(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

/* Write the lanes of a mask, one after the other. Up to 8 numbers are written, of which the first ones count. */
INLINE void compress_32(void *to, __m256i x, uint32_t mask) {
  __m256i order = _mm256_load_si256((const __m256i *)LANES[mask]);
  _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(x, order));
}

INLINE void compress_64(double *to, const double *x, uint32_t mask) {
  const __m256i first = _mm256_loadu_si256((const __m256i *)x), second = _mm256_loadu_si256((const __m256i *)(x + 4));
  const uint32_t low = mask & 15, high = mask >> 4;
  const __m256i order = _mm256_load_si256((const __m256i *)HALVES[low]);
  const __m256i order2 = _mm256_load_si256((const __m256i *)HALVES[high]);
  _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(first, order));
  _mm256_storeu_si256((__m256i *)(to + __builtin_popcount(low)), _mm256_permutevar8x32_epi32(second, order2));
}

INLINE void compress_positions(int32_t *to, int64_t first, uint32_t mask) {
  __m256i order = _mm256_load_si256((const __m256i *)LANES[mask]);
  _mm256_storeu_si256((__m256i *)to, _mm256_add_epi32(order, _mm256_set1_epi32((int32_t)first)));
}

/* A real number as high + low, |low| at most half of the last bit of high, and a bound on the error. */
struct pair { double high, low, bound; };

INLINE double two_sum(double x, double y, double *rest) {
  const double sum = x + y, part = sum - x;
  *rest = (x - (sum - part)) + (y - part);
  return sum;
}

/* x + a pair */
INLINE struct pair add_pair(double x, struct pair y) {
  double rest, lost;
  struct pair sum;
  sum.high = two_sum(x, y.high, &rest);
  rest = two_sum(rest, y.low, &lost);
  sum.high = two_sum(sum.high, rest, &sum.low);
  sum.bound = (y.bound + fabs(lost)) * (1 + 0x1p-40);
  return sum;
}

/* Whether the number is strictly between `high` and one of its neighbors, on the side of `low`. */
INLINE int is_between(struct pair x) {
  return fabs(x.low) > x.bound && fabs(x.low) + x.bound < fabs(x.high) * 0x1.fp-54;
}

/* Whether it is exactly `high`. */
INLINE int is_high(struct pair x) { return x.low == 0 && x.bound == 0 && x.high != 0; }

/* Half the interval that surely has the number, about `high`. */
INLINE double reach_of(struct pair x, double spread) { return (x.bound + fabs(x.low)) * 1.01 + fabs(x.high) * spread; }

/* The bits of |x|, rounded to the neighbor of smaller size, of a number that is between. */
INLINE int64_t bits_below(struct pair x) { return bits_of_double(fabs(x.high)) - ((x.high < 0) != (x.low < 0)); }

/* D at a row and a column, a sum of exact products in pairs (Ogita, Rump and Oishi, SIAM J. Sci. Comput. 26, 2005). */
static struct pair dot_in_pairs(const struct block *b, int64_t i, int64_t j) {
  const double *left = b->left + i * b->rank, *right = b->right + j * b->rank;
  struct pair sum = {0, 0, b->pair_unit * b->row_norms[i] * b->column_norms[j]};
  int is_rounded = !b->is_exact;
  for (int64_t k = 0; k < b->rank; k++) {
    double product = left[k] * right[k], rest;
    __asm__("" : "+x"(product)); /* so that it is rounded here, and not made part of an FMA with the sum below */
    const double error = fma(left[k], right[k], -product);
    sum.high = two_sum(sum.high, product, &rest);
    sum.low += rest + error;
    is_rounded |= (rest != 0) | (error != 0) | ((fabs(product) < 0x1p-900) & (left[k] != 0) & (right[k] != 0));
  }
  if (!(sum.bound > 0x1p-900)) sum.bound = INFINITY; /* an error may have underflowed */
  else if (!is_rounded) sum.bound = 0;
  return sum;
}

/* D at a row and a column in double, and a bound on its error. */
INLINE double dot(const struct block *b, int64_t i, int64_t j, double *bound) {
  const double *left = b->left + i * b->rank, *right = b->right + j * b->rank;
  double sum = 0, second = 0;
  int64_t k = 0;
  for (; k + 2 <= b->rank; k += 2) {
    sum += left[k] * right[k];
    second += left[k + 1] * right[k + 1];
  }
  if (k < b->rank) sum += left[k] * right[k];
  *bound = b->dot_unit * b->row_norms[i] * b->column_norms[j] + b->dot_least;
  return sum + second;
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, TYPE)

/* TYPE; PATTERN, an integer for its bits; REAL, in which it is summed, and whether that is float; PRECISION, LEAST,
   SIZE and INF as in `forms.Form`; STEP, its least number. */
#define TYPE bf16
#define PATTERN uint16_t
#define REAL float
#define IS_FLOAT 1
#define PRECISION 8
#define LEAST (-126)
#define SIZE 0x7fffu
#define INF 0x7f80u
#define STEP 0x1p-133
#include "row.h"
#undef TYPE
#undef REAL
#undef IS_FLOAT
#undef PRECISION
#undef LEAST
#undef INF
#undef STEP

#define TYPE fp16
#define REAL double
#define IS_FLOAT 0
#define PRECISION 11
#define LEAST (-14)
#define INF 0x7c00u
#define STEP 0x1p-24
#include "row.h"
#undef TYPE
#undef PATTERN
#undef PRECISION
#undef LEAST
#undef SIZE
#undef INF
#undef STEP

#define TYPE fp32
#define PATTERN uint32_t
#define PRECISION 24
#define LEAST (-126)
#define SIZE 0x7fffffffu
#define INF 0x7f800000u
#define STEP 0x1p-149
#include "row.h"

/* Records: a bit for each run of every number, set if W is +0.0; then planes of index, the lowest bit first. */

struct bit_writer {
  uint8_t *to;
  uint64_t held;
  int filled;
};

INLINE void write_bits(struct bit_writer *writer, uint64_t bits, int count) {
  writer->held |= bits << writer->filled;
  writer->filled += count;
  if (writer->filled >= 64) {
    memcpy(writer->to, &writer->held, 8);
    writer->to += 8;
    writer->filled -= 64;
    writer->held = writer->filled ? bits >> (count - writer->filled) : 0;
  }
}

/* Move entry i to `left`, with the largest index that its run has in place of the count. Return the next `left`. */
INLINE int64_t open_entry(
    int32_t *index, int32_t *count, int64_t i, int64_t left, uint32_t every, struct bit_writer *to) {
  uint32_t last = (uint32_t)count[i] - 1;
  if (count[i] == EVERY) {
    write_bits(to, index[i] == 0, 1);
    last = index[i] == 0 ? 0 : every; /* of +0.0 there is nothing more */
  }
  index[left] = index[i];
  count[left] = (int32_t)last;
  return left + (last != 0);
}

/* Write the bits of entries whose numbers have `width` bits, and return how many they are; the entries are used up. */
static int64_t pack_entries(int32_t *index, int32_t *count, int64_t entries, int64_t width, uint8_t *out) {
  const uint32_t every = UINT32_MAX >> (32 - width);
  struct bit_writer to = {out, 0, 0};
  int64_t left = 0, i = 0;
  for (; i + 8 <= entries; i += 8) {
    __m256i n = _mm256_loadu_si256((const __m256i *)(count + i)), x = _mm256_loadu_si256((const __m256i *)(index + i));
    __m256i usual = _mm256_cmpgt_epi32(n, _mm256_set1_epi32(1));
    if (UNLIKELY(_mm256_movemask_epi8(usual) != -1)) {
      for (int k = 0; k < 8; k++) left = open_entry(index, count, i + k, left, every, &to);
      continue;
    }
    _mm256_storeu_si256((__m256i *)(index + left), x);
    _mm256_storeu_si256((__m256i *)(count + left), _mm256_sub_epi32(n, _mm256_set1_epi32(1)));
    left += 8;
  }
  for (; i < entries; i++) left = open_entry(index, count, i, left, every, &to);
  for (int bit = 0; left; bit++) {
    int64_t open = 0;
    for (i = 0; i + 8 <= left; i += 8) {
      __m256i x = _mm256_loadu_si256((const __m256i *)(index + i));
      __m256i last = _mm256_loadu_si256((const __m256i *)(count + i));
      __m256i done = _mm256_cmpeq_epi32(_mm256_srli_epi32(last, bit + 1), _mm256_setzero_si256());
      __m256i plane = _mm256_sll_epi32(x, _mm_cvtsi32_si128(31 - bit));
      uint32_t mask = 255 & ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(done));
      write_bits(&to, (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(plane)), 8);
      compress_32(index + open, x, mask);
      compress_32(count + open, last, mask);
      open += __builtin_popcount(mask);
    }
    for (; i < left; i++) {
      uint32_t x = (uint32_t)index[i], last = (uint32_t)count[i];
      write_bits(&to, x >> bit & 1, 1);
      index[open] = (int32_t)x;
      count[open] = (int32_t)last;
      open += (uint64_t)last >> (bit + 1) != 0;
    }
    left = open;
  }
  memcpy(to.to, &to.held, 8);
  return 8 * (to.to - out) + to.filled;
}

/* Read the index of each entry from `length` bits. Return how many were read; -1 if they are too few. The count of an
   entry of every number that is +0.0 becomes 0; `open` has room for the entries. */
static int64_t unpack_entries(
    const uint8_t *from, int64_t length, int32_t *index, int32_t *count, int64_t entries, int64_t width,
    int32_t *open) {
  const uint32_t every = UINT32_MAX >> (32 - width);
  int64_t read = 0, left = 0;
#define NEXT_BIT ((uint32_t)from[read >> 3] >> (read & 7) & 1)
  for (int64_t i = 0; i < entries; i++) {
    index[i] = 0;
    if (UNLIKELY(count[i] == EVERY)) {
      if (read == length) return -1;
      if (NEXT_BIT) count[i] = 0;
      read++;
    }
    open[left] = (int32_t)i;
    left += count[i] != 0 && count[i] != 1;
  }
  for (int bit = 0; left; bit++) {
    int64_t next = 0;
    if (left > length - read) return -1;
    for (int64_t i = 0; i < left; i++, read++) {
      int32_t entry = open[i];
      uint32_t last = count[entry] == EVERY ? every : (uint32_t)count[entry] - 1;
      index[entry] = (int32_t)((uint32_t)index[entry] | NEXT_BIT << bit);
      open[next] = entry;
      next += (uint64_t)last >> (bit + 1) != 0;
    }
    left = next;
  }
#undef NEXT_BIT
  return read;
}

/* Write the numbers of the entries, from the place of each run's first number and their index in it. */
static void put_entries(
    void *out, int64_t width, const int32_t *first, const int32_t *index, const int32_t *count, const int32_t *at,
    int64_t entries) {
  const uint32_t size = UINT32_MAX >> (33 - width);
  for (int64_t i = 0; i < entries; i++) {
    int32_t place = (int32_t)((uint32_t)first[i] + (uint32_t)index[i]), sign = place >> 31;
    uint32_t pattern = ((uint32_t)place ^ (uint32_t)sign) | ((uint32_t)sign & ~size);
    if (count[i] == EVERY) pattern = (uint32_t)index[i];
    if (count[i] == 0) pattern = 0;
    if (width == 16) ((uint16_t *)out)[at[i]] = (uint16_t)pattern;
    else ((uint32_t *)out)[at[i]] = pattern;
  }
}

/* Write the sum of each page as 32-bit words. */
static void sum_pages(const uint8_t *from, int64_t pages, uint64_t *to) {
  for (int64_t page = 0; page < pages; page++, from += PAGE) {
    uint64_t sum = 0;
    for (int i = 0; i < PAGE / 4; i++) {
      uint32_t word;
      memcpy(&word, from + 4 * i, 4);
      sum += word;
    }
    to[page] = sum;
  }
}

/* Rounding to nearest, no subnormal flushed, no trap: what the bounds need, whatever the caller's thread has set. */
enum { MODES = 0x1f80 };

static int64_t size_of_scratch(int64_t kind, int64_t strip, int64_t columns, int64_t rank) {
  if (kind == BF16) return scratch_size_bf16(strip, columns, rank);
  return kind == FP16 ? scratch_size_fp16(strip, columns, rank) : scratch_size_fp32(strip, columns, rank);
}

static int64_t size_of_panels(int64_t kind, int64_t columns, int64_t rank) {
  const int64_t width = kind == BF16 ? panel_bf16 : panel_fp16;
  return (columns + width - 1) / width * width * rank * (kind == BF16 ? 4 : 8);
}

static void fill_panels(
    int64_t kind, const double *right, int64_t matrices, int64_t columns, int64_t rank, char *to) {
  const unsigned modes = _mm_getcsr();
  _mm_setcsr(MODES);
  for (int64_t k = 0; k < matrices; k++, right += columns * rank, to += size_of_panels(kind, columns, rank)) {
    if (kind == BF16) pack_panels_bf16(right, columns, rank, (float *)to);
    else if (kind == FP16) pack_panels_fp16(right, columns, rank, (double *)to);
    else pack_panels_fp32(right, columns, rank, (double *)to);
  }
  _mm_setcsr(modes);
}

/* Rows are counted in the block; what belongs to the columns is moved on from matrix to matrix. */
static void run_pass(struct block *b) {
  const unsigned modes = _mm_getcsr();
  _mm_setcsr(MODES);
  for (int64_t k = 0; k < b->matrices; k++) {
    if (b->kind == BF16) pass_bf16(b, k);
    else if (b->kind == FP16) pass_fp16(b, k);
    else pass_fp32(b, k);
    b->right += b->columns * b->rank;
    b->column_norms += b->columns;
    b->panels = (const char *)b->panels + size_of_panels(b->kind, b->columns, b->rank);
  }
  _mm_setcsr(modes);
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#include "sha256.h"

/* The module. Addresses are integers, and the caller keeps what is there. The lock is released: nothing is shared but
   constants. */

static int read_integers(PyObject *const *from, Py_ssize_t given, Py_ssize_t wanted, int64_t *to) {
  if (given != wanted) {
    PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", given, wanted);
    return 0;
  }
  for (Py_ssize_t i = 0; i < wanted; i++) to[i] = PyLong_AsLongLong(from[i]);
  return !PyErr_Occurred();
}

#define ADDRESS(x) ((void *)(uintptr_t)(x))
#define FUNCTION(name, wanted, result, work)                                             \
  static PyObject *py_##name(PyObject *module, PyObject *const *given, Py_ssize_t count) { \
    int64_t a[wanted], found = 0;                                                        \
    (void)module;                                                                        \
    if (!read_integers(given, count, wanted, a)) return NULL;                            \
    Py_BEGIN_ALLOW_THREADS                                                               \
    work;                                                                                \
    Py_END_ALLOW_THREADS                                                                 \
    result;                                                                              \
  }
#define NOTHING (void)found; Py_RETURN_NONE
#define NUMBER return PyLong_FromLongLong(found)

FUNCTION(run_pass, 1, NOTHING, run_pass(ADDRESS(a[0])))
FUNCTION(size_of_scratch, 4, NUMBER, found = size_of_scratch(a[0], a[1], a[2], a[3]))
FUNCTION(size_of_panels, 3, NUMBER, found = size_of_panels(a[0], a[1], a[2]))
FUNCTION(fill_panels, 6, NOTHING, fill_panels(a[0], ADDRESS(a[1]), a[2], a[3], a[4], ADDRESS(a[5])))
FUNCTION(pack_entries, 5, NUMBER, found = pack_entries(ADDRESS(a[0]), ADDRESS(a[1]), a[2], a[3], ADDRESS(a[4])))
FUNCTION(unpack_entries, 7, NUMBER,
         found = unpack_entries(ADDRESS(a[0]), a[1], ADDRESS(a[2]), ADDRESS(a[3]), a[4], a[5], ADDRESS(a[6])))
FUNCTION(put_entries, 7, NOTHING,
         put_entries(ADDRESS(a[0]), a[1], ADDRESS(a[2]), ADDRESS(a[3]), ADDRESS(a[4]), ADDRESS(a[5]), a[6]))
FUNCTION(sum_pages, 3, NOTHING, sum_pages(ADDRESS(a[0]), a[1], ADDRESS(a[2])))
FUNCTION(hash_blocks, 4, NOTHING, hash_blocks(ADDRESS(a[0]), ADDRESS(a[1]), ADDRESS(a[2]), a[3]))

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}
static PyMethodDef METHODS[] = {
    METHOD(run_pass), METHOD(size_of_scratch), METHOD(size_of_panels), METHOD(fill_panels),
    METHOD(pack_entries), METHOD(unpack_entries), METHOD(put_entries),
    METHOD(sum_pages), METHOD(hash_blocks), {NULL, NULL, 0, NULL}};

static const char *missing(void) {
  unsigned a, b, c, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return "no AVX2";
  if (!__builtin_cpu_supports("fma")) return "no FMA";
  if (!__builtin_cpu_supports("bmi2")) return "no BMI2";
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C ? NULL : "no F16C";
}
#else
static PyMethodDef METHODS[] = {{NULL, NULL, 0, NULL}};
struct block { char nothing; };
static const char *missing(void) { return "none for this processor"; }
static void fill_lanes(void) {}
static int has_sha(void) { return 0; }
#endif

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
  const char *what = missing();
  PyObject *module;
  if (what) {
    PyErr_SetString(PyExc_ImportError, what);
    return NULL;
  }
  fill_lanes();
  module = PyModule_Create(&MODULE);
  if (module && (PyModule_AddIntConstant(module, "SIZE_OF_BLOCK", (long)sizeof(struct block)) < 0 ||
                 PyModule_AddIntConstant(module, "HAS_SHA", has_sha()) < 0 ||
                 PyModule_AddStringConstant(module, "VECTORS", "avx2") < 0)) {
    Py_DECREF(module);
    return NULL;
  }
  return module;
}
