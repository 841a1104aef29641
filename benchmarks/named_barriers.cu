// What compute-sanitizer's racecheck makes of named barriers; sanitizer.md says what came out.
//
//   nvcc -arch=sm_90 -DUNEVEN=1 named_barriers.cu && compute-sanitizer --tool racecheck ./a.out
//
// Four groups of four warps take turns behind a barrier of their own, as the depth groups of gemm.cuh do: copy, meet,
// read what another warp copied. Then all meet at __syncthreads, write sums over the copies, meet again, and read.
// With UNEVEN every second group takes a turn less.
constexpr int kGroups = 4, kGroupThreads = 4 * 32, kThreads = kGroups * kGroupThreads;

__global__ void exchange(const int4* in, int4* out, int most_turns) {
    extern __shared__ __align__(16) char memory[];
    int4* shared = reinterpret_cast<int4*>(memory);  // [kGroups][4 slots][kGroupThreads]
    const int thread = threadIdx.x, group = thread / kGroupThreads, place = thread % kGroupThreads;
    const int turns = most_turns - (UNEVEN ? group % 2 : 0);
    int sum = 0;
    for (int i = 0; i < turns; i++) {
        int4* slot = shared + (group * 4 + i % 4) * kGroupThreads;  // written again 4 turns, and as many barriers, later
        unsigned to = (unsigned)__cvta_generic_to_shared(slot + place);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(in + i * kThreads + thread), "r"(16)
                     : "memory");
        asm volatile("cp.async.commit_group;\n\tcp.async.wait_group 0;" ::: "memory");
        asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroupThreads) : "memory");
        sum += slot[kGroupThreads - 1 - place].x;
    }
    __syncthreads();
    int* sums = reinterpret_cast<int*>(memory);
    for (int i = 0; i < 4; i++) sums[thread * 4 + i] = sum + i;
    __syncthreads();
    out[thread] = reinterpret_cast<int4*>(memory)[kThreads - 1 - thread];
}

int main() {
    const int turns = 7;
    int4 *in, *out;
    cudaMalloc(&in, turns * kThreads * sizeof(int4));
    cudaMalloc(&out, kThreads * sizeof(int4));
    cudaMemset(in, 1, turns * kThreads * sizeof(int4));
    exchange<<<2, kThreads, kGroups * 4 * kGroupThreads * sizeof(int4)>>>(in, out, turns);
    return cudaDeviceSynchronize();
}
