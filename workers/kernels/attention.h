// Paged attention over the cells of cells.h.
// Included by cpu.cpp, inside its namespace.

// A query's result depends on its own context only, bit by bit: the order of every sum is fixed by
// absolute positions (TILE, CHUNK), and not by threads, by the chunking of its prompt or by what
// else is in the batch. Long contexts are split over threads at multiples of CHUNK
// (Flash-Decoding, Dao et al. 2023); partial results are merged in order whether they were split
// or not. Codes become numbers once a tile of keys, for all rows that share the pass.

constexpr int TILE = 256;  // keys of one online-softmax step
constexpr int CHUNK = 512;  // keys of one partial result
constexpr int MAX_ROWS = 48;  // (query, head) pairs that share a pass over one kv head's keys

// The new keys and values of a step.
template <class C>
struct Source {
    using T = typename C::T;
    const T* k;  // null: there are none
    int64_t k_stride;
    const T* v;
    int64_t v_stride;

    // Tokens first .. first + run - 1 of head h, which lie side by side in a block from `offset`.
    void store(const Step& s, char* head, int h, int64_t first, int offset, int run) const {
        C::store(s, head, offset, run, k + first * k_stride + h * s.dim, k_stride,
                 v + first * v_stride + h * s.value_dim, v_stride);
    }

    // Tokens begin .. end - 1, wherever they go.
    void store(const Step& s, char* cache, int64_t begin, int64_t end) const {
        const int bs = s.block_size;
        while (begin < end) {
            const int64_t cell = s.cells[begin];
            const int offset = int(cell % bs);
            int run = 1;
            while (begin + run < end && offset + run < bs && s.cells[begin + run] == cell + run)
                run++;
            char* block = cache + cell / bs * s.kv_heads * C::bytes(s);
            for (int h = 0; h < s.kv_heads; h++)
                store(s, block + h * C::bytes(s), h, begin, offset, run);
            begin += run;
        }
    }
};

// The bytes of the cache that the next tile needs, fetched into L2 little by little while this one
// is worked on: hardware prefetchers do not know which block comes next.
struct Ahead {
    struct Region {
        const char *at, *end;
    };
    Region regions[TILE / 16 + 1];
    Region now{nullptr, nullptr};
    int count = 0;
    int rate = 0;  // cache lines for each call of fetch

    void add(const char* begin, int64_t bytes) { regions[count++] = {begin, begin + bytes}; }

    void spread(int64_t calls) {
        int64_t bytes = 0;
        for (int i = 0; i < count; i++) bytes += regions[i].end - regions[i].at;
        rate = int(bytes / 64 / calls) + 1;
        now = {nullptr, nullptr};
    }

    void fetch() {
        if (now.at >= now.end) {
            if (!count) return;
            now = regions[--count];
        }
        for (int i = 0; i < rate; i++, now.at += 64) __builtin_prefetch(now.at, 0, 2);
    }
};

struct Segment {  // consecutive units of V
    const uint32_t* base;
    int units;
};

// S[NQ][NV * VL] = A [NQ][units] times NV vectors of keys; lda and step in units.
template <class E, int NQ, int NV>
inline void score_tile(const uint32_t* a, int lda, const uint32_t* const* keys, int64_t step,
                       int units, float* s, Ahead& ahead) {
    vf acc[NQ][NV] = {};
    for (int u = 0; u < units; u++) {
        ahead.fetch();
        vu b[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) b[v] = load<vu>(keys[v] + u * step);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; q++) {
            vu x = splat_u(a[q * lda + u]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) acc[q][v] = E::dot(acc[q][v], x, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) store(s + q * TILE + v * VL, acc[q][v]);
}

// C[NQ][NV * VL] = alpha * C + P times columns `first` and on of V's segments; ldp in units.
template <class E, int NQ, int NV>
inline void value_tile(const uint32_t* p, int ldp, const Segment* segments, int count, int first,
                       int dim, float* c, const float* alpha, Ahead& ahead) {
    vf acc[NQ][NV];
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[q][v] = load<vf>(c + q * dim + v * VL) * alpha[q];
    for (int i = 0; i < count; i++) {
        const uint32_t* base = segments[i].base + first;
        for (int u = 0; u < segments[i].units; u++, base += dim, p++) {
            ahead.fetch();
            vu b[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) b[v] = load<vu>(base + v * VL);
#pragma GCC unroll 8
            for (int q = 0; q < NQ; q++) {
                vu x = splat_u(p[q * ldp]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) acc[q][v] = E::dot(acc[q][v], x, b[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) store(c + q * dim + v * VL, acc[q][v]);
}

// Calls f(integral_constant<n>) for n in 1..MAX.
template <int MAX, class F>
inline void dispatch(int n, F&& f) {
    if constexpr (MAX > 0) {
        if (n == MAX) f(std::integral_constant<int, MAX>{});
        else dispatch<MAX - 1>(n, f);
    }
}

// Online softmax of some (query, head) rows: running maximum (times scale and log2 e), sum by
// lanes, output.
struct State {
    float max[MAX_ROWS + 16];  // so that a register tile's may be read as whole vectors
    float sum[MAX_ROWS * VL];
    float out[MAX_ROWS * MAX_DIM];  // [rows][dim]

    void clear(int rows, int dim) {
        std::fill_n(max, MAX_ROWS + 16, NEG);
        std::fill_n(sum, rows * VL, 0.0f);
        std::fill_n(out, rows * dim, 0.0f);
    }

    static int64_t size(int dim) { return MAX_ROWS * (1 + VL + dim); }

    void save(float* to, int rows, int dim) const {
        memcpy(to, max, rows * sizeof(float));
        memcpy(to + MAX_ROWS, sum, rows * VL * sizeof(float));
        memcpy(to + MAX_ROWS * (1 + VL), out, rows * dim * sizeof(float));
    }

    void merge(const float* other, int rows, int dim) {
        merge(other, other + MAX_ROWS, other + MAX_ROWS * (1 + VL), rows, dim);
    }

    void merge(const float* other_max, const float* other_sum, const float* other_out, int rows,
               int dim) {
        for (int r = 0; r < rows; r++) {
            const float m = std::max(max[r], other_max[r]);
            const vf mine = exp2v(splat(max[r] - m)), theirs = exp2v(splat(other_max[r] - m));
            auto add = [&](float* to, const float* from) {
                store(to, load<vf>(to) * mine + load<vf>(from) * theirs);
            };
            max[r] = m;
            add(sum + r * VL, other_sum + r * VL);
            for (int d = 0; d < dim; d += VL) add(out + r * dim + d, other_out + r * dim + d);
        }
    }
};

struct Task {
    int32_t row, first, count;  // queries first .. first + count - 1 of the row
    int32_t head, head_end;  // kv heads
    int32_t chunk, chunk_end;
    int32_t part;  // of a split task: its partial result; else -1
    int32_t whole;  // of a split task: the index of its Whole
};

struct Whole {  // a task that was split: whoever ends last merges parts first .. first + count - 1
    int32_t first, count;
    std::atomic<int32_t> left{0};
};

// Where a tile's codes become numbers: as a block of TILE cells. It is kept between calls, as memory
// that is new would have to be found page by page.
struct Numbers {
    std::vector<uint32_t> keys, values;

    static Numbers& of_thread(const Step& s, int per) {
        static thread_local Numbers numbers;
        numbers.keys.resize(std::max<size_t>(numbers.keys.size(), TILE / per * s.dim));
        numbers.values.resize(std::max<size_t>(numbers.values.size(), TILE / per * s.value_dim));
        return numbers;
    }
};

template <class C>
class Attention {
    using E = typename C::E;
    using T = typename E::T;
    static constexpr int PER = E::PER;
    static constexpr int UNIT_TILE = TILE / PER;

    const Step& s;
    char* cache;
    const T* q;
    const int64_t q_stride;
    const Source<C> source;
    T* out;
    const float* sinks;  // [heads]: logits that take a share of the attention and give nothing
    const int window;  // a query at p sees p - window + 1 .. p
    const int splits;  // equal parts of a kv head's query heads, each worked on as a head
    const int kv_heads;  // of these
    const int group;  // query heads of each
    const float factor;  // scale * log2 e

    std::vector<Task> tasks;
    std::unique_ptr<Whole[]> wholes;
    std::vector<float> parts;

    struct alignas(64) Scratch {
        State run, chunk;
        uint32_t q[MAX_ROWS * MAX_DIM / PER];  // [rows][dim]
        float scores[MAX_NQ * TILE];
        uint32_t probs[MAX_NQ * UNIT_TILE];
        uint32_t last[MAX_DIM];  // the unit of V that holds the context's end, zeros past it
        int32_t position[MAX_ROWS];
        Ahead ahead;
        uint32_t *keys, *values;  // the numbers of a tile's codes
        const Task* next;  // what this thread does after the task at hand; or null
    };

  public:
    Attention(const Step& s, char* cache, const T* q, int64_t q_stride, const Source<C>& source,
              T* out, const float* sinks, int window)
        : s(s), cache(cache), q(q), q_stride(q_stride), source(source), out(out), sinks(sinks),
          window(window > 0 ? window : std::numeric_limits<int>::max() / 2),
          splits(splits_of(s.heads / s.kv_heads)), kv_heads(s.kv_heads * splits),
          group(s.heads / kv_heads), factor(s.scale * LOG2E) {}

    void run(int threads) {
        store_early(threads);
        plan(threads);
        std::atomic<size_t> counter{0};
        parallel(threads, [&] {
            Scratch w;
            if constexpr (C::CODED) {
                Numbers& numbers = Numbers::of_thread(s, PER);
                w.keys = numbers.keys.data(), w.values = numbers.values.data();
            }
            auto take = [&]() -> const Task* {
                size_t i = counter.fetch_add(1, std::memory_order_relaxed);
                return i < tasks.size() ? &tasks[i] : nullptr;
            };
            for (const Task* task = take(); task; task = w.next) {
                w.next = take();
                for (int h = task->head; h < task->head_end; h++) attend(w, *task, h);
            }
        });
    }

  private:
    static int splits_of(int group) {
        int n = (group + MAX_ROWS - 1) / MAX_ROWS;
        while (group % n) n++;
        return n;
    }

    // A decode row's new key and value can wait until its last tile is at hand, in cache: nobody
    // else reads them. Not so at the end of a block: full blocks may be shared, even within a step.
    bool stores_late(int r) const {
        return source.k && splits == 1 && queries(r) == 1 && s.context_lens[r] % s.block_size != 0;
    }

    // Writes the keys and values of all other rows.
    void store_early(int threads) {
        if (!source.k) return;
        std::vector<std::pair<int64_t, int64_t>> spans;
        for (int r = 0; r < s.rows; r++) {
            if (stores_late(r)) continue;
            for (int64_t t = s.query_starts[r]; t < s.query_starts[r + 1]; t += 64)
                spans.push_back({t, std::min<int64_t>(t + 64, s.query_starts[r + 1])});
        }
        parallel_for(threads, spans.size(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++)
                source.store(s, cache, spans[i].first, spans[i].second);
        });
    }

    // Cuts rows into tasks: tiles of queries; kv heads in groups while that leaves enough tasks;
    // and chunks of the context where one task would be a large share of the whole step.
    void plan(int threads) {
        const int tile = std::max(1, MAX_ROWS / group);
        int64_t total = 0;
        for (int r = 0; r < s.rows; r++)
            for (int t = 0; t < queries(r); t += tile)
                total += cost(r, t, tile) * kv_heads;
        const int64_t fair = threads > 1 ? total / (16 * threads) + 1 : total + 1;

        int whole_count = 0, part_count = 0;
        for (int r = 0; r < s.rows; r++)
            for (int t = ((queries(r) + tile - 1) / tile - 1) * tile; t >= 0; t -= tile) {
                const int count = std::min(tile, queries(r) - t);
                const int first = first_key(r, t) / CHUNK;
                const int end = (position(r, t + count - 1) + CHUNK) / CHUNK;
                if (cost(r, t, tile) > 2 * fair && end - first > 1) {
                    for (int h = 0; h < kv_heads; h++, whole_count++)
                        for (int c = first; c < end; c++)
                            tasks.push_back({r, t, count, h, h + 1, c, c + 1, part_count++,
                                             whole_count});
                    continue;
                }
                const int heads = int(std::clamp<int64_t>(fair / cost(r, t, tile), 1, kv_heads));
                for (int h = 0; h < kv_heads; h += heads)
                    tasks.push_back({r, t, count, h, std::min(h + heads, kv_heads), first, end,
                                     -1, -1});
            }
        parts.resize(part_count * State::size(s.value_dim));
        wholes.reset(new Whole[whole_count]);
        for (const Task& task : tasks)
            if (task.part >= 0) {
                Whole& w = wholes[task.whole];
                if (w.left++ == 0) w.first = task.part;
                w.count = w.left;
            }
    }

    int queries(int r) const { return s.query_starts[r + 1] - s.query_starts[r]; }
    int position(int r, int t) const { return s.context_lens[r] - queries(r) + t; }
    int first_key(int r, int t) const { return std::max(0, position(r, t) - window + 1); }
    int64_t cost(int r, int t, int tile) const {  // keys times register tiles
        const int count = std::min(tile, queries(r) - t);
        const int keys = position(r, t + count - 1) + 1 - first_key(r, t);
        return int64_t(keys) * ((count * group + MAX_NQ - 1) / MAX_NQ);
    }

    void attend(Scratch& w, const Task& task, int h) {
        const int rows = task.count * group, dim = s.value_dim;
        for (int i = 0; i < rows; i++) {
            const int t = task.first + i / group;
            w.position[i] = position(task.row, t);
            memcpy(w.q + i * s.dim / PER,
                   q + (s.query_starts[task.row] + t) * q_stride + (h * group + i % group) * s.dim,
                   s.dim * sizeof(T));
        }
        if (task.part >= 0) {
            w.run.clear(rows, dim);
            pass(w, w.run, task, h, rows, task.chunk);
            w.run.save(parts.data() + task.part * State::size(dim), rows, dim);
            Whole& whole = wholes[task.whole];
            if (whole.left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
            w.run.clear(rows, dim);
            for (int i = 0; i < whole.count; i++)
                w.run.merge(parts.data() + (whole.first + i) * State::size(dim), rows, dim);
        } else {
            w.run.clear(rows, dim);
            pass(w, w.run, task, h, rows, task.chunk);
            for (int c = task.chunk + 1; c < task.chunk_end; c++) {
                w.chunk.clear(rows, dim);
                pass(w, w.chunk, task, h, rows, c);
                w.run.merge(w.chunk.max, w.chunk.sum, w.chunk.out, rows, dim);
            }
        }
        for (int i = 0; i < rows; i++) {
            const int t = s.query_starts[task.row] + task.first + i / group;
            const int head = h * group + i % group;
            T* to = out + (int64_t(t) * s.heads + head) * dim;
            float total = hsum(load<vf>(w.run.sum + i * VL));
            if (sinks) total += std::exp2(sinks[head] * LOG2E - w.run.max[i]);
            const float inverse = 1.0f / total;
            for (int d = 0; d < dim; d += VL)
                E::put(to + d, load<vf>(w.run.out + i * dim + d) * inverse);
        }
    }

    char* head_of(int32_t block, int h) const {
        return cache + (int64_t(block) * s.kv_heads + h / splits) * C::bytes(s);
    }
    const uint32_t* units(int32_t block, int h) const {
        return reinterpret_cast<const uint32_t*>(head_of(block, h));
    }

    // Plans the fetching of the tile after keys base .. base + filled - 1 of this task and head.
    void look_ahead(Scratch& w, const Task& task, int h, int rows, int base, int filled) const {
        const int64_t tiles = (rows + MAX_NQ - 1) / MAX_NQ;
        const int64_t score_calls = (filled + MAX_NV * VL - 1) / (MAX_NV * VL) * (s.dim / PER);
        const int64_t value_calls =
            (s.value_dim + MAX_NV * VL - 1) / (MAX_NV * VL) * (filled / PER);
        w.ahead.count = 0;
        const Task* t = &task;
        base += TILE;
        if (base >= last_key(*t) && ++h >= t->head_end) {
            if (!(t = w.next)) return;
            h = t->head;
        }
        if (t != &task || base >= last_key(*t)) base = first_tile(*t);
        const int end = std::min(base + TILE, last_key(*t)), bs = s.block_size;
        const int32_t* table = s.tables + t->row * s.table_stride;
        for (int p = base / bs * bs; p < end; p += bs) {
            w.ahead.add(head_of(table[p / bs], h), C::bytes(s, std::min(bs, end - p)));
        }
        w.ahead.spread(tiles * (score_calls + value_calls));
    }

    int first_tile(const Task& t) const {
        return std::max(t.chunk * CHUNK, first_key(t.row, t.first) / TILE * TILE);
    }
    int last_key(const Task& t) const {
        return std::min(position(t.row, t.first + t.count - 1) + 1, t.chunk_end * CHUNK);
    }

    // Adds chunk c of the context to a state of `rows` (query, head) rows in ascending position.
    void pass(Scratch& w, State& state, const Task& task, int h, int rows, int c) {
        const int bs = s.block_size;
        const int32_t* table = s.tables + task.row * s.table_stride;
        const int tiles = (rows + MAX_NQ - 1) / MAX_NQ, step = (rows + tiles - 1) / tiles;
        const int low = std::max(0, w.position[0] - window + 1);
        const int high = std::min(w.position[rows - 1] + 1, (c + 1) * CHUNK);
        for (int base = std::max(c * CHUNK, low / TILE * TILE); base < high; base += TILE) {
            const uint32_t* keys[TILE / VL];
            const int filled = std::min(TILE, high - base);
            look_ahead(w, task, h, rows, base, filled);
            const int context = s.context_lens[task.row], last = context - 1;
            if (base + filled == context && stores_late(task.row))
                source.store(s, head_of(table[last / bs], h), h, s.query_starts[task.row],
                             last % bs, 1);
            for (int i = 0; i < filled; i += 16) {
                // A block that no query of this task sees may be gone: read any other instead.
                const int seen = std::max(base + i, low);
                const uint32_t* from = w.keys + i;
                if constexpr (!C::CODED)
                    from = units(table[seen / bs], h) + (base + i) % bs;
                else if (base + i + 16 > low)
                    C::read(s, head_of(table[(base + i) / bs], h), (base + i) % bs, filled - i,
                            w.keys, w.values, i, TILE);
                for (int j = 0; j < 16; j += VL) keys[(i + j) / VL] = from + j;
            }
            for (int m = 0; m < rows; m += step) {
                const int n = std::min(step, rows - m);
                const int end = std::min(w.position[m + n - 1] + 1 - base, filled);
                if (end <= 0 || w.position[m] - window + 1 >= base + TILE) continue;
                const int skip = std::max(low - base, 0) / 16 * 16;
                Segment segments[TILE / 16 + 1];
                const int count = values(w, table, h, base, skip, end, context, segments);
                dispatch<MAX_NQ>(n, [&](auto nq) {
                    tile<decltype(nq)::value>(w, state, m, base, keys, end, segments, count,
                                              skip);
                });
            }
        }
    }

    // NQ rows, from m on, against keys base .. base + end - 1.
    template <int NQ>
    void tile(Scratch& w, State& state, int m, int base, const uint32_t* const* keys, int end,
              const Segment* segments, int count, int skip) {
        const int dim = s.value_dim, units = s.dim / PER, vectors = (end + VL - 1) / VL;
        const int stride = C::CODED ? TILE : s.block_size;
        int v = 0;
        auto scores = [&](auto nv) {
            constexpr int NV = decltype(nv)::value;
            score_tile<E, NQ, NV>(w.q + m * units, units, keys + v, stride, units,
                                  w.scores + v * VL, w.ahead);
        };
        for (; v + MAX_NV <= vectors; v += MAX_NV) scores(std::integral_constant<int, MAX_NV>{});
        dispatch<MAX_NV - 1>(vectors - v, scores);

        alignas(64) float alpha[16];
        softmax<NQ>(w, state, m, base, vectors, end, alpha);

        int d = 0;
        auto values = [&](auto nv) {
            constexpr int NV = decltype(nv)::value;
            value_tile<E, NQ, NV>(w.probs + skip / PER, UNIT_TILE, segments, count, d, dim,
                                  state.out + m * dim + d, alpha, w.ahead);
        };
        for (; d + MAX_NV * VL <= dim; d += MAX_NV * VL)
            values(std::integral_constant<int, MAX_NV>{});
        dispatch<MAX_NV - 1>((dim - d) / VL, values);
    }

    // The segments of V for keys base + skip .. base + end - 1.
    int values(Scratch& w, const int32_t* table, int h, int base, int skip, int end, int context,
               Segment* segments) const {
        const int bs = s.block_size, dim = s.value_dim;
        int count = 0;
        if constexpr (C::CODED) {
            segments[0] = {w.values + skip / PER * dim, (end - skip + PER - 1) / PER};
            return 1;
        }
        for (int i = skip; i < end;) {
            const int p = base + i, offset = p % bs, n = std::min(bs - offset, end - i);
            const uint32_t* v =
                units(table[p / bs], h) + int64_t(bs) * s.dim / PER + offset / PER * dim;
            segments[count++] = {v, (n + PER - 1) / PER};
            i += n;
            if (PER == 2 && n % 2 && base + i == context) {
                // The last unit's second half lies past the context and may hold anything.
                segments[count - 1].units--;
                for (int d = 0; d < dim; d++) w.last[d] = first_half(v[n / 2 * dim + d]);
                segments[count++] = {w.last, 1};
            }
        }
        return count;
    }

    static uint32_t first_half(uint32_t unit) {
        uint16_t halves[2];
        memcpy(halves, &unit, 4);
        halves[1] = 0;
        memcpy(&unit, halves, 4);
        return unit;
    }

    // Scores of NQ rows to probabilities relative to their running maxima; alpha is the factor by
    // which what each row has summed so far must shrink.
    template <int NQ>
    void softmax(Scratch& w, State& state, int m, int base, int vectors, int end, float* alpha) {
        float top[16], shift[16];
        std::fill_n(top, 16, NEG);
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++) {
            float* scores = w.scores + i * TILE;
            const int high = std::min(w.position[m + i] + 1 - base, end);
            const int low = std::max(w.position[m + i] - window + 1 - base, 0);
            if (low > 0 || high < vectors * VL)
                for (int v = 0; v < vectors; v++) {
                    vi lane = lanes() + v * VL;
                    vf x = load<vf>(scores + v * VL);
                    store(scores + v * VL, ((lane < high) & (lane >= low)) ? x : splat(NEG));
                }
            vf best = splat(NEG);
            for (int v = 0; v < vectors; v++) best = vmax(best, load<vf>(scores + v * VL));
            top[i] = hmax(best);
        }
        for (int i = 0; i < NQ; i += VL) {
            vf t = load<vf>(top + i), old = load<vf>(state.max + m + i);
            vf now = vmax(old, t == NEG ? t : t * factor);
            store(alpha + i, exp2v(old - now));
            store(shift + i, now == NEG ? vf{} : now);  // a row that has seen nothing: all to 0
            for (int j = 0; j < std::min(VL, NQ - i); j++) state.max[m + i + j] = now[j];
        }
#pragma GCC unroll 8
        for (int i = 0; i < NQ; i++) {
            const float* scores = w.scores + i * TILE;
            T* probs = reinterpret_cast<T*>(w.probs + i * UNIT_TILE);
            vf sum = load<vf>(state.sum + (m + i) * VL) * alpha[i];
            for (int v = 0; v < vectors; v++) {
                vf p = exp2v<E::ROUGH>(load<vf>(scores + v * VL) * factor - shift[i]);
                sum += p;
                E::put(probs + v * VL, p);
            }
            store(state.sum + (m + i) * VL, sum);
        }
    }
};

template <class C>
void attend(const Step& s, void* cache, const void* q, int64_t q_stride, const void* k,
            int64_t k_stride, const void* v, int64_t v_stride, void* out, const float* sinks,
            int window, int threads) {
    using T = typename C::T;
    const Source<C> source{static_cast<const T*>(k), k_stride, static_cast<const T*>(v), v_stride};
    Attention<C>(s, static_cast<char*>(cache), static_cast<const T*>(q), q_stride, source,
                 static_cast<T*>(out), sinks, window)
        .run(threads);
}
