// Vectors as wide as the CPU's own, the dtypes of matrices, and the mask of dropout.
//
// Matrices are row-major. T is float or bfloat16 (its upper half), the dtype of a matrix; sums are
// float. Widths are multiples of BLOCK.
//
// Dropout: element (i, j) of a matrix is dropped when 16 bits of a hash of (seed, i, j) lie below `threshold`, that is
// with probability threshold / 65,536. The hash is three rounds of AES where the CPU has them for vectors of 8 (of
// each round, a byte of a block reaches 4 bytes, then all 16), else Chris Wellons' lowbias32 with a second key added
// halfway, so that two rows never share a run of it. No mask is stored: the backward pass computes it again. The
// elements that are kept are not divided.

#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#if defined(__AVX512F__) || defined(__VAES__)
#include <immintrin.h>
#endif

// The compiler splits vectors wider than the CPU's, into single elements where it compares or converts.
#if defined(__AVX512F__)
static const int LANES = 16;
#elif defined(__AVX2__)
static const int LANES = 8;
#else
static const int LANES = 4;
#endif

static const int BLOCK = 32, TILE = 32, RANK = 8, LARGEST_STACK = 256;
static const int PARTS = BLOCK / LANES;  // vectors in a block of columns

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t flags __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 { uint16_t bits; };

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

static inline words lane_numbers() {
    words v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = lane;
    return v;
}

static inline uint64_t mixed(uint64_t z) {  // splitmix64
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The key from which row i is drawn.
static inline uint64_t row_key(uint64_t seed, int64_t i) { return mixed(seed ^ mixed(i)); }

// 16 random bits for each of the 2 x LANES elements of row `key` from column `column` on, two in a word.
static inline words random_bits(uint64_t key, int64_t column) {
    words x = lane_numbers() + (uint32_t)(key + column / 2);
#if defined(__VAES__) && !defined(__AVX512F__)
    __m256i bits = (__m256i)x, row = _mm256_set1_epi64x(key);
    for (int round = 0; round < 3; round++) bits = _mm256_aesenc_epi128(bits, row);
    return (words)bits;
#else
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x += (uint32_t)(key >> 32);
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
#endif
}

static inline floats where(flags keep, floats v) {
    words w;
    memcpy(&w, &v, sizeof w);
    w &= (words)keep;
    memcpy(&v, &w, sizeof v);
    return v;
}

// Zeroes what is dropped of a block of 32 columns of row `key`.
static inline void drop_block(floats* v, uint64_t key, int64_t column, uint32_t threshold) {
    for (int part = 0; part < PARTS; part += 2) {
        words bits = random_bits(key, column + part * LANES);
#if defined(__AVX2__) && !defined(__AVX512F__)
        const int32_t last = (int32_t)((threshold << 16) - 0x80000001u);  // that is dropped, with its lower half all ones
        v[part] = where((flags)(bits << 16) > last, v[part]);
        v[part + 1] = where((flags)bits > last, v[part + 1]);
#else
        halves both[2];
        memcpy(both, &bits, sizeof both);
        v[part] = where(__builtin_convertvector(both[0], words) >= threshold, v[part]);
        v[part + 1] = where(__builtin_convertvector(both[1], words) >= threshold, v[part + 1]);
#endif
    }
}

// A block of 32 columns of a row, dropped where DROP.
template <bool DROP, typename T>
static inline void load_block(const T* row, int64_t column, uint64_t key, uint32_t threshold, floats* v) {
    for (int part = 0; part < PARTS; part++) v[part] = load(row + column + part * LANES);
    if (DROP) drop_block(v, key, column, threshold);
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

// `count` elements from `at` on as a vector, `rest` in the other lanes
template <typename T>
static inline floats load_some(const T* at, int64_t count, float rest) {
    if (count >= LANES) return load(at);
    T copy[LANES] = {};
    memcpy(copy, at, count * sizeof(T));
    return (flags)lane_numbers() < (int32_t)count ? load(copy) : floats{} + rest;
}
