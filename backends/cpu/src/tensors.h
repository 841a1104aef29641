// torch's tensors without torch's headers or ABI: read through the C table that DLPack 1.3 defines and torch offers
// (`Tensor.__dlpack_c_exchange_api__`, 60 ns a tensor), or by their Python attributes where a torch has none.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "kernels.h"

namespace awq {

// A tensor on the CPU of a dtype that kernels know; shape and strides are the tensor's own memory or `held`'s.
struct TensorView {
    static constexpr int kMostDims = 8;

    void* data;
    int dims;
    Dtype dtype;
    int integer;  // bits of an integer type, which then `dtype` says nothing of; else 0
    int64_t shape[kMostDims], strides[kMostDims];

    int64_t size() const;
    bool contiguous() const;
    bool floating() const { return !integer && dtype != Dtype::f64; }
    // Contiguous, of dtype `wanted` and shape `sizes`, -1 for any.
    bool is(Dtype wanted, std::initializer_list<int64_t> sizes) const;
};

// False for what is no such tensor. Throws what Python raises.
bool read(pybind11::handle tensor, TensorView& view);

// Reads by the exchange table in a capsule from now on, or by attributes for None. The default is what torch offers.
void set_exchange(pybind11::object capsule);

// Memory from torch, of `like`'s dtype and device.
pybind11::object new_empty(pybind11::handle like, const int64_t* shape, int dims);

}  // namespace awq
