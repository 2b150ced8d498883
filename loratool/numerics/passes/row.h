/* The passes for one type of numbers (see kernel.c). */

/* What is looked at again after a pass: numbers that it did not decide, and those whose runs may be longer than one. */
struct NAME(list) {
  int64_t length, hits;
  int32_t *at; /* positions in the strip, rising */
  uint32_t *from, *to; /* the bits of what the pass read and wrote */
  REAL *change; /* D; on the way back -D, which was added */
  int32_t *hit; /* which of these are undecided */
};

struct NAME(row) {
  const PATTERN *from;
  PATTERN *to;
  const REAL *change;
  int64_t columns, at; /* at: the position of its first number in the strip */
  REAL error, spread;
  int record;
};

/* Vectors of 32 bytes, of which two at a time are a panel. */
typedef REAL NAME(vector) __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
enum { NAME(width) = 32 / sizeof(REAL), NAME(panel) = 2 * NAME(width) };

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
    NAME(vector) sum[GROUP][2];
    for (int i = 0; i < GROUP; i++) sum[i][0] = sum[i][1] = (NAME(vector)){0};
    for (int64_t k = start; k < stop; k++) {
      const NAME(vector) first = *(const NAME(vector) *)(panel + k * NAME(panel));
      const NAME(vector) second = *(const NAME(vector) *)(panel + k * NAME(panel) + NAME(width));
      for (int i = 0; i < GROUP; i++) {
        sum[i][0] += left[i * rank + k] * first;
        sum[i][1] += left[i * rank + k] * second;
      }
    }
    for (int i = 0; i < GROUP; i++) {
      NAME(vector) *first = (NAME(vector) *)(to + i * stride);
      NAME(vector) *second = (NAME(vector) *)(to + i * stride + NAME(width));
      if (start) sum[i][0] += *first, sum[i][1] += *second;
      *first = sum[i][0];
      *second = sum[i][1];
    }
  }
}

#if IS_FLOAT
INLINE __m256i JOIN(up, bf16)(__m256 x) {
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x8000)), 16);
}

INLINE __m256i JOIN(pack, bf16)(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
}
#endif

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

/* Do the numbers of a row from `first` on one by one, whatever they are. */
INLINE void NAME(do_numbers)(
    const int back, const struct NAME(row) *row, int64_t first, int64_t last, struct NAME(list) *list,
    struct sums *sums) {
  for (int64_t i = first; i < last; i++) {
    const uint32_t pattern = row->from[i], size = pattern & SIZE;
    const REAL change = row->change[i];
    if (size >= INF) { /* inf and nan stay */
      row->to[i] = (PATTERN)pattern;
      sums->not_finite++;
      continue;
    }
    const REAL x = NAME(value)(pattern), sum = x + change, reach = (sum < 0 ? -sum : sum) * row->spread + row->error;
    const uint32_t high = NAME(nearest)(sum + reach), low = NAME(nearest)(sum - reach), high_size = high & SIZE;
    row->to[i] = (PATTERN)high;
    sums->changed += high != pattern;
    if (high_size < INF) {
      sums->base += (double)x * x;
      sums->squares += (double)change * change;
      sums->kept += ((double)NAME(value)(high) - x) * change;
    }
    const int is_hit = high != low || high_size >= INF;
    const uint32_t power = (back ? pattern : high) & (SIZE - ((1u << (PRECISION - 1)) - 1));
    const int may_have_several = power >= (back ? high_size : size);
    if (is_hit || (row->record && may_have_several)) NAME(append)(list, row->at + i, pattern, high, change, is_hit);
  }
}

/* Do the whole vectors of a row's numbers from `first` on; return the first one that is left, or -1 if a number is not
   finite, and nothing was listed or summed. */
INLINE int64_t NAME(do_vectors)(
    const int back, const struct NAME(row) *row, int64_t first, int64_t last, struct NAME(list) *list,
    struct sums *sums) {
  const struct NAME(list) before = *list;
  int64_t i = first;
#if PRECISION == 8
  const __m256 spread = _mm256_set1_ps(row->spread), error = _mm256_set1_ps(row->error);
  const __m256i size_mask = _mm256_set1_epi16(0x7fff), power_mask = _mm256_set1_epi16(0x7f80);
  __m256 base = _mm256_setzero_ps(), squares = base, kept = base, base2 = base, squares2 = base, kept2 = base;
  __m256i same = _mm256_setzero_si256(), most = same;
  for (; i + 16 <= last; i += 16) {
    const __m256i from = _mm256_loadu_si256((const __m256i *)(row->from + i));
    const __m256i from1 = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(from));
    const __m256i from2 = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(from, 1));
    const __m256 x1 = _mm256_castsi256_ps(_mm256_slli_epi32(from1, 16));
    const __m256 x2 = _mm256_castsi256_ps(_mm256_slli_epi32(from2, 16));
    const __m256 d1 = _mm256_loadu_ps(row->change + i), d2 = _mm256_loadu_ps(row->change + i + 8);
    const __m256 sum1 = _mm256_add_ps(x1, d1), sum2 = _mm256_add_ps(x2, d2);
    const __m256 reach1 = _mm256_fmadd_ps(size_ps(sum1), spread, error);
    const __m256 reach2 = _mm256_fmadd_ps(size_ps(sum2), spread, error);
    const __m256i high1 = up_bf16(_mm256_add_ps(sum1, reach1)), high2 = up_bf16(_mm256_add_ps(sum2, reach2));
    const __m256i low1 = up_bf16(_mm256_sub_ps(sum1, reach1)), low2 = up_bf16(_mm256_sub_ps(sum2, reach2));
    const __m256i high = pack_bf16(high1, high2), decided = _mm256_cmpeq_epi16(high, pack_bf16(low1, low2));
    const __m256i size = _mm256_and_si256(from, size_mask), high_size = _mm256_and_si256(high, size_mask);
    _mm256_storeu_si256((__m256i *)(row->to + i), high);
    most = _mm256_max_epu16(most, _mm256_max_epu16(size, high_size));
    if (!back) {
      const __m256 moved1 = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_slli_epi32(high1, 16)), x1);
      const __m256 moved2 = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_slli_epi32(high2, 16)), x2);
      same = _mm256_sub_epi16(same, _mm256_cmpeq_epi16(high, from));
      base = _mm256_fmadd_ps(x1, x1, base);
      base2 = _mm256_fmadd_ps(x2, x2, base2);
      squares = _mm256_fmadd_ps(d1, d1, squares);
      squares2 = _mm256_fmadd_ps(d2, d2, squares2);
      kept = _mm256_fmadd_ps(moved1, d1, kept);
      kept2 = _mm256_fmadd_ps(moved2, d2, kept2);
    }
    const uint32_t hits = _pext_u32(~(uint32_t)_mm256_movemask_epi8(decided), 0x55555555u);
    if (row->record || UNLIKELY(hits)) {
      uint32_t listed = hits;
      if (row->record) { /* all but those with |W| above the power of two of |W'| */
        const __m256i power = _mm256_and_si256(back ? from : high, power_mask);
        const __m256i single = _mm256_cmpgt_epi16(back ? high_size : size, power);
        listed |= _pext_u32(~(uint32_t)_mm256_movemask_epi8(single), 0x55555555u);
      }
      NAME(note_hits)(list, hits, listed);
      compress_positions(list->at + list->length, row->at + i, listed & 255);
      compress_32(list->from + list->length, from1, listed & 255);
      compress_32(list->to + list->length, high1, listed & 255);
      compress_32(list->change + list->length, _mm256_castps_si256(d1), listed & 255);
      list->length += __builtin_popcount(listed & 255);
      compress_positions(list->at + list->length, row->at + i + 8, listed >> 8);
      compress_32(list->from + list->length, from2, listed >> 8);
      compress_32(list->to + list->length, high2, listed >> 8);
      compress_32(list->change + list->length, _mm256_castps_si256(d2), listed >> 8);
      list->length += __builtin_popcount(listed >> 8);
    }
  }
  uint16_t sizes[16], equal[16];
  int64_t unchanged = 0;
  int is_finite = 1;
  _mm256_storeu_si256((__m256i *)sizes, most);
  _mm256_storeu_si256((__m256i *)equal, same);
  for (int k = 0; k < 16; k++) is_finite &= sizes[k] < INF, unchanged += equal[k];
  const double sum_base = sum_of_floats(_mm256_add_ps(base, base2));
  const double sum_squares = sum_of_floats(_mm256_add_ps(squares, squares2));
  const double sum_kept = sum_of_floats(_mm256_add_ps(kept, kept2));
  is_finite &= sum_base <= FLT_MAX && sum_squares <= FLT_MAX && fabs(sum_kept) <= FLT_MAX; /* else sum in double */
#else
  const __m256d spread = _mm256_set1_pd(row->spread), error = _mm256_set1_pd(row->error);
  __m256d base = _mm256_setzero_pd(), squares = base, kept = base;
  int64_t unchanged = 0;
  int is_finite = 1;
#if PRECISION == 11
  const __m128i size_mask = _mm_set1_epi16(0x7fff), power_mask = _mm_set1_epi16(0x7c00);
  __m128i most = _mm_setzero_si128();
#else
  const __m256i size_mask = _mm256_set1_epi32(0x7fffffff), power_mask = _mm256_set1_epi32(0x7f800000);
  __m256i most = _mm256_setzero_si256();
#endif
  for (; i + 8 <= last; i += 8) {
#if PRECISION == 11
    const __m128i from = _mm_loadu_si128((const __m128i *)(row->from + i));
    const __m256 x = _mm256_cvtph_ps(from);
#else
    const __m256i from = _mm256_loadu_si256((const __m256i *)(row->from + i));
    const __m256 x = _mm256_castsi256_ps(from);
#endif
    const __m256d x1 = low_pd(x), x2 = high_pd(x);
    const __m256d d1 = _mm256_loadu_pd(row->change + i), d2 = _mm256_loadu_pd(row->change + i + 4);
    const __m256d sum1 = _mm256_add_pd(x1, d1), sum2 = _mm256_add_pd(x2, d2);
    const __m256d reach1 = _mm256_fmadd_pd(size_pd(sum1), spread, error);
    const __m256d reach2 = _mm256_fmadd_pd(size_pd(sum2), spread, error);
    const __m256 above = _mm256_set_m128(
        _mm256_cvtpd_ps(_mm256_add_pd(sum2, reach2)), _mm256_cvtpd_ps(_mm256_add_pd(sum1, reach1)));
    const __m256 below = _mm256_set_m128(
        _mm256_cvtpd_ps(_mm256_sub_pd(sum2, reach2)), _mm256_cvtpd_ps(_mm256_sub_pd(sum1, reach1)));
#if PRECISION == 11
    const __m128i high = _mm256_cvtps_ph(above, _MM_FROUND_TO_NEAREST_INT);
    const __m128i decided = _mm_cmpeq_epi16(high, _mm256_cvtps_ph(below, _MM_FROUND_TO_NEAREST_INT));
    const __m128i size = _mm_and_si128(from, size_mask), high_size = _mm_and_si128(high, size_mask);
    const __m128i single = _mm_cmpgt_epi16(back ? high_size : size, _mm_and_si128(back ? from : high, power_mask));
    const __m256 result = _mm256_cvtph_ps(high);
    const __m256i from32 = _mm256_cvtepu16_epi32(from), high32 = _mm256_cvtepu16_epi32(high);
    const uint32_t hits = _pext_u32(~(uint32_t)_mm_movemask_epi8(decided), 0x5555u);
    const uint32_t equal = _pext_u32((uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi16(high, from)), 0x5555u);
    const uint32_t several = _pext_u32(~(uint32_t)_mm_movemask_epi8(single), 0x5555u);
    _mm_storeu_si128((__m128i *)(row->to + i), high);
    most = _mm_max_epu16(most, _mm_max_epu16(size, high_size));
#else
    const __m256i high = _mm256_castps_si256(above), decided = _mm256_cmpeq_epi32(high, _mm256_castps_si256(below));
    const __m256i size = _mm256_and_si256(from, size_mask), high_size = _mm256_and_si256(high, size_mask);
    const __m256i single =
        _mm256_cmpgt_epi32(back ? high_size : size, _mm256_and_si256(back ? from : high, power_mask));
    const __m256 result = above;
    const __m256i from32 = from, high32 = high;
    const uint32_t hits = 255 & ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(decided));
    const uint32_t equal =
        255 & (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(high, from)));
    const uint32_t several = 255 & ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(single));
    _mm256_storeu_si256((__m256i *)(row->to + i), high);
    most = _mm256_max_epu32(most, _mm256_max_epu32(size, high_size));
#endif
    if (!back) {
      base = _mm256_fmadd_pd(x2, x2, _mm256_fmadd_pd(x1, x1, base));
      squares = _mm256_fmadd_pd(d2, d2, _mm256_fmadd_pd(d1, d1, squares));
      kept = _mm256_fmadd_pd(_mm256_sub_pd(low_pd(result), x1), d1, kept);
      kept = _mm256_fmadd_pd(_mm256_sub_pd(high_pd(result), x2), d2, kept);
      unchanged += __builtin_popcount(equal);
    }
    const uint32_t listed = hits | (row->record ? several : 0);
    if (listed) {
      NAME(note_hits)(list, hits, listed);
      compress_positions(list->at + list->length, row->at + i, listed);
      compress_32(list->from + list->length, from32, listed);
      compress_32(list->to + list->length, high32, listed);
      compress_64(list->change + list->length, row->change + i, listed);
      list->length += __builtin_popcount(listed);
    }
  }
  PATTERN sizes[8];
  memcpy(sizes, &most, sizeof sizes);
  for (int k = 0; k < 8; k++) is_finite &= sizes[k] < INF;
  const double sum_base = sum_of_doubles(base), sum_squares = sum_of_doubles(squares), sum_kept = sum_of_doubles(kept);
#endif
  if (!is_finite) {
    *list = before;
    return -1;
  }
  sums->changed += i - first - unchanged;
  sums->base += sum_base;
  sums->squares += sum_squares;
  sums->kept += sum_kept;
  return i;
}

static void NAME(do_row)(const int back, const struct NAME(row) *row, struct NAME(list) *list, struct sums *sums) {
  for (int64_t first = 0; first < row->columns; first += SEGMENT) {
    const int64_t last = first + SEGMENT < row->columns ? first + SEGMENT : row->columns;
    int64_t left = back ? NAME(do_vectors)(1, row, first, last, list, sums)
                        : NAME(do_vectors)(0, row, first, last, list, sums);
    NAME(do_numbers)(back, row, left < 0 ? first : left, last, list, sums);
  }
}

/* A row of which D is 0: all bits stay, and there is no other number to which it could add up. */
static void NAME(keep_row)(const struct NAME(row) *row, struct sums *sums) {
  double base = 0;
  int64_t odd = 0;
  for (int64_t i = 0; i < row->columns; i++) {
    const int is_odd = (row->from[i] & SIZE) >= INF;
    const double x = is_odd ? 0 : NAME(value)(row->from[i]);
    base += x * x;
    odd += is_odd;
  }
  memmove(row->to, row->from, (size_t)row->columns * sizeof(PATTERN));
  sums->base += base;
  sums->not_finite += odd;
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

/* Decide by dot products what the pass did not; of the rest D becomes nan, and the position is handed back. */
static void NAME(decide)(struct block *b, int64_t row, struct NAME(list) *list, struct sums *sums) {
  PATTERN *to = (PATTERN *)b->result + row * b->columns;
  for (int64_t k = 0; k < list->hits; k++) {
    const int32_t which = list->hit[k], at = list->at[which];
    const int64_t i = row + at / b->columns, j = at % b->columns;
    const uint32_t pattern = list->from[which], former = list->to[which];
    const double x = NAME(value)(pattern);
    struct pair D = {0, 0, 0};
    uint32_t decided = 0;
    int is_sure = 0;
#if PRECISION < 24
    D.high = dot(b, i, j, &D.bound);
    is_sure = NAME(nearest_to_pair)(add_pair(x, D), b->dot_spread, &decided);
#endif
    if (!is_sure) {
      D = dot_in_pairs(b, i, j);
      is_sure = NAME(nearest_to_pair)(add_pair(x, D), b->dot_spread, &decided);
    }
    if (is_sure) {
      if ((former & SIZE) < INF) sums->kept += ((double)NAME(value)(decided) - NAME(value)(former)) * D.high;
      sums->changed += (decided != pattern) - (former != pattern);
      list->to[which] = decided;
      to[at] = (PATTERN)decided;
    } else {
      list->change[which] = (REAL)NAN;
      b->at[b->undecided++] = (int32_t)(row * b->columns) + at;
    }
  }
}

/* The run of W', the numbers W that give it. Everything has the sign of W'. The cell of W' reaches from its inner to
   its outer midpoint, so W lies between these ends minus D. If no number of the type is within the margin of an end,
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

/* Return whether first place and count are certain. change: D with an error of at most `reach`; nan if unknown. */
INLINE int NAME(run)(uint32_t pattern, REAL change, REAL reach, REAL margin_of_size, int32_t *start, int32_t *count) {
  const WORD half = (WORD)1 << (SHIFT - 1), size = (WORD)(pattern & SIZE), middle = (size + ZERO) << SHIFT;
  const int negative = pattern > SIZE;
  const REAL d = negative ? -change : change;
  REAL inner = REAL_OF(middle - half), outer = REAL_OF(middle + half);
  if (!SAME_EXPONENTS) {
    REAL ordinal = (REAL)(int32_t)size;
    inner = size < SECOND ? (ordinal - (REAL)0.5) * (REAL)STEP : inner;
    outer = size < SECOND ? (ordinal + (REAL)0.5) * (REAL)STEP : outer;
  }
  inner -= d;
  outer -= d;
  const int falls = outer < 0, straddles = (inner < 0) != falls;
  inner = SIZE_OF(inner);
  outer = SIZE_OF(outer);
  const REAL near = inner < outer ? inner : outer, far = inner < outer ? outer : inner;
  const REAL margin = far * margin_of_size + reach;
  const WORD below = NAME(floor)(near - margin), same = NAME(floor)(near + margin);
  const WORD last = NAME(floor)(far - margin), equal = NAME(floor)(far + margin);
  int sure = (below == same) & (last == equal) & (last < ZERO + (WORD)INF);
  sure = (sure | straddles) & (near > 2 * margin) & (size > 0) & (size < (WORD)INF);
  *count = straddles ? EVERY : (int32_t)(last - below); /* a run that holds 0.0 */
  *start = (int32_t)((falls ^ negative) ? ZERO - last - 1 : below + 1 - ZERO);
  return sure;
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

/* The same run, by D in a pair. */
INLINE int NAME(run_by_pair)(uint32_t pattern, struct pair change, double spread, int32_t *start, int32_t *count) {
  const int negative = pattern > SIZE;
  const int64_t size = pattern & SIZE, second = (int64_t)2 << (PRECISION - 1);
  int64_t of_inner, of_outer;
  if (size == 0 || size >= (int64_t)INF) return 0;
  const double middle = NAME(value)((uint32_t)size);
  const double under = size < second ? STEP : middle - NAME(value)((uint32_t)size - 1);
  const int is_largest = size + 1 == (int64_t)INF;
  const double above = size < second ? STEP : is_largest ? under : NAME(value)((uint32_t)size + 1) - middle;
  if (!negative) change.high = -change.high, change.low = -change.low;
  const struct pair inner = add_pair(middle - under / 2, change), outer = add_pair(middle + above / 2, change);
  /* an end that is a number of the type is a tie, and in the run if W' is even: then the nearer one is not below it */
  const int falls = outer.high < 0, straddles = (inner.high < 0) != falls, is_even = !(size & 1);
  if (!NAME(floor_of_pair)(inner, spread, falls ? !is_even : is_even, &of_inner)) return 0;
  if (!NAME(floor_of_pair)(outer, spread, falls ? is_even : !is_even, &of_outer)) return 0;
  const int64_t below = falls ? of_outer : of_inner, last = falls ? of_inner : of_outer;
  *count = straddles ? EVERY : (int32_t)(last - below);
  *start = (int32_t)((falls ^ negative) ? -last - 1 : below + 1);
  return straddles || last < (int64_t)INF;
}

/* What the pass's D did not tell: by a dot product, and then by one in pairs. */
static int NAME(run_by_dot)(
    const struct block *b, uint32_t pattern, int64_t i, int64_t j, int32_t *start, int32_t *count) {
#if PRECISION < 24
  struct pair change = {0, 0, 0};
  change.high = dot(b, i, j, &change.bound);
  if (NAME(run_by_pair)(pattern, change, b->dot_spread, start, count)) return 1;
#endif
  return NAME(run_by_pair)(pattern, dot_in_pairs(b, i, j), b->dot_spread, start, count);
}

/* Add the runs of what is listed to the entries: places in those of several numbers, and what is handed back. On the
   way back, write W where it is the only number. error: of D in all rows of the strip. */
INLINE void NAME(add_runs)(struct block *b, const int back, int64_t row, const struct NAME(list) *list, REAL error) {
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
      is_sure[i] = (uint8_t)NAME(run)(results[i], back ? -change[i] : change[i], error, margin, start + i, count + i);
    for (int i = 0; i < some; i++) all &= is_sure[i];
    for (int i = 0; UNLIKELY(!all) && i < some; i++) {
      if (is_sure[i]) continue;
      count[i] = UNKNOWN;
      if (change[i] != change[i] && !back) continue; /* W' is not known yet */
      const int64_t at = list->at[first + i];
      if (!NAME(run_by_dot)(b, results[i], row + at / b->columns, at % b->columns, start + i, count + i))
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
  return (int64_t)sizeof(REAL) * (GROUP * (rank + padded) + listed) + 4 * 4 * listed + 64;
}

static void NAME(pass)(struct block *b, int64_t matrix) {
  const int64_t n = b->columns, rank = b->rank, stride = (n + NAME(panel) - 1) / NAME(panel) * NAME(panel);
  const int64_t listed = b->strip * n + 32;
  REAL *change = (REAL *)(((uintptr_t)b->scratch + 31) & ~(uintptr_t)31), *left = change + GROUP * stride;
  struct NAME(list) list;
  list.change = left + GROUP * rank;
  list.at = (int32_t *)(list.change + listed);
  list.hit = list.at + listed;
  list.from = (uint32_t *)(list.hit + listed);
  list.to = list.from + listed;
  const int64_t last = (matrix + 1) * b->rows;
  struct sums sums = {0};
  for (int64_t strip = matrix * b->rows; strip < last; strip += b->strip) {
    const int64_t end = strip + b->strip < last ? strip + b->strip : last;
    double error = 0;
    list.length = list.hits = 0;
    for (int64_t group = strip; group < end; group += GROUP) {
      const int64_t count = end - group < GROUP ? end - group : GROUP;
      int is_live = 0;
      for (int64_t i = 0; i < count; i++) is_live |= b->errors[group + i] >= 0;
      for (int64_t i = 0; is_live && i < GROUP * rank; i++) {
        const double factor = i < count * rank ? b->left[group * rank + i] : 0;
        left[i] = (REAL)(b->back ? -factor : factor);
      }
      for (int64_t j = 0; is_live && j < stride; j += NAME(panel))
        NAME(multiply)(left, rank, (const REAL *)b->panels + j * rank, change + j, stride);
      for (int64_t i = 0; i < count; i++) {
        const int64_t start = (group + i) * n;
        const double its_error = b->errors[group + i];
        struct NAME(row) row = {
            (const PATTERN *)b->source + start, (PATTERN *)b->result + start, change + i * stride, n, start - strip * n,
            (REAL)its_error, (REAL)b->spread, (int)b->record};
        sums.squares = 0;
        if (its_error < 0) NAME(keep_row)(&row, &sums);
        else NAME(do_row)((int)b->back, &row, &list, &sums);
        b->squares[group + i] = sums.squares;
        if (its_error > error) error = its_error;
      }
    }
    if (!b->back) NAME(decide)(b, strip, &list, &sums);
    if (b->record) {
      if (b->back) NAME(add_runs)(b, 1, strip, &list, (REAL)error);
      else NAME(add_runs)(b, 0, strip, &list, (REAL)error);
    }
  }
  sums.entries = b->entries;
  b->sums[matrix] = sums;
}

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
