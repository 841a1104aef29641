#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace awq {
namespace {

// How long an idle worker looks for the next job before it sleeps. Between two operators of a decoder lie 3 to 30 us
// of Python; waking a sleeper costs its caller 5 us and takes 50. While it looks it yields: where there are more threads
// than processors, the one that it waits for is perhaps next.
constexpr std::chrono::microseconds kSpin{200};

// How often the caller looks whether the others are done before it sleeps, some 20 us: a part takes a few. One that
// takes longer is in a thread that lost its processor, and this one's may be what it needs.
constexpr int kLooks = 1024;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

class Pool {
public:
    void run(int64_t count, int threads, void (*part)(void*, int64_t), void* context) {
        const int helpers = int(count < threads ? count : threads) - 1;
        std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
        if (helpers < 1 || !turn.try_lock()) {
            for (int64_t index = 0; index < count; index++) part(context, index);
            return;
        }
        while (workers_ < helpers) start_worker();
        part_ = part;
        context_ = context;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        // Odd while a job is open. Workers with a number below `helpers_` may join; see `work`.
        helpers_.store(helpers, std::memory_order_relaxed);
        job_.fetch_add(1);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> hold(sleep_);
            wake_.notify_all();
        }
        take_parts();
        job_.fetch_add(1);
        // Whoever is inside now took a part before the job closed. Those who come later see that it is closed.
        for (int look = 0; inside_.load() > 0; look++) {
            if (look < kLooks) {
                pause();
                continue;
            }
            std::unique_lock<std::mutex> hold(sleep_);
            awaited_.store(true);
            left_.wait(hold, [&] { return inside_.load() == 0; });
            awaited_.store(false);
        }
    }

private:
    void take_parts() {
        for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) part_(context_, index);
    }

    void work(int number) {
        uint64_t seen = 0;
        for (;;) {
            const uint64_t job = await_job_after(seen);
            seen = job;
            if (number >= helpers_.load(std::memory_order_relaxed)) continue;
            // Either this thread sees the job closed, or the caller sees this thread inside: both are sequentially
            // consistent. A job opened in between is as good as the one seen.
            inside_.fetch_add(1);
            const uint64_t now = job_.load();
            if (now % 2 == 1 && number < helpers_.load(std::memory_order_relaxed)) {
                seen = now;
                take_parts();
            }
            // As above: either this thread sees the caller waiting, or the caller sees nobody inside.
            if (inside_.fetch_sub(1) == 1 && awaited_.load()) {
                std::lock_guard<std::mutex> hold(sleep_);
                left_.notify_one();
            }
        }
    }

    bool open_after(uint64_t seen, uint64_t& job) {
        job = job_.load();
        return job % 2 == 1 && job != seen;
    }

    uint64_t await_job_after(uint64_t seen) {
        uint64_t job;
        const auto end = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; i++, pause())
                if (open_after(seen, job)) return job;
            std::this_thread::yield();
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> hold(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(hold, [&] { return open_after(seen, job); });
        sleeping_.fetch_sub(1);
        return job;
    }

    void start_worker() {
        std::thread([this, number = workers_] { work(number); }).detach();
        workers_++;
    }

    std::mutex turn_;  // held by the one caller whose job this is
    int workers_ = 0;
    std::atomic<int> helpers_{0};
    void (*part_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0;
    alignas(64) std::atomic<uint64_t> job_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> inside_{0};
    alignas(64) std::atomic<int> sleeping_{0};  // workers that a new job must wake
    std::atomic<bool> awaited_{false};           // the caller sleeps until nobody is inside
    std::mutex sleep_;
    std::condition_variable wake_, left_;
};

// Never destroyed: its threads live as long as the process.
Pool*& pool() {
    static Pool* current = [] {
        // The child of fork() has none of the threads, and perhaps a lock that one of them held.
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
        return new Pool;
    }();
    return current;
}

}  // namespace

void in_parallel(int64_t count, int threads, void (*part)(void*, int64_t), void* context) {
    pool()->run(count, threads, part, context);
}

}  // namespace awq
