// The Python module: tensors in, tensors out. What an operator does not serve it answers with NotImplemented.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "isa.h"
#include "operators.h"
#include "tape.h"
#include "tensors.h"

namespace py = pybind11;
using awq::Dtype;
using awq::TensorView;

namespace {

constexpr int64_t kLongElements = 1 << 15;  // work worth letting other Python threads run: above 5 us

// What AWQ_RT_CPU_ISA names or else the widest, until `choose` says otherwise.
std::optional<awq::Isa> choice;

const awq::Isa& isa() {
    if (!choice) {
        const char* wanted = std::getenv("AWQ_RT_CPU_ISA");
        choice = awq::chosen(wanted ? wanted : "");
    }
    return *choice;
}

awq::Runner runner(int threads) { return {*isa().kernels, isa().int8, threads}; }

// Does `work(runner)`, without the interpreter's lock where it takes long; a tape that records keeps it, with the
// `tensors` that it reads and writes.
template <class F>
void perform(int64_t elements, int threads, std::initializer_list<py::handle> tensors, F work) {
    {
        std::optional<py::gil_scoped_release> released;
        if (elements >= kLongElements) released.emplace();
        work(runner(threads));
    }
    if (awq::Tape* tape = awq::Tape::recording()) tape->keep([work](int now) { work(runner(now)); }, tensors);
}

py::object not_served() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

Dtype dtype_of(int code) {
    if (code < 0 || code > 3) throw std::invalid_argument("dtype " + std::to_string(code) + " is unknown");
    return Dtype(code);
}

class Linear {
public:
    Linear(int64_t in_features, int64_t out_features, int64_t group_size, int dtype, int scale_dtype,
           std::optional<int> bias_dtype, const std::string& mode)
        : shape_{in_features, out_features, group_size, dtype_of(scale_dtype)},
          dtype_(dtype_of(dtype)),
          bias_dtype_(dtype_of(bias_dtype.value_or(0))),
          int8_(mode == "int8"),
          family_(mode == "gemv"   ? awq::Family::kGemv
                  : mode == "gemm" ? awq::Family::kGemm
                                   : awq::Family::kAuto) {
        if (group_size <= 0 || in_features <= 0 || in_features % group_size)
            throw std::invalid_argument("group size " + std::to_string(group_size) + " does not divide in_features " +
                                        std::to_string(in_features));
        if (int8_ && !isa().int8) throw std::invalid_argument(isa().name + " has no kernels for 8-bit activations");
    }

    int64_t bytes() const { return shape_.strips() * shape_.strip_bytes(); }

    void pack(uintptr_t codes, uintptr_t zeros, uintptr_t scales, uintptr_t packed, int threads) const {
        py::gil_scoped_release released;
        awq::pack(shape_, reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const uint8_t*>(zeros),
                  reinterpret_cast<const void*>(scales), reinterpret_cast<uint8_t*>(packed), threads);
    }
    void unpack(uintptr_t packed, uintptr_t codes, uintptr_t zeros, uintptr_t scales, int threads) const {
        py::gil_scoped_release released;
        awq::unpack(shape_, reinterpret_cast<const uint8_t*>(packed), reinterpret_cast<uint8_t*>(codes),
                    reinterpret_cast<uint8_t*>(zeros), reinterpret_cast<void*>(scales), threads);
    }
    // `packed` and `bias` (0 for none) are addresses: torch.uint8 need not be read, and weights do not move.
    py::object run(py::object x, uintptr_t packed, uintptr_t bias, int threads) const {
        TensorView in;
        if (!awq::read(x, in) || in.integer || in.dtype != dtype_ || in.dims == 0 ||
            in.shape[in.dims - 1] != shape_.in_features)
            return not_served();
        if (!in.contiguous()) {
            x = x.attr("contiguous")();
            awq::read(x, in);
        }
        int64_t made[TensorView::kMostDims];
        for (int i = 0; i < in.dims; i++) made[i] = in.shape[i];
        made[in.dims - 1] = shape_.out_features;
        py::object y = awq::new_empty(x, made, in.dims);
        TensorView to;
        awq::read(y, to);
        const awq::Output out{to.data, dtype_, reinterpret_cast<const void*>(bias), bias_dtype_};
        const int64_t rows = in.size() / shape_.in_features;
        const auto* strips = reinterpret_cast<const uint8_t*>(packed);
        perform(rows * bytes(), threads, {x, y},
                [of = *this, strips, from = in.data, rows, out](const awq::Runner& runner) {
                    if (of.int8_) runner.linear_int8(of.shape_, strips, from, of.dtype_, rows, out);
                    else runner.linear(of.shape_, strips, from, of.dtype_, rows, of.family_, out);
                });
        return y;
    }

private:
    awq::Shape shape_;
    Dtype dtype_;
    Dtype bias_dtype_;
    bool int8_;
    awq::Family family_;
};

// What an attention layer fixes; the tensors of a layer and its caches come with each call.
class Attention {
public:
    Attention(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary_dim, bool interleaved, int64_t window,
              float scale, float softcap, float norm_eps)
        : fixed_{} {
        if (heads <= 0 || kv_heads <= 0 || heads % kv_heads || head_dim <= 0 || head_dim > awq::kLargestHead ||
            head_dim % awq::kStrip || rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2)
            throw std::invalid_argument("heads " + std::to_string(heads) + ", kv_heads " + std::to_string(kv_heads) +
                                        ", head_dim " + std::to_string(head_dim) + " and rotary_dim " +
                                        std::to_string(rotary_dim) + " are not served");
        fixed_.heads = heads, fixed_.kv_heads = kv_heads, fixed_.head_dim = head_dim;
        fixed_.rotary_dim = rotary_dim, fixed_.interleaved = interleaved, fixed_.window = window;
        fixed_.scale = scale, fixed_.softcap = softcap, fixed_.norm_eps = norm_eps;
    }

    py::object append(py::object qkv, py::object first, py::object k_cache, py::object v_cache, py::object cos,
                      py::object sin, py::object q_norm, py::object k_norm, int threads) const {
        awq::Attention a = fixed_;
        TensorView in, positions;
        int64_t end;
        if (!awq::read(qkv, in) || in.dims != 3 ||
            !served(in, first, positions, k_cache, v_cache, cos, sin, q_norm, k_norm, py::none(), a, end))
            return not_served();
        const int64_t batch = in.shape[0], count = in.shape[1];
        const int64_t made[] = {batch, a.heads, count, a.head_dim};
        py::object q = awq::new_empty(qkv, made, 4);
        TensorView to;
        awq::read(q, to);
        const auto* slots = static_cast<const int32_t*>(positions.data);
        perform(in.size(), threads, {qkv, q, first, k_cache, v_cache, cos, sin, q_norm, k_norm},
                [a, from = in.data, slots, batch, count, end, to = to.data](const awq::Runner& runner) {
                    check(slots, batch, count, end);
                    runner.rope_append(a, from, slots, batch, count, to);
                });
        return q;
    }

    py::object decode(py::object qkv, py::object first, py::object k_cache, py::object v_cache, py::object cos,
                      py::object sin, py::object q_norm, py::object k_norm, py::object slopes, int threads) const {
        awq::Attention a = fixed_;
        TensorView in, positions;
        int64_t end;
        if (!awq::read(qkv, in) || in.dims != 2 ||
            !served(in, first, positions, k_cache, v_cache, cos, sin, q_norm, k_norm, slopes, a, end))
            return not_served();
        const int64_t batch = in.shape[0], made[] = {batch, a.heads * a.head_dim};
        py::object y = awq::new_empty(qkv, made, 2);
        TensorView to;
        awq::read(y, to);
        const auto* slots = static_cast<const int32_t*>(positions.data);
        int64_t seen = 0;
        for (int64_t row = 0; row < batch; row++) seen += slots[row] + 1;
        perform(seen * a.heads * a.head_dim, threads,
                {qkv, y, first, k_cache, v_cache, cos, sin, q_norm, k_norm, slopes},
                [a, from = in.data, slots, batch, end, to = to.data](const awq::Runner& runner) {
                    check(slots, batch, 1, end);
                    runner.decode_attention(a, from, slots, batch, to);
                });
        return y;
    }

private:
    // Whether the tensors are what the kernels read; fills `a`, and `end`, the first position without room.
    static bool served(const TensorView& qkv, py::handle first, TensorView& positions, py::handle k_cache,
                       py::handle v_cache, py::handle cos, py::handle sin, py::handle q_norm, py::handle k_norm,
                       py::handle slopes, awq::Attention& a, int64_t& end) {
        const int64_t batch = qkv.shape[0], width = (a.heads + 2 * a.kv_heads) * a.head_dim;
        TensorView k, v, table;
        if (!qkv.floating() || !qkv.contiguous() || qkv.shape[qkv.dims - 1] != width) return false;
        if (!awq::read(first, positions) || positions.integer != 32 || positions.dims != 1 || positions.shape[0] != batch ||
            !positions.contiguous())
            return false;
        for (auto [object, view] : {std::pair{k_cache, &k}, std::pair{v_cache, &v}})
            if (!awq::read(object, *view) || view->integer || view->dtype != qkv.dtype || view->dims != 4 ||
                view->shape[0] != batch || view->shape[1] != a.kv_heads || view->shape[3] != a.head_dim ||
                view->strides[3] != 1 || (view->shape[2] > 1 && view->strides[2] != a.head_dim))
                return false;
        end = k.shape[2] < v.shape[2] ? k.shape[2] : v.shape[2];
        const int64_t pairs = a.rotary_dim / 2;
        for (auto [object, to] : {std::pair{cos, &a.cos}, std::pair{sin, &a.sin}}) {
            if (!pairs) break;
            if (!awq::read(object, table) || !table.is(Dtype::f32, {-1, pairs})) return false;
            *to = static_cast<const float*>(table.data);
            if (table.shape[0] < end) end = table.shape[0];
        }
        for (auto [object, to, size] :
             {std::tuple{q_norm, &a.q_norm, a.head_dim}, std::tuple{k_norm, &a.k_norm, a.head_dim},
              std::tuple{slopes, &a.slopes, a.heads}}) {
            if (object.is_none()) continue;
            if (!awq::read(object, table) || !table.is(Dtype::f32, {size})) return false;
            *to = static_cast<const float*>(table.data);
        }
        a.dtype = qkv.dtype;
        a.k_cache = k.data, a.k_batch_stride = k.strides[0], a.k_head_stride = k.strides[1];
        a.v_cache = v.data, a.v_batch_stride = v.strides[0], a.v_head_stride = v.strides[1];
        return true;
    }

    // A wrong position would write outside the cache.
    static void check(const int32_t* first, int64_t rows, int64_t count, int64_t end) {
        for (int64_t row = 0; row < rows; row++)
            if (first[row] < 0 || first[row] + count > end)
                throw std::out_of_range("positions " + std::to_string(first[row]) + " to " +
                                        std::to_string(first[row] + count - 1) + " of row " + std::to_string(row) +
                                        " do not lie in the " + std::to_string(end) + " that cache and tables hold");
    }

    awq::Attention fixed_;
};

py::object dense_linear(py::object x, py::object weight, py::object bias, int64_t most_rows, int threads) {
    TensorView in, w, b{};
    if (!awq::read(x, in) || !awq::read(weight, w) || !in.floating() || !w.floating() || in.dims != 2 || w.dims != 2 ||
        in.shape[0] > most_rows || in.shape[1] != w.shape[1] || !in.contiguous() || !w.contiguous())
        return not_served();
    if (!bias.is_none() && (!awq::read(bias, b) || b.integer || !b.is(b.dtype, {w.shape[0]}))) return not_served();
    const int64_t made[] = {in.shape[0], w.shape[0]};
    py::object y = awq::new_empty(x, made, 2);
    TensorView to;
    awq::read(y, to);
    perform(w.size() * in.shape[0], threads, {x, y, weight, bias},
            [w = w.data, dtype = w.dtype, k = w.shape[1], n = w.shape[0], from = in.data, from_dtype = in.dtype,
             rows = in.shape[0], out = awq::Output{to.data, in.dtype, b.data, b.dtype}](const awq::Runner& runner) {
                runner.dense_linear(w, dtype, k, n, from, from_dtype, rows, out);
            });
    return y;
}

py::object rms_norm(py::object x, py::object weight, float eps, int threads) {
    TensorView in, w, to;
    if (!awq::read(x, in) || !in.floating() || in.dims != 2 || !in.contiguous() || !awq::read(weight, w) ||
        !w.is(Dtype::f32, {in.shape[1]}))
        return not_served();
    py::object y = awq::new_empty(x, in.shape, 2);
    awq::read(y, to);
    perform(in.size(), threads, {x, y, weight},
            [from = in.data, dtype = in.dtype, w = static_cast<const float*>(w.data), eps, rows = in.shape[0],
             width = in.shape[1], to = to.data](const awq::Runner& runner) {
                runner.rms_norm(from, dtype, w, eps, rows, width, to);
            });
    return y;
}

py::object add_rms_norm(py::object x, py::object residual, py::object weight, float eps, int threads) {
    TensorView in, sum, w, to;
    if (!awq::read(x, in) || !in.floating() || in.dims != 2 || !in.contiguous() || !awq::read(residual, sum) ||
        !sum.is(in.dtype, {in.shape[0], in.shape[1]}) || !awq::read(weight, w) || !w.is(Dtype::f32, {in.shape[1]}))
        return not_served();
    py::object y = awq::new_empty(x, in.shape, 2);
    awq::read(y, to);
    perform(in.size(), threads, {x, y, residual, weight},
            [from = in.data, sum = sum.data, dtype = in.dtype, w = static_cast<const float*>(w.data), eps,
             rows = in.shape[0], width = in.shape[1], to = to.data](const awq::Runner& runner) {
                runner.add_rms_norm(from, sum, dtype, w, eps, rows, width, to);
            });
    return y;
}

py::object gated_activation(py::object gate_up, int activation, int threads) {
    TensorView in, to;
    if (!awq::read(gate_up, in) || !in.floating() || in.dims != 2 || in.shape[1] % 2 || !in.contiguous())
        return not_served();
    const int64_t made[] = {in.shape[0], in.shape[1] / 2};
    py::object y = awq::new_empty(gate_up, made, 2);
    awq::read(y, to);
    perform(in.size(), threads, {gate_up, y},
            [from = in.data, dtype = in.dtype, activation, rows = made[0], width = made[1],
             to = to.data](const awq::Runner& runner) {
                runner.gated_activation(from, dtype, activation, rows, width, to);
            });
    return y;
}

// Into `found`, int64 [rows].
py::object argmax(const py::object& logits, py::object found, int threads) {
    TensorView in, to;
    if (!awq::read(logits, in) || !in.floating() || in.dims != 2 || !in.contiguous() || !in.shape[1] ||
        !awq::read(found, to) || to.integer != 64 || to.dims != 1 || to.shape[0] != in.shape[0] || !to.contiguous())
        return not_served();
    perform(in.size(), threads, {logits, found},
            [from = in.data, dtype = in.dtype, rows = in.shape[0], width = in.shape[1],
             to = static_cast<int64_t*>(to.data)](const awq::Runner& runner) {
                runner.argmax(from, dtype, rows, width, to);
            });
    return found;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.def("offered", [] {
        std::vector<std::pair<std::string, std::string>> names;
        for (const awq::Isa& isa : awq::offered()) names.emplace_back(isa.name, isa.features);
        return names;
    });
    m.def("choose", [](const std::string& name) { choice = awq::chosen(name); });
    m.def("chosen", [] { return std::pair{isa().name, isa().features}; });
    m.def("has_int8", [] { return isa().int8 != nullptr; });
    m.def("set_exchange", &awq::set_exchange);

    py::class_<Linear>(m, "Linear")
        .def(py::init<int64_t, int64_t, int64_t, int, int, std::optional<int>, const std::string&>())
        .def_property_readonly("bytes", &Linear::bytes)
        .def("pack", &Linear::pack)
        .def("unpack", &Linear::unpack)
        .def("run", &Linear::run);

    py::class_<Attention>(m, "Attention")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, bool, int64_t, float, float, float>())
        .def("append", &Attention::append)
        .def("decode", &Attention::decode);

    py::class_<awq::Tape>(m, "Tape")
        .def(py::init<>())
        .def("start", &awq::Tape::start)
        .def("stop", &awq::Tape::stop)
        .def("__len__", &awq::Tape::size)
        .def("run", &awq::Tape::run);

    m.def("dense_linear", &dense_linear);
    m.def("rms_norm", &rms_norm);
    m.def("add_rms_norm", &add_rms_norm);
    m.def("gated_activation", &gated_activation);
    m.def("argmax", &argmax);
}
