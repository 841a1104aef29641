#include "tensors.h"

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace awq {
namespace {

// The part of DLPack's C interface that is used here, member for member as the standard lays it out.
namespace dlpack {

constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Tensor {
    void* data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct { uint32_t major, minor; } version;
    ExchangeApi* previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* tensor);  // borrows; 0, or -1 with a Python error set
    void* current_stream;
};

}  // namespace dlpack

const dlpack::ExchangeApi* exchange = nullptr;
bool looked_for = false;

bool read_by_exchange(py::handle tensor, TensorView& view) {
    dlpack::Tensor found;
    if (exchange->tensor_from_object(tensor.ptr(), &found)) throw py::error_already_set();
    const auto [code, bits, lanes] = found.dtype;
    if (found.device.type != dlpack::kCpu || lanes != 1 || found.ndim > TensorView::kMostDims) return false;
    view.integer = code == dlpack::kInt && (bits == 32 || bits == 64) ? bits : 0;
    if (code == dlpack::kFloat && bits == 32) view.dtype = Dtype::f32;
    else if (code == dlpack::kFloat && bits == 16) view.dtype = Dtype::f16;
    else if (code == dlpack::kBfloat && bits == 16) view.dtype = Dtype::bf16;
    else if (code == dlpack::kFloat && bits == 64) view.dtype = Dtype::f64;
    else if (!view.integer) return false;
    view.data = static_cast<char*>(found.data) + found.byte_offset;
    view.dims = found.ndim;
    for (int i = 0; i < found.ndim; i++) view.shape[i] = found.shape[i], view.strides[i] = found.strides[i];
    return true;
}

bool read_by_attributes(py::handle tensor, TensorView& view) {
    if (!tensor.attr("is_cpu").cast<bool>()) return false;
    const auto shape = tensor.attr("shape").cast<py::tuple>(), strides = tensor.attr("stride")().cast<py::tuple>();
    if (shape.size() > size_t(TensorView::kMostDims)) return false;
    const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
    view.integer = dtype == "torch.int32" ? 32 : dtype == "torch.int64" ? 64 : 0;
    if (dtype == "torch.float32") view.dtype = Dtype::f32;
    else if (dtype == "torch.float16") view.dtype = Dtype::f16;
    else if (dtype == "torch.bfloat16") view.dtype = Dtype::bf16;
    else if (dtype == "torch.float64") view.dtype = Dtype::f64;
    else if (!view.integer) return false;
    view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    view.dims = int(shape.size());
    for (int i = 0; i < view.dims; i++)
        view.shape[i] = shape[size_t(i)].cast<int64_t>(), view.strides[i] = strides[size_t(i)].cast<int64_t>();
    return true;
}

}  // namespace

int64_t TensorView::size() const {
    int64_t count = 1;
    for (int i = 0; i < dims; i++) count *= shape[i];
    return count;
}

bool TensorView::contiguous() const {
    int64_t step = 1;
    for (int i = dims - 1; i >= 0; step *= shape[i], i--)
        if (shape[i] != 1 && strides[i] != step) return size() == 0;
    return true;
}

bool TensorView::is(Dtype wanted, std::initializer_list<int64_t> sizes) const {
    if (integer || dtype != wanted || dims != int(sizes.size())) return false;
    const int64_t* own = shape;
    for (const int64_t wanted_size : sizes)
        if (const int64_t found = *own++; wanted_size >= 0 && found != wanted_size) return false;
    return contiguous();
}

bool read(py::handle tensor, TensorView& view) {
    if (!looked_for)  // torch 2.10 has another name for it
        set_exchange(py::getattr(py::module_::import("torch").attr("Tensor"), "__dlpack_c_exchange_api__", py::none()));
    return exchange ? read_by_exchange(tensor, view) : read_by_attributes(tensor, view);
}

void set_exchange(py::object capsule) {
    exchange = nullptr;
    looked_for = true;
    if (capsule.is_none()) return;
    const auto* found = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    if (found->version.major == 1 && found->tensor_from_object) exchange = found;
}

py::object new_empty(py::handle like, const int64_t* shape, int dims) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    PyObject* arguments[1 + TensorView::kMostDims] = {like.ptr()};
    for (int i = 0; i < dims; i++) arguments[1 + i] = PyLong_FromLongLong(shape[i]);
    PyObject* made = PyObject_VectorcallMethod(name, arguments, size_t(1 + dims), nullptr);
    for (int i = 0; i < dims; i++) Py_DECREF(arguments[1 + i]);
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

}  // namespace awq
