// Attention in float32, a head at a time, a block of its queries at a time (attention.py has the formulas). All that a
// block needs fits in the caches: no probabilities are written to memory. Keys after a causal block are not computed.
//
// Query heads are `heads`, those of keys and values `shared`; width is a multiple of 16. Rows of elements
// are contiguous; heads and tokens have strides.

#include "vectors.h"

static const int64_t QUERIES = 48;  // of a block
static const int ROWS = 6;          // of a matmul at a time: 6 x 2 vectors of sums, the other registers for its factors
static const int PANEL = 2 * LANES;

struct Sizes {
    int64_t batch, heads, shared, length, width;
    int64_t q[3], k[3], v[3], out[3];  // strides by row of the batch, head, token
};

// A matrix with strides `row` and `column`.
struct Strided { const float* at; int64_t row, column; };

// C (R x V vectors) = scale * A B, or C += where ADD; A is R x depth, B depth x V vectors with rows `b` apart
template <bool ADD, int R, int V>
static inline void matmul_tile(Strided A, const float* B, int64_t b, float* C, int64_t c, int64_t depth, float scale) {
    floats sums[R][V] = {};
    #pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k++) {
        floats row[V];
        for (int j = 0; j < V; j++) row[j] = load(B + k * b + j * LANES);
        for (int i = 0; i < R; i++) {
            float factor = A.at[i * A.row + k * A.column];
            for (int j = 0; j < V; j++) sums[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) {
            float* at = C + i * c + j * LANES;
            store(at, ADD ? load(at) + scale * sums[i][j] : scale * sums[i][j]);
        }
}

template <bool ADD, int V>
static inline void matmul_columns(Strided A, const float* B, int64_t b, float* C, int64_t c, int64_t rows,
                                   int64_t depth, float scale) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        matmul_tile<ADD, ROWS, V>({A.at + i * A.row, A.row, A.column}, B, b, C + i * c, c, depth, scale);
    for (; i + 2 <= rows; i += 2)
        matmul_tile<ADD, 2, V>({A.at + i * A.row, A.row, A.column}, B, b, C + i * c, c, depth, scale);
    for (; i < rows; i++)
        matmul_tile<ADD, 1, V>({A.at + i * A.row, A.row, A.column}, B, b, C + i * c, c, depth, scale);
}

// A matrix in panels of PANEL columns, its rows `row` apart. As plain rows its panels are beside each other.
struct Panels { const float* at; int64_t row, panel = PANEL; };

// C (rows x columns) = scale * A B, or C += where ADD; columns are a multiple of LANES
template <bool ADD>
static void matmul(Strided A, Panels B, float* C, int64_t c, int64_t rows, int64_t columns, int64_t depth, float scale) {
    const float* panel = B.at;
    int64_t j = 0;
    for (; j + PANEL <= columns; j += PANEL, panel += B.panel)
        matmul_columns<ADD, 2>(A, panel, B.row, C + j, c, rows, depth, scale);
    if (j < columns) matmul_columns<ADD, 1>(A, panel, B.row, C + j, c, rows, depth, scale);
}

static inline int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Rows of a scratch matrix lie this far apart: not a power of two, which would put them all into the same cache lines.
static inline int64_t apart(int64_t length) { return whole(length) + LANES; }

// to (width x length, in panels) = from^T, zeros after each row. A panel is read as a whole: in plain rows each
// of its elements would be in another page.
static Panels transposed(const float* from, int64_t stride, float* to, int64_t length, int64_t width) {
    for (int64_t start = 0; start < length; start += PANEL) {
        float* panel = to + start * width;
        int64_t rows = start + PANEL < length ? PANEL : length - start;
        for (int64_t j = 0; j < width; j++) {
            const float* column = from + start * stride + j;
            for (int64_t i = 0; i < rows; i++) panel[j * PANEL + i] = column[i * stride];
            for (int64_t i = rows; i < PANEL; i++) panel[j * PANEL + i] = 0;
        }
    }
    return {to, PANEL, PANEL * width};
}

static inline int64_t room_transposed(int64_t length, int64_t width) {
    return (length + PANEL - 1) / PANEL * PANEL * width;
}

// One block of queries of one head: which they are, and the keys they may see.
struct Block {
    int64_t start, rows, keys;
    const float* padding;  // null, or what is added to the scores of keys
    uint64_t seed;         // of the head's first row
    bool causal;
    int64_t seen(int64_t i) const { return causal ? start + i + 1 : keys; }
};

static inline Block block_at(int64_t start, const Sizes& s, const float* padding, int64_t head, bool causal) {
    int64_t rows = start + QUERIES < s.length ? QUERIES : s.length - start;
    const float* add = padding ? padding + head / s.heads * s.length : nullptr;
    return {start, rows, causal ? start + rows : s.length, add, 0, causal};
}

// The block's scores: S (rows x keys) = scale Q K^T
static inline void score(const Block& block, const float* Q, int64_t q, Panels K_t, float* S, const Sizes& s,
                         float scale) {
    matmul<false>({Q + block.start * q, q, 1}, K_t, S, apart(s.length), block.rows, whole(block.keys), s.width, scale);
}

// v, the scores of a row from key j on, with padding added and -infinity where the query does not see the key
static inline floats allowed(floats v, const Block& block, int64_t j, int64_t seen) {
    if (block.padding) v += load_some(block.padding + j, seen - j, 0);
    if (j + LANES > seen) v = (flags)lane_numbers() < (int32_t)(seen - j) ? v : floats{} - __builtin_inff();
    return v;
}

// Applies dropout to a row of `count` elements: zeroes some, multiplies the others by `keep`.
static inline void drop_row(float* row, int64_t count, uint64_t key, uint32_t threshold, float keep) {
    for (int64_t j = 0; j < count; j += BLOCK) {
        floats v[PARTS] = {};
        for (int part = 0; part < PARTS && j + part * LANES < count; part++) v[part] = load(row + j + part * LANES);
        drop_block(v, key, j, threshold);
        for (int part = 0; part < PARTS && j + part * LANES < count; part++)
            store(row + j + part * LANES, keep * v[part]);
    }
}

// Floats of workspace that each thread needs.
extern "C" int64_t attention_workspace(int64_t length, int64_t width, int64_t backward) {
    int64_t matrix = room_transposed(length, width), scores = QUERIES * apart(length);
    return backward ? 2 * matrix + 3 * scores : matrix + scores;
}

// out, like q, and log_sums (batch, heads, length), which the backward pass needs. padding: null, or (batch, length).
extern "C" void attention_float32(const float* q, const float* k, const float* v, const float* padding, float* out,
                                  float* log_sums, float* space, const Sizes* sizes, float scale, int64_t causal,
                                  uint32_t threshold, float keep, uint64_t seed, int threads) {
    const Sizes& s = *sizes;
    int64_t room = attention_workspace(s.length, s.width, 0);
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t head = 0; head < s.batch * s.heads; head++) {
        int64_t b = head / s.heads, h = head % s.heads, g = h / (s.heads / s.shared);
        float *mine = space + omp_get_thread_num() * room, *S = mine + room_transposed(s.length, s.width);
        const float *Q = q + b * s.q[0] + h * s.q[1], *V = v + b * s.v[0] + g * s.v[1];
        float* O = out + b * s.out[0] + h * s.out[1];
        Panels K_t = transposed(k + b * s.k[0] + g * s.k[1], s.k[2], mine, s.length, s.width);
        for (int64_t start = 0; start < s.length; start += QUERIES) {
            Block block = block_at(start, s, padding, head, causal);
            score(block, Q, s.q[2], K_t, S, s, scale);
            for (int64_t i = 0; i < block.rows; i++) {
                float* row = S + i * apart(s.length);
                int64_t seen = block.seen(i);
                floats largest = floats{} - __builtin_inff(), total = {};
                for (int64_t j = 0; j < seen; j += LANES) {
                    floats here = allowed(load(row + j), block, j, seen);
                    store(row + j, here);
                    largest = here > largest ? here : largest;
                }
                float top = most(largest);
                for (int64_t j = 0; j < seen; j += LANES) {
                    floats here = exponential(load(row + j) - top);
                    store(row + j, here);
                    total += here;
                }
                float all = sum(total);
                log_sums[head * s.length + start + i] = top + __builtin_logf(all);
                for (int64_t j = 0; j < whole(block.keys); j += LANES)
                    store(row + j, j < seen ? load(row + j) * (1 / all) : floats{});
                if (threshold)
                    drop_row(row, seen, row_key(seed, head * s.length + start + i), threshold, keep);
            }
            matmul<false>({S, apart(s.length), 1}, {V, s.v[2]}, O + start * s.out[2], s.out[2], block.rows, s.width,
                           block.keys, 1);
        }
    }
}

// The gradients dq, like out; dk and dv, for each query head, (batch, length, heads, width) contiguous; of g, like out.
extern "C" void attention_backward_float32(const float* q, const float* k, const float* v, const float* padding,
                                       const float* g, const float* log_sums, float* dq, float* dk, float* dv,
                                       float* space, const Sizes* sizes, float scale, int64_t causal,
                                       uint32_t threshold, float keep, uint64_t seed, int threads) {
    const Sizes& s = *sizes;
    int64_t room = attention_workspace(s.length, s.width, 1), lead = apart(s.length), token = s.heads * s.width;
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t head = 0; head < s.batch * s.heads; head++) {
        int64_t b = head / s.heads, h = head % s.heads, of = h / (s.heads / s.shared);
        int64_t matrix = room_transposed(s.length, s.width);
        float *mine = space + omp_get_thread_num() * room, *P = mine + 2 * matrix, *dS = P + QUERIES * lead, *D = threshold ? dS + QUERIES * lead : P;
        const float *Q = q + b * s.q[0] + h * s.q[1], *K = k + b * s.k[0] + of * s.k[1];
        const float* G = g + b * s.out[0] + h * s.out[1];
        float *dQ = dq + b * s.out[0] + h * s.out[1], *dK = dk + (b * s.length * s.heads + h) * s.width;
        float* dV = dv + (b * s.length * s.heads + h) * s.width;
        for (int64_t i = 0; i < s.length; i++) {
            memset(dK + i * token, 0, s.width * sizeof(float));
            memset(dV + i * token, 0, s.width * sizeof(float));
        }
        Panels K_t = transposed(K, s.k[2], mine, s.length, s.width);
        Panels V_t = transposed(v + b * s.v[0] + of * s.v[1], s.v[2], mine + matrix, s.length, s.width);
        for (int64_t start = 0; start < s.length; start += QUERIES) {
            Block block = block_at(start, s, padding, head, causal);
            score(block, Q, s.q[2], K_t, P, s, scale);
            matmul<false>({G + start * s.out[2], s.out[2], 1}, V_t, dS, lead, block.rows, whole(block.keys), s.width,
                           1);
            for (int64_t i = 0; i < block.rows; i++) {
                float *p = P + i * lead, *slope = dS + i * lead, *kept = D + i * lead;
                int64_t seen = block.seen(i), row = head * s.length + start + i;
                for (int64_t j = 0; j < whole(block.keys); j += LANES) {
                    floats here = {};
                    if (j < seen) here = exponential(allowed(load(p + j), block, j, seen) - log_sums[row]);
                    store(p + j, here);
                    if (threshold) store(kept + j, here);
                }
                if (threshold) {
                    drop_row(kept, seen, row_key(seed, row), threshold, keep);
                    drop_row(slope, seen, row_key(seed, row), threshold, keep);
                }
                floats dot = {};
                for (int64_t j = 0; j < seen; j += LANES) dot += load(p + j) * load(slope + j);
                float by = sum(dot);
                for (int64_t j = 0; j < whole(block.keys); j += LANES)
                    store(slope + j, load(p + j) * (load(slope + j) - by));
            }
            matmul<true>({D, 1, lead}, {G + start * s.out[2], s.out[2]}, dV, token, block.keys, s.width, block.rows, 1);
            matmul<true>({dS, 1, lead}, {Q + start * s.q[2], s.q[2]}, dK, token, block.keys, s.width, block.rows, scale);
            matmul<false>({dS, lead, 1}, {K, s.k[2]}, dQ + start * s.out[2], s.out[2], block.rows, s.width, block.keys,
                           scale);
        }
    }
}
