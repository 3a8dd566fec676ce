// Matmuls of float matrices in integers (int8.py has the formulas), for CPUs with AVX2.
//
// x (n, k) is quantized as a whole, W (k, d) a panel of its columns at a time, right before the panel is multiplied, so
// that no copy of W is kept. The reduction is cut into blocks of DEPTH; for row i, column j and block p
//
//     out_ij = sum over p of  s_ip t_pj (sum over k in p of q_ik r_kj)
//     s_ip = max |x_ik| / MOST,   q_ik = x_ik / s_ip to the nearest;   t and r likewise from W's columns
//
// The inner sum is one of 32-bit integers that never overflow, the outer one of floats, in the order of p however many
// threads there are. A block with an infinity or a NaN has a scale of NaN.
//
// What lies next to each other in 32 bits of q and r is multiplied and added by one instruction: two of 16 bits, or
// four of 8. For 8 bits q has to be unsigned: MOST is added to it, and the 32-bit sums start at minus MOST times the
// sum of r.

#include <cstdint>

#if !defined(__AVX2__) || !defined(__FMA__)

extern "C" int integers_supported() { return 0; }

#else

#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <omp.h>

extern "C" int integers_supported() { return 1; }

static const int64_t DEPTH = 128;   // of a block of the reduction
static const int64_t COLUMNS = 16;  // of a tile of sums: two vectors
static const int64_t PANEL = 6;     // tiles side by side whose block of W stays in the first cache
static const int64_t ROWS = 192;    // of x that go by a panel together, so that their sums stay in the second cache
static const float TINY = 0x1p-100f;  // a block with nothing larger is zeros, as the inverse of its scale may overflow

typedef __m256i words;
#define INLINE static inline __attribute__((always_inline))

static inline int64_t ceiling(int64_t number, int64_t of) { return (number + of - 1) / of; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline words absolute(const float* at) {
    return _mm256_and_si256(_mm256_loadu_si256((const words*)at), _mm256_set1_epi32(0x7fffffff));
}

// A block's scale and its inverse, for the largest of its elements' magnitudes: their bits are in the order of their
// values, with infinity and NaN at the end.
static inline void scale_of(uint32_t largest, float most, float& scale, float& inverse) {
    float value;
    memcpy(&value, &largest, sizeof value);
    bool some = value >= TINY && largest < 0x7f800000u;
    scale = largest >= 0x7f800000u ? NAN : some ? value / most : 0;
    inverse = some ? most / value : 0;
}

static inline uint32_t largest_of(const float* at, int64_t count) {  // a multiple of 8
    words found = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 8) found = _mm256_max_epu32(found, absolute(at + k));
    uint32_t each[8], largest = 0;
    memcpy(each, &found, sizeof each);
    for (uint32_t one : each) largest = one > largest ? one : largest;
    return largest;
}

static inline words nearest(const float* at, __m256 inverse) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at), inverse));
}

// 32 bits of the reduction are a step: EACH elements, which one instruction multiplies and adds. A format packs
// elements in their order, and sums a tile of TALL rows: sums (TALL, COLUMNS) += q r over an even number of steps, r as
// [step][column][EACH]. The loops are in assembly as the order of instructions matters, and as all 16 registers are
// needed: with multiplications and sums by turns they take nearly twice as long as with two of each.

struct Int16 {
    typedef int16_t number;
    static const int MOST = 4095, EACH = 2, TALL = 6;

    INLINE words packed(const float* at, __m256 inverse) {
        words pairs = _mm256_packs_epi32(nearest(at, inverse), nearest(at + 8, inverse));
        return _mm256_permute4x64_epi64(pairs, 0xd8);
    }

    INLINE words of_x(words packed) { return packed; }
    INLINE words begin(const words*) { return _mm256_setzero_si256(); }
    INLINE words taken_off(const words*, int64_t) { return _mm256_setzero_si256(); }

    INLINE void add(words (*sums)[2], const number* q, const words* r, int64_t steps) {
        static_assert(DEPTH * sizeof(number) == 256, "the distance of two rows of q");
        #define ROW(I)                                                                                                 \
            "vpbroadcastd " #I "*256(%[q]), %%ymm14\n"                                                                 \
            "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n"                                                                     \
            "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n"                                                                     \
            "vpaddd %%ymm15, %[left" #I "], %[left" #I "]\n"                                                           \
            "vpaddd %%ymm14, %[right" #I "], %[right" #I "]\n"
        #define SUMS(I) [left##I] "+x"(sums[I][0]), [right##I] "+x"(sums[I][1])
        asm volatile(
            "1:\n"
            "vmovdqa (%[r]), %%ymm12\n"
            "vmovdqa 32(%[r]), %%ymm13\n"
            ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5)
            "add $4, %[q]\n"
            "add $64, %[r]\n"
            "dec %[steps]\n"
            "jnz 1b\n"
            : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), [q] "+r"(q), [r] "+r"(r), [steps] "+r"(steps)
            :
            : "cc", "memory", "xmm12", "xmm13", "xmm14", "xmm15");
        #undef ROW
        #undef SUMS
    }
};

struct Int8 {
    typedef int8_t number;
    static const int MOST = 63, EACH = 4, TALL = 4;

    INLINE words packed(const float* at, __m256 inverse) {
        words low = _mm256_packs_epi32(nearest(at, inverse), nearest(at + 8, inverse));
        words high = _mm256_packs_epi32(nearest(at + 16, inverse), nearest(at + 24, inverse));
        return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }

    INLINE words of_x(words packed) { return _mm256_add_epi8(packed, _mm256_set1_epi8(MOST)); }
    INLINE words begin(const words* at) { return _mm256_load_si256(at); }

    // - MOST times the sum of r, for eight columns
    INLINE words taken_off(const words* r, int64_t steps) {
        words total = _mm256_setzero_si256();
        for (int64_t step = 0; step < steps; step++) {
            words pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(MOST), _mm256_load_si256(r + 2 * step));
            total = _mm256_sub_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        return total;
    }

    // Two sums of two multiplications fit in 16 bits together: 4 * 63 * 126 < 2^15.
    INLINE void add(words (*sums)[2], const number* q, const words* r, int64_t steps) {
        const words ones = _mm256_set1_epi16(1);
        static_assert(DEPTH * sizeof(number) == 128, "the distance of two rows of q");
        #define ROW(I)                                                                                                 \
            "vpbroadcastd " #I "*128(%[q]), %%ymm11\n"                                                                 \
            "vpmaddubsw %%ymm8, %%ymm11, %%ymm12\n"                                                                    \
            "vpmaddubsw %%ymm9, %%ymm11, %%ymm13\n"                                                                    \
            "vpbroadcastd " #I "*128+4(%[q]), %%ymm11\n"                                                               \
            "vpmaddubsw %%ymm10, %%ymm11, %%ymm14\n"                                                                   \
            "vpmaddubsw 96(%[r]), %%ymm11, %%ymm11\n"                                                                  \
            "vpaddw %%ymm14, %%ymm12, %%ymm12\n"                                                                       \
            "vpaddw %%ymm11, %%ymm13, %%ymm13\n"                                                                       \
            "vpmaddwd %%ymm15, %%ymm12, %%ymm12\n"                                                                     \
            "vpmaddwd %%ymm15, %%ymm13, %%ymm13\n"                                                                     \
            "vpaddd %%ymm12, %[left" #I "], %[left" #I "]\n"                                                           \
            "vpaddd %%ymm13, %[right" #I "], %[right" #I "]\n"
        #define SUMS(I) [left##I] "+x"(sums[I][0]), [right##I] "+x"(sums[I][1])
        asm volatile(
            "vmovdqa %[ones], %%ymm15\n"
            "1:\n"
            "vmovdqa (%[r]), %%ymm8\n"
            "vmovdqa 32(%[r]), %%ymm9\n"
            "vmovdqa 64(%[r]), %%ymm10\n"
            ROW(0) ROW(1) ROW(2) ROW(3)
            "add $8, %[q]\n"
            "add $128, %[r]\n"
            "sub $2, %[steps]\n"
            "jnz 1b\n"
            : SUMS(0), SUMS(1), SUMS(2), SUMS(3), [q] "+r"(q), [r] "+r"(r), [steps] "+r"(steps)
            : [ones] "m"(ones)
            : "cc", "memory", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        #undef ROW
        #undef SUMS
    }
};

// Lines (rows of x, or columns of W) quantized, block by block: q [block][line][DEPTH], of W in tiles of COLUMNS lines
// [block][tile][step][column][EACH], their scales [block][line], and what the sums of a column of W begin with.
template <class F>
struct Quantised {
    typedef typename F::number number;
    int64_t lines;
    number* numbers;
    float* scales;
    int32_t* begins;

    static int64_t bytes(int64_t blocks, int64_t lines) {
        return ceiling(blocks * lines * (DEPTH * sizeof(number) + 8), 64) * 64;
    }
    Quantised(char* at, int64_t blocks, int64_t lines)
        : lines(lines), numbers((number*)at), scales((float*)(numbers + blocks * lines * DEPTH)),
          begins((int32_t*)(scales + blocks * lines)) {}
    number* numbers_of(int64_t p, int64_t line) const { return numbers + (p * lines + line) * DEPTH; }
    float* scales_of(int64_t p, int64_t line) const { return scales + p * lines + line; }
    int32_t* begins_of(int64_t p, int64_t line) const { return begins + p * lines + line; }
};

static inline int64_t depth_of(int64_t p, int64_t k) { return least(DEPTH, k - p * DEPTH); }
static inline int64_t filled_up(int64_t depth) { return ceiling(depth, 32) * 32; }  // to a whole vector of either format

template <class F>
static void quantise_row(const float* x, int64_t k, const Quantised<F>& to, int64_t i) {
    float copy[DEPTH];
    for (int64_t p = 0; p * DEPTH < k; p++) {
        int64_t depth = depth_of(p, k), filled = filled_up(depth);
        const float* block = x + p * DEPTH;
        if (filled != depth) {
            memset(copy, 0, sizeof copy);
            block = (const float*)memcpy(copy, block, depth * sizeof(float));
        }
        float inverse;
        scale_of(largest_of(block, filled), F::MOST, *to.scales_of(p, i), inverse);
        words* out = (words*)to.numbers_of(p, i);
        for (int64_t at = 0; at < filled; at += 8 * F::EACH)
            _mm256_store_si256(out++, F::of_x(F::packed(block + at, _mm256_set1_ps(inverse))));
    }
}

// A frozen matrix (k, d), or its transpose (d, k), with rows `lead` apart.
struct Matrix {
    const float* at;
    int64_t lead, k, d;
    bool transposed;
};

static inline void transpose(words* rows) {  // 8 x 8
    words a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

// From rows of W's transpose, one a column.
template <class F>
static inline void pack_rows(const float* W, int64_t lead, int64_t depth, words* out, float* scales) {
    for (int64_t half = 0; half < 2; half++) {
        float inverses[8];
        for (int i = 0; i < 8; i++)
            scale_of(largest_of(W + (half * 8 + i) * lead, depth), F::MOST, scales[half * 8 + i], inverses[i]);
        for (int64_t at = 0; at < depth; at += 8 * F::EACH) {
            words rows[8];
            for (int i = 0; i < 8; i++)
                rows[i] = F::packed(W + (half * 8 + i) * lead + at, _mm256_set1_ps(inverses[i]));
            transpose(rows);
            for (int i = 0; i < 8; i++) _mm256_store_si256(out + 2 * (at / F::EACH + i) + half, rows[i]);
        }
    }
}

// From rows of W, EACH at a time. They are read once, into a copy: at some strides between them the caches hold few of
// them at a time. What is asked for ahead are the next columns'.
template <class F>
static inline void pack_columns(const float* W, int64_t lead, int64_t depth, words* out, float* scales) {
    const int BITS = 32 / F::EACH;
    alignas(64) float copy[DEPTH * COLUMNS];
    words found[2] = {};
    for (int64_t k = 0; k < depth; k++) {
        _mm_prefetch((const char*)(W + k * lead + COLUMNS), _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            found[half] = _mm256_max_epu32(found[half], absolute(W + k * lead + 8 * half));
            _mm256_store_ps(copy + k * COLUMNS + 8 * half, _mm256_loadu_ps(W + k * lead + 8 * half));
        }
    }
    uint32_t largest[COLUMNS];
    memcpy(largest, found, sizeof largest);
    float inverses[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) scale_of(largest[i], F::MOST, scales[i], inverses[i]);
    for (int half = 0; half < 2; half++) {
        __m256 inverse = _mm256_loadu_ps(inverses + 8 * half);
        for (int64_t k = 0; k < depth; k += F::EACH) {
            words step = _mm256_setzero_si256();
            for (int i = 0; i < F::EACH; i++) {
                words one = _mm256_slli_epi32(nearest(copy + (k + i) * COLUMNS + 8 * half, inverse), 32 - BITS);
                step = _mm256_or_si256(step, _mm256_srli_epi32(one, 32 - BITS - i * BITS));
            }
            _mm256_store_si256(out + 2 * (k / F::EACH) + half, step);
        }
    }
}

// Block p of the columns from j on, a tile of them, as the lines from `line` on. One that is not whole is copied first,
// and filled up with zeros.
template <class F>
static void quantise_columns(const Matrix& W, int64_t p, int64_t j, const Quantised<F>& to, int64_t line) {
    float copy[COLUMNS * DEPTH];
    int64_t depth = depth_of(p, W.k), filled = filled_up(depth), columns = least(COLUMNS, W.d - j), lead = W.lead;
    const float* block = W.transposed ? W.at + j * lead + p * DEPTH : W.at + p * DEPTH * lead + j;
    if (filled != depth || columns != COLUMNS) {
        memset(copy, 0, sizeof copy);
        int64_t rows = W.transposed ? columns : depth, width = W.transposed ? depth : columns;
        for (int64_t row = 0; row < rows; row++)
            memcpy(copy + row * (W.transposed ? DEPTH : COLUMNS), block + row * lead, width * sizeof(float));
        block = copy;
        lead = W.transposed ? DEPTH : COLUMNS;
    }
    words *numbers = (words*)to.numbers_of(p, line), *begins = (words*)to.begins_of(p, line);
    (W.transposed ? pack_rows<F> : pack_columns<F>)(block, lead, filled, numbers, to.scales_of(p, line));
    for (int half = 0; half < 2; half++)
        _mm256_store_si256(begins + half, F::taken_off(numbers + half, filled / F::EACH));
}

// A tile of out (TALL, COLUMNS), its rows `lead` apart, = scales * sums, or += where ADD
template <class F, bool ADD>
INLINE void tile(const typename F::number* q, const float* s, const typename F::number* r, const float* t,
                 const int32_t* begins, int64_t steps, float* out, int64_t lead) {
    words sums[F::TALL][2];
    for (int row = 0; row < F::TALL; row++)
        for (int half = 0; half < 2; half++) sums[row][half] = F::begin((const words*)begins + half);
    F::add(sums, q, (const words*)r, steps);
    for (int row = 0; row < F::TALL; row++)
        for (int half = 0; half < 2; half++) {
            float* at = out + row * lead + 8 * half;
            __m256 scale = _mm256_mul_ps(_mm256_set1_ps(s[row]), _mm256_loadu_ps(t + 8 * half));
            __m256 found = _mm256_cvtepi32_ps(sums[row][half]);
            _mm256_storeu_ps(at, ADD ? _mm256_fmadd_ps(scale, found, _mm256_loadu_ps(at)) : _mm256_mul_ps(scale, found));
        }
}

struct Output {
    float* at;
    int64_t lead, n, d;
};

// Rows `first` to `last` of out, the columns of `count` tiles from j on, for block p. A tile that reaches over the
// matrix goes through a copy.
template <class F, bool ADD>
static void multiply(const Quantised<F>& x, const Quantised<F>& panel, int64_t p, int64_t first, int64_t last, int64_t j,
                     int64_t count, int64_t depth, const Output& out) {
    const int64_t AHEAD = ceiling(F::TALL * DEPTH * sizeof(*x.numbers), 64 * PANEL) * 64;
    int64_t steps = ceiling(depth, 2 * F::EACH) * 2;
    for (int64_t i = first; i < last; i += F::TALL) {
        const typename F::number *q = x.numbers_of(p, i), *r = panel.numbers_of(p, 0);
        const float *s = x.scales_of(p, i), *t = panel.scales_of(p, 0);
        const int32_t* begins = panel.begins_of(p, 0);
        float* at = out.at + i * out.lead + j;
        int64_t rows = least(F::TALL, out.n - i), columns = least(count * COLUMNS, out.d - j);
        int64_t whole = rows == F::TALL ? columns / COLUMNS * COLUMNS : 0;
        for (int64_t c = 0; c < whole; c += COLUMNS) {
            for (int64_t ahead = 0; ahead < AHEAD; ahead += 64)  // the next rows, a part beside each tile
                _mm_prefetch((const char*)(q + F::TALL * DEPTH) + c / COLUMNS * AHEAD + ahead, _MM_HINT_T0);
            tile<F, ADD>(q, s, r + c * DEPTH, t + c, begins + c, steps, at + c, out.lead);
        }
        for (int64_t c = whole; c < columns; c += COLUMNS) {
            float copy[F::TALL * COLUMNS];
            int64_t width = least(COLUMNS, columns - c) * sizeof(float);
            for (int64_t row = 0; ADD && row < rows; row++)
                memcpy(copy + row * COLUMNS, at + row * out.lead + c, width);
            tile<F, ADD>(q, s, r + c * DEPTH, t + c, begins + c, steps, copy, COLUMNS);
            for (int64_t row = 0; row < rows; row++) memcpy(at + row * out.lead + c, copy + row * COLUMNS, width);
        }
    }
}

// Threads share out panels, and where these are fewer than threads, parts of the rows as well.
template <class F>
static void matmul(const float* x, int64_t x_lead, const Matrix& W, const Output& out, bool add, char* space, int threads) {
    int64_t blocks = ceiling(W.k, DEPTH), rows = ceiling(out.n, F::TALL) * F::TALL;
    int64_t tiles = ceiling(out.d, COLUMNS), panels = least(ceiling(ceiling(tiles, PANEL), threads) * threads, tiles);
    int64_t parts = ceiling(threads, panels), part = ceiling(ceiling(rows, parts), F::TALL) * F::TALL;
    Quantised<F> left(space, blocks, rows);
    space += Quantised<F>::bytes(blocks, rows);
    #pragma omp parallel num_threads(threads)
    {
        int64_t size = Quantised<F>::bytes(blocks, PANEL * COLUMNS);
        Quantised<F> panel(space + omp_get_thread_num() * size, blocks, PANEL * COLUMNS);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < out.n; i++) quantise_row<F>(x + i * x_lead, W.k, left, i);
        #pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < panels * parts; unit++) {
            int64_t number = unit / parts, from = number * tiles / panels, count = (number + 1) * tiles / panels - from;
            int64_t first = unit % parts * part, last = least(first + part, out.n), j = from * COLUMNS;
            if (first >= last) continue;
            for (int64_t p = 0; p < blocks; p++)
                for (int64_t c = 0; c < count * COLUMNS; c += COLUMNS) quantise_columns<F>(W, p, j + c, panel, c);
            for (int64_t some = first; some < last; some += ROWS)
                for (int64_t p = 0; p < blocks; p++)
                    (p || add ? multiply<F, true> : multiply<F, false>)(
                        left, panel, p, some, least(some + ROWS, last), j, count, depth_of(p, W.k), out);
        }
    }
}

// Bytes of workspace that a matmul needs, at most.
extern "C" int64_t int_matmul_workspace(int64_t n, int64_t k, int threads) {
    int64_t blocks = ceiling(k, DEPTH);
    return Quantised<Int16>::bytes(blocks, n + Int16::TALL) + threads * Quantised<Int16>::bytes(blocks, PANEL * COLUMNS) + 64;
}

// out (n, d) = x (n, k) W (k, d), or += where `add`.
#define PRODUCT(NAME, F)                                                                                               \
    extern "C" void int_matmul_##NAME(const float* x, const float* W, float* out, char* space, int64_t n, int64_t k,   \
                                   int64_t d, int64_t x_lead, int64_t W_lead, int64_t out_lead, int transposed,        \
                                   int add, int threads) {                                                             \
        char* aligned = (char*)(((intptr_t)space + 63) / 64 * 64);                                                     \
        matmul<F>(x, x_lead, {W, W_lead, k, d, (bool)transposed}, {out, out_lead, n, d}, add, aligned, threads);       \
    }
PRODUCT(int16, Int16)
PRODUCT(int8, Int8)

#endif
