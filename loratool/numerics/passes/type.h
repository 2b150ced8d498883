/* What the passes need for one type of W' (see kernel.c). */

#if IS_FLOAT
#define REAL_MAX FLT_MAX
#else
#define REAL_MAX DBL_MAX
#endif
#define POWERS (SIZE - ((1u << (PRECISION - 1)) - 1)) /* a pattern & POWERS is its power of two, if not subnormal */

/* What is looked at again after a pass: numbers that it did not decide, and those whose runs may be longer than one. */
struct NAME(list) {
  int64_t length, hits;
  int32_t *at; /* positions in the strip, rising */
  uint32_t *from, *to; /* the bits of what the pass read and wrote */
  REAL *change; /* D; on the way back -D, which was added */
  int32_t *hit; /* which of these are undecided */
};

/* Numbers are done WIDTH at a time, in so many vectors of REAL; a panel has 64 bytes of each product's factor. */
#if IS_FLOAT
typedef floats NAME(vector);
#else
typedef doubles NAME(vector);
#endif
enum { NAME(parts) = sizeof(REAL) / 4, NAME(width) = WIDTH / NAME(parts), NAME(panel) = 16 / NAME(parts) };

/* (columns, rank) -> (panels, rank, NAME(panel)); zeros fill the last one */
static void NAME(pack_panels)(const double *right, int64_t columns, int64_t rank, REAL *to) {
  for (int64_t first = 0; first < columns; first += NAME(panel))
    for (int64_t k = 0; k < rank; k++)
      for (int64_t i = first; i < first + NAME(panel); i++) *to++ = i < columns ? (REAL)right[i * rank + k] : 0;
}

/* Write the products of GROUP rows, (GROUP, rank), with a panel: sums of CHUNK products, then of these sums. */
INLINE void NAME(multiply)(const REAL *left, int64_t rank, const REAL *panel, REAL *to, int64_t stride) {
  for (int64_t start = 0; start < rank; start += CHUNK) {
    const int64_t stop = start + CHUNK < rank ? start + CHUNK : rank;
    NAME(vector) sum[GROUP][VECTORS_OF_PANEL];
    for (int i = 0; i < GROUP; i++)
      for (int v = 0; v < VECTORS_OF_PANEL; v++) sum[i][v] = (NAME(vector)){0};
    for (int64_t k = start; k < stop; k++) {
      NAME(vector) right[VECTORS_OF_PANEL];
      for (int v = 0; v < VECTORS_OF_PANEL; v++) right[v] = JOIN(load, REAL)(panel + k * NAME(panel) + v * NAME(width));
      for (int i = 0; i < GROUP; i++)
        for (int v = 0; v < VECTORS_OF_PANEL; v++) sum[i][v] += left[i * rank + k] * right[v];
    }
    for (int i = 0; i < GROUP; i++)
      for (int v = 0; v < VECTORS_OF_PANEL; v++) {
        REAL *product = to + i * stride + v * NAME(width);
        if (start) sum[i][v] += JOIN(load, REAL)(product);
        memcpy(product, &sum[i][v], sizeof sum[i][v]);
      }
  }
}

INLINE void NAME(append)(struct NAME(list) *list, int64_t at, uint32_t from, uint32_t to, REAL change, int is_hit) {
  list->hit[list->hits] = (int32_t)list->length;
  list->hits += is_hit;
  list->at[list->length] = (int32_t)at;
  list->from[list->length] = from;
  list->to[list->length] = to;
  list->change[list->length] = change;
  list->length++;
}

/* Note which of the lanes that are listed are undecided. */
INLINE void NAME(note_hits)(struct NAME(list) *list, uint32_t hits, uint32_t listed) {
  while (UNLIKELY(hits)) {
    uint32_t before = listed & ((hits & -hits) - 1);
    list->hit[list->hits++] = (int32_t)(list->length + __builtin_popcount(before));
    hits &= hits - 1;
  }
}

/* The bits of the number of the type that is nearest to x, not 0, ties to even; and whether that is no overflow. */
INLINE uint32_t NAME(nearest_to_double)(double x, int *is_sure) {
#if PRECISION == 24
  const uint32_t pattern = nearest_fp32(x);
  *is_sure = (pattern & SIZE) < INF;
  return pattern;
#else
  enum { SHIFT_ = 53 - PRECISION };
  const int64_t bits = bits_of_double(fabs(x)), is_odd = bits >> SHIFT_ & 1;
  const int64_t rounded = (bits + (((int64_t)1 << (SHIFT_ - 1)) - 1 + is_odd)) >> SHIFT_;
  int64_t ordinal = rounded - ((int64_t)(LEAST + 1022) << (PRECISION - 1));
  if (fabs(x) < 2.0 * ((int64_t)1 << (PRECISION - 1)) * STEP) /* there all steps are one */
    ordinal = (int64_t)nearbyint(fabs(x) / STEP);
  *is_sure = ordinal < (int64_t)INF;
  return (uint32_t)ordinal | (x < 0 ? SIZE + 1 : 0);
#endif
}

/* D in a pair. D: as the pass computed it */
INLINE struct pair NAME(nearer)(const struct block *b, int64_t i, int64_t j, REAL D) {
  if (PRECISION == 24 && b->rooms[i] > 0) return (struct pair){D, 0, 0};
  return dot_in_pairs(b, i, j);
}

/* Find the bits of the nearest number, and return whether they are certain. */
INLINE int NAME(nearest_to_pair)(struct pair x, double spread, uint32_t *pattern) {
  const double reach = reach_of(x, spread);
  int is_sure, is_sure_too;
  if (is_between(x)) { /* rounded to odd, it rounds as the number itself (Boldo and Melquiond 2008) */
    const double odd = double_of(bits_below(x) | 1);
    *pattern = NAME(nearest_to_double)(x.high < 0 ? -odd : odd, &is_sure);
    return is_sure;
  }
  if (is_high(x)) {
    *pattern = NAME(nearest_to_double)(x.high, &is_sure);
    return is_sure;
  }
  if (!(fabs(x.high) > reach)) return 0; /* as of 0 the sign is not known */
  *pattern = NAME(nearest_to_double)(x.high + reach, &is_sure);
  return *pattern == NAME(nearest_to_double)(x.high - reach, &is_sure_too) && is_sure && is_sure_too;
}

/* The run of W', the numbers W that give it. Everything has the sign of W'. The cell of W' reaches from its inner to
   its outer midpoint, so a W lies between these ends minus D. If no number of the type is within the margin of an end,
   first and last number are certain. */
#if IS_FLOAT
#define WORD int32_t
#define WORD_BITS 24
#define BIAS 127
#define REAL_OF(x) float_of((uint32_t)(x))
#define WORD_OF(x) ((int32_t)bits_of_float(x))
#define SIZE_OF(x) fabsf(x)
#else
#define WORD int64_t
#define WORD_BITS 53
#define BIAS 1023
#define REAL_OF(x) double_of(x)
#define WORD_OF(x) bits_of_double(x)
#define SIZE_OF(x) fabs(x)
#endif
/* of a number x: x's bits >> SHIFT = ZERO + ordinal. Below the second binade all steps are one, as they are in REAL
   only if that has the same exponents (float and bf16). */
#define SHIFT (WORD_BITS - PRECISION)
#define ZERO ((WORD)(LEAST + BIAS - 1) << (PRECISION - 1))
#define SECOND ((WORD)2 << (PRECISION - 1))
#define SAME_EXPONENTS (IS_FLOAT && PRECISION == 8)

INLINE WORD NAME(floor)(REAL x) {
  WORD ordinal = (WORD)((uint64_t)WORD_OF(x) >> SHIFT);
#if IS_FLOAT
  ordinal = (WORD)((uint32_t)WORD_OF(x) >> SHIFT);
#endif
  if (!SAME_EXPONENTS) {
    REAL limit = (REAL)SECOND * (REAL)STEP, low = x < limit ? x : limit;
    WORD small = ZERO + (int32_t)((low > 0 ? low : 0) * (REAL)(1 / STEP));
    ordinal = x < limit ? small : ordinal;
  }
  return ordinal;
}

/* Return whether first place and count are certain, as 0 or -1: all conditions are masks of the same width, which
   every compiler makes vectors of. change: D, nan if unknown; inverse: 1 / a; reach: of D / a. */
INLINE WORD NAME(run)(
    uint32_t pattern, REAL change, REAL inverse, REAL reach, REAL margin_of_size, int32_t *start, int32_t *count) {
  const WORD half = (WORD)1 << (SHIFT - 1), size = (WORD)(pattern & SIZE), middle = (size + ZERO) << SHIFT;
  const WORD negative = (WORD)pattern > (WORD)SIZE ? -1 : 0;
  const REAL d = negative ? -change : change;
  REAL inner = REAL_OF(middle - half), outer = REAL_OF(middle + half);
  if (!SAME_EXPONENTS) {
    REAL ordinal = (REAL)(int32_t)size;
    inner = size < SECOND ? (ordinal - (REAL)0.5) * (REAL)STEP : inner;
    outer = size < SECOND ? (ordinal + (REAL)0.5) * (REAL)STEP : outer;
  }
  inner = (inner - d) * inverse;
  outer = (outer - d) * inverse;
  const WORD falls = outer < 0 ? -1 : 0, straddles = falls ^ (inner < 0 ? -1 : 0);
  inner = SIZE_OF(inner);
  outer = SIZE_OF(outer);
  const REAL near = inner < outer ? inner : outer, far = inner < outer ? outer : inner;
  const REAL margin = far * margin_of_size + reach;
  const WORD below = NAME(floor)(near - margin), same = NAME(floor)(near + margin);
  const WORD last = NAME(floor)(far - margin), equal = NAME(floor)(far + margin);
  WORD sure = (below ^ same) | (last ^ equal) ? 0 : -1;
  sure = (last < ZERO + (WORD)INF ? sure : 0) | straddles; /* a run that holds 0.0 counts as every number */
  sure = near > 2 * margin ? sure : 0;
  *count = (int32_t)(straddles ? EVERY : last - below);
  *start = (int32_t)((falls ^ negative) ? ZERO - last - 1 : below + 1 - ZERO);
  return size > 0 && size < (WORD)INF ? sure : 0;
}

/* The ordinal of the last number of the type that is not larger in size than a double. */
INLINE int64_t NAME(floor_of_double)(double size) {
  if (size < 2.0 * ((int64_t)1 << (PRECISION - 1)) * STEP) return (int64_t)(size / STEP);
  return (bits_of_double(size) >> (53 - PRECISION)) - ((int64_t)(LEAST + 1022) << (PRECISION - 1));
}

/* The same of the size of a pair, and whether it is certain, with the sign of `high`. If the pair is a number of the
   type, that counts as larger if `is_larger`. */
INLINE int NAME(floor_of_pair)(struct pair x, double spread, int is_larger, int64_t *ordinal) {
  const double size = fabs(x.high), reach = reach_of(x, spread);
  if (is_between(x)) {
    *ordinal = NAME(floor_of_double)(double_of(bits_below(x)));
    return 1;
  }
  if (is_high(x)) {
    *ordinal = NAME(floor_of_double)(is_larger ? double_of(bits_of_double(size) - 1) : size);
    return 1;
  }
  if (!(size > 2 * reach)) return 0;
  *ordinal = NAME(floor_of_double)(size - reach);
  return *ordinal == NAME(floor_of_double)(size + reach);
}

/* The same run of a weight in row i, by D in a pair. */
INLINE int NAME(run_by_pair)(
    const struct block *b, uint32_t pattern, int64_t i, struct pair change, int32_t *start, int32_t *count) {
  const int negative = pattern > SIZE;
  const int64_t size = pattern & SIZE, second = (int64_t)2 << (PRECISION - 1);
  int64_t of_inner, of_outer;
  if (size == 0 || size >= (int64_t)INF) return 0;
  const double middle = NAME(value)((uint32_t)size);
  const double under = size < second ? STEP : middle - NAME(value)((uint32_t)size - 1);
  const int is_largest = size + 1 == (int64_t)INF;
  const double above = size < second ? STEP : is_largest ? under : NAME(value)((uint32_t)size + 1) - middle;
  if (!negative) change.high = -change.high, change.low = -change.low;
  struct pair inner = add_pair(middle - under / 2, change), outer = add_pair(middle + above / 2, change);
  if (b->is_scaled) {
    inner = divided(inner, b->factors[i], b->factor_errors[i]);
    outer = divided(outer, b->factors[i], b->factor_errors[i]);
  }
  /* an end that is a number of the type is a tie, and in the run if W' is even: then the nearer one is not below it */
  const int falls = outer.high < 0, straddles = (inner.high < 0) != falls, is_even = !(size & 1);
  if (!NAME(floor_of_pair)(inner, b->dot_spread, falls ? !is_even : is_even, &of_inner)) return 0;
  if (!NAME(floor_of_pair)(outer, b->dot_spread, falls ? is_even : !is_even, &of_outer)) return 0;
  const int64_t below = of_inner < of_outer ? of_inner : of_outer, last = of_inner + of_outer - below;
  *count = straddles ? EVERY : (int32_t)(last - below);
  *start = (int32_t)((falls ^ negative) ? -last - 1 : below + 1);
  return straddles || last < (int64_t)INF;
}

/* What the pass's D did not tell: by a dot product, and then by one in pairs. */
static int NAME(run_by_dot)(
    const struct block *b, uint32_t pattern, int64_t i, int64_t j, REAL D, int32_t *start, int32_t *count) {
#if PRECISION < 24
  struct pair change = {0, 0, 0};
  change.high = dot(b, i, j, &change.bound);
  if (NAME(run_by_pair)(b, pattern, i, change, start, count)) return 1;
#endif
  return NAME(run_by_pair)(b, pattern, i, NAME(nearer)(b, i, j, D), start, count);
}

/* Add the runs of what is listed to the entries: places in those of several numbers, and what is handed back. On the
   way back, write W where it is the only number. inverse: 1 / a; error: of D / a in all of these rows. */
INLINE void NAME(add_runs)(
    struct block *b, const int back, int64_t row, const struct NAME(list) *list, REAL inverse, REAL error) {
  const REAL margin = (REAL)b->margin;
  const int32_t start_of_strip = (int32_t)(row * b->columns);
  PATTERN *restored = (PATTERN *)b->result + row * b->columns;
  int32_t start[TOGETHER], count[TOGETHER], place[TOGETHER];
  uint8_t is_sure[TOGETHER];
  int64_t entry = b->entries;
  for (int64_t first = 0; first < list->length; first += TOGETHER) {
    const int some = list->length - first < TOGETHER ? (int)(list->length - first) : TOGETHER;
    const uint32_t *results = (back ? list->from : list->to) + first, *weights = list->from + first;
    const REAL *change = list->change + first;
    uint8_t all = 1;
    for (int i = 0; i < some; i++)
      is_sure[i] = (uint8_t)NAME(run)(
          results[i], back ? -change[i] : change[i], inverse, error, margin, start + i, count + i);
    for (int i = 0; i < some; i++) all &= is_sure[i];
    for (int i = 0; UNLIKELY(!all) && i < some; i++) {
      if (is_sure[i]) continue;
      count[i] = UNKNOWN;
      if (change[i] != change[i] && !back) continue; /* W' is not known yet */
      const int64_t at = list->at[first + i];
      const REAL D = back ? -change[i] : change[i];
      if (!NAME(run_by_dot)(b, results[i], row + at / b->columns, at % b->columns, D, start + i, count + i))
        count[i] = UNKNOWN;
    }
    if (back) {
      for (int i = 0; i < some; i++) {
        if (count[i] == 1) {
          const int32_t sign = start[i] >> 31;
          restored[list->at[first + i]] = (PATTERN)((start[i] ^ sign) | (sign & (int32_t)~SIZE));
        }
        b->index[entry] = start[i];
        b->count[entry] = count[i];
        b->at[entry] = start_of_strip + list->at[first + i];
        entry += count[i] != 1;
      }
      continue;
    }
    for (int i = 0; i < some; i++)
      place[i] = (int32_t)(((weights[i] & SIZE) ^ (weights[i] > SIZE ? UINT32_MAX : 0)) - (uint32_t)start[i]);
    for (int i = 0; i < some; i++) {
      int32_t index = place[i];
      if (UNLIKELY(count[i] == EVERY)) index = (int32_t)weights[i];
      if (UNLIKELY(count[i] == UNKNOWN)) index = start_of_strip + list->at[first + i];
      b->index[entry] = index;
      b->count[entry] = count[i];
      entry += count[i] != 1;
    }
  }
  b->entries = entry;
}

static int64_t NAME(scratch_size)(int64_t strip, int64_t columns, int64_t rank) {
  const int64_t listed = strip * columns + 32, padded = columns + NAME(panel);
  return (int64_t)sizeof(REAL) * (GROUP * (rank + padded) + listed) + 4 * (4 * listed + columns) + 64;
}

#define CAST 0
#include "row.h"
#undef CAST
#define CAST 1
#include "row.h"
#undef CAST

#undef WORD
#undef WORD_BITS
#undef BIAS
#undef REAL_OF
#undef WORD_OF
#undef SIZE_OF
#undef SHIFT
#undef ZERO
#undef SECOND
#undef SAME_EXPONENTS
#undef REAL_MAX
#undef POWERS
