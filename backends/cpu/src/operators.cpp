#include "operators.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "pool.h"

namespace awq {
namespace {

constexpr int64_t kPartBytes = 16 << 10;    // packed bytes worth a part of their own: about a microsecond
constexpr int64_t kPanelBytes = 4 << 20;    // of x in panels at a time
constexpr int64_t kTileWords = 64;          // 512 weights deep: 64 KB of float32, half of a small second-level cache
constexpr int64_t kPackedPart = 1 << 19;    // weights that are packed by one thread: half a millisecond
constexpr int64_t kSerialElements = 1 << 14;  // below this an elementwise operator is done before a second thread is

// Memory that one thread keeps between calls, for one purpose; it grows to the largest size asked for.
class Scratch {
public:
    ~Scratch() { release(); }
    template <class T>
    T* of(int64_t count) {
        const int64_t bytes = count * int64_t(sizeof(T)) + 64;
        if (bytes > bytes_) {
            release();
            start_ = ::operator new(size_t(bytes), std::align_val_t(64));
            bytes_ = bytes;
        }
        return static_cast<T*>(start_);
    }

private:
    void release() {
        if (start_) ::operator delete(start_, std::align_val_t(64));
        start_ = nullptr;
        bytes_ = 0;
    }
    void* start_ = nullptr;
    int64_t bytes_ = 0;
};

template <class T>
T* offset(T* p, int64_t bytes) {
    return reinterpret_cast<T*>(uintptr_t(p) + uintptr_t(bytes));
}

// f(first, last) over 0..count in parts of at least `least`, a few for each thread.
template <class F>
void in_ranges(int64_t count, int64_t least, int threads, F f) {
    const int64_t step = std::max({least, ceil_div(count, int64_t(threads) * 8), int64_t(1)});
    in_parallel(ceil_div(count, step), threads,
                [&](int64_t part) { f(part * step, std::min(count, (part + 1) * step)); });
}

int64_t strips_a_part(const Shape& shape, int rows) {
    return std::max<int64_t>(1, kPartBytes / (shape.strip_bytes() * rows));
}

// The index of the largest of `x`, the first of equal ones; of the first NaN where there is one.
int64_t largest(const float* x, int64_t count) {
    constexpr int kLanes = 16;  // as many maxima as the compiler keeps in vectors
    float peaks[kLanes];
    int32_t missing[kLanes] = {};
    for (float& peak : peaks) peak = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; lane++) {
            const float value = x[i + lane];
            peaks[lane] = value > peaks[lane] ? value : peaks[lane];
            missing[lane] |= value != value;
        }
    for (; i < count; i++) {
        peaks[0] = x[i] > peaks[0] ? x[i] : peaks[0];
        missing[0] |= x[i] != x[i];
    }
    const bool any_missing = std::any_of(missing, missing + kLanes, [](int32_t found) { return found; });
    const float peak = *std::max_element(peaks, peaks + kLanes);
    return std::find_if(x, x + count, [&](float value) { return any_missing ? value != value : value == peak; }) - x;
}

}  // namespace

void Runner::linear(const Shape& shape, const uint8_t* packed, const void* x, Dtype dtype, int64_t rows, Family family,
                    const Output& out) const {
    const int64_t width = shape.in_features, padded = shape.padded(), groups = shape.groups();
    if (rows == 0 || shape.out_features == 0) return;
    if (family == Family::kGemv || (family == Family::kAuto && rows <= kernels.few_rows)) {
        static thread_local Scratch scratch;
        const bool in_place = dtype == Dtype::f32 && padded == width;
        const int64_t most = std::min<int64_t>(rows, kernels.few_rows);
        float* sums = scratch.of<float>(most * (groups + (in_place ? 0 : padded)));
        float* floats = in_place ? nullptr : sums + most * groups;
        for (int64_t row = 0; row < rows; row += most) {
            const int count = int(std::min(most, rows - row));
            const void* from = offset(x, row * width * bytes_of(dtype));
            kernels.prepare(shape, from, dtype, count, floats, sums);
            const float* ready = in_place ? static_cast<const float*>(from) : floats;
            Output part = out;
            part.y = offset(out.y, row * shape.out_features * bytes_of(out.dtype));
            in_ranges(shape.strips(), strips_a_part(shape, count), threads, [&](int64_t first, int64_t last) {
                kernels.gemv(shape, packed, ready, sums, count, part, first, last);
            });
        }
        return;
    }

    static thread_local Scratch panel_scratch;
    const int64_t high = kernels.panel_rows, columns = kernels.tile_strips * kStrip;
    const int64_t fitting = std::max<int64_t>(1, kPanelBytes / (padded * high * 4)) * high;
    const int64_t chunk = ceil_div(ceil_div(rows, ceil_div(rows, fitting)), high) * high;
    float* panels = panel_scratch.of<float>(std::min(chunk, rows) * padded);
    const int64_t words = groups * shape.words();
    for (int64_t row = 0; row < rows; row += chunk) {
        const int64_t count = std::min(chunk, rows - row);
        in_ranges(ceil_div(count, high), 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t r = first * high; r < std::min(last * high, count); r += high)
                kernels.pack_panel(shape, offset(x, (row + r) * width * bytes_of(dtype)), dtype,
                                   int(std::min(high, count - r)), panels + r * padded);
        });
        in_parallel(ceil_div(shape.strips(), kernels.tile_strips), threads, [&](int64_t index) {
            static thread_local Scratch tile_scratch;
            float* tile = tile_scratch.of<float>(kTileWords * kWord * columns + count * columns);
            float* c = tile + kTileWords * kWord * columns;
            std::memset(c, 0, size_t(count * columns) * sizeof(float));
            const int64_t strip = index * kernels.tile_strips;
            const int strips = int(std::min<int64_t>(kernels.tile_strips, shape.strips() - strip));
            for (int64_t word = 0; word < words; word += kTileWords) {
                const int64_t last = std::min(words, word + kTileWords), depth = (last - word) * kWord;
                kernels.dequantize(shape, packed + strip * shape.strip_bytes(), strips, word, last, tile);
                for (int64_t r = 0; r < count; r += high) {
                    const int some = int(std::min(high, count - r));
                    kernels.multiply(panels + r * padded + word * kWord * some, tile, depth, some, c + r * columns);
                }
            }
            for (int64_t r = 0; r < count; r += high)
                kernels.store(shape, c + r * columns, int(std::min(high, count - r)), row + r, strip * kStrip, out);
        });
    }
}

void Runner::linear_int8(const Shape& shape, const uint8_t* packed, const void* x, Dtype dtype, int64_t rows,
                         const Output& out) const {
    static thread_local Scratch scratch;
    constexpr int64_t kRows = 64;
    const int64_t padded = shape.padded(), groups = shape.groups(), most = std::min(rows, kRows);
    if (rows == 0 || shape.out_features == 0) return;
    float* scales = scratch.of<float>(2 * most * groups + ceil_div(most * padded, 4));
    float* sums = scales + most * groups;
    int8_t* q = reinterpret_cast<int8_t*>(sums + most * groups);
    for (int64_t row = 0; row < rows; row += most) {
        const int count = int(std::min(most, rows - row));
        int8->quantize(shape, offset(x, row * shape.in_features * bytes_of(dtype)), dtype, count, q, scales, sums);
        Output part = out;
        part.y = offset(out.y, row * shape.out_features * bytes_of(out.dtype));
        in_ranges(shape.strips(), strips_a_part(shape, count), threads, [&](int64_t first, int64_t last) {
            int8->gemv(shape, packed, {q, scales, sums}, count, part, first, last);
        });
    }
}

void Runner::dense_linear(const void* weight, Dtype weight_dtype, int64_t in_features, int64_t out_features,
                          const void* x, Dtype dtype, int64_t rows, const Output& out) const {
    static thread_local Scratch scratch;
    const float* floats = static_cast<const float*>(x);
    if (dtype != Dtype::f32) {
        float* converted = scratch.of<float>(rows * in_features);
        kernels.to_float(x, dtype, rows * in_features, converted);
        floats = converted;
    }
    const int64_t row_bytes = std::max<int64_t>(1, in_features * bytes_of(weight_dtype));
    const int64_t least = ceil_div(std::max<int64_t>(1, kPartBytes / row_bytes), kStrip) * kStrip;
    const int64_t step = std::max(least, ceil_div(ceil_div(out_features, int64_t(threads) * 8), kStrip) * kStrip);
    in_parallel(ceil_div(out_features, step), threads, [&](int64_t part) {
        kernels.dense(weight, weight_dtype, in_features, floats, rows, out_features, out, part * step,
                      std::min(out_features, (part + 1) * step));
    });
}

void Runner::rms_norm(const void* x, Dtype dtype, const float* weight, float eps, int64_t rows, int64_t width,
                      void* y) const {
    in_ranges(rows, ceil_div(kSerialElements, std::max<int64_t>(width, 1)), threads, [&](int64_t first, int64_t last) {
        for (int64_t at = first * width * bytes_of(dtype); first < last; first++, at += width * bytes_of(dtype))
            kernels.rms_norm(offset(x, at), dtype, weight, eps, width, offset(y, at));
    });
}

void Runner::add_rms_norm(const void* x, void* residual, Dtype dtype, const float* weight, float eps, int64_t rows,
                          int64_t width, void* y) const {
    in_ranges(rows, ceil_div(kSerialElements, std::max<int64_t>(width, 1)), threads, [&](int64_t first, int64_t last) {
        for (int64_t at = first * width * bytes_of(dtype); first < last; first++, at += width * bytes_of(dtype)) {
            kernels.add(offset(residual, at), offset(x, at), dtype, width);
            kernels.rms_norm(offset(residual, at), dtype, weight, eps, width, offset(y, at));
        }
    });
}

void Runner::gated_activation(const void* gate_up, Dtype dtype, int activation, int64_t rows, int64_t width,
                              void* y) const {
    const int64_t bytes = width * bytes_of(dtype);
    in_ranges(rows, ceil_div(kSerialElements, std::max<int64_t>(width, 1)), threads, [&](int64_t first, int64_t last) {
        for (; first < last; first++) {
            const void* gate = offset(gate_up, 2 * first * bytes);
            kernels.gated(gate, offset(gate, bytes), dtype, activation, width, offset(y, first * bytes));
        }
    });
}

void Runner::argmax(const void* x, Dtype dtype, int64_t rows, int64_t width, int64_t* y) const {
    in_ranges(rows, ceil_div(kSerialElements, width), threads, [&](int64_t first, int64_t last) {
        thread_local Scratch wide;
        for (; first < last; first++) {
            const void* row = offset(x, first * width * bytes_of(dtype));
            if (dtype == Dtype::f32) {
                y[first] = largest(static_cast<const float*>(row), width);
            } else {
                float* copy = wide.of<float>(width);
                kernels.to_float(row, dtype, width, copy);
                y[first] = largest(copy, width);
            }
        }
    });
}

void Runner::rope_append(const Attention& a, const void* qkv, const int32_t* first, int64_t batch, int64_t count,
                         void* q) const {
    const int64_t heads = a.heads + 2 * a.kv_heads, head_bytes = a.head_dim * bytes_of(a.dtype);
    const int64_t least = ceil_div(kSerialElements, heads * a.head_dim);
    in_ranges(batch * count, least, threads, [&](int64_t token, int64_t last) {
        for (; token < last; token++) {
            const int64_t row = token / count, step = token % count, position = first[row] + step;
            const void* from = offset(qkv, token * heads * head_bytes);
            for (int64_t head = 0; head < a.heads; head++, from = offset(from, head_bytes))
                kernels.place_head(a, from, a.q_norm, position, true,
                                   offset(q, ((row * a.heads + head) * count + step) * head_bytes));
            for (int64_t head = 0; head < a.kv_heads; head++, from = offset(from, head_bytes)) {
                const int64_t at = row * a.k_batch_stride + head * a.k_head_stride + position * a.head_dim;
                kernels.place_head(a, from, a.k_norm, position, true, offset(a.k_cache, at * bytes_of(a.dtype)));
            }
            for (int64_t head = 0; head < a.kv_heads; head++, from = offset(from, head_bytes)) {
                const int64_t at = row * a.v_batch_stride + head * a.v_head_stride + position * a.head_dim;
                std::memcpy(offset(a.v_cache, at * bytes_of(a.dtype)), from, size_t(head_bytes));
            }
        }
    });
}

void Runner::decode_attention(const Attention& a, const void* qkv, const int32_t* positions, int64_t batch,
                              void* y) const {
    static thread_local Scratch q_scratch;
    const int64_t head_bytes = a.head_dim * bytes_of(a.dtype);
    uint8_t* q = q_scratch.of<uint8_t>(batch * a.heads * head_bytes);
    rope_append(a, qkv, positions, batch, 1, q);
    int64_t slots = 0;
    for (int64_t row = 0; row < batch; row++) slots += positions[row] + 1;
    const bool small = a.heads * slots * a.head_dim < kSerialElements;
    in_parallel(batch * a.heads, small ? 1 : threads, [&](int64_t index) {
        static thread_local Scratch scratch;
        const int64_t row = index / a.heads, head = index % a.heads;
        float* scores = scratch.of<float>(positions[row] + 1);
        kernels.attend(a, q + index * head_bytes, row, head, positions[row], scores, offset(y, index * head_bytes));
    });
}

void pack(const Shape& shape, const uint8_t* codes, const uint8_t* zeros, const void* scales, uint8_t* packed,
          int threads) {
    const int64_t n = shape.out_features, size = bytes_of(shape.scale_dtype);
    in_ranges(shape.strips(), kPackedPart / (shape.in_features * kStrip), threads, [&](int64_t strip, int64_t last) {
        std::memset(packed + strip * shape.strip_bytes(), 0, size_t((last - strip) * shape.strip_bytes()));
        for (; strip < last; strip++) {
            uint8_t* to = packed + strip * shape.strip_bytes();
            const int64_t column = strip * kStrip, count = std::min<int64_t>(kStrip, n - column);
            for (int64_t group = 0; group < shape.groups(); group++, to += shape.group_bytes()) {
                for (int64_t k = 0; k < shape.group_size; k++) {
                    const uint8_t* row = codes + (group * shape.group_size + k) * n + column;
                    uint8_t* bytes = to + k / kWord * kWordBytes + k % kWord / 2;
                    for (int64_t c = 0; c < count; c++) bytes[4 * c] |= uint8_t((row[c] & 0xf) << (k % 2 * 4));
                }
                const int64_t from = group * n + column;
                std::memcpy(to + shape.scales_at(), offset(scales, from * size), size_t(count * size));
                std::memcpy(to + shape.zeros_at(), zeros + from, size_t(count));
            }
        }
    });
}

void unpack(const Shape& shape, const uint8_t* packed, uint8_t* codes, uint8_t* zeros, void* scales, int threads) {
    const int64_t n = shape.out_features, size = bytes_of(shape.scale_dtype);
    in_ranges(shape.strips(), kPackedPart / (shape.in_features * kStrip), threads, [&](int64_t strip, int64_t last) {
        for (; strip < last; strip++) {
            const uint8_t* from = packed + strip * shape.strip_bytes();
            const int64_t column = strip * kStrip, count = std::min<int64_t>(kStrip, n - column);
            for (int64_t group = 0; group < shape.groups(); group++, from += shape.group_bytes()) {
                for (int64_t k = 0; k < shape.group_size; k++) {
                    uint8_t* row = codes + (group * shape.group_size + k) * n + column;
                    const uint8_t* bytes = from + k / kWord * kWordBytes + k % kWord / 2;
                    for (int64_t c = 0; c < count; c++) row[c] = uint8_t(bytes[4 * c] >> (k % 2 * 4) & 0xf);
                }
                const int64_t to = group * n + column;
                std::memcpy(offset(scales, to * size), from + shape.scales_at(), size_t(count * size));
                std::memcpy(zeros + to, from + shape.zeros_at(), size_t(count));
            }
        }
    });
}

}  // namespace awq
