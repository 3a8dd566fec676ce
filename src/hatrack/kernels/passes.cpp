// All that a layer does beside its matmuls, each in one pass over a matrix: dropout, norms, activations, softmax, loss.

#include "vectors.h"

// out (n, width) = scale * D(x)
template <typename T>
static void drop(const T* x, T* out, int64_t n, int64_t width, float scale, uint32_t threshold, uint64_t seed,
                 int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint64_t key = row_key(seed, i);
        for (int64_t j = 0; j < width; j += BLOCK) {
            floats v[PARTS];
            load_block<true>(x + i * width, j, key, threshold, v);
            for (int part = 0; part < PARTS; part++) store(out + i * width + j + part * LANES, scale * v[part]);
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
        for (int64_t j = 0; j < width; j += 2 * LANES) {
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
static void rms_norm_backward(const T* x, const float* w, const float* inverse, const T* g, T* dx, int64_t n, int64_t width,
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

// y (n,) = x s for the sigmoid s of 2 u(x); or, where BACK, the gradient in y becomes that of x: times s + x s (1 - s)
// 2 u'
template <bool BACK, typename T>
static void gelu(const T* x, T* y, int64_t n, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i += LANES) {
        floats v = load(x + i), square = v * v, u = v * (1.59576912f + 0.0713548163f * square);
        floats s = 1.0f / (1.0f + exponential(u < -87.0f ? floats{} + 87.0f : -u));
        floats slope = s + v * s * (1.0f - s) * (1.59576912f + 0.214064449f * square);
        store(y + i, BACK ? load(y + i) * slope : v * s);
    }
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
// (batch, length) elements added to the scores of keys, for n / batch rows each. space: threads x width floats.
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
            if (add) v += load_some(add + j, seen - j, 0);
            if (j + LANES > seen) v = (flags)lane_numbers() < (int32_t)(seen - j) ? v : floats{} + least;
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
static void softmax_backward(const T* p, T* g, int64_t n, int64_t width, int threads) {
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
    extern "C" void rms_norm_backward_##NAME(const T* x, const float* w, const float* inverse, const T* g, T* dx,      \
                                         int64_t n, int64_t width, int threads) {                                      \
        rms_norm_backward(x, w, inverse, g, dx, n, width, threads);                                                    \
    }                                                                                                                  \
    extern "C" void gelu_##NAME(const T* x, T* y, int64_t n, int threads) { gelu<false>(x, y, n, threads); }           \
    extern "C" void gelu_backward_##NAME(const T* x, T* g, int64_t n, int threads) { gelu<true>(x, g, n, threads); }   \
    extern "C" void softmax_loss_##NAME(T* z, const int64_t* wanted, float* losses, int64_t n, int64_t width,          \
                                        int threads) {                                                                 \
        softmax_loss(z, wanted, losses, n, width, threads);                                                            \
    }                                                                                                                  \
    extern "C" void softmax_##NAME(T* s, const float* padding, float* space, int64_t n, int64_t width, int64_t block,  \
                                   int64_t start, int64_t length, int64_t causal, int64_t batch, int threads) {        \
        softmax(s, padding, space, n, width, block, start, length, causal, batch, threads);                            \
    }                                                                                                                  \
    extern "C" void softmax_backward_##NAME(const T* p, T* g, int64_t n, int64_t width, int threads) {                 \
        softmax_backward(p, g, n, width, threads);                                                                     \
    }

PASSES(float32, float)
PASSES(bfloat16, bfloat16)
