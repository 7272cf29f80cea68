// Matrix products in bf16 for CPUs with AVX512-BF16: y = act(x W^T + bias) + residual.
//
// W [N, K] is packed once into panels of 32 outputs: [N / 32][K / 2][32][2], so that two vectors
// hold a pair of inputs of 32 outputs and one vdpbf16ps takes both. A tile is up to 14 rows by one
// panel, held in registers over the whole of K: no row's sum depends, not in one bit, on the other
// rows or on the number of threads. Threads take panels; each panel is read from memory once, from
// then on from L2. While a panel is computed the next one is fetched, as much with every tile of
// rows: with few rows a product costs what reading W costs, with many what its arithmetic costs.

#if defined(__AVX512BF16__)

constexpr int PANEL = 32;
constexpr int MAX_TILE = 14;  // 28 accumulators, 2 weights and 1 input of 32 registers
constexpr int64_t PAIR_BYTES = 2 * PANEL * 2;  // of a panel, for a pair of inputs
constexpr int64_t CHUNK_BYTES = 512 << 10;  // of x, so that it stays in L2 from panel to panel
constexpr int64_t FETCH_AHEAD = 64 * PAIR_BYTES;  // where a panel is read only once

inline __m512 widen(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// sums [R][PANEL] of R rows of x with the panel w; fetches from `fetch` on, `step` bytes a pair.
template <int R>
void gemm_tile(const uint16_t* x, int64_t stride, const uint16_t* w, int64_t K, const char* fetch,
               int64_t step, float* sums) {
    __m512 low[R], high[R];
#pragma GCC unroll 14  // else gcc fills them in memory first
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 2, w += 2 * PANEL) {
        const __m512bh w_low = (__m512bh)_mm512_loadu_si512(w);
        const __m512bh w_high = (__m512bh)_mm512_loadu_si512(w + PANEL);
        _mm_prefetch(fetch, _MM_HINT_T1);
        _mm_prefetch(fetch + 64, _MM_HINT_T1);
        fetch += step;
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride + k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            low[r] = _mm512_dpbf16_ps(low[r], both, w_low);
            high[r] = _mm512_dpbf16_ps(high[r], both, w_high);
        }
    }
    for (int r = 0; r < R; r++) {
        _mm512_store_ps(sums + r * PANEL, low[r]);
        _mm512_store_ps(sums + r * PANEL + PANEL / 2, high[r]);
    }
}

using GemmTile = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, const char*, int64_t,
                          float*);

template <int... R>
constexpr std::array<GemmTile, sizeof...(R)> gemm_tiles(std::integer_sequence<int, R...>) {
    return {gemm_tile<R + 1>...};
}
constexpr auto GEMM_TILES = gemm_tiles(std::make_integer_sequence<int, MAX_TILE>{});

// 32 values of p, zero from `count` on.
inline const uint16_t* whole(const uint16_t* p, int count, uint16_t* buffer) {
    if (count == PANEL) return p;
    std::memset(buffer, 0, PANEL * sizeof *p);
    std::memcpy(buffer, p, count * sizeof *p);
    return buffer;
}

inline void gemm_pack(const uint16_t* w, int64_t N, int64_t K, uint16_t* out, int threads) {
    parallel_for(threads, (N + PANEL - 1) / PANEL, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++)
            for (int64_t k = 0; k < K; k += 2)
                for (int64_t j = 0; j < PANEL; j++) {
                    uint32_t pair = 0;
                    const int64_t n = p * PANEL + j;
                    if (n < N) std::memcpy(&pair, w + n * K + k, sizeof pair);
                    std::memcpy(out + (p * K + k) * PANEL + 2 * j, &pair, sizeof pair);
                }
    });
}

// How a tile of rows is multiplied by a panel of a weight in bf16; codes.h has that for codes.
struct NumbersTile {
    static constexpr int MOST = MAX_TILE;
    const uint16_t* w;
    int64_t K;

    // sums [rows][PANEL] of `rows` rows of x with panel p; it is tile `at` of `tiles`.
    void operator()(const uint16_t* x, int64_t stride, int rows, int64_t p, int64_t at,
                    int64_t tiles, float* sums) const {
        const uint16_t* panel = w + p * PANEL * K;
        const int64_t step = PAIR_BYTES / tiles;
        const int64_t ahead = tiles == 1 ? FETCH_AHEAD : (PANEL * 2 + at * step / 2) * K;
        const char* fetch = reinterpret_cast<const char*>(panel) + ahead;
        GEMM_TILES[rows - 1](x, stride, panel, K, fetch, step, sums);
    }
};

// The panels from `begin` to `end` of the M rows of a chunk.
template <class Tile>
void gemm_chunk(const uint16_t* x, int64_t x_stride, int64_t M, const Tile& multiply, int64_t N,
                const uint16_t* bias, const uint16_t* residual, int64_t r_stride, int relu,
                uint16_t* y, int64_t begin, int64_t end) {
    const int64_t tiles = (M + Tile::MOST - 1) / Tile::MOST;
    alignas(64) float sums[Tile::MOST * PANEL];
    alignas(64) uint16_t buffer[PANEL];
    for (int64_t p = begin; p < end; p++) {
        const int64_t n = p * PANEL;
        const int count = static_cast<int>(std::min<int64_t>(PANEL, N - n));
        __m512 b[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        if (bias) {
            const uint16_t* from = whole(bias + n, count, buffer);
            b[0] = widen(from);
            b[1] = widen(from + PANEL / 2);
        }
        for (int64_t tile = 0, m = 0; tile < tiles; tile++) {
            const int rows = static_cast<int>(M / tiles + (tile < M % tiles));
            multiply(x + m * x_stride, x_stride, rows, p, tile, tiles, sums);
            for (int r = 0; r < rows; r++, m++) {
                __m512 v[2];
                const uint16_t* add =
                    residual ? whole(residual + m * r_stride + n, count, buffer) : nullptr;
                for (int h = 0; h < 2; h++) {
                    v[h] = _mm512_load_ps(sums + r * PANEL + h * (PANEL / 2)) + b[h];
                    if (relu) v[h] = _mm512_max_ps(v[h], _mm512_setzero_ps());
                    if (add) v[h] += widen(add + h * (PANEL / 2));
                }
                const __m512i out = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
                if (count == PANEL) {
                    _mm512_storeu_si512(y + m * N + n, out);
                } else {
                    _mm512_store_si512(buffer, out);
                    std::memcpy(y + m * N + n, buffer, count * sizeof *y);
                }
            }
        }
    }
}

template <class Tile>
void gemm(const uint16_t* x, int64_t x_stride, int64_t M, const Tile& multiply, int64_t N,
          int64_t K, const uint16_t* bias, const uint16_t* residual, int64_t r_stride, int relu,
          uint16_t* y, int threads) {
    constexpr int64_t tile = Tile::MOST;
    const int64_t panels = (N + PANEL - 1) / PANEL;
    const int64_t most = std::max<int64_t>(tile, CHUNK_BYTES / (2 * K) / tile * tile);
    const int64_t chunks = (M + most - 1) / most;
    const int64_t share = std::max<int64_t>(1, panels / (threads * 8));  // panels of one task
    const int64_t shares = (panels + share - 1) / share;
    parallel_for(threads, chunks * shares, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t m = task / shares * most, p = task % shares * share;
            gemm_chunk(x + m * x_stride, x_stride, std::min(most, M - m), multiply, N, bias,
                       residual ? residual + m * r_stride : nullptr, r_stride, relu, y + m * N, p,
                       std::min(panels, p + share));
        }
    });
}

constexpr int HAS_GEMM = 1;

#else

struct NumbersTile {
    const uint16_t* w;
    int64_t K;
};
inline void gemm_pack(const uint16_t*, int64_t, int64_t, uint16_t*, int) {}
template <class Tile>
void gemm(const uint16_t*, int64_t, int64_t, const Tile&, int64_t, int64_t, const uint16_t*,
          const uint16_t*, int64_t, int, uint16_t*, int) {}
constexpr int HAS_GEMM = 0;

#endif
