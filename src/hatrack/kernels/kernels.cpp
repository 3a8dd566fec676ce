// The skinny products of an adapted layer and the passes around it, for processors. Compiled for the one it runs on.
//
// Matrices are row-major. T is float or bfloat16 (its upper half), and the numbers of a matrix are of that type; the
// intermediate h (n, rank) and sums are float. rank is a multiple of 8, width of 32. Whatever has other shapes goes to
// torch (native.py). Where the processor multiplies pairs of bfloat16 (AVX512-BF16), those instructions are used, and h
// is rounded to bfloat16 for them.
//
// Dropout: number (i, j) of a matrix is dropped when 16 bits of a hash of (seed, i, j) lie below `threshold`, that is
// with probability threshold / 65,536. The hash is Chris Wellons' lowbias32 with a second key added halfway, so that
// two rows never share a run of it. Nothing is stored: the backward pass computes it again. What is kept is not divided.

#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t flags __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

struct bfloat16 { uint16_t bits; };

static const int LANES = 16, BLOCK = 32, RANK = 8, TILE = 32;

static inline floats load(const float* at) { floats v; memcpy(&v, at, sizeof v); return v; }
static inline void store(float* at, floats v) { memcpy(at, &v, sizeof v); }

static inline floats load(const bfloat16* at) {
    halves v;
    memcpy(&v, at, sizeof v);
    words wide = __builtin_convertvector(v, words) << 16;
    floats found;
    memcpy(&found, &wide, sizeof found);
    return found;
}

static inline void store(bfloat16* at, floats v) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(at, &rounded, sizeof rounded);
#else
    words w;
    memcpy(&w, &v, sizeof w);
    words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    words nan = ((w >> 16) | 0x40u);
    rounded = (v == v) ? rounded : nan;
    halves found = __builtin_convertvector(rounded, halves);
    memcpy(at, &found, sizeof found);
#endif
}

static inline float sum(floats v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

static inline float most(floats v) {
    float found = v[0];
    for (int lane = 1; lane < LANES; lane++) found = v[lane] > found ? v[lane] : found;
    return found;
}

static inline uint64_t mixed(uint64_t z) {  // splitmix64
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// What the draws for row i follow from.
static inline uint64_t row_key(uint64_t seed, int64_t i) { return mixed(seed ^ mixed(i)); }

// 16 random bits for each of the 32 numbers of row `key` from column `column` on.
static const words COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline words random_bits(uint64_t key, int64_t column) {
    words x = COUNT + (uint32_t)(key + column);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x += (uint32_t)(key >> 32);
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// Which of the 32 are kept: all ones or all zeros for each, in two vectors.
struct Kept { flags low, high; };

static inline Kept kept(uint64_t key, int64_t column, uint32_t threshold) {
    words bits = random_bits(key, column);
    halves both[2];
    memcpy(both, &bits, sizeof both);
    Kept found = {__builtin_convertvector(both[0], words) >= threshold,
                  __builtin_convertvector(both[1], words) >= threshold};
    return found;
}

static inline floats where(flags keep, floats v) {
    words w;
    memcpy(&w, &v, sizeof w);
    w &= (words)keep;
    memcpy(&v, &w, sizeof v);
    return v;
}

// One block of 32 columns of a row, as two vectors, dropped where DROP.
template <bool DROP, typename T>
static inline void block(const T* row, int64_t column, uint64_t key, uint32_t threshold, floats& low, floats& high) {
    low = load(row + column);
    high = load(row + column + LANES);
    if (DROP) {
        Kept keep = kept(key, column, threshold);
        low = where(keep.low, low);
        high = where(keep.high, high);
    }
}

// h (n, rank) = scale * D(x) A^T for x (n, width), A (rank, width)
template <bool DROP, typename T>
static void down(const T* x, const T* A, float* h, int64_t n, int64_t width, int64_t rank, float scale,
                 uint32_t threshold, uint64_t seed, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t pair = 0; pair < (n + 1) / 2; pair++) {
        int64_t i = 2 * pair, other = i + 1 < n ? i + 1 : i;
        uint64_t key = row_key(seed, i), other_key = row_key(seed, other);
        for (int64_t first = 0; first < rank; first += RANK) {
            floats a[RANK] = {}, b[RANK] = {};
            for (int64_t j = 0; j < width; j += BLOCK) {
                floats a0, a1, b0, b1;
                block<DROP>(x + i * width, j, key, threshold, a0, a1);
                block<DROP>(x + other * width, j, other_key, threshold, b0, b1);
                for (int k = 0; k < RANK; k++) {
                    const T* row = A + (first + k) * width + j;
                    floats A0 = load(row), A1 = load(row + LANES);
                    a[k] += a0 * A0 + a1 * A1;
                    b[k] += b0 * A0 + b1 * A1;
                }
            }
            for (int k = 0; k < RANK; k++) {
                h[i * rank + first + k] = scale * sum(a[k]);
                h[other * rank + first + k] = scale * sum(b[k]);
            }
        }
    }
}

// y (n, width) += scale * D(h A) for h (n, rank), A (rank, width)
template <bool DROP, typename T>
static void up(T* y, const float* h, const T* A, int64_t n, int64_t width, int64_t rank, float scale,
               uint32_t threshold, uint64_t seed, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t pair = 0; pair < (n + 1) / 2; pair++) {
        int64_t i = 2 * pair;
        bool both = i + 1 < n;
        int64_t other = both ? i + 1 : i;
        uint64_t key = row_key(seed, i), other_key = row_key(seed, other);
        for (int64_t j = 0; j < width; j += BLOCK) {
            floats a0 = {}, a1 = {}, b0 = {}, b1 = {};
            for (int64_t k = 0; k < rank; k++) {
                const T* row = A + k * width + j;
                floats A0 = load(row), A1 = load(row + LANES);
                float ha = scale * h[i * rank + k], hb = scale * h[other * rank + k];
                a0 += ha * A0;
                a1 += ha * A1;
                b0 += hb * A0;
                b1 += hb * A1;
            }
            if (DROP) {
                Kept keep = kept(key, j, threshold);
                a0 = where(keep.low, a0);
                a1 = where(keep.high, a1);
                keep = kept(other_key, j, threshold);
                b0 = where(keep.low, b0);
                b1 = where(keep.high, b1);
            }
            T* at = y + i * width + j;
            store(at, load(at) + a0);
            store(at + LANES, load(at + LANES) + a1);
            if (both) {
                at += width;
                store(at, load(at) + b0);
                store(at + LANES, load(at + LANES) + b1);
            }
        }
    }
}

// A few rows of x, which `outer` goes through while their block of the sums stays in registers.
struct Tile { int64_t from, to; uint64_t keys[TILE]; };

static inline Tile tile_of(int64_t number, int64_t n, uint64_t seed) {
    Tile tile;
    tile.from = number * TILE;
    tile.to = tile.from + TILE < n ? tile.from + TILE : n;
    for (int64_t i = tile.from; i < tile.to; i++) tile.keys[i - tile.from] = row_key(seed, i);
    return tile;
}

static inline int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }

// out (rank, width) = h^T D(x) for h (n, rank), x (n, width). `space`: threads x rank x width floats, any content.
template <bool DROP, typename T>
static void outer(const T* x, const float* h, float* out, float* space, int64_t n, int64_t width, int64_t rank,
                  uint32_t threshold, uint64_t seed, int threads) {
    int64_t size = rank * width;
    #pragma omp parallel num_threads(threads)
    {
        float* mine = space + omp_get_thread_num() * size;
        memset(mine, 0, size * sizeof(float));
        #pragma omp for schedule(static)
        for (int64_t number = 0; number < tiles(n); number++) {
            Tile tile = tile_of(number, n, seed);
            int64_t from = tile.from, to = tile.to;
            for (int64_t j = 0; j < width; j += BLOCK) {
                for (int64_t first = 0; first < rank; first += RANK) {
                    floats low[RANK], high[RANK];
                    for (int k = 0; k < RANK; k++) {
                        low[k] = load(mine + (first + k) * width + j);
                        high[k] = load(mine + (first + k) * width + j + LANES);
                    }
                    for (int64_t i = from; i < to; i++) {
                        floats x0, x1;
                        block<DROP>(x + i * width, j, tile.keys[i - from], threshold, x0, x1);
                        for (int k = 0; k < RANK; k++) {
                            float factor = h[i * rank + first + k];
                            low[k] += factor * x0;
                            high[k] += factor * x1;
                        }
                    }
                    for (int k = 0; k < RANK; k++) {
                        store(mine + (first + k) * width + j, low[k]);
                        store(mine + (first + k) * width + j + LANES, high[k]);
                    }
                }
            }
        }
        int team = omp_get_num_threads();
        #pragma omp for schedule(static)
        for (int64_t j = 0; j < size; j += LANES) {
            floats total = {};
            for (int thread = 0; thread < team; thread++) total += load(space + thread * size + j);
            store(out + j, total);
        }
    }
}

#ifdef __AVX512BF16__
// The same three for bfloat16, two products an instruction.

static inline __m512i pair(const bfloat16* at) { return _mm512_loadu_si512(at); }
static inline __m512bh as_pairs(__m512i v) { return (__m512bh)v; }

static inline __mmask32 kept_bits(uint64_t key, int64_t column, uint32_t threshold) {
    return _mm512_cmpge_epu16_mask((__m512i)random_bits(key, column), _mm512_set1_epi16((short)threshold));
}

template <bool DROP>
static inline __m512i block_pairs(const bfloat16* row, int64_t column, uint64_t key, uint32_t threshold) {
    if (DROP) return _mm512_maskz_loadu_epi16(kept_bits(key, column, threshold), row + column);
    return pair(row + column);
}

static inline uint32_t rounded_pair(float first, float second) {
    __m128bh two = _mm_cvtneps_pbh(_mm_set_ps(0, 0, second, first));
    uint32_t found;
    memcpy(&found, &two, sizeof found);
    return found;
}

template <bool DROP>
static void down_in_pairs(const bfloat16* x, const bfloat16* A, float* h, int64_t n, int64_t width, int64_t rank,
                          float scale, uint32_t threshold, uint64_t seed, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t two = 0; two < (n + 1) / 2; two++) {
        int64_t i = 2 * two, other = i + 1 < n ? i + 1 : i;
        uint64_t key = row_key(seed, i), other_key = row_key(seed, other);
        for (int64_t first = 0; first < rank; first += RANK) {
            __m512 a[RANK], b[RANK];
            for (int k = 0; k < RANK; k++) a[k] = b[k] = _mm512_setzero_ps();
            for (int64_t j = 0; j < width; j += BLOCK) {
                __m512bh xa = as_pairs(block_pairs<DROP>(x + i * width, j, key, threshold));
                __m512bh xb = as_pairs(block_pairs<DROP>(x + other * width, j, other_key, threshold));
                for (int k = 0; k < RANK; k++) {
                    __m512bh row = as_pairs(pair(A + (first + k) * width + j));
                    a[k] = _mm512_dpbf16_ps(a[k], xa, row);
                    b[k] = _mm512_dpbf16_ps(b[k], xb, row);
                }
            }
            for (int k = 0; k < RANK; k++) {
                h[i * rank + first + k] = scale * _mm512_reduce_add_ps(a[k]);
                h[other * rank + first + k] = scale * _mm512_reduce_add_ps(b[k]);
            }
        }
    }
}

static inline __m512 widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

template <bool DROP>
static void up_in_pairs(bfloat16* y, const float* h, const bfloat16* A, int64_t n, int64_t width, int64_t rank,
                        float scale, uint32_t threshold, uint64_t seed, int threads) {
    uint32_t* pairs = (uint32_t*)malloc(rank / 2 * width * sizeof(uint32_t));  // (rank / 2, width): rows k and k + 1
    for (int64_t k = 0; k < rank; k += 2)
        for (int64_t j = 0; j < width; j++)
            pairs[k / 2 * width + j] = A[k * width + j].bits | (uint32_t)A[(k + 1) * width + j].bits << 16;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint64_t key = row_key(seed, i);
        for (int64_t first = 0; first < rank; first += RANK) {
            __m512bh factors[RANK / 2];
            for (int k = 0; k < RANK / 2; k++) {
                const float* at = h + i * rank + first + 2 * k;
                factors[k] = as_pairs(_mm512_set1_epi32(rounded_pair(scale * at[0], scale * at[1])));
            }
            for (int64_t j = 0; j < width; j += BLOCK) {
                __m512 low = _mm512_setzero_ps(), high = low;
                for (int k = 0; k < RANK / 2; k++) {
                    const uint32_t* row = pairs + (first / 2 + k) * width + j;
                    low = _mm512_dpbf16_ps(low, factors[k], as_pairs(_mm512_loadu_si512(row)));
                    high = _mm512_dpbf16_ps(high, factors[k], as_pairs(_mm512_loadu_si512(row + LANES)));
                }
                if (DROP) {
                    __mmask32 keep = kept_bits(key, j, threshold);
                    low = _mm512_maskz_mov_ps((__mmask16)keep, low);
                    high = _mm512_maskz_mov_ps((__mmask16)(keep >> 16), high);
                }
                bfloat16* at = y + i * width + j;
                __m512i before = _mm512_loadu_si512(at);
                low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(before)));
                high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(before, 1)));
                _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
        }
    }
    free(pairs);
}

template <bool DROP>
static void outer_in_pairs(const bfloat16* x, const float* h, float* out, float* space, int64_t n, int64_t width,
                           int64_t rank, uint32_t threshold, uint64_t seed, int threads) {
    int64_t size = rank * width;
    #pragma omp parallel num_threads(threads)
    {
        float* mine = space + omp_get_thread_num() * size;
        memset(mine, 0, size * sizeof(float));
        #pragma omp for schedule(static)
        for (int64_t number = 0; number < tiles(n); number++) {
            Tile tile = tile_of(number, n, seed);
            int64_t from = tile.from, to = tile.to;
            for (int64_t first = 0; first < rank; first += RANK) {
                uint32_t factors[TILE / 2][RANK];  // h of rows i and i + 1
                for (int64_t i = from; i < to; i += 2)
                    for (int k = 0; k < RANK; k++) {
                        const float* at = h + i * rank + first + k;
                        factors[(i - from) / 2][k] = rounded_pair(at[0], i + 1 < to ? at[rank] : 0);
                    }
                for (int64_t j = 0; j < width; j += BLOCK) {
                    __m512 low[RANK], high[RANK];
                    for (int k = 0; k < RANK; k++) {
                        low[k] = _mm512_loadu_ps(mine + (first + k) * width + j);
                        high[k] = _mm512_loadu_ps(mine + (first + k) * width + j + LANES);
                    }
                    for (int64_t i = from; i < to; i += 2) {
                        bool both = i + 1 < to;
                        const bfloat16* row = x + i * width;
                        __m512i x0 = block_pairs<DROP>(row, j, tile.keys[i - from], threshold), x1 = x0;
                        if (both) x1 = block_pairs<DROP>(row + width, j, tile.keys[i - from + 1], threshold);
                        __m512bh x_low = as_pairs(_mm512_unpacklo_epi16(x0, x1));
                        __m512bh x_high = as_pairs(_mm512_unpackhi_epi16(x0, x1));
                        for (int k = 0; k < RANK; k++) {
                            __m512bh factor = as_pairs(_mm512_set1_epi32(factors[(i - from) / 2][k]));
                            low[k] = _mm512_dpbf16_ps(low[k], factor, x_low);
                            high[k] = _mm512_dpbf16_ps(high[k], factor, x_high);
                        }
                    }
                    for (int k = 0; k < RANK; k++) {
                        _mm512_storeu_ps(mine + (first + k) * width + j, low[k]);
                        _mm512_storeu_ps(mine + (first + k) * width + j + LANES, high[k]);
                    }
                }
            }
        }
        // Unpacking put columns 0-3, 8-11, ... of a block into `low` and 4-7, 12-15, ... into `high`.
        const __m512i first_half = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second_half = _mm512_add_epi32(first_half, _mm512_set1_epi32(8));
        int team = omp_get_num_threads();
        #pragma omp for schedule(static)
        for (int64_t j = 0; j < size; j += BLOCK) {
            __m512 low = _mm512_setzero_ps(), high = low;
            for (int thread = 0; thread < team; thread++) {
                low = _mm512_add_ps(low, _mm512_loadu_ps(space + thread * size + j));
                high = _mm512_add_ps(high, _mm512_loadu_ps(space + thread * size + j + LANES));
            }
            _mm512_storeu_ps(out + j, _mm512_permutex2var_ps(low, first_half, high));
            _mm512_storeu_ps(out + j + LANES, _mm512_permutex2var_ps(low, second_half, high));
        }
    }
}
#endif

#define LOW_RANK(NAME, T, DOWN, UP, OUTER)                                                                             \
    extern "C" void down_##NAME(const T* x, const T* A, float* h, int64_t n, int64_t width, int64_t rank, float scale, \
                                uint32_t threshold, uint64_t seed, int threads) {                                      \
        (threshold ? DOWN(true) : DOWN(false))(x, A, h, n, width, rank, scale, threshold, seed, threads);              \
    }                                                                                                                  \
    extern "C" void up_##NAME(T* y, const float* h, const T* A, int64_t n, int64_t width, int64_t rank, float scale,   \
                              uint32_t threshold, uint64_t seed, int threads) {                                        \
        (threshold ? UP(true) : UP(false))(y, h, A, n, width, rank, scale, threshold, seed, threads);                  \
    }                                                                                                                  \
    extern "C" void outer_##NAME(const T* x, const float* h, float* out, float* space, int64_t n, int64_t width,       \
                                 int64_t rank, uint32_t threshold, uint64_t seed, int threads) {                       \
        (threshold ? OUTER(true) : OUTER(false))(x, h, out, space, n, width, rank, threshold, seed, threads);          \
    }

#define DOWN(DROP) down<DROP, float>
#define UP(DROP) up<DROP, float>
#define OUTER(DROP) outer<DROP, float>
LOW_RANK(float32, float, DOWN, UP, OUTER)
#undef DOWN
#undef UP
#undef OUTER

#ifdef __AVX512BF16__
#define DOWN(DROP) down_in_pairs<DROP>
#define UP(DROP) up_in_pairs<DROP>
#define OUTER(DROP) outer_in_pairs<DROP>
#else
#define DOWN(DROP) down<DROP, bfloat16>
#define UP(DROP) up<DROP, bfloat16>
#define OUTER(DROP) outer<DROP, bfloat16>
#endif
LOW_RANK(bfloat16, bfloat16, DOWN, UP, OUTER)

// out (n, width) = scale * D(x)
template <typename T>
static void drop(const T* x, T* out, int64_t n, int64_t width, float scale, uint32_t threshold, uint64_t seed,
                 int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint64_t key = row_key(seed, i);
        for (int64_t j = 0; j < width; j += BLOCK) {
            floats low, high;
            block<true>(x + i * width, j, key, threshold, low, high);
            store(out + i * width + j, scale * low);
            store(out + i * width + j + LANES, scale * high);
        }
    }
}

// y (n, width) = w * x / root(mean(x^2) + epsilon); inverse (n,): one over that root
template <typename T>
static void rms_norm(const T* x, const float* w, T* y, float* inverse, int64_t n, int64_t width, float epsilon,
                     int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T* row = x + i * width;
        floats squares = {}, more = {};
        for (int64_t j = 0; j < width; j += BLOCK) {
            floats low = load(row + j), high = load(row + j + LANES);
            squares += low * low;
            more += high * high;
        }
        float by = inverse[i] = 1 / __builtin_sqrtf(sum(squares + more) / width + epsilon);
        for (int64_t j = 0; j < width; j += LANES) store(y + i * width + j, load(row + j) * by * load(w + j));
    }
}

// The gradient of x: with u = w * g and s = inverse, dx = s u - x s^3 mean(u x)
template <typename T>
static void rms_norm_back(const T* x, const float* w, const float* inverse, const T* g, T* dx, int64_t n, int64_t width,
                          int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T *row = x + i * width, *slope = g + i * width;
        floats dot = {};
        for (int64_t j = 0; j < width; j += LANES) dot += load(slope + j) * load(w + j) * load(row + j);
        float s = inverse[i], back = s * s * s * sum(dot) / width;
        for (int64_t j = 0; j < width; j += LANES)
            store(dx + i * width + j, s * load(slope + j) * load(w + j) - back * load(row + j));
    }
}

// e^x to about 2 units in the last place, 0 below -87: 2^k times a polynomial of the rest (Cody and Waite's split)
static inline floats exponential(floats x) {
    const floats zero = {};
    floats clipped = x < -87.0f ? zero - 87.0f : x;
    floats shifted = clipped * 1.44269504f + 12582912.0f;  // its lower bits are k, rounded
    words bits;
    memcpy(&bits, &shifted, sizeof bits);
    floats k = shifted - 12582912.0f;
    floats r = clipped - k * 0.693359375f + k * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    words power = (bits << 23) + 0x3f800000u;  // 2^k
    floats scale;
    memcpy(&scale, &power, sizeof scale);
    return x < -87.0f ? zero : p * scale;
}

// `count` numbers from `at` on as a vector, `rest` in the other lanes
template <typename T>
static inline floats load_some(const T* at, int64_t count, float rest) {
    T copy[LANES] = {};
    memcpy(copy, at, count * sizeof(T));
    floats v = load(copy);
    for (int64_t lane = count; lane < LANES; lane++) v[lane] = rest;
    return v;
}

// losses (n,) of logits z (n, width) at the tokens wanted (n,); z becomes the gradient softmax(z) - onehot(wanted)
template <typename T>
static void softmax_loss(T* z, const int64_t* wanted, float* losses, int64_t n, int64_t width, int threads) {
    const float least = -__builtin_inff();
    int64_t whole = width / LANES * LANES, rest = width - whole;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        T* row = z + i * width;
        floats largest = load_some(row + whole, rest, least);
        for (int64_t j = 0; j < whole; j += LANES) {
            floats v = load(row + j);
            largest = v > largest ? v : largest;
        }
        float top = most(largest);
        floats total = exponential(load_some(row + whole, rest, least) - top);
        for (int64_t j = 0; j < whole; j += LANES) total += exponential(load(row + j) - top);
        float log_sum = top + __builtin_logf(sum(total));
        float chosen = load_some(row + wanted[i], 1, 0)[0];
        losses[i] = log_sum - chosen;
        for (int64_t j = 0; j < whole; j += LANES) store(row + j, exponential(load(row + j) - log_sum));
        T last[LANES];
        store(last, exponential(load_some(row + whole, rest, least) - log_sum));
        memcpy(row + whole, last, rest * sizeof(T));
        floats probability = exponential(floats{} + (chosen - log_sum));
        store(last, probability - 1.0f);
        row[wanted[i]] = last[0];
    }
}

// Rows of scores s (n, width) become probabilities, in place. Row i belongs to query start + i % block, which sees the
// keys before `length`, and no later ones than itself where `causal`; what it does not see becomes 0. padding: null, or
// (batch, length) numbers added to the scores of keys, for n / batch rows each. space: threads x width floats.
template <typename T>
static void softmax(T* s, const float* padding, float* space, int64_t n, int64_t width, int64_t block, int64_t start,
                    int64_t length, int64_t causal, int64_t batch, int threads) {
    const float least = -__builtin_inff();
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        T* row = s + i * width;
        float* kept = space + omp_get_thread_num() * width;
        const float* add = padding ? padding + i / (n / batch) * length : nullptr;
        int64_t seen = causal ? start + i % block + 1 : length;
        floats largest = floats{} + least, total = {};
        for (int64_t j = 0; j < seen; j += LANES) {
            floats v = load(row + j);
            if (add) v += load_some(add + j, seen - j < LANES ? seen - j : LANES, 0);
            if (j + LANES > seen) v = (flags)COUNT < (int32_t)(seen - j) ? v : floats{} + least;
            store(kept + j, v);
            largest = v > largest ? v : largest;
        }
        float top = most(largest);
        for (int64_t j = 0; j < seen; j += LANES) {
            floats v = exponential(load(kept + j) - top);
            store(kept + j, v);
            total += v;
        }
        float by = 1 / sum(total);
        int64_t j = 0;
        for (; j < seen; j += LANES) store(row + j, load(kept + j) * by);
        for (; j < width; j += LANES) store(row + j, floats{});
    }
}

// The gradient of the scores, in place of that of the probabilities p: g = p (g - sum(p g))
template <typename T>
static void softmax_back(const T* p, T* g, int64_t n, int64_t width, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T* row = p + i * width;
        T* slope = g + i * width;
        floats dot = {};
        for (int64_t j = 0; j < width; j += LANES) dot += load(row + j) * load(slope + j);
        float by = sum(dot);
        for (int64_t j = 0; j < width; j += LANES) store(slope + j, load(row + j) * (load(slope + j) - by));
    }
}

#define PASSES(NAME, T)                                                                                                \
    extern "C" void drop_##NAME(const T* x, T* out, int64_t n, int64_t width, float scale, uint32_t threshold,         \
                                uint64_t seed, int threads) {                                                          \
        drop(x, out, n, width, scale, threshold, seed, threads);                                                       \
    }                                                                                                                  \
    extern "C" void rms_norm_##NAME(const T* x, const float* w, T* y, float* inverse, int64_t n, int64_t width,        \
                                    float epsilon, int threads) {                                                      \
        rms_norm(x, w, y, inverse, n, width, epsilon, threads);                                                        \
    }                                                                                                                  \
    extern "C" void rms_norm_back_##NAME(const T* x, const float* w, const float* inverse, const T* g, T* dx,          \
                                         int64_t n, int64_t width, int threads) {                                      \
        rms_norm_back(x, w, inverse, g, dx, n, width, threads);                                                        \
    }                                                                                                                  \
    extern "C" void softmax_loss_##NAME(T* z, const int64_t* wanted, float* losses, int64_t n, int64_t width,          \
                                        int threads) {                                                                 \
        softmax_loss(z, wanted, losses, n, width, threads);                                                            \
    }                                                                                                                  \
    extern "C" void softmax_##NAME(T* s, const float* padding, float* space, int64_t n, int64_t width, int64_t block,  \
                                   int64_t start, int64_t length, int64_t causal, int64_t batch, int threads) {        \
        softmax(s, padding, space, n, width, block, start, length, causal, batch, threads);                            \
    }                                                                                                                  \
    extern "C" void softmax_back_##NAME(const T* p, T* g, int64_t n, int64_t width, int threads) {                     \
        softmax_back(p, g, n, width, threads);                                                                         \
    }

PASSES(float32, float)
PASSES(bfloat16, bfloat16)
