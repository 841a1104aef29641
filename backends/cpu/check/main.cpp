// Every kernel of every instruction set offered here against float64, without Python: for emulators of other processors
// and for sanitizers. `tools/cpu_sanitize.sh` builds and runs it. Exit status 1 and a line for each failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../src/isa.h"
#include "../src/operators.h"

using namespace awq;

namespace {

constexpr double kFloat = 0x1p-24, kDeviations = 6.0;
int failures = 0;
std::mt19937 chance(0);

std::vector<float> normal(int64_t count, float mean = 0.0f) {
    std::normal_distribution<float> draw(mean);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = draw(chance);
    return values;
}

// The largest of |found - exact| / limit.
struct Worst {
    double excess = 0.0;
    void see(double found, double exact, double limit) {
        const double error = std::abs(found - exact);
        if (!(error <= limit)) excess = std::isfinite(error) ? std::max(excess, error / limit) : INFINITY;
        else excess = std::max(excess, limit > 0.0 ? error / limit : 0.0);
    }
    void report(const std::string& what) const {
        std::printf("%s %s: %.3f of the bound\n", excess <= 1.0 ? "ok    " : "FAILED", what.c_str(), excess);
        failures += !(excess <= 1.0);
    }
};

// Codes, zeros, float32 scales; and the packed weight in memory of exactly its size, where a sanitizer sees overruns.
struct Weight {
    Shape shape;
    std::vector<uint8_t> codes, zeros, packed;
    std::vector<float> scales;

    Weight(int64_t k, int64_t n, int64_t group) : shape{k, n, group, Dtype::f32} {
        codes.resize(size_t(k * n)), zeros.resize(size_t(k / group * n)), scales.resize(zeros.size());
        for (uint8_t& code : codes) code = uint8_t(chance() % 16);
        for (uint8_t& zero : zeros) zero = uint8_t(chance() % 16);
        for (float& scale : scales) scale = 0.001f + float(chance() % 1000) * 2e-5f;
        packed.resize(size_t(shape.strips() * shape.strip_bytes()));
        pack(shape, codes.data(), zeros.data(), scales.data(), packed.data(), 2);
        std::vector<uint8_t> back_codes(codes.size()), back_zeros(zeros.size());
        std::vector<float> back_scales(scales.size());
        unpack(shape, packed.data(), back_codes.data(), back_zeros.data(), back_scales.data(), 2);
        if (back_codes != codes || back_zeros != zeros || back_scales != scales) {
            std::printf("FAILED unpack(pack(w)) K %ld N %ld G %ld\n", long(k), long(n), long(group));
            failures++;
        }
    }
};

enum class Mode { kGemv, kGemm, kInt8 };

void check_linear(const Runner& runner, const std::string& isa, const Weight& weight, int64_t rows, Mode mode) {
    const auto [k, n, group, scale_dtype] = weight.shape;
    const std::vector<float> x = normal(rows * k, 0.3f), bias = normal(n);
    std::vector<float> y(size_t(rows * n), NAN);
    const Output out{y.data(), Dtype::f32, bias.data(), Dtype::f32};
    if (mode == Mode::kInt8) runner.linear_int8(weight.shape, weight.packed.data(), x.data(), Dtype::f32, rows, out);
    else runner.linear(weight.shape, weight.packed.data(), x.data(), Dtype::f32, rows,
                       mode == Mode::kGemv ? Family::kGemv : Family::kGemm, out);
    Worst worst;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < n; column++) {
            double exact = bias[size_t(column)], size = std::abs(exact), apart = 0.0, rounding = 0.0;
            for (int64_t g = 0; g < k / group; g++) {
                const double scale = weight.scales[size_t(g * n + column)], zero = weight.zeros[size_t(g * n + column)];
                double peak = 0.0, weights = 0.0;
                for (int64_t i = g * group; i < (g + 1) * group; i++) {
                    const double value = x[size_t(row * k + i)];
                    const double w = (weight.codes[size_t(i * n + column)] - zero) * scale;
                    exact += value * w, size += std::abs(value * w), apart += 15 * scale * std::abs(value);
                    peak = std::max(peak, std::abs(value)), weights += std::abs(w);
                }
                if (mode == Mode::kInt8) rounding += 0.501 * peak / 127 * weights;
            }
            // As awq_rt/testing/tolerance.py, a little wider: sums of |.| instead of roots of sums of squares.
            const double limit = kFloat * (std::abs(exact) + kDeviations * (std::sqrt(double(k)) * size + 2 * apart));
            worst.see(y[size_t(row * n + column)], exact, limit + rounding);
        }
    const char* names[] = {"gemv", "gemm", "8-bit"};
    worst.report(isa + " " + names[int(mode)] + " K " + std::to_string(k) + " N " + std::to_string(n) + " G " +
                 std::to_string(group) + " M " + std::to_string(rows));
}

void check_dense(const Runner& runner, const std::string& isa, int64_t k, int64_t n) {
    const std::vector<float> x = normal(2 * k), weight = normal(n * k);
    std::vector<float> y(size_t(2 * n), NAN);
    const Output out{y.data(), Dtype::f32, nullptr, Dtype::f32};
    runner.dense_linear(weight.data(), Dtype::f32, k, n, x.data(), Dtype::f32, 2, out);
    Worst worst;
    for (int64_t row = 0; row < 2; row++)
        for (int64_t column = 0; column < n; column++) {
            double exact = 0.0, size = 0.0;
            for (int64_t i = 0; i < k; i++) {
                const double product = double(x[size_t(row * k + i)]) * weight[size_t(column * k + i)];
                exact += product, size += std::abs(product);
            }
            worst.see(y[size_t(row * n + column)], exact, kFloat * kDeviations * (std::sqrt(double(k)) + 1) * size);
        }
    worst.report(isa + " dense K " + std::to_string(k) + " N " + std::to_string(n));
}

// Through every conversion of a dtype: x is exact in it, and so is the result up to its own rounding.
void check_norm(const Runner& runner, const std::string& isa, Dtype dtype, double unit, int64_t width) {
    std::vector<uint16_t> x(static_cast<size_t>(3 * width)), y(x.size());
    std::vector<float> wide(x.size()), weight = normal(width), found(x.size());
    const unsigned smallest = dtype == Dtype::f16 ? 0x3000 : 0x3e00;
    for (size_t i = 0; i < x.size(); i++) x[i] = uint16_t(smallest + chance() % 0x800 + (i % 2 << 15));
    runner.kernels.to_float(x.data(), dtype, int64_t(x.size()), wide.data());
    runner.rms_norm(x.data(), dtype, weight.data(), 1e-5f, 3, width, y.data());
    runner.kernels.to_float(y.data(), dtype, int64_t(y.size()), found.data());
    Worst worst;
    for (int64_t row = 0; row < 3; row++) {
        const float* from = wide.data() + row * width;
        double squares = 0.0;
        for (int64_t i = 0; i < width; i++) squares += double(from[i]) * from[i];
        for (int64_t i = 0; i < width; i++) {
            const double exact = from[i] / std::sqrt(squares / double(width) + 1e-5f) * weight[size_t(i)];
            worst.see(found[size_t(row * width + i)], exact, (unit + 48 * kFloat) * std::abs(exact) + 0x1p-25);
        }
    }
    worst.report(isa + " norm in " + (dtype == Dtype::f16 ? "float16" : "bfloat16") + " of " + std::to_string(width));
}

void check_activation(const Runner& runner, const std::string& isa, int64_t width) {
    const std::vector<float> x = normal(2 * 2 * width);
    std::vector<float> y(size_t(2 * width), NAN);
    for (int activation : {kSilu, kGelu, kGeluTanh, kRelu}) {
        runner.gated_activation(x.data(), Dtype::f32, activation, 2, width, y.data());
        Worst worst;
        for (int64_t row = 0; row < 2; row++)
            for (int64_t i = 0; i < width; i++) {
                const double gate = x[size_t(2 * row * width + i)], up = x[size_t((2 * row + 1) * width + i)];
                const double u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate);
                const double act = activation == kSilu   ? gate / (1 + std::exp(-gate))
                                   : activation == kGelu ? gate / 2 * std::erfc(-gate / std::sqrt(2.0))
                                   : activation == kRelu ? std::max(gate, 0.0)
                                                         : gate / 2 * (1 + std::tanh(u));
                const double limit = kFloat * 64 * (1 + gate * gate) * std::abs(act * up) + 1e-30;
                worst.see(y[size_t(row * width + i)], act * up, limit);
            }
        worst.report(isa + " activation " + std::to_string(activation) + " of " + std::to_string(width));
    }
}

void check_attention(const Runner& runner, const std::string& isa, int64_t position) {
    constexpr int64_t kHeads = 4, kGroups = 2, kDim = 64, kSlots = 70;
    Attention a{};
    a.heads = kHeads, a.kv_heads = kGroups, a.head_dim = kDim, a.scale = 0.125f, a.dtype = Dtype::f32;
    std::vector<float> keys = normal(kGroups * kSlots * kDim), values = normal(kGroups * kSlots * kDim);
    const std::vector<float> qkv = normal((kHeads + 2 * kGroups) * kDim);
    std::vector<float> y(size_t(kHeads * kDim), NAN);
    a.k_cache = keys.data(), a.v_cache = values.data();
    a.k_batch_stride = a.v_batch_stride = kGroups * kSlots * kDim, a.k_head_stride = a.v_head_stride = kSlots * kDim;
    const int32_t at = int32_t(position);
    runner.decode_attention(a, qkv.data(), &at, 1, y.data());
    Worst worst;
    for (int64_t head = 0; head < kHeads; head++) {
        const float* k = keys.data() + head / 2 * kSlots * kDim;
        const float* v = values.data() + head / 2 * kSlots * kDim;
        std::vector<double> shares(static_cast<size_t>(position + 1));
        double peak = -INFINITY, total = 0.0, error = 0.0;
        for (int64_t slot = 0; slot <= position; slot++) {
            double score = 0.0, size = 0.0;
            for (int64_t i = 0; i < kDim; i++) {
                const double product = double(qkv[size_t(head * kDim + i)]) * k[slot * kDim + i];
                score += product, size += std::abs(product);
            }
            shares[size_t(slot)] = score * a.scale;
            peak = std::max(peak, score * a.scale), error = std::max(error, 40 * kFloat * size * a.scale);
        }
        for (double& share : shares) total += share = std::exp(share - peak);
        for (int64_t i = 0; i < kDim; i++) {
            double exact = 0.0, size = 0.0;
            for (int64_t slot = 0; slot <= position; slot++) {
                const double part = shares[size_t(slot)] / total * v[slot * kDim + i];
                exact += part, size += std::abs(part);
            }
            worst.see(y[size_t(head * kDim + i)], exact, (2 * error + 80 * kFloat) * size);
        }
    }
    worst.report(isa + " attention over " + std::to_string(position + 1));
}

}  // namespace

int main() {
    struct { int64_t k, n, group; } shapes[] = {{64, 8, 64}, {128, 65, 64}, {192, 40, 192}, {20, 33, 5}, {30, 17, 1},
                                                {576, 192, 64}, {1100, 50, 550}};
    for (const Isa& isa : offered()) {
        const Runner runner{*isa.kernels, isa.int8, 3};
        for (const auto& shape : shapes) {
            const Weight weight(shape.k, shape.n, shape.group);
            for (int64_t rows : {1, 2, 5, 8, 33}) {
                check_linear(runner, isa.name, weight, rows, Mode::kGemv);
                check_linear(runner, isa.name, weight, rows, Mode::kGemm);
                if (isa.int8) check_linear(runner, isa.name, weight, rows, Mode::kInt8);
            }
        }
        for (const auto [k, n] : {std::pair<int64_t, int64_t>{576, 100}, {7, 3}, {33, 65}})
            check_dense(runner, isa.name, k, n);
        for (const int64_t width : {576, 7, 33}) {
            check_norm(runner, isa.name, Dtype::f16, 0x1p-11, width);
            check_norm(runner, isa.name, Dtype::bf16, 0x1p-8, width);
            check_activation(runner, isa.name, width);
        }
        for (const int64_t position : {0, 3, 66}) check_attention(runner, isa.name, position);
    }
    std::printf(failures ? "%d failed\n" : "all kernels are within their bounds\n", failures);
    return failures != 0;
}
