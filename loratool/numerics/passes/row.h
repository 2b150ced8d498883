/* The passes for one type of W', from a W of the same type, or of fp32 (CAST: a W of 16 bits is widened before). */
#if CAST
#define ROW(x) JOIN(cast, NAME(x))
#define FROM(x) JOIN(x, fp32)
#define FROM_PATTERN uint32_t
#define FROM_SIZE 0x7fffffffu
#define FROM_INF 0x7f800000u
#else
#define ROW(x) NAME(x)
#define FROM(x) NAME(x)
#define FROM_PATTERN PATTERN
#define FROM_SIZE SIZE
#define FROM_INF INF
#endif

struct ROW(row) {
  const FROM_PATTERN *from;
  PATTERN *to;
  const REAL *change;
  int64_t columns, at; /* at: the position of its first number in the strip */
  REAL factor, less; /* a and a - 1 */
  REAL error, spread;
  int record;
  uint32_t all; /* the lanes that are listed in any case: all where a is not 1 */
};

/* Whether W' counts as W: of one type if no bit differs, else if the values are equal, which nan is to none. */
INLINE int ROW(is_same)(uint32_t to, uint32_t from) {
  return CAST ? NAME(value)(to) == FROM(value)(from) : to == from;
}

/* The bits of W' where W is inf or nan, or D is 0. All stay; a cast rounds to nearest, ties to even, which is not sure
   to be no overflow, and nan becomes the one of `set_quiet_nan`. */
INLINE uint32_t ROW(without_change)(uint32_t from, int *is_sure) {
  const uint32_t size = from & FROM_SIZE, sign = from > FROM_SIZE ? SIZE + 1 : 0;
  *is_sure = 1;
  if (!CAST) return from;
  if (size > FROM_INF) return INF | 1u << (PRECISION - 2);
  if (size == 0 || size == FROM_INF) return sign | (size ? INF : 0);
  const uint32_t nearest = NAME(nearest_to_double)(FROM(value)(from), is_sure);
  return *is_sure ? nearest : sign | INF;
}

/* Do the numbers of a row from `first` on one by one, whatever they are. */
INLINE void ROW(do_numbers)(
    const int back, const struct ROW(row) *row, int64_t first, int64_t last, struct NAME(list) *list,
    struct sums *sums) {
  for (int64_t i = first; i < last; i++) {
    const uint32_t pattern = row->from[i], size = pattern & FROM_SIZE;
    const REAL change = row->change[i];
    int is_hit;
    if (size >= FROM_INF) {
      const uint32_t result = ROW(without_change)(pattern, &is_hit);
      row->to[i] = (PATTERN)result;
      sums->not_finite++;
      sums->changed += !ROW(is_same)(result, pattern);
      continue;
    }
    const REAL x = FROM(value)(pattern), sum = x * row->factor + change, requested = x * row->less + change;
    const REAL reach = (sum < 0 ? -sum : sum) * row->spread + row->error;
    const uint32_t high = NAME(nearest)(sum + reach), low = NAME(nearest)(sum - reach), high_size = high & SIZE;
    row->to[i] = (PATTERN)high;
    sums->changed += !ROW(is_same)(high, pattern);
    if (high_size < INF) {
      sums->base += (double)x * x;
      sums->squares += (double)requested * requested;
      sums->kept += ((double)NAME(value)(high) - x) * requested;
    }
    is_hit = high != low || high_size >= INF;
    const uint32_t power = (back ? pattern : high) & POWERS;
    const int may_have_several = row->all || power >= (back ? high_size : size);
    if (is_hit || (row->record && may_have_several)) NAME(append)(list, row->at + i, pattern, high, change, is_hit);
  }
}

/* Do the whole vectors of a row's numbers from `first` on; return the first one that is left, or -1 if a number is not
   finite, and nothing was listed or summed. */
INLINE int64_t ROW(do_vectors)(
    const int back, const struct ROW(row) *row, int64_t first, int64_t last, struct NAME(list) *list,
    struct sums *sums) {
  const struct NAME(list) before = *list;
  const NAME(vector) spread = row->spread - (NAME(vector)){0}, error = row->error - (NAME(vector)){0};
  const NAME(vector) factor = row->factor - (NAME(vector)){0}, less = row->less - (NAME(vector)){0};
  NAME(vector) base = {0}, squares = {0}, kept = {0};
  words most = {0}, same = {0};
  const int record = !CAST && row->record; /* a cast has none, and no way back */
  int64_t i = first;
  for (; i + WIDTH <= last; i += WIDTH) {
    words from, high;
    NAME(vector) x[NAME(parts)], d[NAME(parts)], above[NAME(parts)], below[NAME(parts)], result[NAME(parts)];
    JOIN(to, REAL)(FROM(load)(row->from + i, &from), x);
    for (int k = 0; k < NAME(parts); k++) {
      d[k] = JOIN(load, REAL)(row->change + i + k * NAME(width));
      const NAME(vector) sum = x[k] * factor + d[k], reach = JOIN(size, REAL)(sum) * spread + error;
      above[k] = sum + reach;
      below[k] = sum - reach;
    }
    const words low = NAME(nearests)(JOIN(of, REAL)(below));
    const floats nearest = NAME(store)(row->to + i, JOIN(of, REAL)(above), &high);
    const words size = from & FROM_SIZE, high_size = high & SIZE;
    if (back) most = larger(most, larger(size, high_size));
    else {
      same -= CAST ? (words)(nearest == (floats)from) : (words)(high == from);
      JOIN(to, REAL)(nearest, result);
      for (int k = 0; k < NAME(parts); k++) {
        base += x[k] * x[k];
        const NAME(vector) requested = x[k] * less + d[k];
        squares += requested * requested;
        kept += (result[k] - x[k]) * requested;
      }
    }
    const uint32_t hits = ALL & ~mask_of((words)(high == low));
    if (record || UNLIKELY(hits)) {
      uint32_t listed = hits;
      if (record) { /* all but those with |W| above the power of two of |W'| */
        const words power = (back ? from : high) & POWERS;
        listed |= ALL & (row->all | ~mask_of((words)((ints)(back ? high_size : size) > (ints)power)));
      }
      NAME(note_hits)(list, hits, listed);
      compress_positions(list->at + list->length, row->at + i, listed);
      compress(list->from + list->length, from, listed);
      compress(list->to + list->length, high, listed);
      JOIN(compress, REAL)(list->change + list->length, row->change + i, listed);
      list->length += __builtin_popcount(listed);
    }
  }
  int64_t unchanged = 0;
  double sum_base = 0, sum_squares = 0, sum_kept = 0;
  int is_finite = 1;
  for (int k = 0; k < WIDTH; k++) is_finite &= most[k] < INF, unchanged += same[k];
  for (int k = 0; k < NAME(width); k++) sum_base += base[k], sum_squares += squares[k], sum_kept += kept[k];
  /* as of numbers that are all finite, with squares that are; of others in float, sum in double */
  is_finite &= sum_base <= REAL_MAX && sum_squares <= REAL_MAX && fabs(sum_kept) <= REAL_MAX;
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

static void ROW(do_row)(const int back, const struct ROW(row) *row, struct NAME(list) *list, struct sums *sums) {
  for (int64_t first = 0; first < row->columns; first += SEGMENT) {
    const int64_t last = first + SEGMENT < row->columns ? first + SEGMENT : row->columns;
    int64_t left = !CAST && back ? ROW(do_vectors)(1, row, first, last, list, sums)
                        : ROW(do_vectors)(0, row, first, last, list, sums);
    ROW(do_numbers)(back, row, left < 0 ? first : left, last, list, sums);
  }
}

/* A row of which D is 0: of one type there is no other number to which it could add up. */
static void ROW(keep_row)(const struct ROW(row) *row, struct NAME(list) *list, struct sums *sums) {
  double base = 0;
  int64_t odd = 0;
  for (int64_t i = 0; i < row->columns; i++) {
    int is_sure;
    const uint32_t pattern = row->from[i], result = ROW(without_change)(pattern, &is_sure);
    const int is_odd = (pattern & FROM_SIZE) >= FROM_INF;
    const double x = is_odd ? 0 : FROM(value)(pattern);
    row->to[i] = (PATTERN)result;
    base += x * x;
    odd += is_odd;
    sums->changed += !ROW(is_same)(result, pattern);
    if (!is_sure) NAME(append)(list, row->at + i, pattern, result, 0, 1);
  }
  sums->base += base;
  sums->not_finite += odd;
}

/* Decide by dot products what the pass did not; of the rest D becomes nan, and the position is handed back. */
static void ROW(decide)(struct block *b, int64_t row, struct NAME(list) *list, struct sums *sums) {
  PATTERN *to = (PATTERN *)b->result + row * b->columns;
  for (int64_t k = 0; k < list->hits; k++) {
    const int32_t which = list->hit[k], at = list->at[which];
    const int64_t i = row + at / b->columns, j = at % b->columns;
    const uint32_t pattern = list->from[which], former = list->to[which];
    const double x = FROM(value)(pattern), a = b->factors[i], error = b->factor_errors[i];
    struct pair D = {0, 0, 0};
    uint32_t decided = 0;
    int is_sure = 0;
#if PRECISION < 24
    D.high = dot(b, i, j, &D.bound);
    is_sure = NAME(nearest_to_pair)(sum_of(a, error, x, D), b->dot_spread, &decided);
#endif
    if (!is_sure) {
      D = NAME(nearer)(b, i, j, list->change[which]);
      is_sure = NAME(nearest_to_pair)(sum_of(a, error, x, D), b->dot_spread, &decided);
    }
    if (is_sure) {
      const double moved = (double)NAME(value)(decided) - NAME(value)(former);
      if ((former & SIZE) < INF) sums->kept += moved * (x * (a - 1) + D.high);
      sums->changed += ROW(is_same)(former, pattern) - ROW(is_same)(decided, pattern);
      list->to[which] = decided;
      to[at] = (PATTERN)decided;
    } else {
      list->change[which] = (REAL)NAN;
      b->at[b->undecided++] = (int32_t)(row * b->columns) + at;
    }
  }
}

/* Decide what is listed of the rows from `row` on, and add its runs; the list is used up. error: of D. */
static void ROW(finish)(
    struct block *b, int64_t row, struct NAME(list) *list, double error, struct sums *sums) {
  const double inverse = 1 / b->factors[row];
  const REAL reach = (REAL)(error * fabs(inverse));
  if (!b->back) ROW(decide)(b, row, list, sums);
  if (!CAST && b->record) {
    if (b->back) NAME(add_runs)(b, 1, row, list, (REAL)inverse, reach);
    else NAME(add_runs)(b, 0, row, list, (REAL)inverse, reach);
  }
  list->length = list->hits = 0;
}

static void ROW(pass)(struct block *b, int64_t matrix) {
  const int64_t n = b->columns, rank = b->rank, stride = (n + NAME(panel) - 1) / NAME(panel) * NAME(panel);
  const int64_t listed = b->strip * n + 32;
  REAL *change = (REAL *)(((uintptr_t)b->scratch + 31) & ~(uintptr_t)31), *left = change + GROUP * stride;
  struct NAME(list) list;
  list.change = left + GROUP * rank;
  list.at = (int32_t *)(list.change + listed);
  list.hit = list.at + listed;
  list.from = (uint32_t *)(list.hit + listed);
  list.to = list.from + listed;
#if CAST
  uint32_t *const widened = list.to + listed; /* a row */
#endif
  const int64_t last = (matrix + 1) * b->rows;
  struct sums sums = {0};
    list.length = list.hits = 0;
  for (int64_t strip = matrix * b->rows; strip < last; strip += b->strip) {
    const int64_t end = strip + b->strip < last ? strip + b->strip : last;
    double error = 0;
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
        const double its_error = b->errors[group + i], a = b->factors[group + i];
#if CAST
        const uint32_t *from = row_in_fp32(b, start, widened);
#else
        const PATTERN *from = (const PATTERN *)b->source + start;
#endif
        struct ROW(row) row = {
            from, (PATTERN *)b->result + start, change + i * stride, n, b->is_scaled ? 0 : start - strip * n,
            (REAL)a, (REAL)(a - 1), (REAL)its_error, (REAL)b->spread, (int)b->record, b->is_scaled ? UINT32_MAX : 0};
#if PRECISION == 24
        if (!is_exact(b, group + i, from)) b->rooms[group + i] = 0;
        else if (!b->record && !b->back) row.error = 0x1p-1000, row.spread = 0; /* too little for any sum but 0 */
#endif
        sums.squares = 0;
        if (its_error < 0) ROW(keep_row)(&row, &list, &sums);
        else ROW(do_row)((int)b->back, &row, &list, &sums);
        b->squares[group + i] = sums.squares;
        if (b->is_scaled) ROW(finish)(b, group + i, &list, its_error, &sums);
        else if (its_error > error) error = its_error;
      }
    }
    if (!b->is_scaled) ROW(finish)(b, strip, &list, error, &sums);
  }
  sums.entries = b->entries;
  b->sums[matrix] = sums;
}

#undef ROW
#undef FROM
#undef FROM_PATTERN
#undef FROM_SIZE
#undef FROM_INF
