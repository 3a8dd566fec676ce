// The matmuls of an adapted layer with its narrow factors, each one pass over its wide matrix. Other shapes are left to
// torch (low_rank.py). rank is a multiple of RANK, width of BLOCK; the intermediate h (n, rank) is float, its rows
// `lead` apart.
//
// Several adapters of one x are stacked in A: each RANK rows of it have a dropout mask D of their own, from a seed in
// `seeds`.

#include "vectors.h"

// A few rows of x, which a kernel goes through while its block of sums stays in registers.
struct Tile {
    int64_t from, to;
    uint64_t keys[TILE];
    void use(uint64_t seed) {
        for (int64_t i = from; i < to; i++) keys[i - from] = row_key(seed, i);
    }
};

static inline Tile tile_of(int64_t number, int64_t n) {
    int64_t from = number * TILE;
    return {from, from + TILE < n ? from + TILE : n, {}};
}

static inline int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }

// h (n, rank) = scale * D(x) A^T for x (n, width), A (rank, width)
template <bool DROP, typename T>
static void down(const T* x, const T* A, float* h, int64_t n, int64_t width, int64_t rank, int64_t lead,
                 float scale, uint32_t threshold, const uint64_t* seeds, int threads) {
    const int64_t SPAN = 512;  // columns of A that stay in the first cache while a tile of rows goes by
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t number = 0; number < tiles(n); number++) {
        Tile tile = tile_of(number, n);
        for (int64_t first = 0; first < rank; first += RANK) {
            if (DROP) tile.use(seeds[first / RANK]);
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
                for (int k = 0; k < RANK; k++) h[i * lead + first + k] = scale * sum(sums[i - tile.from][k]);
        }
    }
}

// y (n, width) += scale * D(h A) for h (n, rank), A (rank, width)
template <bool DROP, typename T>
static void up(T* y, const float* h, const T* A, int64_t n, int64_t width, int64_t rank, int64_t lead,
               float scale, uint32_t threshold, const uint64_t* seeds, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint64_t keys[LARGEST_STACK / RANK];
        float factors[LARGEST_STACK];
        for (int64_t first = 0; DROP && first < rank; first += RANK) keys[first / RANK] = row_key(seeds[first / RANK], i);
        for (int64_t k = 0; k < rank; k++) factors[k] = scale * h[i * lead + k];
        for (int64_t j = 0; j < width; j += BLOCK) {
            T* at = y + i * width + j;
            floats total[PARTS];
            for (int part = 0; part < PARTS; part++) total[part] = load(at + part * LANES);
            for (int64_t first = 0; first < rank; first += RANK) {
                floats kept[PARTS] = {}, *found = DROP ? kept : total;
                for (int k = 0; k < RANK; k++)
                    for (int part = 0; part < PARTS; part++)
                        found[part] += factors[first + k] * load(A + (first + k) * width + j + part * LANES);
                if (!DROP) continue;
                drop_block(kept, keys[first / RANK], j, threshold);
                for (int part = 0; part < PARTS; part++) total[part] += kept[part];
            }
            for (int part = 0; part < PARTS; part++) store(at + part * LANES, total[part]);
        }
    }
}

// out (rank, width) = h^T D(x) for h (n, rank), x (n, width). `space`: threads x rank x width floats, any content.
template <bool DROP, typename T>
static void outer(const T* x, const float* h, float* out, float* space, int64_t n, int64_t width, int64_t rank,
                  int64_t lead, uint32_t threshold, const uint64_t* seeds, int threads) {
    const int CHUNK = RANK / PARTS < 2 ? 2 : RANK / PARTS;  // ranks whose sums of a block fit in registers
    int64_t size = rank * width;
    #pragma omp parallel num_threads(threads)
    {
        float* mine = space + omp_get_thread_num() * size;
        memset(mine, 0, size * sizeof(float));
        #pragma omp for schedule(static)
        for (int64_t number = 0; number < tiles(n); number++) {
            Tile tile = tile_of(number, n);
            for (int64_t j = 0; j < width; j += BLOCK) {
                floats rows[TILE][PARTS];
                for (int64_t first = 0; first < rank; first += CHUNK) {
                    if (first == 0 || (DROP && first % RANK == 0 && seeds[first / RANK] != seeds[first / RANK - 1])) {
                        if (DROP) tile.use(seeds[first / RANK]);
                        for (int64_t i = tile.from; i < tile.to; i++)
                            load_block<DROP>(x + i * width, j, tile.keys[i - tile.from], threshold, rows[i - tile.from]);
                    }
                    floats found[CHUNK][PARTS];
                    for (int k = 0; k < CHUNK; k++)
                        for (int part = 0; part < PARTS; part++)
                            found[k][part] = load(mine + (first + k) * width + j + part * LANES);
                    for (int64_t i = tile.from; i < tile.to; i++)
                        for (int k = 0; k < CHUNK; k++)
                            for (int part = 0; part < PARTS; part++)
                                found[k][part] += h[i * lead + first + k] * rows[i - tile.from][part];
                    for (int k = 0; k < CHUNK; k++)
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
    extern "C" void down_##NAME(const T* x, const T* A, float* h, int64_t n, int64_t width, int64_t rank,              \
                                int64_t lead, float scale, uint32_t threshold, const uint64_t* seeds, int threads) {   \
        (threshold ? DOWN(true) : DOWN(false))(x, A, h, n, width, rank, lead, scale, threshold, seeds, threads);       \
    }                                                                                                                  \
    extern "C" void up_##NAME(T* y, const float* h, const T* A, int64_t n, int64_t width, int64_t rank, int64_t lead,  \
                              float scale, uint32_t threshold, const uint64_t* seeds, int threads) {                   \
        (threshold ? UP(true) : UP(false))(y, h, A, n, width, rank, lead, scale, threshold, seeds, threads);           \
    }                                                                                                                  \
    extern "C" void outer_##NAME(const T* x, const float* h, float* out, float* space, int64_t n, int64_t width,       \
                                 int64_t rank, int64_t lead, uint32_t threshold, const uint64_t* seeds, int threads) { \
        (threshold ? OUTER(true) : OUTER(false))(x, h, out, space, n, width, rank, lead, threshold, seeds, threads);   \
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

