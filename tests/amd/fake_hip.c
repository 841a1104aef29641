/* A HIP runtime that runs nothing itself: every call is handed to a hook, by name, with its arguments as 64-bit words. */
#include <stdint.h>

typedef int (*Hook)(const char* function, const uint64_t* arguments, int count);
static Hook hook;

void fake_hip_set_hook(Hook given) { hook = given; }

#define CALL(name, ...)                                                       \
    uint64_t arguments[] = {__VA_ARGS__};                                     \
    return hook ? hook(name, arguments, sizeof arguments / sizeof *arguments) : 3 /* hipErrorNotInitialized */
#define P(pointer) (uint64_t)(uintptr_t)(pointer)

int hipRuntimeGetVersion(int* version) { CALL("hipRuntimeGetVersion", P(version)); }
int hipModuleLoadData(void** module, const void* image) { CALL("hipModuleLoadData", P(module), P(image)); }
int hipModuleGetFunction(void** function, void* module, const char* name) {
    CALL("hipModuleGetFunction", P(function), P(module), P(name));
}
int hipModuleLaunchKernel(
    void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
    unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    CALL("hipModuleLaunchKernel", P(function), grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, P(stream),
         P(parameters), P(extra));
}
int hipStreamBeginCapture(void* stream, int mode) { CALL("hipStreamBeginCapture", P(stream), mode); }
int hipStreamEndCapture(void* stream, void** graph) { CALL("hipStreamEndCapture", P(stream), P(graph)); }
int hipGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    CALL("hipGraphInstantiateWithFlags", P(executable), P(graph), flags);
}
int hipGraphLaunch(void* executable, void* stream) { CALL("hipGraphLaunch", P(executable), P(stream)); }
const char* hipGetErrorString(int status) { return status ? "the fake was told to fail" : "no error"; }
const char* hipGetErrorName(int status) { return status ? "hipErrorFake" : "hipSuccess"; }
