// Ranks of one host that add, gather and broadcast through memory they share.
//
// Each rank has a line of counters and two buffers, used in turn by the rounds. In round s a rank
// writes its part into its own buffer, says so (arrived = s), and reads the others' once they have
// arrived. A buffer is written again in round s + 2, which a rank enters only when all have arrived
// at s + 1: then all have read what round s left there. Sums are taken in the order of ranks by
// every rank for itself, so all have the same bits.
//
// A rank that waits spins a little, then yields the core, then sleeps on a futex: ranks may have to
// share cores, and one that spins on the core of the rank it waits for waits longest.

constexpr int GROUP_SPINS = 1000;  // some 20 µs
constexpr int GROUP_YIELDS = 200;

struct GroupLine {
    alignas(128) std::atomic<uint32_t> arrived;
    std::atomic<uint32_t> sleepers;
};

struct GroupMemory {
    uint8_t* base;
    int rank, size;
    int64_t chunk;   // bytes of a buffer
    uint32_t round;  // the last one that this rank entered

    GroupLine& line(int r) { return reinterpret_cast<GroupLine*>(base)[r]; }
    uint8_t* buffer(int r) {
        return base + size * sizeof(GroupLine) + (2 * r + (round & 1)) * chunk;
    }
};

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

inline void await(GroupLine& line, uint32_t round) {
    auto there = [&] {
        return int32_t(line.arrived.load(std::memory_order_acquire) - round) >= 0;
    };
    for (int i = 0; i < GROUP_SPINS; i++) {
        if (there()) return;
        pause_core();
    }
#if defined(__linux__)
    for (int i = 0; i < GROUP_YIELDS; i++) {
        if (there()) return;
        sched_yield();
    }
    line.sleepers.fetch_add(1);
    for (;;) {
        const uint32_t seen = line.arrived.load();
        if (int32_t(seen - round) >= 0) break;
        const timespec second = {1, 0};
        syscall(SYS_futex, &line.arrived, FUTEX_WAIT, seen, &second, nullptr, 0);
    }
    line.sleepers.fetch_sub(1);
#else
    while (!there()) pause_core();
#endif
}

inline void enter(GroupMemory& group) {
    for (int r = 0; r < group.size; r++) await(group.line(r), group.round);
    group.round++;
}

inline void arrive(GroupMemory& group) {
    GroupLine& line = group.line(group.rank);
    line.arrived.store(group.round);
#if defined(__linux__)
    if (line.sleepers.load()) {
        syscall(SYS_futex, &line.arrived, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
    }
#endif
}

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return widen(x); }
inline void store_as(float x, float* out) { *out = x; }
inline void store_as(float x, uint16_t* out) {  // bfloat16, to nearest even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *out = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// x becomes the sum of all ranks' x, added in float32 and rounded once.
template <class T>
void group_reduce(GroupMemory& group, T* x, int64_t n) {
    constexpr int64_t BLOCK = 1024;
    const int64_t most = group.chunk / sizeof(T);
    for (int64_t at = 0; at < n; at += most) {
        const int64_t count = std::min(most, n - at);
        enter(group);
        memcpy(group.buffer(group.rank), x + at, count * sizeof(T));
        arrive(group);
        for (int r = 0; r < group.size; r++) await(group.line(r), group.round);
        for (int64_t b = 0; b < count; b += BLOCK) {
            float sum[BLOCK];
            const int64_t width = std::min(BLOCK, count - b);
            for (int r = 0; r < group.size; r++) {
                const T* part = reinterpret_cast<const T*>(group.buffer(r)) + b;
                if (r == 0) {
                    for (int64_t i = 0; i < width; i++) sum[i] = as_float(part[i]);
                } else {
                    for (int64_t i = 0; i < width; i++) sum[i] += as_float(part[i]);
                }
            }
            for (int64_t i = 0; i < width; i++) store_as(sum[i], x + at + b + i);
        }
    }
}

// On rank 0, out [rows, size * width bytes] gets the ranks' x [rows, width bytes] side by side.
inline void group_gather(GroupMemory& group, const uint8_t* x, int64_t rows, int64_t width,
                         uint8_t* out) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t at = 0; at < width;) {  // as many rows as a buffer holds, or a part of one
            const int64_t whole = at ? 0 : std::min(rows - row, group.chunk / width);
            const int64_t count = whole ? whole * width : std::min(width - at, group.chunk);
            enter(group);
            memcpy(group.buffer(group.rank), x + row * width + at, count);
            arrive(group);
            if (group.rank == 0) {
                for (int r = 0; r < group.size; r++) {
                    await(group.line(r), group.round);
                    for (int64_t i = 0; i < std::max<int64_t>(whole, 1); i++) {
                        memcpy(out + ((row + i) * group.size + r) * width + at,
                               group.buffer(r) + i * width, whole ? width : count);
                    }
                }
            }
            if (whole) row += whole - 1;
            at += whole ? width : count;
        }
    }
}

// Every rank's x becomes rank 0's.
inline void group_broadcast(GroupMemory& group, uint8_t* x, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += group.chunk) {
        const int64_t count = std::min(group.chunk, bytes - at);
        enter(group);
        if (group.rank == 0) memcpy(group.buffer(0), x + at, count);
        arrive(group);
        if (group.rank != 0) {
            await(group.line(0), group.round);
            memcpy(x + at, group.buffer(0), count);
        }
    }
}
