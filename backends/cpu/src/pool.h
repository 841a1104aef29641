// A few threads that share the parts of one job. The caller works too and never waits for a thread that has not begun:
// a job costs no barrier, and a processor taken by somebody else costs one thread's share, not a stall.
#pragma once

#include <cstdint>
#include <type_traits>

namespace awq {

// `part(context, index)` for each index below `count`, on at most `threads` threads, the caller's among them. Which
// thread takes which part is left to chance, so a part's result must not depend on it. Called from two threads at
// once, the second one works alone. After fork() the child starts with no threads and makes its own.
void in_parallel(int64_t count, int threads, void (*part)(void* context, int64_t index), void* context);

template <class F>
void in_parallel(int64_t count, int threads, F&& part) {
    using Body = std::remove_reference_t<F>;
    in_parallel(count, threads, [](void* context, int64_t index) { (*static_cast<Body*>(context))(index); },
                const_cast<void*>(static_cast<const void*>(&part)));
}

}  // namespace awq
