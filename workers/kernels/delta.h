// The heads of a gated delta net, a row's tokens one after the other; the formulas are in delta.py.
// Included by cpu.cpp, inside its namespace.

constexpr float L2_EPS = 1e-6f;
constexpr int DELTA_VECTORS = 4;  // of a state's columns at once: as many chains of additions

// What all tokens of a step share; sizes and strides in elements. `keys` heads of keys, each for
// `shared` heads of values.
struct DeltaStep {
    int32_t rows, keys, shared, key_size, value_size;
    float eps;
    int64_t state_stride, rest_stride;
    const int32_t* starts;
    const int64_t* states;
    const float *decay, *dt, *norm;
};

inline vf silu(vf x) {
    const vf e = exp2v(vmin(vmax(x * -LOG2E, splat(NEG)), splat(126.0f)));
    return x / (e + 1.0f);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// y = silu(x) / |silu(x)| * scale
inline void unit(const float* x, float* y, int n, float scale) {
    each<F32>(x, n, 0.0f, [&](int64_t i, vf v) { set<F32>(y, i, n, silu(v)); });
    const float square = sum_of<F32>(y, n, 0.0f, [](vf v) { return v * v; });
    const float factor = scale / std::sqrt(square + L2_EPS);
    each<F32>(y, n, 0.0f, [&](int64_t i, vf v) { set<F32>(y, i, n, v * factor); });
}

// A token through N * VL columns of a state, from column i on; the last may be beyond its width.
template <int N>
inline void columns(float* state, int64_t i, int width, int key_size, const float* q,
                    const float* k, const float* v, float decay, float beta, float* y) {
    vf sums[N] = {}, change[N];
    for (int row = 0; row < key_size; row++)
        for (int j = 0; j < N; j++)
            sums[j] += at<F32>(state + row * width, i + j * VL, width) * decay * k[row];
    for (int j = 0; j < N; j++) {
        change[j] = (silu(at<F32>(v, i + j * VL, width)) - sums[j]) * beta;
        sums[j] = vf{};
    }
    for (int row = 0; row < key_size; row++)
        for (int j = 0; j < N; j++) {
            float* p = state + row * width;
            const vf s = at<F32>(p, i + j * VL, width) * decay + change[j] * k[row];
            set<F32>(p, i + j * VL, width, s);
            sums[j] += s * q[row];
        }
    for (int j = 0; j < N; j++) set<F32>(y, i + j * VL, width, sums[j]);
}

// The tokens of one row through one head of keys and the heads of values that it serves.
inline void delta_head(const DeltaStep& s, int row, int head, const float* qkv, const float* rest,
                       float* state, float* y) {
    const int K = s.key_size, V = s.value_size;
    const int64_t all_keys = int64_t(s.keys) * K, values = int64_t(s.keys) * s.shared;
    std::vector<float> q(K), k(K);
    for (int64_t t = s.starts[row]; t < s.starts[row + 1]; t++) {
        const float* in = qkv + t * (2 * all_keys + values * V);
        const float* gates = rest + t * s.rest_stride;
        unit(in + head * K, q.data(), K, 1.0f / std::sqrt(float(K)));
        unit(in + all_keys + head * K, k.data(), K, 1.0f);
        for (int64_t h = head * s.shared; h < (head + 1) * s.shared; h++) {
            float* S = state + s.states[row] * s.state_stride + h * K * V;
            float* out = y + (t * values + h) * V;
            const float* v = in + 2 * all_keys + h * V;
            const float beta = sigmoid(gates[values * V + h]);
            const float a = gates[values * V + values + h];
            const float decay = std::exp(s.decay[h] * softplus(a + s.dt[h]));
            int64_t i = 0;
            for (; i + DELTA_VECTORS * VL <= V; i += DELTA_VECTORS * VL)
                columns<DELTA_VECTORS>(S, i, V, K, q.data(), k.data(), v, decay, beta, out);
            for (; i < V; i += VL)
                columns<1>(S, i, V, K, q.data(), k.data(), v, decay, beta, out);
            const float square = sum_of<F32>(out, V, 0.0f, [](vf x) { return x * x; });
            const float scale = 1.0f / std::sqrt(square / float(V) + s.eps);
            each<F32>(out, V, 0.0f, [&](int64_t j, vf x) {
                const vf z = at<F32>(gates + h * V, j, V);
                set<F32>(out, j, V, x * scale * at<F32>(s.norm, j, V) * silu(z));
            });
        }
    }
}
