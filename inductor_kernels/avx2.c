// Exact products of 8-bit codes and 8-bit weights for x86 without VNNI: vpmaddwd on 16-bit pairs, twice the
// multiplications per instruction of float32. A convolution is an implicit GEMM: rows are gathered as they are needed.
// A linear layer is a convolution of 1x1 images.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 6         // of the register tile: 6 x 16 sums in 12 registers
#define COLUMNS 16     // of the register tile and of a panel
#define CHUNK 96       // rows gathered at a time
#define FEW_ROWS 24    // rows per thread below which the threads divide the columns instead
#define DEPTH 384      // pairs of a panel that stay in the first-level cache
#define WORTH 2000000  // multiplications that repay waking a thread, about 50 us of its time
#define WORTH_CODES 200000  // numbers to quantize that repay it

// The arguments that stay the same from call to call. panels: [columns / 16][pairs][16][2] weights, padded with zeros.
typedef struct {
    const int16_t *panels;
    const int32_t *weight_sum;
    int64_t height, width, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int64_t dilation_h, dilation_w, out_h, out_w, columns;
} PackedWeight;

typedef struct {
    const uint8_t *codes;
    const float *values;  // of a linear layer, instead of codes: quantized as they are gathered
    int16_t zero_point;
    uint8_t flip;  // 128 turns signed codes into unsigned ones
    float inverse, levels;
} Input;

// The epilogue's vectors for the columns of one panel, padded to its width. A missing bias is -0, which changes no sum.
typedef struct {
    int32_t zero[COLUMNS];  // zero point times weight sum
    float scale[COLUMNS], bias[COLUMNS];
    int64_t width, step;  // step: from a column to the next in the result
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

// clamp(round(x * inverse + zero_point), 0, levels) of 8 numbers, ties to even; NaN gives 0
static __m256i codes_of(const float *x, __m256 inverse, __m256 zero_point, __m256 levels) {
    __m256 value = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(x), inverse), zero_point);
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, _mm256_setzero_ps()), levels));
}

static void quantize_wide(const Input *x, int64_t first, int64_t count, int16_t *to) {
    __m256 by = _mm256_set1_ps(x->inverse), zero = _mm256_set1_ps(x->zero_point), most = _mm256_set1_ps(x->levels);
    const float *from = x->values + first;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256i pair = _mm256_packs_epi32(codes_of(from + i, by, zero, most), codes_of(from + i + 8, by, zero, most));
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_permute4x64_epi64(pair, 0xd8));  // packs works on halves
    }
    for (; i < count; i += 8) {
        float rest[8] = {0};
        int32_t eight[8];
        int64_t left = count - i < 8 ? count - i : 8;
        memcpy(rest, from + i, (size_t)left * sizeof(float));
        _mm256_storeu_si256((__m256i *)eight, codes_of(rest, by, zero, most));
        for (int64_t j = 0; j < left; j++) to[i + j] = (int16_t)eight[j];
    }
}

// count codes from index first on, widened to 16 bits
static void take(const Input *x, int64_t first, int64_t count, int16_t *to) {
    if (x->values) quantize_wide(x, first, count, to);
    else widen(x->codes + first, count, x->flip, to);
}

static void fill(int16_t value, int64_t count, int16_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] = value;
}

// The window of output pixel (b, oh, ow); outside the image it reads the zero point.
static void gather_window(const PackedWeight *p, const Input *x, int64_t b, int64_t oh, int64_t ow, int16_t *to) {
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

// Rows [first, first + count) of the implicit matrix into a[][stride], each padded with zeros to the stride.
static void gather(const PackedWeight *p, const Input *x, int64_t first, int64_t count, int64_t stride, int16_t *a) {
    int64_t depth = p->kernel_h * p->kernel_w * p->channels;
    int is_pointwise = p->kernel_h * p->kernel_w * p->stride_h * p->stride_w == 1 && !p->pad_h && !p->pad_w;
    if (is_pointwise) {
        if (depth == stride) take(x, first * depth, count * depth, a);
        else
            for (int64_t r = 0; r < count; r++) {
                take(x, (first + r) * depth, depth, a + r * stride);
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

static void load_finish(const PackedWeight *p, int64_t column, int64_t zero_point, const float *scale,
                        const float *bias, int64_t step, Finish *f) {
    f->step = step;
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

static void store_finished(const int32_t *sums, const Finish *f, float factor, float *out) {
    const __m256i *halves = (const __m256i *)sums;
    __m256 values[2] = {finished(_mm256_loadu_si256(halves), f, 0, factor),
                        finished(_mm256_loadu_si256(halves + 1), f, 1, factor)};
    if (f->width == COLUMNS && f->step == 1) {
        _mm256_storeu_ps(out, values[0]);
        _mm256_storeu_ps(out + 8, values[1]);
    } else {
        float both[COLUMNS];
        _mm256_storeu_ps(both, values[0]);
        _mm256_storeu_ps(both + 8, values[1]);
        for (int64_t n = 0; n < f->width; n++) out[n * f->step] = both[n];
    }
}

// sums[ROWS][COLUMNS] (+)= a[ROWS][2 * pairs] b[pairs][COLUMNS][2], starting from zero if is_first. Not inlined, and
// the inner step in assembly, because it uses all 16 registers and compilers spill the sums otherwise.
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

// Stores a tile into y, from row `first` of the result on. With planes (step != 1) the result is [batch, columns,
// pixels], else [rows, columns].
static void store_tile(const int32_t *sums, int64_t first, int64_t rows, int64_t column, const PackedWeight *p,
                       const Finish *f, const float *row_scale, float *y) {
    int64_t pixels = p->out_h * p->out_w;
    for (int64_t row = first; row < first + (rows < ROWS ? rows : ROWS); row++, sums += COLUMNS) {
        float *out = f->step == 1 ? y + row * p->columns + column
                                  : y + row / pixels * p->columns * pixels + column * pixels + row % pixels;
        store_finished(sums, f, row_scale ? row_scale[row] : 1.0f, out);
    }
}

// How rows and panels are divided into tasks: chunks of rows times parts of the panels.
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

// codes, or values to be quantized (linear layers only): [batch, height, width, channels]; y: float [batch, out_h,
// out_w, columns], or [batch, columns, out_h, out_w] with planes; bias and row_scale may be NULL. Returns 0, or 1 when
// there is no memory.
int inductor_kernels_product(const PackedWeight *p, const uint8_t *codes, const float *values, float *y,
                             const float *scale, const float *bias, const float *row_scale, int64_t batch,
                             int64_t zero_point, int64_t is_signed, int64_t planes, float inverse, float levels,
                             int64_t threads) {
    int64_t rows = batch * p->out_h * p->out_w, depth = p->kernel_h * p->kernel_w * p->channels;
    int64_t pairs = (depth + 1) / 2, panels = (p->columns + COLUMNS - 1) / COLUMNS;
    if (rows == 0) return 0;
    Split s = split(rows, depth, p->columns, panels, threads);
    int64_t padded = (s.chunk + ROWS - 1) / ROWS * ROWS;
    Input x = {codes, values, (int16_t)zero_point, is_signed ? 128 : 0, inverse, levels};
    int64_t step = planes ? p->out_h * p->out_w : 1;
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
                load_finish(p, panel * COLUMNS, zero_point, scale, bias, step, &f);
                for (int64_t k = 0; k < pairs; k += DEPTH)
                    for (int64_t r = 0; r < count; r += ROWS) {
                        tile(a + (r * pairs + k) * 2, pairs * 2, p->panels + (panel * pairs + k) * 2 * COLUMNS,
                             pairs - k < DEPTH ? pairs - k : DEPTH, k == 0, sums + r * COLUMNS);
                        if (k + DEPTH < pairs) continue;
                        store_tile(sums + r * COLUMNS, first + r, count - r, panel * COLUMNS, p, &f, row_scale, y);
                    }
            }
        }
        free(a);
        free(sums);
    }
    return failed;
}

static int64_t threads_for(int64_t count, int64_t threads) {
    int64_t worth = count / WORTH_CODES;
    return threads < worth ? threads : worth > 1 ? worth : 1;
}

// codes[i] = clamp(round(x[i] * inverse + zero_point), 0, levels), ties to even; levels <= 255.
void inductor_kernels_quantize(const float *x, uint8_t *codes, int64_t count, float inverse, float zero_point,
                               float levels, int64_t threads) {
    __m256 by = _mm256_set1_ps(inverse), zero = _mm256_set1_ps(zero_point), most = _mm256_set1_ps(levels);
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs works on each half of a register
    int64_t whole = count / 32;
    threads = threads_for(count, threads);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i <= whole; i++) {
        float rest[32] = {0};
        uint8_t last[32];
        int64_t left = i < whole ? 32 : count - 32 * whole;
        if (left < 32) memcpy(rest, x + 32 * i, (size_t)left * sizeof(float));
        const float *from = left < 32 ? rest : x + 32 * i;
        __m256i low = _mm256_packs_epi32(codes_of(from, by, zero, most), codes_of(from + 8, by, zero, most));
        __m256i high = _mm256_packs_epi32(codes_of(from + 16, by, zero, most), codes_of(from + 24, by, zero, most));
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(left < 32 ? last : codes + 32 * i), bytes);
        if (left < 32) memcpy(codes + 32 * i, last, (size_t)left);
    }
}

// The same for x [batch, channels, pixels] and codes [batch, pixels, channels]; stride: from an image of x to the next.
void inductor_kernels_quantize_planes(const float *x, uint8_t *codes, int64_t batch, int64_t stride, int64_t channels,
                                      int64_t pixels, float inverse, float zero_point, float levels, int64_t threads) {
    __m256 by = _mm256_set1_ps(inverse), zero = _mm256_set1_ps(zero_point), most = _mm256_set1_ps(levels);
    int64_t blocks = (pixels + 7) / 8;
    threads = threads_for(batch * channels * pixels, threads);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t block = 0; block < batch * blocks; block++) {
        int64_t image = block / blocks, pixel = block % blocks * 8, wide = pixels - pixel < 8 ? pixels - pixel : 8;
        const float *from = x + image * stride + pixel;
        uint8_t *to = codes + (image * pixels + pixel) * channels;
        for (int64_t c = 0; c < channels; c += 4) {  // four channels of a pixel are the bytes of one number
            int64_t high = channels - c < 4 ? channels - c : 4;
            __m256i four = _mm256_setzero_si256();
            uint32_t numbers[8];
            for (int64_t h = high - 1; h >= 0; h--) {
                float rest[8] = {0};
                const float *line = from + (c + h) * pixels;
                if (wide < 8) memcpy(rest, line, (size_t)wide * sizeof(float));
                four = _mm256_or_si256(_mm256_slli_epi32(four, 8), codes_of(wide < 8 ? rest : line, by, zero, most));
            }
            _mm256_storeu_si256((__m256i *)numbers, four);
            if (high == 4)
                for (int64_t i = 0; i < wide; i++) memcpy(to + i * channels + c, numbers + i, 4);
            else
                for (int64_t i = 0; i < wide; i++) memcpy(to + i * channels + c, numbers + i, (size_t)high);
        }
    }
}
