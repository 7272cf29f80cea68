// The heads of Mamba-2, a row's tokens one after the other; the formulas are in mamba2.py.
// Included by cpu.cpp, inside its namespace, behind delta.h.

constexpr int MAMBA_VECTORS = 4;  // of a state's columns at once: as many chains of additions

// What all tokens of a step share; sizes and strides in elements. `groups` of `shared` heads each.
struct Mamba2Step {
    int32_t rows, groups, shared, size, state_size;
    float eps;
    int64_t state_stride, rest_stride;
    const int32_t* starts;
    const int64_t* states;
    const float *decay, *dt, *skip, *norm;
};

// A token through N * VL columns of a state, from column i on; the last may be beyond its width.
template <int N>
inline void scan_columns(float* state, int64_t i, int width, int state_size, const float* B,
                         const float* C, const float* x, float time, float decay, float skip,
                         float* y) {
    vf fresh[N], sums[N] = {};
    for (int j = 0; j < N; j++) fresh[j] = silu(at<F32>(x, i + j * VL, width));
    for (int row = 0; row < state_size; row++)
        for (int j = 0; j < N; j++) {
            float* p = state + row * width;
            const vf s = at<F32>(p, i + j * VL, width) * decay + fresh[j] * time * B[row];
            set<F32>(p, i + j * VL, width, s);
            sums[j] += s * C[row];
        }
    for (int j = 0; j < N; j++) set<F32>(y, i + j * VL, width, sums[j] + fresh[j] * skip);
}

// The tokens of one row through the heads of one group.
inline void mamba2_group(const Mamba2Step& s, int row, int group, const float* xbc,
                         const float* rest, float* state, float* y) {
    const int P = s.size, N = s.state_size, width = s.shared * P;
    const int64_t heads = int64_t(s.groups) * s.shared, inner = heads * P;
    const int64_t first = int64_t(group) * s.shared;
    std::vector<float> B(N), C(N);
    for (int64_t t = s.starts[row]; t < s.starts[row + 1]; t++) {
        const float* in = xbc + t * (inner + 2 * int64_t(s.groups) * N);
        const float *b = in + inner + group * N, *c = b + int64_t(s.groups) * N;
        const float* gates = rest + t * s.rest_stride;
        each<F32>(b, N, 0.0f, [&](int64_t i, vf v) { set<F32>(B.data(), i, N, silu(v)); });
        each<F32>(c, N, 0.0f, [&](int64_t i, vf v) { set<F32>(C.data(), i, N, silu(v)); });
        for (int64_t h = first; h < first + s.shared; h++) {
            float* S = state + s.states[row] * s.state_stride + h * N * P;
            const float time = softplus(gates[inner + h] + s.dt[h]);
            const float decay = std::exp(s.decay[h] * time);
            const float* x = in + h * P;
            float* out = y + t * inner + h * P;
            int64_t i = 0;
            for (; i + MAMBA_VECTORS * VL <= P; i += MAMBA_VECTORS * VL)
                scan_columns<MAMBA_VECTORS>(S, i, P, N, B.data(), C.data(), x, time, decay,
                                            s.skip[h], out);
            for (; i < P; i += VL)
                scan_columns<1>(S, i, P, N, B.data(), C.data(), x, time, decay, s.skip[h], out);
        }
        float* out = y + t * inner + first * P;
        const float *z = gates + first * P, *norm = s.norm + first * P;
        each<F32>(out, width, 0.0f, [&](int64_t i, vf v) {
            set<F32>(out, i, width, v * silu(at<F32>(z, i, width)));
        });
        const float square = sum_of<F32>(out, width, 0.0f, [](vf v) { return v * v; });
        const float scale = 1.0f / std::sqrt(square / float(width) + s.eps);
        each<F32>(out, width, 0.0f, [&](int64_t i, vf v) {
            set<F32>(out, i, width, v * scale * at<F32>(norm, i, width));
        });
    }
}
