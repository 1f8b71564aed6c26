/* What the CUDA runtime and driver answer on a machine with one GPU, without one: torch asks these functions before any kernel runs.
   Memory is the host's, copies are memmove, streams and events are always ready, kernels do nothing. */
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALWAYS_FINE(name, ...) int name(__VA_ARGS__) { return 0; }
#define NOT_SUPPORTED(name) int name(void) { return 801; }
#define PINNED 65536
static char handle[64]; /* every stream, event and context */
static struct { char *start; size_t size; } pinned[PINNED];
static int pins;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Pretended GPU");
  p->major = 9; p->multiProcessorCount = 132; p->warpSize = 32; p->totalGlobalMem = 80ull << 30;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448; p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { case 75: *value = 9; break; case 76: *value = 0; break; case 16: *value = 132; break; case 10: *value = 32; break; default: *value = 1; }
  return 0; /* 75, 76: compute capability 9.0 */
}
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(size_t *unused, size_t *all) { *unused = 79ull << 30; *all = 80ull << 30; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 0; return 0; }
int cudaDeviceGetPCIBusId(char *id, int length, int device) { snprintf(id, length, "0000:00:00.0"); return 0; }
const char *cudaGetErrorString(int error) { return error ? "pretended error" : "no error"; }
const char *cudaGetErrorName(int error) { return error ? "pretended error" : "cudaSuccess"; }
ALWAYS_FINE(cudaSetDevice, int device)
ALWAYS_FINE(cudaInitDevice, int device, unsigned a, unsigned b)
ALWAYS_FINE(cudaDeviceSynchronize, void)
ALWAYS_FINE(cudaGetLastError, void)
ALWAYS_FINE(cudaPeekAtLastError, void)

int cudaStreamCreate(void **stream) { *stream = handle; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = handle; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = handle; return 0; }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void *a, void *b, void *c, size_t *n) {
  *status = 0;
  if (id) *id = 0;
  if (n) *n = 0;
  return 0;
}
ALWAYS_FINE(cudaStreamDestroy, void *stream)
ALWAYS_FINE(cudaStreamQuery, void *stream)
ALWAYS_FINE(cudaStreamSynchronize, void *stream)
ALWAYS_FINE(cudaStreamWaitEvent, void *stream, void *event, unsigned flags)
ALWAYS_FINE(cudaThreadExchangeStreamCaptureMode, int *mode)
int cudaEventCreate(void **event) { *event = handle; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = handle; return 0; }
int cudaEventElapsedTime(float *milliseconds, void *a, void *b) { *milliseconds = 1; return 0; }
ALWAYS_FINE(cudaEventDestroy, void *event)
ALWAYS_FINE(cudaEventRecord, void *event, void *stream)
ALWAYS_FINE(cudaEventRecordWithFlags, void *event, void *stream, unsigned flags)
ALWAYS_FINE(cudaEventQuery, void *event)
ALWAYS_FINE(cudaEventSynchronize, void *event)

int cudaMalloc(void **p, size_t n) { return posix_memalign(p, 512, n ? n : 512) ? 2 : 0; }
int cudaFree(void *p) { free(p); return 0; }
int cudaHostAlloc(void **p, size_t n, unsigned flags) {
  if (posix_memalign(p, 512, n ? n : 512)) return 2;
  int i = __sync_fetch_and_add(&pins, 1) % PINNED;
  pinned[i].start = *p;
  pinned[i].size = n;
  return 0;
}
int cudaFreeHost(void *p) {
  for (int i = 0; i < PINNED; i++) if (pinned[i].start == p) pinned[i].start = 0;
  free(p);
  return 0;
}
ALWAYS_FINE(cudaHostRegister, void *p, size_t n, unsigned flags)
ALWAYS_FINE(cudaHostUnregister, void *p)
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  char *c = (char *)p;
  for (int i = 0; i < (pins < PINNED ? pins : PINNED); i++)
    if (pinned[i].start && c >= pinned[i].start && c < pinned[i].start + pinned[i].size) { a->type = 1; a->hostPointer = c; }
  return 0;
}
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { memmove(to, from, n); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { memmove(to, from, n); return 0; }
int cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return 0; }
int cudaMemsetAsync(void *p, int value, size_t n, void *stream) { memset(p, value, n); return 0; }
ALWAYS_FINE(cudaLaunchKernel, const void *f)
ALWAYS_FINE(cudaLaunchKernelExC, const void *config, const void *f, void **arguments)
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags, int *result) {
  *f = 0;
  if (result) *result = 1;
  return 0;
}

/* the driver, libcuda.so.1, as whose name this library goes */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = handle; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = handle; return 0; }
int cuDeviceGet(int *device, int n) { *device = n; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
int cuGetErrorString(int error, const char **text) { *text = "pretended"; return 0; }
ALWAYS_FINE(cuCtxSetCurrent, void *context)
NOT_SUPPORTED(cuFuncGetAttribute) NOT_SUPPORTED(cuFuncSetAttribute) NOT_SUPPORTED(cuFuncSetCacheConfig)
NOT_SUPPORTED(cuLaunchCooperativeKernel) NOT_SUPPORTED(cuLaunchKernel) NOT_SUPPORTED(cuLinkAddData_v2) NOT_SUPPORTED(cuLinkComplete)
NOT_SUPPORTED(cuLinkCreate_v2) NOT_SUPPORTED(cuModuleGetFunction) NOT_SUPPORTED(cuModuleLoad) NOT_SUPPORTED(cuModuleLoadData)
NOT_SUPPORTED(cuModuleLoadDataEx) NOT_SUPPORTED(cuModuleUnload) NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_SUPPORTED(cuPointerGetAttribute) NOT_SUPPORTED(cuTensorMapEncodeTiled)
