// Loops over the threads of torch's own OpenMP pool.
// Included by cpu.cpp, inside its namespace.

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
ParallelFn gomp_parallel = nullptr;

// Runs body() once on each of `threads` threads; the body takes its share from an atomic counter.
template <class F>
void parallel(int threads, F&& body) {
    if (threads <= 1 || !gomp_parallel) return body();
    auto call = [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); };
    gomp_parallel(call, &body, threads, 0);
}

// body(begin, end) over 0..n in pieces of `grain`; serial when the whole is one piece.
template <class F>
void parallel_for(int threads, int64_t n, int64_t grain, F&& body) {
    if (n <= grain || threads <= 1) return body(int64_t(0), n);
    std::atomic<int64_t> next{0};
    parallel(threads, [&] {
        for (int64_t i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
            body(i, std::min(i + grain, n));
    });
}
