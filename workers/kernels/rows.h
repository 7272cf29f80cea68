// Norms, rotary embedding, SiLU and argmax: one row of elements at a time.
// Included by cpu.cpp, inside its namespace.

constexpr int64_t SERIAL = 8192;  // elements below which waking threads costs more than it gains

inline int64_t grain_of(int64_t rows, int64_t width, int threads) {
    if (rows * width <= SERIAL) return rows;
    return std::max<int64_t>(1, std::min(rows / (2 * threads), SERIAL / width));
}

// Rotates the first 2 * half elements of each head: pairs (i, i + half), NeoX style.
template <class E>
void rope(typename E::T* x, int64_t stride, int heads, int dim, const int64_t* positions,
          const float* cos, const float* sin, int half, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        const float* c = cos + positions[t] * half;
        const float* n = sin + positions[t] * half;
        for (int h = 0; h < heads; h++) {
            typename E::T* p = x + t * stride + h * dim;
            for (int i = 0; i < half; i += VL) {
                vf a = at<E>(p, i, half), b = at<E>(p + half, i, half);
                vf ci = at<F32>(c, i, half), si = at<F32>(n, i, half);
                set<E>(p, i, half, a * ci - b * si);
                set<E>(p + half, i, half, b * ci + a * si);
            }
        }
    }
}

// The sum of f(x) over n elements; the last vector is padded with `fill`, for which f is 0.
template <class E, class F>
inline float sum_of(const typename E::T* p, int64_t n, float fill, F&& f) {
    vf sums[4] = {};  // one would wait for its own last addition
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) sums[j] += f(E::get(p + i + j * VL));
    each<E>(p + i, n - i, fill, [&](int64_t, vf x) { sums[0] += f(x); });
    return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y = x / rms(x), rounded, times w: the order of rounding is transformers'.
template <class E>
void rms_row(const typename E::T* x, const typename E::T* w, typename E::T* y, int64_t n,
             float eps) {
    const float square = sum_of<E>(x, n, 0.0f, [](vf v) { return v * v; });
    const float scale = 1.0f / std::sqrt(square / float(n) + eps);
    each<E>(x, n, 0.0f,
            [&](int64_t i, vf v) { set<E>(y, i, n, E::round(v * scale) * at<E>(w, i, n)); });
}

template <class E>
void layer_row(const typename E::T* x, const typename E::T* w, const typename E::T* b,
               typename E::T* y, int64_t n, float eps) {
    const float mean = sum_of<E>(x, n, 0.0f, [](vf v) { return v; }) / float(n);
    const float square = sum_of<E>(x, n, mean, [&](vf v) { return (v - mean) * (v - mean); });
    const float scale = 1.0f / std::sqrt(square / float(n) + eps);
    each<E>(x, n, 0.0f, [&](int64_t i, vf v) {
        set<E>(y, i, n, (v - mean) * scale * at<E>(w, i, n) + at<E>(b, i, n));
    });
}

template <class E>
void silu_row(const typename E::T* gate, const typename E::T* up, typename E::T* y, int64_t n) {
    each<E>(gate, n, 0.0f, [&](int64_t i, vf g) {
        vf e = exp2v(vmin(vmax(g * -LOG2E, splat(NEG)), splat(126.0f)));  // no overflow, no inf
        set<E>(y, i, n, E::round(g / (e + 1.0f)) * at<E>(up, i, n));
    });
}

// ---------------------------------------------------------------- masks of tokens

// Adds -inf to the logits whose bit (i % 32 of word i / 32) is 0: NaN and +inf become NaN.
template <class E>
void mask_row(typename E::T* x, const uint32_t* mask, int64_t n) {
    const vf lowest = splat(-std::numeric_limits<float>::infinity());
    for (int64_t from = 0; from < n; from += 32) {
        const uint32_t word = mask[from / 32];
        if (word == ~0u) continue;
        const int64_t to = std::min(n, from + 32);
        for (int64_t i = from; i < to; i += VL) {
            const vu bits = (splat_u(word) >> (vu(lanes()) + uint32_t(i - from))) & 1u;
            const vf v = at<E>(x, i, to);
            set<E>(x, i, to, bits != 0u ? v : v + lowest);
        }
    }
}

// ---------------------------------------------------------------- argmax and logsumexp

constexpr int64_t SPAN = 8192;  // logits of one task; fixed, so that sums do not depend on threads

struct Best {
    float max, sum;
    int64_t index;
};

template <class E>
Best best_of(const typename E::T* x, int64_t n) {
    const float lowest = -std::numeric_limits<float>::infinity();
    vf top = splat(lowest);
    vi where = {};
    vf bad = {};
    each<E>(x, n, lowest, [&](int64_t i, vf v) {
        vi better = v > top;
        top = better ? v : top;
        where = better ? lanes() + int32_t(i) : where;
        bad = (v == v) ? bad : v;
    });
    Best best{top[0], 0.0f, where[0]};
    for (int l = 1; l < VL; l++)
        if (top[l] > best.max || (top[l] == best.max && where[l] < best.index))
            best.max = top[l], best.index = where[l];
    if (hsum(bad) != hsum(bad)) best.max = std::numeric_limits<float>::quiet_NaN();
    if (!std::isfinite(best.max)) return best;
    vf sum = {};
    each<E>(x, n, lowest, [&](int64_t, vf v) {
        sum += exp2v(vmax((v - best.max) * LOG2E, splat(NEG)));
    });
    best.sum = hsum(sum);
    return best;
}

// Per row: the first index of the maximum, log(sum(exp)), and whether that is finite.
template <class E>
void argmax_lse(const typename E::T* x, int64_t rows, int64_t stride, int64_t n, int64_t* index,
                float* lse, uint8_t* finite, int threads) {
    const int64_t spans = (n + SPAN - 1) / SPAN;
    std::vector<Best> bests(rows * spans);
    parallel_for(rows * n <= SERIAL ? 1 : threads, rows * spans, 1,
                 [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; i++) {
                         const int64_t from = i % spans * SPAN;
                         bests[i] = best_of<E>(x + i / spans * stride + from,
                                               std::min(SPAN, n - from));
                         bests[i].index += from;
                     }
                 });
    for (int64_t r = 0; r < rows; r++) {
        const Best* b = bests.data() + r * spans;
        Best best = b[0];
        bool nan = best.max != best.max;
        for (int64_t i = 1; i < spans; i++) {
            nan |= b[i].max != b[i].max;
            if (b[i].max > best.max) best.max = b[i].max, best.index = b[i].index;
        }
        float sum = 0.0f;
        for (int64_t i = 0; i < spans; i++)
            if (b[i].sum > 0) sum += b[i].sum * std::exp(b[i].max - best.max);
        index[r] = best.index;
        lse[r] = nan ? std::numeric_limits<float>::quiet_NaN()
                 : std::isfinite(best.max) ? best.max + std::log(sum) : best.max;
        finite[r] = std::isfinite(lse[r]);
    }
}
