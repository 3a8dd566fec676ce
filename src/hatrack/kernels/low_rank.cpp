// The skinny products of an adapted layer, each one pass over its wide matrix. Whatever has other shapes goes to torch
// (native.py). rank is a multiple of RANK, width of BLOCK; the intermediate h (n, rank) is float.

#include "vectors.h"

// A few rows of x, which a kernel goes through while its block of the sums stays at hand.
struct Tile { int64_t from, to; uint64_t keys[TILE]; };

static inline Tile tile_of(int64_t number, int64_t n, uint64_t seed) {
    Tile tile;
    tile.from = number * TILE;
    tile.to = tile.from + TILE < n ? tile.from + TILE : n;
    for (int64_t i = tile.from; i < tile.to; i++) tile.keys[i - tile.from] = row_key(seed, i);
    return tile;
}

static inline int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }

// h (n, rank) = scale * D(x) A^T for x (n, width), A (rank, width)
template <bool DROP, typename T>
static void down(const T* x, const T* A, float* h, int64_t n, int64_t width, int64_t rank, float scale,
                 uint32_t threshold, uint64_t seed, int threads) {
    const int64_t SPAN = 512;  // columns of A that stay in the first cache while a tile of rows goes by
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t number = 0; number < tiles(n); number++) {
        Tile tile = tile_of(number, n, seed);
        for (int64_t first = 0; first < rank; first += RANK) {
            floats sums[TILE][RANK] = {};
            for (int64_t from = 0; from < width; from += SPAN) {
                int64_t to = from + SPAN < width ? from + SPAN : width;
                for (int64_t i = tile.from; i < tile.to; i++) {
                    floats found[RANK];
                    for (int k = 0; k < RANK; k++) found[k] = sums[i - tile.from][k];
                    for (int64_t j = from; j < to; j += BLOCK) {
                        floats v[PARTS];
                        load_block<DROP>(x + i * width, j, tile.keys[i - tile.from], threshold, v);
                        for (int part = 0; part < PARTS; part++)
                            for (int k = 0; k < RANK; k++)
                                found[k] += v[part] * load(A + (first + k) * width + j + part * LANES);
                    }
                    for (int k = 0; k < RANK; k++) sums[i - tile.from][k] = found[k];
                }
            }
            for (int64_t i = tile.from; i < tile.to; i++)
                for (int k = 0; k < RANK; k++) h[i * rank + first + k] = scale * sum(sums[i - tile.from][k]);
        }
    }
}

// y (n, width) += scale * D(h A) for h (n, rank), A (rank, width)
template <bool DROP, typename T>
static void up(T* y, const float* h, const T* A, int64_t n, int64_t width, int64_t rank, float scale,
               uint32_t threshold, uint64_t seed, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t number = 0; number < tiles(n); number++) {
        Tile tile = tile_of(number, n, seed);
        for (int64_t j = 0; j < width; j += BLOCK) {
            for (int64_t i = tile.from; i < tile.to; i++) {
                floats found[PARTS] = {};
                for (int64_t first = 0; first < rank; first += RANK)
                    for (int k = 0; k < RANK; k++) {
                        float factor = scale * h[i * rank + first + k];
                        for (int part = 0; part < PARTS; part++)
                            found[part] += factor * load(A + (first + k) * width + j + part * LANES);
                    }
                if (DROP) drop_block(found, tile.keys[i - tile.from], j, threshold);
                T* at = y + i * width + j;
                for (int part = 0; part < PARTS; part++)
                    store(at + part * LANES, load(at + part * LANES) + found[part]);
            }
        }
    }
}

// out (rank, width) = h^T D(x) for h (n, rank), x (n, width). `space`: threads x rank x width floats, any content.
template <bool DROP, typename T>
static void outer(const T* x, const float* h, float* out, float* space, int64_t n, int64_t width, int64_t rank,
                  uint32_t threshold, uint64_t seed, int threads) {
    const int AT_ONCE = RANK / PARTS < 2 ? 2 : RANK / PARTS;  // ranks whose sums of a block fit in registers
    int64_t size = rank * width;
    #pragma omp parallel num_threads(threads)
    {
        float* mine = space + omp_get_thread_num() * size;
        memset(mine, 0, size * sizeof(float));
        #pragma omp for schedule(static)
        for (int64_t number = 0; number < tiles(n); number++) {
            Tile tile = tile_of(number, n, seed);
            for (int64_t j = 0; j < width; j += BLOCK) {
                floats rows[TILE][PARTS];
                for (int64_t i = tile.from; i < tile.to; i++)
                    load_block<DROP>(x + i * width, j, tile.keys[i - tile.from], threshold, rows[i - tile.from]);
                for (int64_t first = 0; first < rank; first += AT_ONCE) {
                    floats found[AT_ONCE][PARTS];
                    for (int k = 0; k < AT_ONCE; k++)
                        for (int part = 0; part < PARTS; part++)
                            found[k][part] = load(mine + (first + k) * width + j + part * LANES);
                    for (int64_t i = tile.from; i < tile.to; i++)
                        for (int k = 0; k < AT_ONCE; k++)
                            for (int part = 0; part < PARTS; part++)
                                found[k][part] += h[i * rank + first + k] * rows[i - tile.from][part];
                    for (int k = 0; k < AT_ONCE; k++)
                        for (int part = 0; part < PARTS; part++)
                            store(mine + (first + k) * width + j + part * LANES, found[k][part]);
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
#include "low_rank_pairs.h"
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

