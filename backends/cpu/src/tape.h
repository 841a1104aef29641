// Work that was done once, kept to be done again on the same memory with no Python in between.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <utility>
#include <vector>

namespace awq {

class Tape {
public:
    using Work = std::function<void(int threads)>;

    // Between the two, whatever this thread performs is kept.
    void start() {
        if (recording_) throw std::logic_error("this thread records on a tape already");
        recording_ = this;
    }
    void stop() { recording_ = nullptr; }
    static Tape* recording() { return recording_; }

    // `tensors` are those whose memory `work` reads and writes: it stays theirs as long as the tape does.
    void keep(Work work, std::initializer_list<pybind11::handle> tensors) {
        for (const pybind11::handle tensor : tensors)
            tensors_.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor));
        work_.push_back(std::move(work));
    }

    size_t size() const { return work_.size(); }

    // Does the work from `first` up to `last` again, in order.
    void run(size_t first, size_t last, int threads) const {
        if (last > work_.size()) throw std::out_of_range("the tape holds less work than that");
        const pybind11::gil_scoped_release released;
        for (size_t at = first; at < last; at++) work_[at](threads);
    }

private:
    static inline thread_local Tape* recording_ = nullptr;

    std::vector<Work> work_;
    std::vector<pybind11::object> tensors_;
};

}  // namespace awq
