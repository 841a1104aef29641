// What compute-sanitizer makes of copies that announce their own end; sanitizer.md says what came out.
//
//   nvcc -arch=sm_90 -DASYNC=1 -DENGINE=1 asynchronous_copies.cu && compute-sanitizer --tool racecheck ./a.out
//   nvcc -arch=sm_90 -DBULK=1 asynchronous_copies.cu && compute-sanitizer --tool initcheck ./a.out
//
// ring: a warp fills stages and another reads them, as gemm_ring.cu does: a barrier a stage says that it is full, another
// that it is empty again. ASYNC: the copies (cp.async) arrive at the barrier when they are done; else the warp waits for
// them and arrives itself. ENGINE: the copy engine brings as much again, whose bytes the same barrier counts.
// fill: 4 KB go from shared to device memory, with BULK by the copy engine, and are read there.
#ifndef ASYNC
#define ASYNC 0
#endif
#ifndef ENGINE
#define ENGINE 0
#endif
#ifndef BULK
#define BULK 0
#endif
typedef unsigned int u32;
constexpr int kStages = 4, kLanes = 32;

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ void arrive(u32 barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

__device__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;}"
        ::"r"(barrier), "r"(phase) : "memory");
}

__global__ void ring(const int4* in, int4* out, int turns) {
    __shared__ int4 stages[kStages][kLanes];
    __shared__ __align__(128) int4 brought[kStages][kLanes];
    __shared__ long long full[kStages], empty[kStages];
    const int lane = threadIdx.x % kLanes;
    if (threadIdx.x == 0)
        for (int s = 0; s < kStages; s++) {
            init(shared_address(full + s), kLanes + ENGINE);
            init(shared_address(empty + s), kLanes);
        }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < turns; i++) {
        const int stage = i % kStages, phase = i / kStages % 2;
        if (threadIdx.x < kLanes) {
            wait(shared_address(empty + stage), phase ^ 1);
#if ENGINE
            if (lane == 0)
                asm volatile(
                    "{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%2], 512;\n\t"
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];}"
                    ::"r"(shared_address(brought[stage])), "l"(in + i * kLanes), "r"(shared_address(full + stage))
                    : "memory");
#endif
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&stages[stage][lane])),
                         "l"(in + i * kLanes + lane) : "memory");
#if ASYNC
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(full + stage))
                         : "memory");
#else
            asm volatile("cp.async.commit_group;\n\tcp.async.wait_group 0;" ::: "memory");
            arrive(shared_address(full + stage));
#endif
        } else {
            wait(shared_address(full + stage), phase);
            sum += stages[stage][kLanes - 1 - lane].x + (ENGINE ? brought[stage][kLanes - 1 - lane].x : 0);
            arrive(shared_address(empty + stage));
        }
    }
    if (threadIdx.x >= kLanes) out[lane].x = sum;
}

__global__ void fill(int4* out) {
    __shared__ __align__(128) int4 values[256];
    values[threadIdx.x] = make_int4(threadIdx.x, 1, 2, 3);
#if BULK
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 4096;\n\tcp.async.bulk.commit_group;\n\t"
                     "cp.async.bulk.wait_group 0;" ::"l"(out), "r"(shared_address(values)) : "memory");
#else
    out[threadIdx.x] = values[threadIdx.x];
#endif
}

__global__ void add(const int4* in, int4* out) { out[threadIdx.x].x = in[threadIdx.x].x + 1; }

int main() {
    const int turns = 11;
    int4 *in, *out, *filled;
    cudaMalloc(&in, turns * kLanes * sizeof(int4));
    cudaMalloc(&out, 256 * sizeof(int4));
    cudaMalloc(&filled, 256 * sizeof(int4));
    cudaMemset(in, 1, turns * kLanes * sizeof(int4));
    cudaMemset(out, 0, 256 * sizeof(int4));
    ring<<<1, 2 * kLanes>>>(in, out, turns);
    fill<<<1, 256>>>(filled);
    add<<<1, 256>>>(filled, out);
    return cudaDeviceSynchronize();
}
