// The kernels of low_rank.cpp for bfloat16 on CPUs that multiply pairs of elements (AVX512-BF16). h is rounded to
// bfloat16 for them. Included by low_rank.cpp.

#pragma once

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
                          int64_t lead, float scale, uint32_t threshold, const uint64_t* seeds, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t two = 0; two < (n + 1) / 2; two++) {
        int64_t i = 2 * two, other = i + 1 < n ? i + 1 : i;
        for (int64_t first = 0; first < rank; first += RANK) {
            uint64_t seed = seeds[first / RANK], key = row_key(seed, i), other_key = row_key(seed, other);
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
                h[i * lead + first + k] = scale * _mm512_reduce_add_ps(a[k]);
                h[other * lead + first + k] = scale * _mm512_reduce_add_ps(b[k]);
            }
        }
    }
}

static inline __m512 widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

template <bool DROP>
static void up_in_pairs(bfloat16* y, const float* h, const bfloat16* A, int64_t n, int64_t width, int64_t rank,
                        int64_t lead, float scale, uint32_t threshold, const uint64_t* seeds, int threads) {
    uint32_t* pairs = (uint32_t*)malloc(rank / 2 * width * sizeof(uint32_t));  // (rank / 2, width): rows k and k + 1
    for (int64_t k = 0; k < rank; k += 2)
        for (int64_t j = 0; j < width; j++)
            pairs[k / 2 * width + j] = A[k * width + j].bits | (uint32_t)A[(k + 1) * width + j].bits << 16;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint32_t factors[LARGEST_STACK / 2];
        uint64_t keys[LARGEST_STACK / RANK];
        for (int64_t k = 0; k < rank / 2; k++)
            factors[k] = rounded_pair(scale * h[i * lead + 2 * k], scale * h[i * lead + 2 * k + 1]);
        for (int64_t first = 0; DROP && first < rank; first += RANK) keys[first / RANK] = row_key(seeds[first / RANK], i);
        for (int64_t j = 0; j < width; j += BLOCK) {
            bfloat16* at = y + i * width + j;
            __m512i before = _mm512_loadu_si512(at);
            __m512 total_low = widened(_mm512_castsi512_si256(before));
            __m512 total_high = widened(_mm512_extracti64x4_epi64(before, 1));
            for (int64_t first = 0; first < rank; first += RANK) {
                __m512 low = _mm512_setzero_ps(), high = low;
                for (int64_t k = first / 2; k < (first + RANK) / 2; k++) {
                    const uint32_t* row = pairs + k * width + j;
                    __m512bh factor = as_pairs(_mm512_set1_epi32(factors[k]));
                    low = _mm512_dpbf16_ps(low, factor, as_pairs(_mm512_loadu_si512(row)));
                    high = _mm512_dpbf16_ps(high, factor, as_pairs(_mm512_loadu_si512(row + LANES)));
                }
                if (DROP) {
                    __mmask32 keep = kept_bits(keys[first / RANK], j, threshold);
                    low = _mm512_maskz_mov_ps((__mmask16)keep, low);
                    high = _mm512_maskz_mov_ps((__mmask16)(keep >> 16), high);
                }
                total_low = _mm512_add_ps(total_low, low);
                total_high = _mm512_add_ps(total_high, high);
            }
            _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(total_high, total_low));
        }
    }
    free(pairs);
}

template <bool DROP>
static void outer_in_pairs(const bfloat16* x, const float* h, float* out, float* space, int64_t n, int64_t width,
                           int64_t rank, int64_t lead, uint32_t threshold, const uint64_t* seeds, int threads) {
    int64_t size = rank * width;
    #pragma omp parallel num_threads(threads)
    {
        float* mine = space + omp_get_thread_num() * size;
        memset(mine, 0, size * sizeof(float));
        #pragma omp for schedule(static)
        for (int64_t number = 0; number < tiles(n); number++) {
            Tile tile = tile_of(number, n);
            int64_t from = tile.from, to = tile.to;
            for (int64_t first = 0; first < rank; first += RANK) {
                if (DROP) tile.use(seeds[first / RANK]);
                uint32_t factors[TILE / 2][RANK];  // h of rows i and i + 1
                for (int64_t i = from; i < to; i += 2)
                    for (int k = 0; k < RANK; k++) {
                        const float* at = h + i * lead + first + k;
                        factors[(i - from) / 2][k] = rounded_pair(at[0], i + 1 < to ? at[lead] : 0);
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
