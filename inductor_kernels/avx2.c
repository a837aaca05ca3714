// Exact products of 8-bit codes and 8-bit weights for x86 without VNNI: vpmaddwd on 16-bit pairs, twice the
// multiplications per instruction of float32. A convolution is a GEMM whose rows are gathered as they are needed;
// a linear layer is a convolution of 1x1 images.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 6         // of the register tile: 6 x 16 sums in 12 registers
#define COLUMNS 16
#define CHUNK 96       // rows gathered at a time
#define FEW_ROWS 24    // per thread; below, the threads share out the columns instead
#define DEPTH 384      // pairs of a panel kept in the first-level cache
#define WORTH 2000000  // multiplications that repay waking a thread, about 50 us of one

// What stays the same from call to call. Panels: [columns / 16][pairs][16][2] 16-bit weights, zeros at the end.
typedef struct {
    const int16_t *panels;
    const int32_t *weight_sum;
    int64_t height, width, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int64_t dilation_h, dilation_w, out_h, out_w, columns;
} Plan;

typedef struct {
    const uint8_t *codes;
    int16_t zero_point;
    uint8_t flip;  // 128 turns signed codes into unsigned ones
} Input;

// A panel's columns of the vectors, padded to the panel's width. Without a bias it is -0, which changes no sum.
typedef struct {
    int32_t zero[COLUMNS];  // zero point times weight sum
    float scale[COLUMNS], bias[COLUMNS];
    int64_t width;
} Finish;

static void widen(const uint8_t *from, int64_t count, uint8_t flip, int16_t *to) {
    int64_t i = 0;
    __m128i mask = _mm_set1_epi8((char)flip);
    for (; i + 16 <= count; i += 16) {
        __m128i codes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + i)), mask);
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_cvtepu8_epi16(codes));
    }
    for (; i < count; i++) to[i] = (int16_t)(from[i] ^ flip);
}

static void fill(int16_t value, int64_t count, int16_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] = value;
}

// The window of output pixel (b, oh, ow); outside the image it reads the zero point.
static void gather_window(const Plan *p, const Input *x, int64_t b, int64_t oh, int64_t ow, int16_t *to) {
    int64_t left = ow * p->stride_w - p->pad_w, line = p->kernel_w * p->channels;
    for (int64_t kh = 0; kh < p->kernel_h; kh++, to += line) {
        int64_t h = oh * p->stride_h - p->pad_h + kh * p->dilation_h;
        if (h < 0 || h >= p->height) {
            fill(x->zero_point, line, to);
            continue;
        }
        const uint8_t *row = x->codes + (b * p->height + h) * p->width * p->channels;
        if (p->dilation_w == 1 && left >= 0 && left + p->kernel_w <= p->width) {
            widen(row + left * p->channels, line, x->flip, to);
            continue;
        }
        for (int64_t kw = 0; kw < p->kernel_w; kw++) {
            int64_t w = left + kw * p->dilation_w;
            if (w >= 0 && w < p->width) widen(row + w * p->channels, p->channels, x->flip, to + kw * p->channels);
            else fill(x->zero_point, p->channels, to + kw * p->channels);
        }
    }
}

// Rows [first, first + count) of the implied matrix into a[][stride], each padded with zeros to the stride.
static void gather(const Plan *p, const Input *x, int64_t first, int64_t count, int64_t stride, int16_t *a) {
    int64_t depth = p->kernel_h * p->kernel_w * p->channels;
    int is_pointwise = p->kernel_h * p->kernel_w * p->stride_h * p->stride_w == 1 && !p->pad_h && !p->pad_w;
    if (is_pointwise) {
        if (depth == stride) widen(x->codes + first * depth, count * depth, x->flip, a);
        else
            for (int64_t r = 0; r < count; r++) {
                widen(x->codes + (first + r) * depth, depth, x->flip, a + r * stride);
                a[r * stride + depth] = 0;
            }
        return;
    }
    int64_t ow = first % p->out_w, oh = first / p->out_w % p->out_h, b = first / (p->out_w * p->out_h);
    for (int64_t r = 0; r < count; r++, a += stride) {
        gather_window(p, x, b, oh, ow, a);
        if (depth < stride) a[depth] = 0;
        if (++ow == p->out_w) {
            ow = 0;
            if (++oh == p->out_h) oh = 0, b++;
        }
    }
}

static void load_finish(const Plan *p, int64_t column, int64_t zero_point, const float *scale, const float *bias,
                        Finish *f) {
    f->width = p->columns - column < COLUMNS ? p->columns - column : COLUMNS;
    for (int64_t n = 0; n < COLUMNS; n++) {
        int inside = n < f->width;
        f->zero[n] = inside ? (int32_t)zero_point * p->weight_sum[column + n] : 0;
        f->scale[n] = inside ? scale[column + n] : 0.0f;
        f->bias[n] = inside && bias ? bias[column + n] : -0.0f;
    }
}

// (sum - z weight_sum) * scale (* row_scale) + bias of 8 columns
static __m256 finished(__m256i sum, const Finish *f, int half, float factor) {
    __m256i exact = _mm256_sub_epi32(sum, _mm256_loadu_si256((const __m256i *)(f->zero + 8 * half)));
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(exact), _mm256_loadu_ps(f->scale + 8 * half));
    return _mm256_add_ps(_mm256_mul_ps(value, _mm256_set1_ps(factor)), _mm256_loadu_ps(f->bias + 8 * half));
}

static void store_finished(__m256i low, __m256i high, const Finish *f, float factor, float *out) {
    __m256 values[2] = {finished(low, f, 0, factor), finished(high, f, 1, factor)};
    if (f->width == COLUMNS) {
        _mm256_storeu_ps(out, values[0]);
        _mm256_storeu_ps(out + 8, values[1]);
    } else {
        float both[COLUMNS];
        _mm256_storeu_ps(both, values[0]);
        _mm256_storeu_ps(both + 8, values[1]);
        memcpy(out, both, (size_t)f->width * sizeof(float));
    }
}

// sums[ROWS][COLUMNS] (+)= a[ROWS][2 * pairs] b[pairs][COLUMNS][2]; from zero if it is the first part. A function
// of its own, and the step in assembly, because all 16 registers are taken and compilers spill the sums otherwise.
__attribute__((noinline)) static void tile(const int16_t *a, int64_t stride, const int16_t *b, int64_t pairs,
                                           int is_first, int32_t *sums) {
    __m256i c[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++)
            c[r][h] = is_first ? _mm256_setzero_si256()
                               : _mm256_loadu_si256((__m256i *)(sums + r * COLUMNS + 8 * h));
    for (int64_t p = 0; p < pairs; p++) {
        __m256i b0 = _mm256_loadu_si256((const __m256i *)(b + p * 2 * COLUMNS));
        __m256i b1 = _mm256_loadu_si256((const __m256i *)(b + p * 2 * COLUMNS + COLUMNS));
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            __m256i v, product;
            __asm__("vpbroadcastd %[pair], %[v]\n\t"
                    "vpmaddwd %[b0], %[v], %[product]\n\t"
                    "vpaddd %[product], %[c0], %[c0]\n\t"
                    "vpmaddwd %[b1], %[v], %[v]\n\t"
                    "vpaddd %[v], %[c1], %[c1]"
                    : [c0] "+x"(c[r][0]), [c1] "+x"(c[r][1]), [v] "=&x"(v), [product] "=&x"(product)
                    : [b0] "x"(b0), [b1] "x"(b1), [pair] "m"(*(const int32_t(*)[1])(a + r * stride + 2 * p)));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i *)(sums + r * COLUMNS + 8 * h), c[r][h]);
}

// Rows [0, rows) of a tile into y; y and row_scale point at the first one.
static void store_tile(const int32_t *sums, int64_t rows, const Finish *f, const float *row_scale, float *y,
                       int64_t columns) {
    for (int64_t r = 0; r < (rows < ROWS ? rows : ROWS); r++, sums += COLUMNS)
        store_finished(_mm256_loadu_si256((const __m256i *)sums), _mm256_loadu_si256((const __m256i *)(sums + 8)), f,
                       row_scale ? row_scale[r] : 1.0f, y + r * columns);
}

// How the rows and panels are shared out.
typedef struct {
    int64_t chunk, chunks, parts, threads;
} Split;

static Split split(int64_t rows, int64_t depth, int64_t columns, int64_t panels, int64_t threads) {
    int64_t worth = rows * depth * columns / WORTH, each;
    Split s = {rows < CHUNK ? rows : CHUNK, 0, 1, threads < worth ? threads : worth > 1 ? worth : 1};
    each = (rows + s.threads - 1) / s.threads;
    if (each < FEW_ROWS) s.parts = s.threads < panels ? s.threads : panels;
    else if (each < s.chunk) s.chunk = (each + ROWS - 1) / ROWS * ROWS;
    s.chunks = (rows + s.chunk - 1) / s.chunk;
    return s;
}

// x: codes [batch, height, width, channels]; y: float [batch, out_h, out_w, columns]; bias and row_scale may be
// NULL. Returns 0, or 1 when there is no memory.
int inductor_kernels_product(const Plan *p, const uint8_t *codes, float *y, const float *scale, const float *bias,
                             const float *row_scale, int64_t batch, int64_t zero_point, int64_t is_signed,
                             int64_t threads) {
    int64_t rows = batch * p->out_h * p->out_w, depth = p->kernel_h * p->kernel_w * p->channels;
    int64_t pairs = (depth + 1) / 2, panels = (p->columns + COLUMNS - 1) / COLUMNS;
    if (rows == 0) return 0;
    Split s = split(rows, depth, p->columns, panels, threads);
    int64_t padded = (s.chunk + ROWS - 1) / ROWS * ROWS;
    Input x = {codes, (int16_t)zero_point, is_signed ? 128 : 0};
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) if (s.threads > 1)
    {
        int16_t *a = malloc((size_t)(padded * pairs) * 2 * sizeof(int16_t));
        int32_t *sums = malloc((size_t)(padded * COLUMNS) * sizeof(int32_t));
        if (!a || !sums) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.chunks * s.parts; task++) {
            int64_t first = task / s.parts * s.chunk, part = task % s.parts;
            int64_t count = rows - first < s.chunk ? rows - first : s.chunk;
            if (!a || !sums) continue;
            gather(p, &x, first, count, pairs * 2, a);
            fill(0, (ROWS - count % ROWS) % ROWS * pairs * 2, a + count * pairs * 2);
            for (int64_t panel = panels * part / s.parts; panel < panels * (part + 1) / s.parts; panel++) {
                Finish f;
                load_finish(p, panel * COLUMNS, zero_point, scale, bias, &f);
                for (int64_t k = 0; k < pairs; k += DEPTH)
                    for (int64_t r = 0; r < count; r += ROWS) {
                        tile(a + (r * pairs + k) * 2, pairs * 2, p->panels + (panel * pairs + k) * 2 * COLUMNS,
                             pairs - k < DEPTH ? pairs - k : DEPTH, k == 0, sums + r * COLUMNS);
                        if (k + DEPTH < pairs) continue;
                        store_tile(sums + r * COLUMNS, count - r, &f, row_scale ? row_scale + first + r : NULL,
                                   y + (first + r) * p->columns + panel * COLUMNS, p->columns);
                    }
            }
        }
        free(a);
        free(sums);
    }
    return failed;
}
