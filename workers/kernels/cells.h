// What lies in a KV block: keys and values as they are, or as 8-bit floats.
// Included by cpu.cpp, inside its namespace.
//
// A block holds, for each kv head, keys then values, in units of PER elements along the dimension
// that a product sums over: K [dim / PER][block_size] and V [block_size / PER][value_dim]. Elements
// fill 32 bits, so both products of attention are the same register tile: rows of a small matrix
// broadcast against vectors of the cache. Codes (fp8_cache.py) lie in the same order, a byte
// each; behind them are the exponents of the keys' scales [block_size] and of the values'. Latents
// are kept twice, as keys and as values, which then have a scale of their own: other backends read
// the same numbers but of elements 2^13 times smaller than the largest.

constexpr int MAX_DIM = 576;

struct Step {  // mirrored by AttentionStep in attention/cpu.py
    int32_t heads, kv_heads, dim, value_dim, block_size;
    int32_t fp8;  // whether blocks hold codes
    float scale;
    int32_t rows;
    int64_t tokens;
    int64_t table_stride;
    const int32_t* query_starts;  // [rows + 1]
    const int32_t* context_lens;  // [rows]
    const int32_t* tables;  // [rows, table_stride]
    const int64_t* cells;  // [tokens]
};

typedef uint32_t u4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, u4{__VA_ARGS__})
#endif

// to[i * bs + t] = from[t][i] for 4 x 4 units.
template <class T>
inline void transpose4(const T* from, int64_t stride, uint32_t* to, int64_t bs) {
    u4 a = load<u4>(from), b = load<u4>(from + stride);
    u4 c = load<u4>(from + 2 * stride), d = load<u4>(from + 3 * stride);
    u4 ab = SHUFFLE(a, b, 0, 4, 1, 5), AB = SHUFFLE(a, b, 2, 6, 3, 7);
    u4 cd = SHUFFLE(c, d, 0, 4, 1, 5), CD = SHUFFLE(c, d, 2, 6, 3, 7);
    store(to, SHUFFLE(ab, cd, 0, 1, 4, 5));
    store(to + bs, SHUFFLE(ab, cd, 2, 3, 6, 7));
    store(to + 2 * bs, SHUFFLE(AB, CD, 0, 1, 4, 5));
    store(to + 3 * bs, SHUFFLE(AB, CD, 2, 3, 6, 7));
}

template <class E>
void store_keys(uint32_t* to, int bs, const typename E::T* k, int64_t stride, int units, int run) {
    int t = 0;
    for (; t + 4 <= run; t += 4, k += 4 * stride)
        for (int u = 0; u < units; u += 4)
            transpose4(k + u * E::PER, stride, to + u * bs + t, bs);
    for (; t < run; t++, k += stride)
        for (int u = 0; u < units; u++) memcpy(to + u * bs + t, k + u * E::PER, 4);
}

template <class E>
void store_values(uint32_t* to, int offset, const typename E::T* v, int64_t stride, int dim,
                  int run) {
    for (int t = 0; t < run; t++, offset++, v += stride) {
        uint32_t* row = to + offset / E::PER * dim;
        if constexpr (E::PER == 1) {
            memcpy(row, v, dim * sizeof(*v));
        } else if (offset % 2 == 0 && t + 1 < run) {  // a whole pair
            for (int d = 0; d < dim; d++) row[d] = v[d] | uint32_t(v[stride + d]) << 16;
            t++, offset++, v += stride;
        } else {
            uint16_t* half = reinterpret_cast<uint16_t*>(row) + offset % 2;
            for (int d = 0; d < dim; d++) half[2 * d] = v[d];
        }
    }
}

// Keys and values in the type that is computed in.
template <class Type>
struct PlainCells {
    using E = Type;
    using T = typename E::T;
    static constexpr bool CODED = false;

    static int64_t key_units(const Step& s) { return int64_t(s.block_size) * s.dim / E::PER; }

    // Of a kv head's part of a block, up to the key and value of its first `used` tokens.
    static int64_t bytes(const Step& s, int used) {
        return 4 * (int64_t(s.block_size / E::PER) * (s.dim + used * s.value_dim / s.block_size));
    }
    static int64_t bytes(const Step& s) { return bytes(s, s.block_size); }

    // `run` tokens from cell `offset` on of the block whose part for one kv head is `head`.
    static void store(const Step& s, char* head, int offset, int run, const T* k, int64_t k_stride,
                      const T* v, int64_t v_stride) {
        uint32_t* to = reinterpret_cast<uint32_t*>(head);
        store_keys<E>(to + offset, s.block_size, k, k_stride, s.dim / E::PER, run);
        store_values<E>(to + key_units(s), offset, v, v_stride, s.value_dim, run);
    }
};

// ---------------------------------------------------------------- 8-bit floats

typedef uint8_t vb __attribute__((vector_size(VL)));
constexpr uint32_t LOWER = (127 - 7) << 23;  // by which E4M3's exponents are below those of fp32

// x [dim] as codes; returns the exponent of their scale.
template <class E>
uint8_t encode(const typename E::T* x, int dim, uint8_t* codes) {
    vi most{};
    for (int d = 0; d < dim; d += VL) {
        vi size = (vi)E::get(x + d) & 0x7fffffff;
        most = size > most ? size : most;
    }
    int32_t largest = 0;
    for (int i = 0; i < VL; i++) largest = std::max(largest, most[i] >> 23);
    const int32_t exponent = largest < 255 ? std::max(largest - 7, 1) : 255;
    const vf inverse = (vf)(vu{} + (uint32_t(254 - std::min(exponent, 253)) << 23));
    for (int d = 0; d < dim; d += VL) {
        vu bits = (vu)(E::get(x + d) * inverse), size = bits & 0x7fffffffu;
        vu normal = (size - LOWER + 0x7ffffu + ((size >> 20) & 1u)) >> 20;
        vu steps = (vu)((vf)size + 16384.0f) & 0xffu;  // the sum's last bit is worth 2^-9
        vu code = ((vf)size < 0x1p-6f ? steps : normal) | ((bits >> 24) & 0x80u);
        store(codes + d, __builtin_convertvector(code, vb));
    }
    return uint8_t(exponent);
}

inline void store_units(uint32_t* to, vu units) { store(to, units); }

inline vf number(vu code) {
    vu size = code & 0x7fu;
    vf normal = (vf)((size << 20) + LOWER), small = __builtin_convertvector((vi)size, vf) * 0x1p-9f;
    vf x = size < 8u ? small : normal;
    return (vf)((vu)x | ((code & 0x80u) << 24));
}

inline vf scale_of(uint8_t exponent) { return (vf)(splat_u(uint32_t(exponent) << 23)); }
inline vf scales_of(const uint8_t* exponents) {
    return (vf)(__builtin_convertvector(load<vb>(exponents), vu) << 23);
}

// VL units of codes times their scales; of a pair `low` is the first one's, `high` the second's.
template <class E>
inline vu units_of(const uint8_t* codes, vf low, vf high) {
    if constexpr (E::PER == 1) {
        return (vu)(number(__builtin_convertvector(load<vb>(codes), vu)) * low);
    } else {  // bf16 has these numbers exactly
        vu pair = __builtin_convertvector(load<vh>(codes), vu);
        vu first = (vu)(number(pair & 0xffu) * low), second = (vu)(number(pair >> 8) * high);
        return first >> 16 | (second & 0xffff0000u);
    }
}

template <class Type>
struct CodedCells {
    using E = Type;
    using T = typename E::T;
    static constexpr bool CODED = true;

    static int64_t bytes(const Step& s) {
        return int64_t(s.block_size) * (s.dim + s.value_dim + 2);
    }
    static int64_t bytes(const Step& s, int) { return bytes(s); }  // the scales are at the end

    static uint8_t* values_of(const Step& s, uint8_t* head) { return head + s.block_size * s.dim; }
    static uint8_t* exponents_of(const Step& s, uint8_t* head) {
        return head + s.block_size * (s.dim + s.value_dim);
    }

    static void store(const Step& s, char* head, int offset, int run, const T* k, int64_t k_stride,
                      const T* v, int64_t v_stride) {
        constexpr int PER = E::PER;
        const int bs = s.block_size;
        uint8_t *keys = reinterpret_cast<uint8_t*>(head), *values = values_of(s, keys);
        uint8_t *exponents = exponents_of(s, keys), codes[MAX_DIM];
        for (int t = offset; t < offset + run; t++, k += k_stride, v += v_stride) {
            exponents[t] = encode<E>(k, s.dim, codes);
            for (int d = 0; d < s.dim; d++) keys[(d / PER * bs + t) * PER + d % PER] = codes[d];
            exponents[bs + t] = encode<E>(v, s.value_dim, codes);
            for (int d = 0; d < s.value_dim; d++)
                values[(t / PER * s.value_dim + d) * PER + t % PER] = codes[d];
        }
    }

    // 16 cells from `offset` on, in units as if they were from cell `at` on in a block of `size`
    // cells; nothing, zeros in its unit, behind the first `used` values.
    static void read(const Step& s, char* head, int offset, int used, uint32_t* to_keys,
                     uint32_t* to_values, int at, int size) {
        constexpr int PER = E::PER;
        const int bs = s.block_size, dim = s.value_dim;
        uint8_t *keys = reinterpret_cast<uint8_t*>(head), *values = values_of(s, keys);
        const uint8_t* exponents = exponents_of(s, keys) + offset;
        for (int j = 0; j < 16; j += VL) {
            const vf scale = scales_of(exponents + j);
            for (int u = 0; u < s.dim / PER; u++)
                store_units(to_keys + u * size + at + j,
                        units_of<E>(keys + (u * bs + offset + j) * PER, scale, scale));
        }
        exponents += bs;
        for (int t = 0; t < std::min(used, 16); t += PER) {
            const vf low = scale_of(exponents[t]);
            const vf high = t + PER <= used ? scale_of(exponents[t + PER - 1]) : vf{};
            for (int d = 0; d < dim; d += VL)
                store_units(to_values + (at + t) / PER * dim + d,
                        units_of<E>(values + ((offset + t) / PER * dim + d) * PER, low, high));
        }
    }
};
