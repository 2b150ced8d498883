/* Passes over the rows of a weight, in one stream through memory: W' = RN(a W + D) and what an undo record needs of W,
   and the way back. W and W' are bf16, fp16 or fp32 (`type.h` is included for each W'), D = left right^T, a of each
   row. If W' is of another type than W, a row of W is widened to fp32 before.

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

#define INLINE static inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect((x) != 0, 0)

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_PASSES 1
#include "avx2.h"
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAS_PASSES 1
#include "neon.h"
#endif

#ifdef HAS_PASSES
enum { BF16, FP16, FP32 };
enum { GROUP = 6 };            /* rows that are multiplied together: their sums fill the registers */
enum { CHUNK = 16 };           /* products that are summed at a time, which makes the bound nearly that of so few */
enum { SEGMENT = 4096 };       /* numbers of a row whose squares are summed in the row's own type */
enum { TOGETHER = 256 };       /* runs that are computed at a time */
enum { PAGE = 4096 };          /* bytes */
enum { EVERY = -1, UNKNOWN = 0 }; /* counts of a run: all numbers of the type, and one that is handed back */

/* What a pass reads and writes; `blocks._Block` has the same fields. Positions are in the block, row by row. */
struct block {
  int64_t kind, source_kind;       /* the types of what is written and read */
  int64_t back, record;            /* whether W' is read and W written; whether runs are asked for. Neither if the
                                      types differ */
  int64_t matrices, rows, columns, rank; /* matrices of one shape, one after the other in all arrays */
  int64_t strip;                   /* rows between two looks at what is left */
  const void *source;              /* (rows, columns), W; on the way back W' */
  void *result;                    /* (rows, columns), W'; on the way back W */
  const double *left, *right;      /* (rows, rank), (columns, rank) */
  const void *panels;              /* right as `fill_panels` packed it */
  const double *errors;            /* (rows,) bounds of D as the pass computes it; below 0: the row of D is 0 */
  const double *sizes;             /* (rows,) of D at most */
  double *rooms;                   /* (rows,) 2^52 times a power of two that all products are multiples of; 0 if none is
                                      known, and where sums turn out to be inexact */
  double finest;                   /* the same times a W, of its own bits */
  const double *row_norms, *column_norms; /* of left and right, for the bound of a dot product in double */
  int64_t is_scaled;               /* whether any a may be other than 1 */
  const double *factors, *factor_errors; /* (rows,) a, and a bound on its error */
  double spread;                   /* times |a W + D|: its rounding, that of its ends, and of their casts */
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
INLINE float value_fp32(uint32_t pattern) { return float_of(pattern); }

/* Rounded to nearest, a tie away from 0: no tie is ever decided, as it is strictly within its bound. */
INLINE uint32_t nearest_bf16(float x) { return ((bits_of_float(x) + 0x8000u) >> 16) & 0xffffu; }
INLINE uint32_t nearest_fp32(double x) { return bits_of_float((float)x); }

/* The same of a vector. The patterns of a type of 16 bits are words of which the upper half is 0. */
INLINE words load_32(const void *from) { words x; memcpy(&x, from, sizeof x); return x; }
INLINE void store_32(void *to, words x) { memcpy(to, &x, sizeof x); }
INLINE words nearests_bf16(floats x) { return ((words)x + 0x8000u) >> 16; }
INLINE words nearests_fp32(floats x) { return (words)x; }
INLINE floats load_bf16(const uint16_t *from, words *patterns) {
  *patterns = load_16(from);
  return (floats)(*patterns << 16);
}
INLINE floats load_fp32(const uint32_t *from, words *patterns) {
  *patterns = load_32(from);
  return (floats)*patterns;
}
INLINE floats store_bf16(uint16_t *to, floats x, words *patterns) {
  store_16(to, *patterns = nearests_bf16(x));
  return (floats)(*patterns << 16);
}
INLINE floats store_fp32(uint32_t *to, floats x, words *patterns) {
  store_32(to, *patterns = (words)x);
  return x;
}

INLINE floats size_float(floats x) { return (floats)((words)x & 0x7fffffffu); }
INLINE doubles size_double(doubles x) { return (doubles)((longs)x & INT64_MAX); }

/* The numbers of a vector in the type of the sums: one vector of float, or two of double */
INLINE floats load_float(const float *from) { floats x; memcpy(&x, from, sizeof x); return x; }
INLINE doubles load_double(const double *from) { doubles x; memcpy(&x, from, sizeof x); return x; }
INLINE void to_float(floats x, floats *to) { *to = x; }
INLINE floats of_float(const floats *x) { return *x; }

/* A row of W in fp32, which has all numbers of the other types: where it is, or widened to `to`. */
static const uint32_t *row_in_fp32(const struct block *b, int64_t start, uint32_t *to) {
  if (b->source_kind == FP32) return (const uint32_t *)b->source + start;
  const uint16_t *from = (const uint16_t *)b->source + start;
  const int is_bf16 = b->source_kind == BF16;
  int64_t i = 0;
  for (words patterns; i + WIDTH <= b->columns; i += WIDTH)
    store_32(to + i, (words)(is_bf16 ? load_bf16(from + i, &patterns) : load_fp16(from + i, &patterns)));
  for (; i < b->columns; i++) to[i] = bits_of_float(is_bf16 ? value_bf16(from[i]) : value_fp16(from[i]));
  return to;
}

/* Whether all sums of a row are exact in double: of multiples of one power of two, less than 2^53 times as large. */
static int is_exact(const struct block *b, int64_t row, const uint32_t *from) {
  uint32_t most = 0, least = UINT32_MAX; /* least: less 1, so that 0 is the largest */
  if (!(b->sizes[row] < b->rooms[row])) return 0;
  for (int64_t i = 0; i < b->columns; i++) {
    const uint32_t size = from[i] & 0x7fffffffu;
    most = size > most ? size : most;
    least = size - 1 < least ? size - 1 : least;
  }
  const double size = b->sizes[row] + value_fp32(most);
  return size < b->rooms[row] && (most == 0 || size < b->finest * value_fp32(least + 1));
}

enum { VECTORS_OF_PANEL = 16 / WIDTH };
enum { ALL = (1 << WIDTH) - 1, HALF = WIDTH / 2 };
static uint32_t LANES[1 << WIDTH][WIDTH] __attribute__((aligned(4 * WIDTH))); /* the places of a mask's bits */

/* the same of half as many bits, each as the two places of a double's halves */
static uint32_t HALVES[1 << HALF][WIDTH] __attribute__((aligned(4 * WIDTH)));

static void fill_lanes(void) {
  for (uint32_t mask = 0; mask <= ALL; mask++)
    for (uint32_t bit = 0, count = 0; bit < WIDTH; bit++)
      if (mask >> bit & 1) LANES[mask][count++] = bit;
  for (uint32_t mask = 0; mask < 1 << HALF; mask++)
    for (uint32_t bit = 0, count = 0; bit < HALF; bit++)
      if (mask >> bit & 1) {
        HALVES[mask][count++] = 2 * bit;
        HALVES[mask][count++] = 2 * bit + 1;
      }
}

/* Write the lanes of a mask, one after the other. A whole vector is written, of which the first ones count. */
INLINE void compress(void *to, words x, uint32_t mask) { store_32(to, permute(x, load_32(LANES[mask]))); }
INLINE void compress_positions(int32_t *to, int64_t first, uint32_t mask) {
  store_32(to, load_32(LANES[mask]) + (uint32_t)first);
}
INLINE void compress_float(float *to, const float *x, uint32_t mask) { compress(to, load_32(x), mask); }
INLINE void compress_double(double *to, const double *x, uint32_t mask) {
  const uint32_t low = mask & ((1 << HALF) - 1), high = mask >> HALF;
  store_32(to, permute(load_32(x), load_32(HALVES[low])));
  store_32(to + __builtin_popcount(low), permute(load_32(x + HALF), load_32(HALVES[high])));
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

/* a x + D, with a bound on a's error. */
INLINE struct pair sum_of(double a, double error, double x, struct pair D) {
  const double product = rounded(a * x);
  double lost;
  D.low = two_sum(D.low, fma(a, x, -product), &lost);
  D.bound += error * fabs(x) + fabs(lost);
  return add_pair(product, D);
}

/* The quotient to the precision of a double. */
INLINE struct pair divided(struct pair x, double a, double error) {
  const double quotient = x.high / a, rounding = error / fabs(a) + 0x1p-51; /* beside the quotient's: |x.low| */
  const struct pair result = {quotient, 0, x.bound / fabs(a) + fabs(quotient) * rounding};
  return result;
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
    const double product = rounded(left[k] * right[k]); /* and not part of an FMA with the sum below */
    double rest;
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
#include "type.h"
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
#include "type.h"
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
#include "type.h"

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
  for (; i + WIDTH <= entries; i += WIDTH) {
    const words x = load_32(index + i), last = load_32(count + i) - 1;
    if (UNLIKELY(mask_of(last | (words)(last == 0)))) { /* none, one, or every number */
      for (int k = 0; k < WIDTH; k++) left = open_entry(index, count, i + k, left, every, &to);
      continue;
    }
    store_32(index + left, x);
    store_32(count + left, last);
    left += WIDTH;
  }
  for (; i < entries; i++) left = open_entry(index, count, i, left, every, &to);
  for (int bit = 0; left; bit++) {
    int64_t open = 0;
    for (i = 0; i + WIDTH <= left; i += WIDTH) {
      const words x = load_32(index + i), last = load_32(count + i);
      const uint32_t stays = ALL & ~mask_of((words)(last >> bit >> 1 == 0));
      write_bits(&to, mask_of(x << (31 - bit)), WIDTH);
      compress(index + open, x, stays);
      compress(count + open, last, stays);
      open += __builtin_popcount(stays);
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

#include "rans.h"

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
  const modes before = get_modes();
  set_modes(MODES);
  for (int64_t k = 0; k < matrices; k++, right += columns * rank, to += size_of_panels(kind, columns, rank)) {
    if (kind == BF16) pack_panels_bf16(right, columns, rank, (float *)to);
    else if (kind == FP16) pack_panels_fp16(right, columns, rank, (double *)to);
    else pack_panels_fp32(right, columns, rank, (double *)to);
  }
  set_modes(before);
}

static void (*const PASSES[2][3])(struct block *, int64_t) = {
    {pass_bf16, pass_fp16, pass_fp32}, {cast_pass_bf16, cast_pass_fp16, cast_pass_fp32}};

/* Rows are counted in the block; what belongs to the columns is moved on from matrix to matrix. */
static void run_pass(struct block *b) {
  const modes before = get_modes();
  set_modes(MODES);
  for (int64_t k = 0; k < b->matrices; k++) {
    PASSES[b->kind != b->source_kind][b->kind](b, k);
    b->right += b->columns * b->rank;
    b->column_norms += b->columns;
    b->panels = (const char *)b->panels + size_of_panels(b->kind, b->columns, b->rank);
  }
  set_modes(before);
}

#ifdef __x86_64__
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define HAS_HASHES 1
#include "sha256.h"
#endif

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
FUNCTION(make_steps, 5, NOTHING, make_steps(a[0], ADDRESS(a[1]), ADDRESS(a[2]), a[3], ADDRESS(a[4])))
FUNCTION(take_steps, 6, NOTHING, take_steps(a[0], ADDRESS(a[1]), ADDRESS(a[2]), a[3], a[4], ADDRESS(a[5])))
FUNCTION(classify, 6, NOTHING, classify(a[0], ADDRESS(a[1]), a[2], ADDRESS(a[3]), a[4], ADDRESS(a[5])))
FUNCTION(count_symbols, 5, NOTHING, count_symbols(ADDRESS(a[0]), ADDRESS(a[1]), a[2], ADDRESS(a[3]), a[4]))
FUNCTION(mark_symbols, 5, NUMBER,
         found = mark_symbols(ADDRESS(a[0]), ADDRESS(a[1]), a[2], ADDRESS(a[3]), ADDRESS(a[4])))
FUNCTION(encode_symbols, 8, NUMBER,
         found = encode_symbols(
             ADDRESS(a[0]), ADDRESS(a[1]), a[2], a[3], ADDRESS(a[4]), a[5], ADDRESS(a[6]), ADDRESS(a[7])))
FUNCTION(decode_symbols, 8, NUMBER,
         found = decode_symbols(
             ADDRESS(a[0]), a[1], a[2], ADDRESS(a[3]), ADDRESS(a[4]), ADDRESS(a[5]), a[6], ADDRESS(a[7])))
#ifdef HAS_HASHES
FUNCTION(hash_blocks, 4, NOTHING, hash_blocks(ADDRESS(a[0]), ADDRESS(a[1]), ADDRESS(a[2]), a[3]))
#endif

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}
static PyMethodDef METHODS[] = {
    METHOD(run_pass), METHOD(size_of_scratch), METHOD(size_of_panels), METHOD(fill_panels),
    METHOD(pack_entries), METHOD(unpack_entries), METHOD(put_entries),
    METHOD(sum_pages),
    METHOD(make_steps), METHOD(take_steps), METHOD(classify), METHOD(count_symbols), METHOD(mark_symbols),
    METHOD(encode_symbols), METHOD(decode_symbols),
#ifdef HAS_HASHES
    METHOD(hash_blocks),
#endif
    {NULL, NULL, 0, NULL}};
#else
static PyMethodDef METHODS[] = {{NULL, NULL, 0, NULL}};
struct block { char nothing; };
#define VECTORS ""
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
                 PyModule_AddStringConstant(module, "VECTORS", VECTORS) < 0)) {
    Py_DECREF(module);
    return NULL;
  }
  return module;
}
