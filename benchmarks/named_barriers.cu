// What compute-sanitizer's racecheck makes of named barriers; sanitizer.md says what came out.
//
//   nvcc -arch=sm_90 -DUNEVEN=1 named_barriers.cu && compute-sanitizer --tool racecheck ./a.out
//
// Two groups of 256 threads take turns of their own behind barriers of their own, as the depth groups of gemm.cuh do.
// Then all 512 meet at __syncthreads, write, meet again, and read. With UNEVEN one group takes a turn less.
constexpr int kGroup = 256;

__global__ void exchange(const int* in, int* out) {
    __shared__ int turns[2][4][kGroup], sums[2 * kGroup];
    const int thread = threadIdx.x, group = thread / kGroup, place = thread % kGroup;
    int sum = 0;
    for (int i = 0; i < 7 - UNEVEN * group; i++) {
        turns[group][i % 4][place] = in[thread];
        asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory");
        sum += turns[group][i % 4][kGroup - 1 - place];  // written again 4 turns, and as many barriers, later
    }
    __syncthreads();
    sums[thread] = sum;
    __syncthreads();
    out[thread] = sums[2 * kGroup - 1 - thread];
}

int main() {
    int *in, *out;
    cudaMalloc(&in, 2 * kGroup * sizeof(int));
    cudaMalloc(&out, 2 * kGroup * sizeof(int));
    cudaMemset(in, 1, 2 * kGroup * sizeof(int));
    exchange<<<2, 2 * kGroup>>>(in, out);
    return cudaDeviceSynchronize();
}
