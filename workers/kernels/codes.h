// Matrix products with weights in codes of 4 bits, for CPUs with AVX512-BF16: gemm.h's tiles, whose
// panels hold a quarter of the bytes.
//
// A code is one of 32 numbers in bf16, at code + offset: of integers the offset is 15 - zero, so
// that they are code - zero. Those are multiplied and summed within a group of inputs; a group's
// sum times its scale, in float32, is added to the total. So a row's sums have one order here too.
//
// codes [N / 32][K / 2][32]: byte j has in its low half output j / 2 of the panel and input j % 2
// of the pair, in its high half output 16 + j / 2. offsets [N / 32][G][2][32] are those of the same
// places, scales [N / 32][G][32]. Group g begins at input g * group - start.

#if defined(__AVX512BF16__)

constexpr int MAX_CODES_TILE = 12;  // 24 sums, 2 weights, 2 offsets, numbers and a mask

inline __m512i widen_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

struct CodesTile {
    static constexpr int MOST = MAX_CODES_TILE;
    const uint8_t* codes;
    const uint8_t* offsets;
    const float* scales;
    const uint16_t* numbers;
    int64_t K, group, start, groups;

    // The inputs from k to end, of one group: adds R rows' sums times `scale` [PANEL] to `sums`.
    template <int R>
    void add(const uint16_t* x, int64_t stride, const uint8_t* panel, const uint8_t* offset,
             const float* scale, int64_t k, int64_t end, float* sums) const {
        const __m512i table = _mm512_loadu_si512(numbers), half = _mm512_set1_epi16(15);
        const __m512i low_offset = widen_bytes(offset), high_offset = widen_bytes(offset + PANEL);
        __m512 low[R], high[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
        for (; k < end; k += 2) {
            const __m512i both = widen_bytes(panel + k * (PANEL / 2));
            const __m512i low_at = _mm512_add_epi16(_mm512_and_si512(both, half), low_offset);
            const __m512i high_at = _mm512_add_epi16(_mm512_srli_epi16(both, 4), high_offset);
            const __m512bh w_low = (__m512bh)_mm512_permutexvar_epi16(low_at, table);
            const __m512bh w_high = (__m512bh)_mm512_permutexvar_epi16(high_at, table);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                int32_t pair;
                std::memcpy(&pair, x + r * stride + k, sizeof pair);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
                low[r] = _mm512_dpbf16_ps(low[r], inputs, w_low);
                high[r] = _mm512_dpbf16_ps(high[r], inputs, w_high);
            }
        }
        const __m512 low_scale = _mm512_loadu_ps(scale);
        const __m512 high_scale = _mm512_loadu_ps(scale + PANEL / 2);
        for (int r = 0; r < R; r++) {
            float* sum = sums + r * PANEL;
            _mm512_store_ps(sum, _mm512_fmadd_ps(low[r], low_scale, _mm512_load_ps(sum)));
            sum += PANEL / 2;
            _mm512_store_ps(sum, _mm512_fmadd_ps(high[r], high_scale, _mm512_load_ps(sum)));
        }
    }

    template <int R>
    void rows_of(const uint16_t* x, int64_t stride, int64_t p, float* sums) const {
        std::memset(sums, 0, R * PANEL * sizeof *sums);
        for (int64_t g = 0, k = 0; g < groups; g++) {
            const int64_t at = p * groups + g, end = std::min(K, (g + 1) * group - start);
            add<R>(x, stride, codes + p * K * (PANEL / 2), offsets + at * 2 * PANEL,
                   scales + at * PANEL, k, end, sums);
            k = end;
        }
    }

    template <int... R>
    static constexpr auto all(std::integer_sequence<int, R...>) {
        return std::array{&CodesTile::rows_of<R + 1>...};
    }

    void operator()(const uint16_t* x, int64_t stride, int rows, int64_t p, int64_t, int64_t,
                    float* sums) const {
        static constexpr auto tiles = all(std::make_integer_sequence<int, MAX_CODES_TILE>{});
        (this->*tiles[rows - 1])(x, stride, p, sums);
    }
};

#else

struct CodesTile {
    const uint8_t* codes;
    const uint8_t* offsets;
    const float* scales;
    const uint16_t* numbers;
    int64_t K, group, start, groups;
};

#endif
