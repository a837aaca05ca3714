// Exact products of 8-bit codes and 8-bit weights for x86 without VNNI: vpmaddwd on 16-bit pairs, twice the
// multiplications per instruction of float32. A convolution is a GEMM whose rows are gathered as they are needed;
// a linear layer is a convolution of 1x1 images.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 6       // of the register tile: 6 x 16 sums in 12 registers
#define COLUMNS 16
#define CHUNK 96     // rows gathered at a time
#define DEPTH 384    // pairs of a panel kept in the first-level cache

typedef struct {
    int64_t batch, height, width, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int64_t dilation_h, dilation_w, out_h, out_w, columns, zero_point, is_signed, threads;
} Shape;

// Codes as 16-bit integers; signed ones become unsigned.
static void widen(const uint8_t *from, int64_t count, uint8_t flip, int16_t *to) {
    int64_t i = 0;
    __m128i mask = _mm_set1_epi8((char)flip);
    for (; i + 16 <= count; i += 16) {
        __m128i codes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + i)), mask);
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_cvtepu8_epi16(codes));
    }
    for (; i < count; i++) to[i] = (int16_t)(from[i] ^ flip);
}

// One output pixel's window; outside the image it reads the zero point.
static void gather(const uint8_t *x, const Shape *s, int64_t row, int16_t *to) {
    int64_t ow = row % s->out_w, oh = row / s->out_w % s->out_h, b = row / (s->out_w * s->out_h);
    uint8_t flip = s->is_signed ? 128 : 0;
    for (int64_t kh = 0; kh < s->kernel_h; kh++)
        for (int64_t kw = 0; kw < s->kernel_w; kw++, to += s->channels) {
            int64_t h = oh * s->stride_h - s->pad_h + kh * s->dilation_h;
            int64_t w = ow * s->stride_w - s->pad_w + kw * s->dilation_w;
            if (h >= 0 && h < s->height && w >= 0 && w < s->width)
                widen(x + ((b * s->height + h) * s->width + w) * s->channels, s->channels, flip, to);
            else
                for (int64_t c = 0; c < s->channels; c++) to[c] = (int16_t)s->zero_point;
        }
}

// sums[ROWS][COLUMNS] += a[ROWS][2 * pairs] b[pairs][COLUMNS][2]
static void tile(const int16_t *a, int64_t stride, const int16_t *b, int64_t pairs, int32_t *sums) {
    __m256i c[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) c[r][h] = _mm256_loadu_si256((__m256i *)(sums + r * COLUMNS + 8 * h));
    for (int64_t p = 0; p < pairs; p++) {
        __m256i b0 = _mm256_loadu_si256((const __m256i *)(b + p * 2 * COLUMNS));
        __m256i b1 = _mm256_loadu_si256((const __m256i *)(b + p * 2 * COLUMNS + COLUMNS));
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, a + r * stride + 2 * p, 4);
            __m256i v = _mm256_set1_epi32(pair);
            c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(v, b0));
            c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(v, b1));
            // in this order: gcc would start all products first and spill the sums
            __asm__ volatile("" : "+x"(c[r][0]), "+x"(c[r][1]));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i *)(sums + r * COLUMNS + 8 * h), c[r][h]);
}

// (sum - z weight_sum) * scale (* row_scale) + bias for the columns of one panel.
static void finish(const int32_t *sums, const Shape *s, int64_t first, int64_t rows, int64_t column,
                   const int32_t *weight_sum, const float *scale, const float *bias, const float *row_scale, float *y) {
    int64_t width = s->columns - column < COLUMNS ? s->columns - column : COLUMNS;
    for (int64_t r = 0; r < rows; r++) {
        float factor = row_scale ? row_scale[first + r] : 1.0f;
        float *out = y + (first + r) * s->columns + column;
        for (int64_t n = 0; n < width; n++) {
            int32_t exact = sums[r * COLUMNS + n] - (int32_t)s->zero_point * weight_sum[column + n];
            float value = (float)exact * scale[column + n] * factor;
            out[n] = bias ? value + bias[column + n] : value;
        }
    }
}

// x: codes [batch, height, width, channels]; w: panels [columns / 16][pairs][16][2] of 16-bit weights, zeros at the
// end; y: float [batch, out_h, out_w, columns]. Returns 0, or 1 when there is no memory.
int inductor_kernels_product(const uint8_t *x, const int16_t *w, const int32_t *weight_sum, const float *scale,
                             const float *bias, const float *row_scale, float *y, const Shape *s) {
    int64_t rows = s->batch * s->out_h * s->out_w, depth = s->kernel_h * s->kernel_w * s->channels;
    int64_t pairs = (depth + 1) / 2, chunks = (rows + CHUNK - 1) / CHUNK, failed = 0;
    int64_t panels = (s->columns + COLUMNS - 1) / COLUMNS;
    // few rows: the threads share out the panels instead
    int64_t parts = chunks >= 2 * s->threads || panels < 2 ? 1 : (s->threads < panels ? s->threads : panels);
#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1)
    for (int64_t task = 0; task < chunks * parts; task++) {
        int64_t first = task / parts * CHUNK, part = task % parts;
        int64_t count = rows - first < CHUNK ? rows - first : CHUNK;
        int64_t padded = (count + ROWS - 1) / ROWS * ROWS;
        int16_t *a = calloc((size_t)(padded * pairs * 2), sizeof(int16_t));
        if (!a) {
            failed = 1;
            continue;
        }
        for (int64_t r = 0; r < count; r++) gather(x, s, first + r, a + r * pairs * 2);
        for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++) {
            int32_t sums[CHUNK * COLUMNS] = {0};
            for (int64_t p = 0; p < pairs; p += DEPTH)
                for (int64_t r = 0; r < padded; r += ROWS)
                    tile(a + r * pairs * 2 + 2 * p, pairs * 2, w + (panel * pairs + p) * 2 * COLUMNS,
                         pairs - p < DEPTH ? pairs - p : DEPTH, sums + r * COLUMNS);
            finish(sums, s, first, count, panel * COLUMNS, weight_sum, scale, bias, row_scale, y);
        }
        free(a);
    }
    return (int)failed;
}
