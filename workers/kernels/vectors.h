// Vectors of fp32 lanes, and elements of bf16 and fp32 read and written through them.
// Included by cpu.cpp, inside its namespace.

#if defined(__AVX512F__)
constexpr int VL = 16;  // fp32 lanes
constexpr int MAX_NV = 4;  // vectors across a register tile: 6 x 4 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int VL = 8;
constexpr int MAX_NV = 2;
#elif defined(__aarch64__)
constexpr int VL = 4;
constexpr int MAX_NV = 4;
#else
constexpr int VL = 4;
constexpr int MAX_NV = 2;
#endif
constexpr int MAX_NQ = 6;  // rows of a register tile

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

constexpr float NEG = -1e30f;  // stands for -inf: finite, so that no inf - inf arises
constexpr float LOG2E = 1.44269504088896341f;

// Unaligned, of any element type. (Not memcpy: GCC 12 then moves vectors through scalar registers.)
template <class V>
struct __attribute__((packed, may_alias)) Loose {
    V v;
};
template <class V, class T>
inline V load(const T* p) {
    return reinterpret_cast<const Loose<V>*>(p)->v;
}
template <class V, class T>
inline void store(T* p, V v) {
    reinterpret_cast<Loose<V>*>(p)->v = v;
}
inline vf splat(float x) { return vf{} + x; }
inline vu splat_u(uint32_t x) { return vu{} + x; }

inline vi lanes() {
    vi v;
    for (int i = 0; i < VL; i++) v[i] = i;
    return v;
}

inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline vf vmin(vf a, vf b) { return -vmax(-a, -b); }

inline float hmax(vf a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a);
#else
    float m = a[0];
    for (int i = 1; i < VL; i++) m = std::max(m, a[i]);
    return m;
#endif
}

inline float hsum(vf a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a);
#else
    float s = 0;
    for (int i = 0; i < VL; i++) s += a[i];
    return s;
#endif
}

// 2^x for x <= 127: 2^round(x) times a minimax polynomial of the fraction, exact at 0. Relative
// error 1e-7, or 1e-4 if ROUGH, which is a twentieth of what rounding to bf16 adds.
template <bool ROUGH = false>
inline vf exp2v(vf x) {
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
    vf f = x - n;
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf clamped = vmax(x, splat(-126.0f));
    vf shifted = clamped + magic;
    vf f = clamped - (shifted - magic);
#endif
    vf p;
    if constexpr (ROUGH) {
        p = f * 0.05500893294811249f + 0.2422109693288803f;
        p = p * f + 0.6932829022407532f;
    } else {
        p = f * 0.001326472731307149f + 0.009671512991189957f;
        p = p * f + 0.05550733581185341f;
        p = p * f + 0.24022242426872253f;
        p = p * f + 0.6931470036506653f;
    }
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return x < -126.0f ? vf{} : (vf)((vu)p + ((vu)shifted << 23));
#endif
}

// ---------------------------------------------------------------- element types

inline float widen(uint16_t x) {
    uint32_t u = uint32_t(x) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

inline vh narrow(vf x) {  // to bf16, nearest even
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu u = (vu)x;
    vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    r = (x != x) ? splat_u(0x7fc0u) : r;
    return __builtin_convertvector(r, vh);
#endif
}

// PER elements make a 32-bit unit; dot() adds the products of units lane by lane.
struct F32 {
    using T = float;
    static constexpr int PER = 1;
    static constexpr bool ROUGH = false;
    static vf get(const T* p) { return load<vf>(p); }
    static void put(T* p, vf x) { store(p, x); }
    static vf dot(vf acc, vu a, vu b) { return acc + (vf)a * (vf)b; }
    static vf round(vf x) { return x; }
};

struct BF16 {
    using T = uint16_t;
    static constexpr int PER = 2;
    static constexpr bool ROUGH = true;
    static vf get(const T* p) {
        return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16);
    }
    static void put(T* p, vf x) { store(p, narrow(x)); }
    static vf dot(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
        return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
        acc += (vf)(a << 16) * (vf)(b << 16);
        return acc + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
    }
    static vf round(vf x) {
        return (vf)(__builtin_convertvector(narrow(x), vu) << 16);
    }
};

// The first n < VL elements, the rest `fill`; and back.
template <class E>
inline vf get_tail(const typename E::T* p, int n, float fill) {
    typename E::T buffer[VL] = {};
    memcpy(buffer, p, n * sizeof(*p));
    return lanes() < n ? E::get(buffer) : splat(fill);
}
template <class E>
inline void put_tail(typename E::T* p, vf x, int n) {
    typename E::T buffer[VL];
    E::put(buffer, x);
    memcpy(p, buffer, n * sizeof(*p));
}

// f(i, x) for each vector x = p[i : i + VL] of n elements, the last one padded with `fill`.
template <class E, class F>
inline void each(const typename E::T* p, int64_t n, float fill, F&& f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) f(i, E::get(p + i));
    if (i < n) f(i, get_tail<E>(p + i, int(n - i), fill));
}
template <class E>
inline vf at(const typename E::T* p, int64_t i, int64_t n) {
    return i + VL <= n ? E::get(p + i) : get_tail<E>(p + i, int(n - i), 0.0f);
}
template <class E>
inline void set(typename E::T* p, int64_t i, int64_t n, vf x) {
    if (i + VL <= n) E::put(p + i, x);
    else put_tail<E>(p + i, x, int(n - i));
}
